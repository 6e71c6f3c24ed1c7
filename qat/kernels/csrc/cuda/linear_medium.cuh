// linear_medium: y = x W^T + bias for 9 tokens and more, W in INT4 or INT8, activations in f16, bf16 or INT8 (W4A16,
// W8A16, W4A8, W8A8), with the epilogues of epilogue.cuh.
//
//                        split 0              split 1
//         k ->    tile 0 1 2 3 ... | ... ... ... ... |          one block: 8 row tiles (128 n), 8 NT tokens, one split
//     warp 0    2 row tiles        |                 |          of k; 4 warps of 2 row tiles each
//     warp 1    2 row tiles        |                 |
//     warp 2    2 row tiles        |                 |          stage: 8 weight tiles, x[8 NT][64], 8 rows of scales
//     warp 3    2 row tiles        |                 |
//
// Thread mapping: all threads fill a stage with cp.async, MEDIUM_STAGES - 1 stages ahead; each warp multiplies its 2 row
// tiles with all NT times 8 tokens, which it reads from the stage (rows of 144 bytes, or 64 for INT8: no bank conflict).
// Weights of the first stages are requested before griddepcontrol.wait.
// One split writes y.  Several write parts [split][M][N], and sum_splits adds them in the order of the splits: the
// result does not depend on timing.
//
// Grid: (ceil(row tiles / 8), splits, ceil(M / (8 NT))), splits <= k tiles.  NT = 8 with PASSES = 2 spills registers:
// groups of 32 take two blocks of NT = 4 instead.  Alignment: weights, scales and rows of
// x (layout.cuh) 16 bytes.
// SwiGLU: N is even, rows 2j and 2j + 1 are gate and up of column j.
// Reference: qat.kernels.reference.packed_linear, which rounds s * q (and INT8 activations) to T first; tests/kernels/
// has the tolerance.
// Registers: at most 232.  Run on the emulator, never yet on a GPU; the numbers of stages and warps are estimates.
#pragma once
#include "epilogue.cuh"
#include "multiply.cuh"

