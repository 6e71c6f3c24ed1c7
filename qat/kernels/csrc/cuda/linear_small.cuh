// linear_small: y = x W^T + bias for up to 8 tokens, W in INT4 or INT8, activations in f16, bf16 or INT8 (W4A16, W8A16,
// W4A8, W8A8), with the epilogues of epilogue.cuh.
//
//                    k ->   tile 0   1   2   3   4   5   6   7   8   9  ...
//     R row tiles (16 R n)  warp 0   1   2   3   4   5   6   7   0   1  ...      one block: 8 warps take turns along k
//
// Thread mapping: a warp multiplies R tiles of 16 n by 64 k with 8 tokens (multiply.cuh, layout.cuh); tokens m >= M are
// zero.  Weights go from global memory to registers, DEPTH tiles ahead, and the first ones are requested before
// griddepcontrol.wait: only x and what belongs to its tokens depends on the previous kernel.  Sums of a group are exact
// integers, times activations in f16 or bf16; the scale multiplies the sum.  The warps' parts are added in the order of
// the warps, so that the result does not depend on timing.
//
// Grid: (ceil(row tiles / R), ceil(M / 8)).  Alignment: weights, scales and rows of x (layout.cuh) 16 bytes.  SwiGLU: N
// is even, rows 2j and 2j + 1 are gate and up of column j.
// Reference: qat.kernels.reference.packed_linear, which rounds s * q (and INT8 activations) to T first; tests/kernels/
// has the tolerance.
// Registers: at most 128.  Run on the emulator, never yet on a GPU; DEPTH, WARPS and R are estimates.
#pragma once
#include "epilogue.cuh"
#include "multiply.cuh"

namespace qat {

constexpr int SMALL_WARPS = 8, SMALL_TOKENS = 8;

// Each lane keeps about 128 bytes in flight: 8 warps and 2 blocks on a multiprocessor are 64 KB of requests.
template <int BITS, int R>
constexpr int SMALL_DEPTH = R * TILE_VECTORS<BITS> <= 2 ? 4 : 2;

template <class In, class T, class S, int BITS, int PASSES, int R>
__global__ void __launch_bounds__(SMALL_WARPS * 32, 2)
linear_small(const uint4* __restrict__ tiles, const S* __restrict__ scale, const In* __restrict__ x,
             const float* __restrict__ token_scale, const T* __restrict__ bias, const T* __restrict__ residual,
             T* __restrict__ y, int M, int N, int K, int groups, int swiglu) {
    using Mul = Multiply<In, BITS, PASSES>;
    using Sum = typename Mul::Sum;
    constexpr int DEPTH = SMALL_DEPTH<BITS, R>, VECTORS = TILE_VECTORS<BITS>;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int k_tiles = ceil_div(K, TILE_K), row_tiles = ceil_div(N, TILE_N), tiles_per_group = k_tiles / groups;
    const int first_row_tile = blockIdx.x * R, first_token = blockIdx.y * SMALL_TOKENS;

    auto fetch_weights = [&](int k_tile, uint4 (&to)[R][VECTORS]) {
#pragma unroll
        for (int r = 0; r < R; ++r)
            if (k_tile < k_tiles && first_row_tile + r < row_tiles) {
                const i64 tile = i64(first_row_tile + r) * k_tiles + k_tile;
#pragma unroll
                for (int v = 0; v < VECTORS; ++v)
                    to[r][v] = ld_global_nc_v4(tiles + tile * TILE_UINT4<BITS> + 32 * v + lane);
            }
    };
    auto fetch_activations = [&](int k_tile) {
        const int m = first_token + g, k = k_tile * TILE_K + 16 * t, stride = row_stride<In>(K);
        uint4 v[sizeof(In)] = {};
#pragma unroll
        for (int i = 0; i < int(sizeof(In)); ++i)
            if (m < M && k + LOAD<In> * i < stride) v[i] = ld_global_v4(x + i64(m) * stride + k + LOAD<In> * i);
        return Mul::tokens(v);
    };

    uint4 ahead[DEPTH][R][VECTORS] = {};
    griddepcontrol_launch_dependents();
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) fetch_weights(warp + d * SMALL_WARPS, ahead[d]);
    griddepcontrol_wait();

    Sum total[R][4] = {};
    typename Mul::Tokens now = fetch_activations(warp);
    for (int first = warp; first < k_tiles; first += DEPTH * SMALL_WARPS) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {  // a compile-time index keeps `ahead` in registers
            const int k_tile = first + d * SMALL_WARPS;
            if (k_tile >= k_tiles) break;
            Words<BITS> words[R];
#pragma unroll
            for (int r = 0; r < R; ++r) words[r] = words_of<BITS>(ahead[d][r]);
            fetch_weights(k_tile + DEPTH * SMALL_WARPS, ahead[d]);
            const typename Mul::Tokens next = fetch_activations(k_tile + SMALL_WARPS);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                if (first_row_tile + r >= row_tiles) break;
                const typename Mul::Tile tile = Mul::tile(words[r]);
#pragma unroll
                for (int pass = 0; pass < Mul::PASSES; ++pass) {
                    const int group = group_of<Mul::PASSES>(k_tile, pass, tiles_per_group);
                    if (group >= groups) break;  // the second half of the last tile, behind K
                    const S* s = scale + (i64(first_row_tile + r) * groups + group) * TILE_N;
                    Mul::add(tile, now, pass, to_float(s[g]), to_float(s[g + 8]), total[r]);
                }
            }
            now = next;
        }
    }

    __shared__ Sum part[SMALL_WARPS][R * TILE_N][SMALL_TOKENS + 1];  // + 1 spreads the rows over the banks
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) part[warp][16 * r + g + 8 * (i >> 1)][2 * t + (i & 1)] = total[r][i];
    __syncthreads();
    const Output<T, S, Sum, Mul::UNIT> output{scale, token_scale, bias, residual, y, N, swiglu};
    for (int i = threadIdx.x; i < R * TILE_N * SMALL_TOKENS; i += SMALL_WARPS * 32) {
        const int row = i % (R * TILE_N), token = i / (R * TILE_N);
        const int n = first_row_tile * TILE_N + row, m = first_token + token;
        if (n >= N || m >= M) continue;
        output.store(m, n, [&](int d) {
            Sum sum = 0;
            for (int w = 0; w < SMALL_WARPS; ++w) sum += part[w][row + d][token];
            return sum;
        });
    }
}

}  // namespace qat
