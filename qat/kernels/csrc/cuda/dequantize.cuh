// dequantize: the run-time layout -> W[N][K rounded up to 8] in f16 or bf16, for products with so many tokens that a dense matrix
// multiplication is faster.
//
// Thread mapping: a warp writes one tile of 16 n by 64 k, lane 4g + t columns 16t ... 16t + 15 of rows g and g + 8;
// 8 warps a block, tiles in their order in memory.  Alignment: weights, scales and rows of W
// 16 bytes; columns from K on are zero.
// Reference: qat.functional.dequantize, cast to the type: s * q in float, rounded once.  Equal bit for bit.
// Registers: at most 48.  Run on the emulator, never yet on a GPU.
#pragma once
#include "layout.cuh"

namespace qat {

constexpr int DEQUANTIZE_WARPS = 8;

template <class T, class S, int BITS, int PASSES>
__global__ void __launch_bounds__(DEQUANTIZE_WARPS * 32)
dequantize(const uint4* __restrict__ tiles, const S* __restrict__ scale, T* __restrict__ weight, int N, int K, int groups) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int k_tiles = ceil_div(K, TILE_K), row_tiles = ceil_div(N, TILE_N), tiles_per_group = k_tiles / groups;
    const i64 tile = i64(blockIdx.x) * DEQUANTIZE_WARPS + warp;
    const int row_tile = int(tile / k_tiles), k_tile = int(tile % k_tiles);
    const int group = group_of<PASSES>(k_tile, t >> 1, tiles_per_group);
    if (row_tile >= row_tiles || group >= groups) return;

    uint4 v[TILE_VECTORS<BITS>];
#pragma unroll
    for (int i = 0; i < TILE_VECTORS<BITS>; ++i) v[i] = ld_global_nc_v4(tiles + tile * TILE_UINT4<BITS> + 32 * i + lane);
    u32 a[4][4];
    decode_tile<T>(words_of<BITS>(v), a);
    const S* s = scale + (i64(row_tile) * groups + group) * TILE_N;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // rows g and g + 8
        const int n = row_tile * TILE_N + g + 8 * half, k = k_tile * TILE_K + 16 * t;
        const float factor = to_float(s[g + 8 * half]);
        u32 pair[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // e = 0 1 of a step are in register `half`, e = 2 3 in register half + 2
            const u32 q = a[i >> 1][half + 2 * (i & 1)];
            const u32 low = from_float(T(), factor * to_float(T{u16(q)})).bits;
            pair[i] = low | u32(from_float(T(), factor * to_float(T{u16(q >> 16)})).bits) << 16;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (n < N && k + 8 * i < row_stride<T>(K))
                *reinterpret_cast<uint4*>(weight + i64(n) * row_stride<T>(K) + k + 8 * i) =
                    uint4{pair[4 * i], pair[4 * i + 1], pair[4 * i + 2], pair[4 * i + 3]};
    }
}

}  // namespace qat
