// Memory behind simt.h: guard pages, poison, cp.async, and the checks of the checked build.  Compile without -fsanitize.
#undef _FORTIFY_SOURCE
#include "engine.h"

#include <link.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>

namespace simt {
namespace {

// Who touched a shared byte last, and whether several threads, or threads of several warps, did so since the barrier.
struct Mark {
    unsigned epoch = 0, warp_epoch = 0;
    short thread = -1;
    bool several = false, several_warps = false;
};
struct Shadow {
    Mark written, read;
};

std::vector<Region*> regions;
Region* dynamic = nullptr;
char *static_shared, *static_shared_end;
std::vector<Shadow> static_shadow, dynamic_shadow;
bool tracking = false;  // true once a hook of the checked build has been called

std::string source_line(void* code) {  // best effort, only for messages
    Dl_info info;
    if (!code || !dladdr(code, &info)) return "";
    char command[600], line[300] = "";
    snprintf(command, sizeof command, "addr2line -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
             size_t(code) - size_t(info.dli_fbase) - 1);
    if (FILE* pipe = popen(command, "r")) {
        if (!fgets(line, sizeof line, pipe)) line[0] = 0;
        pclose(pipe);
    }
    const std::string text = line;
    return " at " + text.substr(0, text.find_first_of(" \n"));
}

void on_signal(int number, siginfo_t* info, void* raw) {
    char* address = static_cast<char*>(info->si_addr);
    auto* machine = &static_cast<ucontext_t*>(raw)->uc_mcontext;
#if defined(__x86_64__)
    void* code = reinterpret_cast<char*>(machine->gregs[REG_RIP]) + 1;
    const char* what = machine->gregs[REG_ERR] & 2 ? "writes" : "reads";
#else
    void* code = reinterpret_cast<char*>(machine->pc) + 4;
    const char* what = "touches";
#endif
    if (!current) {
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    const std::string line = source_line(code);
    if (number == SIGILL || number == SIGFPE)
        fail("undefined behaviour: index, shift, alignment or division%s", line.c_str());
    for (Region* r : regions)
        if (address >= r->map && address < r->map + r->map_bytes)
            fail("%s '%s' at byte %td of %zu%s", what, r->name, address - r->data, r->bytes, line.c_str());
    fail("%s unknown address %p%s (wild pointer or misaligned vector)", what, static_cast<void*>(address), line.c_str());
}

thread_local char tls_marker;
int find_tls(dl_phdr_info* info, size_t, void*) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        auto* start = static_cast<char*>(info->dlpi_tls_data);
        auto* end = start + info->dlpi_phdr[i].p_memsz;
        if (info->dlpi_phdr[i].p_type == PT_TLS && start <= &tls_marker && &tls_marker < end) {
            static_shared = start;
            static_shared_end = end;
        }
    }
    return 0;
}

// Does a barrier lie between that access and the running thread's?
bool ordered(const Mark& earlier) {
    if (earlier.thread == current->id || earlier.epoch < epoch) return true;
    return earlier.thread / 32 == current->id / 32 && earlier.warp_epoch < current->warp_epoch && !earlier.several_warps;
}

// May somebody still read what the running thread is about to write?
bool still_read(const Mark& r) {
    if (r.epoch < block_epoch) return false;
    return !ordered(r) || (r.several && r.epoch == epoch && r.warp_epoch >= current->warp_epoch);
}

Mark mark_read(const Mark& earlier) {
    Mark now{epoch, current->warp_epoch, short(current->id)};
    if (earlier.epoch != epoch) return now;
    const bool same_thread = earlier.thread == current->id;
    now.several_warps = earlier.several_warps || (!same_thread && earlier.thread / 32 != current->id / 32);
    now.several = now.several_warps || ((earlier.several || !same_thread) && earlier.warp_epoch == now.warp_epoch);
    return now;
}

void check_shared(Shadow* bytes, size_t count, Access kind, size_t offset, void* code) {
    for (size_t i = 0; i < count; ++i) {
        Mark &w = bytes[i].written, &r = bytes[i].read;
        const bool live = w.epoch >= block_epoch;
        if (kind == read && !live)
            fail("reads shared byte %zu, which nobody has written%s", offset + i, source_line(code).c_str());
        if (live && !ordered(w))
            fail("race: %s shared byte %zu that %s wrote, no barrier between%s", kind == read ? "reads" : "writes",
                 offset + i, name_of(w.thread).c_str(), source_line(code).c_str());
        if (kind == write && still_read(r))
            fail("race: writes shared byte %zu that %s may still read, no barrier between%s", offset + i,
                 name_of(r.thread).c_str(), source_line(code).c_str());
        if (kind == read) r = mark_read(r);
        else w = {epoch, current->warp_epoch, short(current->id)};
    }
}

Shadow& shadow_of(const char* p) {
    return p >= static_shared && p < static_shared_end ? static_shadow[p - static_shared]
                                                       : dynamic_shadow[p - dynamic->data];
}

}  // namespace

void set_up_memory() {
    dl_iterate_phdr(find_tls, nullptr);
    static_shadow.resize(static_shared_end - static_shared);
    static char signal_stack[64 << 10];
    stack_t alternative{signal_stack, 0, sizeof signal_stack};
    sigaltstack(&alternative, nullptr);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(number, &action, nullptr);
}

void begin_kernel(size_t dynamic_bytes) {
    dynamic = dynamic_bytes ? map_region("dynamic shared memory", dynamic_bytes, Touch::end) : nullptr;
    dynamic_shadow.assign(dynamic_bytes, Shadow{});
}

