// quantize_tokens and rmsnorm_quantize: a token's activations to integer codes and one scale; x is read once.
//
//     x            [M][K rounded up to 8], padded with zeros          one block: one token, a thread takes every 256th
//     codes        [M][K rounded up to 16] bytes, padded with zeros   chunk of 16 values; the row stays in shared memory
//     token_scale  [M]
//
// The float operations, each rounded to nearest:
//     rmsnorm_quantize only, as transformers' LlamaRMSNorm:
//         sum      = fma(x, x, sum), a thread's values in the order of k; lanes pairwise (16, 8, 4, 2, 1 apart), then
//                    warps in their order.  torch sums in another order: equal where the sums are exact.
//         inverse  = 1 / sqrt(sum / K + eps)
//         v        = round(weight * round(x * inverse)), round to T
//     quantize_tokens: v = x
//     scale = max(max |v| / divisor, 2^-64), divisor qmax or, by the rule of half the range, qmax + 1/2; or the static one
//     code  = min(max(v / scale to the nearest integer, ties to even, -qmax - 1), qmax)
// Given v these are the bits of qat.functional.dynamic_scale and quantize.  A NaN makes the scale NaN, as there; its
// code is 0, and the layer's output is NaN all the same.
//
// Grid: (M).  Dynamic shared memory: 2 bytes for each of K rounded up to 16.  Alignment: rows of x, weight (padded like a
// row of x) and codes 16 bytes.
// Reference: qat.functional.dynamic_scale and quantize; tests/kernels/ compares with LlamaRMSNorm too.
// Registers: at most 48.  Run on the emulator, never yet on a GPU; the number of warps is an estimate.
#pragma once
#include "layout.cuh"

namespace qat {

constexpr int QUANTIZE_WARPS = 8, QUANTIZE_THREADS = QUANTIZE_WARPS * 32;
constexpr int CHUNK = 16;  // values of a thread at a time: two loads of T, one store of codes

// Value i of 8 in T, as float.
template <class T>
PTX_FN float value_of(const uint4& v, int i) {
    const u32 word = i < 2 ? v.x : i < 4 ? v.y : i < 6 ? v.z : v.w;
    return to_float(T{u16(word >> 16 * (i & 1))});
}

// All threads get the warps' values folded in their order; `of_warp` must not be in use.
template <class Fold>
PTX_FN float fold_block(float v, float (&of_warp)[QUANTIZE_WARPS], Fold fold) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) v = fold(v, shfl_xor(v, distance));
    if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = v;
    __syncthreads();
    v = of_warp[0];
    for (int w = 1; w < QUANTIZE_WARPS; ++w) v = fold(v, of_warp[w]);
    return v;
}

// The codes of the row in shared memory, which this thread wrote where it reads; `largest` is this thread's max |v|.
template <class T>
PTX_FN void write_codes(const uint4* row, float largest, const float* static_scale, s8* codes, float* token_scale, int K,
                        int qmax, int half_range, float (&of_warp)[QUANTIZE_WARPS]) {
    largest = fold_block(largest, of_warp, [](float a, float b) { return max_nan(a, b); });
    const float divisor = half_range ? float(qmax) + 0.5f : float(qmax), floor = 0x1p-64f;
    const float scale = static_scale ? *static_scale : max_nan(div_rn(largest, divisor), floor);
    if (threadIdx.x == 0) token_scale[blockIdx.x] = scale;
    const int chunks = ceil_div(K, CHUNK);
    for (int chunk = threadIdx.x; chunk < chunks; chunk += QUANTIZE_THREADS) {
        u32 word[4] = {};
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            const int q = round_to_int(div_rn(value_of<T>(row[2 * chunk + i / 8], i % 8), scale));
            word[i / 4] |= u32(u32(q < -qmax - 1 ? -qmax - 1 : q > qmax ? qmax : q) & 255) << 8 * (i % 4);
        }
        uint4* to = reinterpret_cast<uint4*>(codes + i64(blockIdx.x) * chunks * CHUNK);
        to[chunk] = uint4{word[0], word[1], word[2], word[3]};
    }
}

// Half h of a chunk of a padded row; behind its end, zeros.
template <class T>
PTX_FN uint4 half_chunk(const T* row, int chunk, int h, int K) {
    const int k = CHUNK * chunk + 8 * h;
    return k < row_stride<T>(K) ? ld_global_v4(row + k) : uint4{};
}

template <class T>
__global__ void __launch_bounds__(QUANTIZE_THREADS)
quantize_tokens(const T* __restrict__ x, const float* __restrict__ static_scale, s8* __restrict__ codes,
                float* __restrict__ token_scale, int K, int qmax, int half_range) {
    DYNAMIC_SHARED(uint4, row);
    __shared__ float of_warp[QUANTIZE_WARPS];
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    float largest = 0;
    for (int chunk = threadIdx.x; chunk < ceil_div(K, CHUNK); chunk += QUANTIZE_THREADS)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint4 v = half_chunk(x + i64(blockIdx.x) * row_stride<T>(K), chunk, h, K);
            row[2 * chunk + h] = v;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float value = value_of<T>(v, i);
                largest = max_nan(largest, value < 0 ? -value : value);
            }
        }
    write_codes<T>(row, largest, static_scale, codes, token_scale, K, qmax, half_range, of_warp);
}

template <class T>
__global__ void __launch_bounds__(QUANTIZE_THREADS)
rmsnorm_quantize(const T* __restrict__ x, const T* __restrict__ weight, s8* __restrict__ codes,
                 float* __restrict__ token_scale, int K, float eps, int qmax, int half_range) {
    DYNAMIC_SHARED(uint4, row);
    __shared__ float of_warp[2][QUANTIZE_WARPS];
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    float sum = 0;
    for (int chunk = threadIdx.x; chunk < ceil_div(K, CHUNK); chunk += QUANTIZE_THREADS)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint4 v = half_chunk(x + i64(blockIdx.x) * row_stride<T>(K), chunk, h, K);
            row[2 * chunk + h] = v;
#pragma unroll
            for (int i = 0; i < 8; ++i) sum = fma_rn(value_of<T>(v, i), value_of<T>(v, i), sum);
        }
    sum = fold_block(sum, of_warp[0], [](float a, float b) { return a + b; });
    const float inverse = div_rn(1.f, sqrt_rn(div_rn(sum, float(K)) + eps));

    float largest = 0;
    for (int chunk = threadIdx.x; chunk < ceil_div(K, CHUNK); chunk += QUANTIZE_THREADS)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint4 v = row[2 * chunk + h], w = half_chunk(weight, chunk, h, K);
            u32 pair[4] = {};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const T normal = from_float(T(), value_of<T>(v, i) * inverse);
                const T out = from_float(T(), value_of<T>(w, i) * to_float(normal));
                const float value = to_float(out);
                largest = max_nan(largest, value < 0 ? -value : value);
                pair[i / 2] |= u32(out.bits) << 16 * (i & 1);
            }
            row[2 * chunk + h] = uint4{pair[0], pair[1], pair[2], pair[3]};
        }
    write_codes<T>(row, largest, nullptr, codes, token_scale, K, qmax, half_range, of_warp[1]);
}

}  // namespace qat
