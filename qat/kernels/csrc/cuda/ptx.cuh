// Every PTX instruction that the kernels use, one small named function each.
//
// NVRTC and nvcc get the instruction.  With QAT_EMULATE the same function is its meaning in C++, from the fragment
// tables of the PTX manual, for the emulator of tests/kernels/simt.  Nothing is included: no CUDA header, no std header.
#pragma once

#ifdef QAT_EMULATE
#include "simt.h"
#define PTX_FN inline
#define PTX_SITE , simt::Site site = simt::Site::here()
#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(simt::dynamic_shared())
#else
#define PTX_FN __device__ __forceinline__
#define PTX_SITE
#define DYNAMIC_SHARED(T, name) extern __shared__ T name[]
#endif

namespace qat {

using s8 = signed char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

// The two activation types, as their bits.
struct f16 { u16 bits; };
struct bf16 { u16 bits; };

// ---- bits ----

// Any function of three bits; LUT is what it gives for a = 0xF0, b = 0xCC, c = 0xAA.
template <u32 LUT>
PTX_FN u32 lop3(u32 a, u32 b, u32 c) {
    u32 d = 0;
#ifdef QAT_EMULATE
    for (int i = 0; i < 8; ++i)
        if (LUT >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
#else
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(LUT));
#endif
    return d;
}
constexpr u32 AND_OR = (0xF0 & 0xCC) | 0xAA;   // (a & b) | c
constexpr u32 AND_XOR = (0xF0 & 0xCC) ^ 0xAA;  // (a & b) ^ c

// Four of the eight bytes of b:a, byte i chosen by nibble i of `selector`.
PTX_FN u32 prmt(u32 a, u32 b, u32 selector) {
    u32 d = 0;
#ifdef QAT_EMULATE
    const unsigned long long bytes = (unsigned long long)b << 32 | a;
    for (int i = 0; i < 4; ++i) {
        const u32 nibble = selector >> (4 * i) & 15, byte = u32(bytes >> (8 * (nibble & 7))) & 255;
        d |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);  // bit 3 spreads the byte's sign
    }
#else
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
#endif
    return d;
}

// ---- floats ----

PTX_FN float to_float(float v) { return v; }

PTX_FN float to_float(f16 v) {
    float f;
#ifdef QAT_EMULATE
    f = simt::half_value(v.bits);
#else
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
#endif
    return f;
}

PTX_FN float to_float(bf16 v) {  // a bfloat16 is the upper half of a float
    float f;
#ifdef QAT_EMULATE
    f = simt::bfloat_value(v.bits);
#else
    asm("mov.b32 %0, {%1, %2};" : "=f"(f) : "h"(u16(0)), "h"(v.bits));
#endif
    return f;
}

// Rounds to nearest, ties to even.
PTX_FN f16 from_float(f16, float f) {
    f16 v;
#ifdef QAT_EMULATE
    v.bits = simt::round_to_half(f);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
#endif
    return v;
}

PTX_FN bf16 from_float(bf16, float f) {
    bf16 v;
#ifdef QAT_EMULATE
    v.bits = simt::round_to_bfloat(f);
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
#endif
    return v;
}

// a * b + c on the two halves of a register, rounded once.
PTX_FN u32 fma_x2(f16, u32 a, u32 b, u32 c) {
    u32 d;
#ifdef QAT_EMULATE
    d = simt::fma_x2(a, b, c, simt::half_value, simt::round_to_half);
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}

PTX_FN u32 fma_x2(bf16, u32 a, u32 b, u32 c) {
    u32 d;
#ifdef QAT_EMULATE
    d = simt::fma_x2(a, b, c, simt::bfloat_value, simt::round_to_bfloat);
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}

// float arithmetic that is rounded to nearest at each step, whatever the compiler may fuse or relax elsewhere.
PTX_FN float mul_rn(float a, float b) {
    float d;
#ifdef QAT_EMULATE
    d = a * b;
#else
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
#endif
    return d;
}

PTX_FN float div_rn(float a, float b) {
    float d;
#ifdef QAT_EMULATE
    d = a / b;
#else
    asm("div.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
#endif
    return d;
}

PTX_FN float sqrt_rn(float a) {
    float d;
#ifdef QAT_EMULATE
    d = __builtin_sqrtf(a);
#else
    asm("sqrt.rn.f32 %0, %1;" : "=f"(d) : "f"(a));
#endif
    return d;
}

// a * b + c, rounded once.
PTX_FN float fma_rn(float a, float b, float c) {
    float d;
#ifdef QAT_EMULATE
    d = __builtin_fmaf(a, b, c);
#else
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
#endif
    return d;
}

// 2^a to about 2 units in the last place.
PTX_FN float exp2_approx(float a) {
    float d;
#ifdef QAT_EMULATE
    d = __builtin_exp2f(a);
#else
    asm("ex2.approx.f32 %0, %1;" : "=f"(d) : "f"(a));
#endif
    return d;
}

// The larger one; NaN if either is.
PTX_FN float max_nan(float a, float b) {
    float d;
#ifdef QAT_EMULATE
    d = a != a || a > b ? a : b;
#else
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
#endif
    return d;
}

// To the nearest integer, ties to even; what an int cannot hold saturates, NaN is 0.
PTX_FN int round_to_int(float a) {
    int d;
#ifdef QAT_EMULATE
    d = simt::round_to_int(a);
#else
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(d) : "f"(a));
#endif
    return d;
}