void begin_block() {
    memset(static_shared, 0xFF, static_shared_end - static_shared);
    if (dynamic) memset(dynamic->data, 0xFF, dynamic->bytes);
}

std::string end_kernel() {
    if (dynamic) unmap_region(dynamic);
    dynamic = nullptr;
    for (Region* r : regions)  // is the slack beside the buffers still poisoned?
        for (char* p = r->map + PAGE; p < r->map + r->map_bytes - PAGE; ++p) {
            if (p == r->data) p += r->bytes;
            if (p < r->map + r->map_bytes - PAGE && *p != char(0xFF))
                return std::string("somebody wrote just outside of '") + r->name + "'";
        }
    return "";
}

void* dynamic_shared() { return dynamic->data; }

void access(const void* address, size_t bytes, Access kind, size_t aligned, void* code) {
    auto* p = const_cast<char*>(static_cast<const char*>(address));
    if (!current || (p >= stacks && p < stacks + STACK_BYTES * MAX_THREADS)) return;
    if (size_t(p) % aligned) fail("address is not a multiple of %zu%s", aligned, source_line(code).c_str());
    if (p >= static_shared && p < static_shared_end) {
        if (tracking) check_shared(&shadow_of(p), bytes, kind, p - static_shared, code);
        return;
    }
    for (Region* r : regions) {
        if (p < r->map || p >= r->map + r->map_bytes) continue;
        if (p < r->data || p + bytes > r->data + r->bytes)
            fail("%s '%s' at byte %td of %zu%s", kind == read ? "reads" : "writes", r->name, p - r->data, r->bytes,
                 source_line(code).c_str());
        if (r->from_previous_kernel && !current->dependency_met)
            fail("touches '%s' before griddepcontrol.wait%s", r->name, source_line(code).c_str());
        if (r == dynamic && tracking) check_shared(&shadow_of(p), bytes, kind, p - r->data, code);
        return;
    }
}

// The bytes arrive as late as the rules allow; until then the destination is poison, as if they might come early too.
void async_copy(void* shared, const void* global, size_t bytes, size_t from_global) {
    auto *to = static_cast<char*>(shared);
    access(shared, bytes, write, bytes);
    if (size_t(global) % bytes) fail("cp.async source is not a multiple of %zu", bytes);
    if (from_global) {
        access(global, from_global, read, 1);
        (void)*static_cast<const volatile char*>(global);  // lets the guard page object here and not at delivery
    }
    memset(shared, 0xFF, bytes);
    if (tracking)  // reading these bytes before the wait reads unwritten memory, for the copying thread too
        for (size_t i = 0; i < bytes; ++i) shadow_of(to + i).written.epoch = 0;
    current->open_group.push_back({to, static_cast<const char*>(global), bytes, from_global});
}

void async_commit() {
    current->groups.push_back(std::move(current->open_group));
    current->open_group.clear();
}

void async_wait(int groups_left) {
    for (; int(current->groups.size()) > groups_left; current->groups.pop_front())
        for (const Copy& c : current->groups.front()) {
            memset(c.to, 0, c.bytes);
            memcpy(c.to, c.from, c.from_global);
            access(c.to, c.bytes, write);
        }
}

void dependency_wait() { current->dependency_met = true; }

Region* map_region(const char* name, size_t bytes, Touch touch) {
    const size_t body = (bytes + PAGE - 1) / PAGE * PAGE, whole = body + 2 * PAGE;
    auto* map = static_cast<char*>(mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    memset(map, 0xFF, whole);
    mprotect(map, PAGE, PROT_NONE);
    mprotect(map + PAGE + body, PAGE, PROT_NONE);
    char* data = touch == Touch::start ? map + PAGE : map + PAGE + body - (bytes + 15) / 16 * 16;
    return regions.emplace_back(new Region{name, map, data, whole, bytes});
}

void unmap_region(Region* r) {
    munmap(r->map, r->map_bytes);
    regions.erase(std::find(regions.begin(), regions.end(), r));
    delete r;
}

void lock_region(Region* r) { mprotect(r->map + PAGE, r->map_bytes - 2 * PAGE, PROT_READ); }

}  // namespace simt

// What g++ -fsanitize=thread calls.  Present in both builds, called only by the checked one.
#define HOOK(NAME, BYTES, KIND, ALIGNED)                                                     \
    extern "C" void NAME(void* address) {                                                    \
        simt::tracking = true;                                                               \
        simt::access(address, BYTES, simt::KIND, ALIGNED, __builtin_return_address(0));      \
    }
#define HOOKS(BYTES)                                                                         \
    HOOK(__tsan_read##BYTES, BYTES, read, BYTES)                                             \
    HOOK(__tsan_write##BYTES, BYTES, write, BYTES)                                           \
    HOOK(__tsan_unaligned_read##BYTES, BYTES, read, 1)                                       \
    HOOK(__tsan_unaligned_write##BYTES, BYTES, write, 1)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#define RANGE_HOOK(NAME, KIND)                                                               \
    extern "C" void NAME(void* address, size_t bytes) {                                      \
        simt::tracking = true;                                                               \
        simt::access(address, bytes, simt::KIND, 1, __builtin_return_address(0));            \
    }
RANGE_HOOK(__tsan_read_range, read)
RANGE_HOOK(__tsan_write_range, write)
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_init() {}
