// Runs unchanged CUDA kernels on a CPU, one block at a time, to test them where there is no GPU.
//
// Every CUDA thread is a fiber on the one host thread.  A fiber runs until it must wait: at __syncthreads for the whole
// block, at a warp collective (__syncwarp, mma) for the lanes of its mask.  Which ready fiber runs next is chosen badly
// on purpose, see Order.  It is no model of time.
//
// The same kernel file is built in two ways:
//   plain     poisoned shared memory, guard pages around global memory, cp.async that delivers at its wait and not
//             before, hostile orders of threads and blocks
//   checked   g++ -fsanitize=thread, WITHOUT linking its runtime: the compiler calls __tsan_read4(address) and the like
//             for every load and store, and memory.cpp answers them.  Adds reads of unwritten shared memory, races
//             between threads of a block, and exact bounds of global memory.
//
// What it cannot see: a wrong asm string, rounding inside the matrix unit, speed, bank conflicts, races between blocks.
//
// Compile kernels with -ffp-contract=off, or g++ may fuse a * b + c where nvcc does not.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

// ---- what the CUDA compiler has built in ----

struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
#define __global__
#define __device__
#define __launch_bounds__(...)
// A block's static shared memory is the thread-local storage of the host thread that runs it: that works inside of
// templates, and the linker gathers all of it in one range that can be found and poisoned.  __constinit keeps g++ from
// adding "already initialised" flags to it and, like CUDA, refuses constructors.
#define __shared__ __constinit static thread_local
#define threadIdx (simt::builtins->thread_idx)
#define blockIdx (simt::builtins->block_idx)
#define blockDim (simt::builtins->block_dim)
#define gridDim (simt::builtins->grid_dim)
#define SIMT_QUIET __attribute__((no_sanitize("thread")))

namespace simt {

// ---- launching ----

enum class Order { forward, reverse, random };  // of threads and blocks: the lowest or highest runs ahead as far as it can
struct Options {
    Order order = Order::forward;
    unsigned seed = 0;
};
// Runs every block of the grid; returns "" or the first thing that went wrong.
std::string launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, Options, const std::function<void()>& kernel);

struct Builtins {
    uint3 thread_idx, block_idx;
    dim3 block_dim, grid_dim;
};
extern Builtins* builtins;  // of the running thread
void* dynamic_shared();

// ---- waiting ----

