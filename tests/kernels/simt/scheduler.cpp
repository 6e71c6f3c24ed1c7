// Fibers, barriers and warp collectives behind simt.h.  Compile without -fsanitize.
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include "engine.h"

#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <random>

namespace simt {

Builtins* builtins = nullptr;
Thread* current = nullptr;
char* stacks = nullptr;
unsigned epoch = 1, block_epoch = 1;

namespace {

Thread threads[MAX_THREADS];
jmp_buf scheduler;
std::vector<int> ready;  // the last one runs next
int thread_count, at_barrier, finished;
unsigned warp_waiting[MAX_THREADS / 32];  // lanes that have arrived at a collective
void* lane_args[32];
Options options;
std::mt19937 random_source;
const std::function<void()>* body;
std::string error;

std::string at(Site s) {
    const char* slash = strrchr(s.file, '/');
    return std::string(slash ? slash + 1 : s.file) + ":" + std::to_string(s.line);
}

void make_ready(std::vector<int> ids) {
    if (options.order == Order::forward) std::reverse(ids.begin(), ids.end());
    ready.insert(ready.end(), ids.begin(), ids.end());
}

void fiber() {
    for (;;) {
        (*body)();
        current->done = true;
        ++finished;
        suspend();
    }
}

std::string who_waits_where() {
    std::map<std::string, std::vector<int>> places;
    for (int i = 0; i < thread_count; ++i) {
        const Thread& t = threads[i];
        places[t.done ? "have returned" : std::string("wait at ") + t.op + " " + at(t.site)].push_back(i);
    }
    std::string text;
    for (auto& [place, ids] : places) {
        text += text.empty() ? "threads" : "; threads";
        for (size_t i = 0, j; i < ids.size(); i = j) {
            for (j = i + 1; j < ids.size() && ids[j] == ids[j - 1] + 1;) ++j;
            text += " " + std::to_string(ids[i]) + (j > i + 1 ? "-" + std::to_string(ids[j - 1]) : "");
        }
        text += " " + place;
    }
    return text;
}

void resume(Thread& t) {
    current = &t;
    builtins = &t;
    if (_setjmp(scheduler) == 0) {
        if (t.started) _longjmp(t.context, 1);
        t.started = true;
        static ucontext_t fresh;
        getcontext(&fresh);
        fresh.uc_stack.ss_sp = stacks + STACK_BYTES * t.id;
        fresh.uc_stack.ss_size = STACK_BYTES;
        makecontext(&fresh, fiber, 0);
        setcontext(&fresh);
    }
    current = nullptr;
}

void prepare(Thread& t, int id, uint3 block_idx, dim3 block, dim3 grid) {
    const unsigned i = unsigned(id);
    t.id = id;
    t.thread_idx = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    t.block_idx = block_idx;
    t.block_dim = block;
    t.grid_dim = grid;
    t.done = t.dependency_met = false;
    t.warp_epoch = 0;
    t.open_group.clear();
    t.groups.clear();
}

void run_block(uint3 block_idx, dim3 block, dim3 grid) {
    begin_block();
    block_epoch = ++epoch;
    memset(warp_waiting, 0, sizeof warp_waiting);
    at_barrier = finished = 0;
    ready.clear();
    std::vector<int> ids(thread_count);
    for (int i = 0; i < thread_count; ++i) prepare(threads[ids[i] = i], i, block_idx, block, grid);
    make_ready(ids);
    while (error.empty() && !ready.empty()) {
        if (options.order == Order::random) std::swap(ready[random_source() % ready.size()], ready.back());
        Thread& next = threads[ready.back()];
        ready.pop_back();
        resume(next);
    }
    if (error.empty() && finished < thread_count) error = "deadlock: " + who_waits_where();
    if (error.empty()) return;
    for (Thread& t : threads) t.started = false;  // their stacks hold half-run kernels
    error = "block (" + std::to_string(block_idx.x) + "," + std::to_string(block_idx.y) + "): " + error;
}

}  // namespace

std::string name_of(int thread) {
    return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / 32) + " lane " +
           std::to_string(thread % 32) + ")";
}

void fail(const char* format, ...) {
    char text[1000];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    error = name_of(current->id) + " " + text;
    _longjmp(scheduler, 1);
}

void suspend() {
    if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

std::string launch(dim3 grid, dim3 block, size_t dynamic_bytes, Options chosen, const std::function<void()>& kernel) {
    if (!stacks) {
        stacks = static_cast<char*>(mmap(nullptr, STACK_BYTES * MAX_THREADS, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        set_up_memory();
    }
    options = chosen;
    random_source.seed(chosen.seed);
    body = &kernel;
    error.clear();
    thread_count = block.x * block.y * block.z;
    if (thread_count < 1 || thread_count > MAX_THREADS) return "a block has 1 to 1024 threads";
    begin_kernel(dynamic_bytes);
    std::vector<unsigned> blocks(grid.x * grid.y * grid.z);
    for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;
    if (chosen.order == Order::reverse) std::reverse(blocks.begin(), blocks.end());
    if (chosen.order == Order::random) std::shuffle(blocks.begin(), blocks.end(), random_source);
    for (unsigned i : blocks) {
        run_block({i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)}, block, grid);
        if (!error.empty()) break;
    }
    const std::string damage = end_kernel();
    return error.empty() ? damage : error;
}

void block_barrier(Site site) {
    current->op = "__syncthreads";
    current->site = site;
    if (++at_barrier == thread_count) {
        std::vector<int> ids;
        for (int i = 0; i < thread_count; ++i) {
            if (threads[i].site.line != site.line) fail("divergent __syncthreads: %s", who_waits_where().c_str());
            ids.push_back(i);
        }
        at_barrier = 0;
        ++epoch;
        make_ready(ids);
    }
    suspend();
}

void** arrive(const char* op, unsigned mask, Site site, void* args) {
    const int me = current->id % 32, warp = current->id / 32;
    if (!(mask >> me & 1)) fail("calls %s %s with a mask that leaves itself out", op, at(site).c_str());
    Thread* t = threads + warp * 32;
    t[me].op = op;
    t[me].site = site;
    t[me].mask = mask;
    t[me].args = args;
    const unsigned others = warp_waiting[warp] & mask, here = others | 1u << me;
    warp_waiting[warp] |= 1u << me;
    if (others) {  // they agree among themselves already, so one stands for all
        const int i = __builtin_ctz(others);
        if (strcmp(t[i].op, op) || t[i].site.line != site.line || t[i].mask != mask)
            fail("is at %s %s (mask %08x) while lane %d is at %s %s (mask %08x)", op, at(site).c_str(), mask, i, t[i].op,
                 at(t[i].site).c_str(), t[i].mask);
    }
    if (here != mask) return nullptr;
    for (int i = 0; i < 32; ++i) lane_args[i] = here >> i & 1 ? t[i].args : nullptr;
    return lane_args;
}

void leave(bool orders_memory) {
    const int warp = current->id / 32;
    std::vector<int> ids;
    for (int i = 0; i < 32; ++i)
        if (current->mask >> i & 1) {
            ids.push_back(warp * 32 + i);
            threads[warp * 32 + i].warp_epoch += orders_memory;
        }
    warp_waiting[warp] &= ~current->mask;
    make_ready(ids);
}

}  // namespace simt