namespace qat {

constexpr int MEDIUM_WARPS = 4, MEDIUM_R = 2, MEDIUM_STAGES = 4;
constexpr int MEDIUM_ROW_TILES = MEDIUM_WARPS * MEDIUM_R, MEDIUM_ROWS = MEDIUM_ROW_TILES * TILE_N;

template <class In, class S, int BITS, int PASSES, int NT>
struct MediumStage {
    uint4 tile[MEDIUM_ROW_TILES][TILE_UINT4<BITS>];
    // 16-byte reads of 8 lanes fall into different banks: of two rows of 64 bytes, or of rows of 128 + 16.
    alignas(16) In x[8 * NT][TILE_K + (sizeof(In) == 1 ? 0 : 8)];
    alignas(16) S scale[MEDIUM_ROW_TILES][Multiply<In, BITS, PASSES>::PASSES][TILE_N];
};

// After the last stage the same memory holds the block's results, to be written in rows of y.
template <int NT, class Sum>
struct MediumResult { Sum sum[8 * NT][MEDIUM_ROWS + 1]; };

template <class In, class S, int BITS, int PASSES, int NT>
constexpr int MEDIUM_SHARED_BYTES =
    MEDIUM_STAGES * sizeof(MediumStage<In, S, BITS, PASSES, NT>) > sizeof(MediumResult<NT, float>)
        ? MEDIUM_STAGES * sizeof(MediumStage<In, S, BITS, PASSES, NT>)
        : sizeof(MediumResult<NT, float>);

template <class In, class T, class S, int BITS, int PASSES, int NT, class Sum = typename Multiply<In, BITS, PASSES>::Sum>
__global__ void __launch_bounds__(MEDIUM_WARPS * 32, 2)
linear_medium(const uint4* __restrict__ tiles, const S* __restrict__ scale, const In* __restrict__ x,
              const float* __restrict__ token_scale, const T* __restrict__ bias, const T* __restrict__ residual,
              T* __restrict__ y, Sum* __restrict__ parts, int M, int N, int K, int groups, int swiglu) {
    using Mul = Multiply<In, BITS, PASSES>;
    using Stage = MediumStage<In, S, BITS, PASSES, NT>;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int k_tiles = ceil_div(K, TILE_K), row_tiles = ceil_div(N, TILE_N), tiles_per_group = k_tiles / groups;
    const int first_row_tile = blockIdx.x * MEDIUM_ROW_TILES, first_token = blockIdx.z * 8 * NT;
    const int split = blockIdx.y, splits = gridDim.y;
    const int begin = int(i64(split) * k_tiles / splits), end = int(i64(split + 1) * k_tiles / splits);
    DYNAMIC_SHARED(uint4, dynamic);
    Stage* stages = reinterpret_cast<Stage*>(dynamic);

    auto fill_weights = [&](int k_tile, Stage& stage) {
        if (k_tile >= end) return;
#pragma unroll 2
        for (int i = threadIdx.x; i < MEDIUM_ROW_TILES * TILE_UINT4<BITS>; i += MEDIUM_WARPS * 32) {
            const int r = i / TILE_UINT4<BITS>, vector = i % TILE_UINT4<BITS>;
            const bool exists = first_row_tile + r < row_tiles;
            const i64 tile = i64(exists ? first_row_tile + r : 0) * k_tiles + k_tile;
            cp_async_16(&stage.tile[r][vector], tiles + tile * TILE_UINT4<BITS> + vector, exists ? 16 : 0);
        }
        constexpr int CHUNKS = TILE_N * sizeof(S) / 16;  // of 16 bytes in one group's scales
#pragma unroll 2
        for (int i = threadIdx.x; i < MEDIUM_ROW_TILES * Mul::PASSES * CHUNKS; i += MEDIUM_WARPS * 32) {
            const int chunk = i % CHUNKS, pass = i / CHUNKS % Mul::PASSES, r = i / (CHUNKS * Mul::PASSES);
            const int group = group_of<Mul::PASSES>(k_tile, pass, tiles_per_group);
            const bool exists = first_row_tile + r < row_tiles && group < groups;
            const S* from = scale + (exists ? (i64(first_row_tile + r) * groups + group) * TILE_N : 0);
            cp_async_16(&stage.scale[r][pass][16 / sizeof(S) * chunk], from + 16 / sizeof(S) * chunk, exists ? 16 : 0);
        }
    };
    auto fill_x = [&](int k_tile, Stage& stage) {
        if (k_tile >= end) return;
#pragma unroll 2
        for (int i = threadIdx.x; i < 8 * NT * TILE_K / LOAD<In>; i += MEDIUM_WARPS * 32) {
            const int token = i / (TILE_K / LOAD<In>), column = i % (TILE_K / LOAD<In>) * LOAD<In>;
            const int m = first_token + token, k = k_tile * TILE_K + column, stride = row_stride<In>(K);
            const bool exists = m < M && k < stride;
            cp_async_16(&stage.x[token][column], exists ? x + i64(m) * stride + k : x, exists ? 16 : 0);
        }
    };

    griddepcontrol_launch_dependents();
#pragma unroll 1
    for (int i = 0; i < MEDIUM_STAGES - 1; ++i) fill_weights(begin + i, stages[i]);
    griddepcontrol_wait();
#pragma unroll 1
    for (int i = 0; i < MEDIUM_STAGES - 1; ++i) {
        fill_x(begin + i, stages[i]);
        cp_async_commit();
    }

    Sum total[MEDIUM_R][NT][4] = {};
    for (int i = 0; begin + i < end; ++i) {
        cp_async_wait_group<MEDIUM_STAGES - 2>();
        __syncthreads();  // every thread's part of this stage has landed, and nobody still reads the one before
        Stage& next = stages[(i + MEDIUM_STAGES - 1) % MEDIUM_STAGES];
        fill_weights(begin + i + MEDIUM_STAGES - 1, next);
        fill_x(begin + i + MEDIUM_STAGES - 1, next);
        cp_async_commit();

        const Stage& stage = stages[i % MEDIUM_STAGES];
        typename Mul::Tile tile[MEDIUM_R];
#pragma unroll
        for (int r = 0; r < MEDIUM_R; ++r) {
            uint4 v[TILE_VECTORS<BITS>];
#pragma unroll
            for (int j = 0; j < TILE_VECTORS<BITS>; ++j) v[j] = ld_shared_v4(&stage.tile[MEDIUM_R * warp + r][32 * j + lane]);
            tile[r] = Mul::tile(words_of<BITS>(v));
        }
#pragma unroll
        for (int j = 0; j < NT; ++j) {
            const uint4* from = reinterpret_cast<const uint4*>(&stage.x[8 * j + g][16 * t]);
            uint4 v[sizeof(In)];
#pragma unroll
            for (int i = 0; i < int(sizeof(In)); ++i) v[i] = ld_shared_v4(from + i);
            const typename Mul::Tokens now = Mul::tokens(v);
#pragma unroll
            for (int r = 0; r < MEDIUM_R; ++r)
#pragma unroll
                for (int pass = 0; pass < Mul::PASSES; ++pass) {
                    const S* s = stage.scale[MEDIUM_R * warp + r][pass];
                    Mul::add(tile[r], now, pass, to_float(s[g]), to_float(s[g + 8]), total[r][j]);
                }
        }
    }

    __syncthreads();  // the stages have been read
    MediumResult<NT, Sum>& result = *reinterpret_cast<MediumResult<NT, Sum>*>(dynamic);
#pragma unroll
    for (int r = 0; r < MEDIUM_R; ++r)
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                result.sum[8 * j + 2 * t + (i & 1)][16 * (MEDIUM_R * warp + r) + g + 8 * (i >> 1)] = total[r][j][i];
    __syncthreads();
    const Output<T, S, Sum, Mul::UNIT> output{scale, token_scale, bias, residual, y, N, swiglu};
#pragma unroll 2
    for (int i = threadIdx.x; i < 8 * NT * MEDIUM_ROWS; i += MEDIUM_WARPS * 32) {
        const int token = i / MEDIUM_ROWS, row = i % MEDIUM_ROWS;
        const int n = first_row_tile * TILE_N + row, m = first_token + token;
        if (n >= N || m >= M) continue;
        if (splits > 1) parts[(i64(split) * M + m) * N + n] = result.sum[token][row];
        else output.store(m, n, [&](int d) { return result.sum[token][row + d]; });
    }
}

// The sum of row n is parts[0][m][n] + parts[1][m][n] + ..., in this order; then the epilogue.  One thread a sum, 256 a
// block.
constexpr int SUM_THREADS = 256;

template <class T, class S, class Sum, int UNIT>
__global__ void __launch_bounds__(SUM_THREADS)
sum_splits(const Sum* __restrict__ parts, const S* __restrict__ scale, const float* __restrict__ token_scale,
           const T* __restrict__ bias, const T* __restrict__ residual, T* __restrict__ y, int M, int N, int splits,
           int swiglu) {
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    const i64 i = i64(blockIdx.x) * SUM_THREADS + threadIdx.x, count = i64(M) * N;
    if (i >= count) return;
    const Output<T, S, Sum, UNIT> output{scale, token_scale, bias, residual, y, N, swiglu};
    output.store(int(i / N), int(i % N), [&](int d) {
        Sum sum = ld_global(parts + i + d);
        for (int split = 1; split < splits; ++split) sum += ld_global(parts + split * count + i + d);
        return sum;
    });
}

}  // namespace qat