struct Site {  // where in the kernel a call stands, taken as a default argument
    const char* file;
    int line;
    static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void block_barrier(Site);
void** arrive(const char* op, unsigned mask, Site, void* args);  // the lanes' args for the last lane, else null
void leave(bool orders_memory);                                  // called by the last lane, frees the others
void suspend();

// Brings the lanes of `mask` together at one place in the kernel; the last one to come does the work for all.
template <class Args, class Work>
SIMT_QUIET void collective(const char* op, unsigned mask, Site site, Args& args, Work work, bool orders_memory = false) {
    if (void** waiting = arrive(op, mask, site, &args)) {
        Args* lanes[32];
        for (int i = 0; i < 32; ++i) lanes[i] = static_cast<Args*>(waiting[i]);
        work(lanes);
        leave(orders_memory);
    }
    suspend();
}

// ---- memory as the kernel sees it ----

enum Access { read, write };
void access(const void* address, size_t bytes, Access, size_t aligned = 1, void* code = nullptr);
SIMT_QUIET inline void copy_bytes(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
void async_copy(void* shared, const void* global, size_t bytes, size_t bytes_from_global);
void async_commit();
void async_wait(int groups_left);
void dependency_wait();  // griddepcontrol.wait

// A global-memory buffer between two unmapped pages.  Its end (or its start) touches one, so that running over faults
// at once; slack for alignment is poisoned.  Build it, fill it, then lock() inputs against writing.
enum class Touch { end, start };
struct Region {
    const char* name;
    char *map, *data;
    size_t map_bytes, bytes;
    bool from_previous_kernel = false;  // may be touched only after griddepcontrol.wait
};
Region* map_region(const char* name, size_t bytes, Touch);
void unmap_region(Region*);
void lock_region(Region*);

template <class T>
struct Global {
    Region* region;
    size_t count;
    Global(const char* name, size_t count, Touch touch = Touch::end)
        : region(map_region(name, count * sizeof(T), touch)), count(count) {}
    Global(const Global&) = delete;
    ~Global() { unmap_region(region); }
    T* data() { return reinterpret_cast<T*>(region->data); }
    void lock(bool from_previous_kernel = false) {
        region->from_previous_kernel = from_previous_kernel;
        lock_region(region);
    }
};

// ---- meanings of instructions that ptx.cuh refers to ----

using Bits = unsigned short;
inline float half_value(Bits bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return float(value);
}
inline Bits round_to_half(double v) {
    const _Float16 value = static_cast<_Float16>(v);  // to nearest even
    Bits bits;
    memcpy(&bits, &value, 2);
    return bits;
}
inline float bfloat_value(Bits bits) {
    const unsigned word = unsigned(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}
// To nearest even, by way of float: exact for floats and for doubles that a float holds, as all of ours.
inline Bits round_to_bfloat(double v) {
    const float value = float(v);
    unsigned word;
    memcpy(&word, &value, 4);
    if (value != value) return Bits(word >> 16 | 0x40);
    return Bits((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline int round_to_int(float v) {
    if (v != v) return 0;
    if (v >= 2147483648.f) return 2147483647;
    if (v < -2147483648.f) return -2147483647 - 1;
    return int(__builtin_nearbyintf(v));  // the host rounds ties to even too
}

template <class Value, class Round>
unsigned fma_x2(unsigned a, unsigned b, unsigned c, Value value, Round round) {
    unsigned d = 0;
    for (int i = 0; i < 32; i += 16) {
        auto f = [&](unsigned v) { return double(value(Bits(v >> i))); };
        d |= unsigned(round(f(a) * f(b) + f(c))) << i;
    }
    return d;
}

// Sums are rounded once; the hardware's order and rounding are not specified, so compare where float sums are exact.
template <class Value>
SIMT_QUIET void mma_m16n8k16(const char* op, Value value, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                             Site site) {
    struct Args {
        float* c;
        const unsigned* a;
        unsigned b[2];
    } args{c, a, {b0, b1}};
    collective(op, ~0u, site, args, [value](Args** lanes) SIMT_QUIET {
        float A[16][16], B[8][16];
        for (int lane = 0; lane < 32; ++lane)
            for (int h = 0; h < 2; ++h) {
                const int g = lane / 4, k = lane % 4 * 2 + h;
                for (int i = 0; i < 4; ++i)
                    A[g + 8 * (i & 1)][k + 8 * (i >> 1)] = value(Bits(lanes[lane]->a[i] >> (16 * h)));
                for (int i = 0; i < 2; ++i) B[g][k + 8 * i] = value(Bits(lanes[lane]->b[i] >> (16 * h)));
            }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                double sum = lanes[lane]->c[i];
                for (int k = 0; k < 16; ++k)
                    sum += double(A[lane / 4 + 8 * (i >> 1)][k] * B[lane % 4 * 2 + (i & 1)][k]);
                lanes[lane]->c[i] = float(sum);
            }
    });
}

SIMT_QUIET inline void mma_m16n8k32(const char* op, int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                    Site site) {
    struct Args {
        int* c;
        const unsigned* a;
        unsigned b[2];
    } args{c, a, {b0, b1}};
    collective(op, ~0u, site, args, [](Args** lanes) SIMT_QUIET {
        int A[16][32], B[8][32];
        for (int lane = 0; lane < 32; ++lane)
            for (int byte = 0; byte < 4; ++byte) {
                const int g = lane / 4, k = lane % 4 * 4 + byte;
                auto code = [byte](unsigned word) { return int((signed char)(word >> (8 * byte))); };
                for (int i = 0; i < 4; ++i) A[g + 8 * (i & 1)][k + 16 * (i >> 1)] = code(lanes[lane]->a[i]);
                for (int i = 0; i < 2; ++i) B[g][k + 16 * i] = code(lanes[lane]->b[i]);
            }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                int sum = 0;
                for (int k = 0; k < 32; ++k) sum += A[lane / 4 + 8 * (i >> 1)][k] * B[lane % 4 * 2 + (i & 1)][k];
                lanes[lane]->c[i] = int(unsigned(lanes[lane]->c[i]) + unsigned(sum));
            }
    });
}

SIMT_QUIET inline float shfl_xor(float v, int lane_mask, Site site) {
    struct Args {
        float given, got;
    } args{v, v};
    collective("shfl", ~0u, site, args, [lane_mask](Args** lanes) SIMT_QUIET {
        for (int lane = 0; lane < 32; ++lane) lanes[lane]->got = lanes[lane ^ lane_mask]->given;
    });
    return args.got;
}

}  // namespace simt

inline void __syncthreads(simt::Site site = simt::Site::here()) { simt::block_barrier(site); }

inline void __syncwarp(unsigned mask = ~0u, simt::Site site = simt::Site::here()) {
    int none = 0;
    simt::collective("__syncwarp", mask, site, none, [](int**) {}, true);
}