PTX_FN float as_float(int bits) {
    float d;
#ifdef QAT_EMULATE
    simt::copy_bytes(&d, &bits, 4);
#else
    asm("mov.b32 %0, %1;" : "=f"(d) : "r"(bits));
#endif
    return d;
}

// ---- memory ----

// Streams 16 bytes that nothing writes while the kernel runs, without keeping them in L1.
PTX_FN uint4 ld_global_nc_v4(const uint4* p) {
    uint4 v;
#ifdef QAT_EMULATE
    simt::access(p, 16, simt::read, 16);
    simt::copy_bytes(&v, p, 16);
#else
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
#endif
    return v;
}

// 16 bytes that an earlier kernel may have written.  Volatile: it stays behind griddepcontrol_wait.
PTX_FN uint4 ld_global_v4(const void* p) {
    uint4 v;
#ifdef QAT_EMULATE
    simt::access(p, 16, simt::read, 16);
    simt::copy_bytes(&v, p, 16);
#else
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
#endif
    return v;
}

// A float, in the same order as ld_global_v4.
PTX_FN float ld_global(const float* p) {
    float v;
#ifdef QAT_EMULATE
    simt::access(p, 4, simt::read, 4);
    simt::copy_bytes(&v, p, 4);
#else
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
#endif
    return v;
}

// The same for an int, and for a 16-bit value.
PTX_FN int ld_global(const int* p) {
    int v;
#ifdef QAT_EMULATE
    simt::access(p, 4, simt::read, 4);
    simt::copy_bytes(&v, p, 4);
#else
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(p));
#endif
    return v;
}

template <class T>
PTX_FN T ld_global(const T* p) {
    T v;
#ifdef QAT_EMULATE
    simt::access(p, 2, simt::read, 2);
    simt::copy_bytes(&v, p, 2);
#else
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v.bits) : "l"(p));
#endif
    return v;
}

PTX_FN uint4 ld_shared_v4(const uint4* p) {
    uint4 v;
#ifdef QAT_EMULATE
    simt::access(p, 16, simt::read, 16);
    simt::copy_bytes(&v, p, 16);
#else
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(u32(__cvta_generic_to_shared(p))));
#endif
    return v;
}

// Starts to copy `bytes` (0 to 16) from global to shared memory and zeros up to 16.  With 0 nothing is read.
PTX_FN void cp_async_16(void* shared, const void* global, int bytes) {
#ifdef QAT_EMULATE
    simt::async_copy(shared, global, 16, bytes);
#else
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(u32(__cvta_generic_to_shared(shared))), "l"(global), "r"(bytes) : "memory");
#endif
}

// Closes a group of this thread's copies.
PTX_FN void cp_async_commit() {
#ifdef QAT_EMULATE
    simt::async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's latest groups are unfinished.
template <int PENDING>
PTX_FN void cp_async_wait_group() {
#ifdef QAT_EMULATE
    simt::async_wait(PENDING);
#else
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
#endif
}

// ---- programmatic dependent launch (sm_90 and later; elsewhere kernels run one after the other anyway) ----

// Allows the next kernel of the stream to start.
PTX_FN void griddepcontrol_launch_dependents() {
#if !defined(QAT_EMULATE) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Returns once the previous kernel's writes can be seen.
PTX_FN void griddepcontrol_wait() {
#ifdef QAT_EMULATE
    simt::dependency_wait();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- warp ----

// The value of the lane whose number differs in the bits of `lane_mask`; all 32 lanes take part.
PTX_FN float shfl_xor(float v, int lane_mask PTX_SITE) {
#ifdef QAT_EMULATE
    return simt::shfl_xor(v, lane_mask, site);
#else
    float d;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=f"(d) : "f"(v), "r"(lane_mask));
    return d;
#endif
}

// ---- matrix ----

// Volatile, as the loads are: the compiler keeps the order that a kernel writes down, and with it the register count.
// C[16][8] += A[16][16] B[16][8] in float, by one warp.  Lane 4g + t holds
//     a[i]  row g + 8 (i & 1), columns 2t, 2t + 1 of half i >> 1
//     b0 b1 rows 2t, 2t + 1 of half 0, 1; column g
//     c[i]  row g + 8 (i >> 1), column 2t + (i & 1)
PTX_FN void mma_m16n8k16(f16, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1 PTX_SITE) {
#ifdef QAT_EMULATE
    simt::mma_m16n8k16("mma f16", simt::half_value, c, a, b0, b1, site);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

PTX_FN void mma_m16n8k16(bf16, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1 PTX_SITE) {
#ifdef QAT_EMULATE
    simt::mma_m16n8k16("mma bf16", simt::bfloat_value, c, a, b0, b1, site);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// C[16][8] += A[16][32] B[32][8] on signed bytes, in int that wraps, by one warp.  Lane 4g + t holds
//     a[i]  row g + 8 (i & 1), columns 4t ... 4t + 3 of half i >> 1, the lowest byte first
//     b0 b1 rows 4t ... 4t + 3 of half 0, 1; column g
//     c[i]  row g + 8 (i >> 1), column 2t + (i & 1)
PTX_FN void mma_m16n8k32(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1 PTX_SITE) {
#ifdef QAT_EMULATE
    simt::mma_m16n8k32("mma s8", c, a, b0, b1, site);
#else
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace qat
