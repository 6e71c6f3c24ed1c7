// linear_medium: y = x W^T + bias for 9 to 64 tokens, W in INT4 or INT8, activations in f16 or bf16 (W4A16, W8A16).
//
//                        split 0              split 1
//         k ->    tile 0 1 2 3 ... | ... ... ... ... |          one block: 8 row tiles (128 n), 8 NT tokens, one split
//     warp 0    2 row tiles        |                 |          of k; 4 warps of 2 row tiles each
//     warp 1    2 row tiles        |                 |
//     warp 2    2 row tiles        |                 |          stage: 8 weight tiles, x[8 NT][64], 8 rows of scales
//     warp 3    2 row tiles        |                 |
//
// Thread mapping: all threads fill a stage with cp.async, MEDIUM_STAGES - 1 stages ahead; each warp multiplies its 2 row
// tiles with all NT times 8 tokens, which it reads from the stage (rows of 144 bytes: no bank conflict).  Weights of the
// first stages are requested before griddepcontrol.wait.
// One split writes y.  Several write float parts [split][M][N], and sum_splits adds them in the order of the splits: the
// result does not depend on timing.
//
// Grid: (ceil(row tiles / 8), splits, ceil(M / (8 NT))), splits <= k tiles.  NT = 8 with PASSES = 2 spills registers:
// groups of 32 take two blocks of NT = 4 instead.  Alignment: weights, scales and rows of
// x (layout.cuh) 16 bytes.
// Reference: qat.kernels.reference.packed_linear, which rounds s * q to x's type first; tests/kernels/ has the tolerance.
// Registers: at most 232.  Run on the emulator, never yet on a GPU; the numbers of stages and warps are estimates.
#pragma once
#include "layout.cuh"

namespace qat {

constexpr int MEDIUM_WARPS = 4, MEDIUM_R = 2, MEDIUM_STAGES = 4;
constexpr int MEDIUM_ROW_TILES = MEDIUM_WARPS * MEDIUM_R, MEDIUM_ROWS = MEDIUM_ROW_TILES * TILE_N;

template <class T, class S, int BITS, int PASSES, int NT>
struct MediumStage {
    uint4 tile[MEDIUM_ROW_TILES][TILE_UINT4<BITS>];
    alignas(16) T x[8 * NT][TILE_K + 8];  // + 8: 16-byte reads of 8 lanes fall into different banks
    alignas(16) S scale[MEDIUM_ROW_TILES][PASSES][TILE_N];
};

// After the last stage the same memory holds the block's results, to be written in rows of y.
template <int NT>
struct MediumResult { float sum[8 * NT][MEDIUM_ROWS + 1]; };

template <class T, class S, int BITS, int PASSES, int NT>
constexpr int MEDIUM_SHARED_BYTES = MEDIUM_STAGES * sizeof(MediumStage<T, S, BITS, PASSES, NT>) > sizeof(MediumResult<NT>)
                                        ? MEDIUM_STAGES * sizeof(MediumStage<T, S, BITS, PASSES, NT>)
                                        : sizeof(MediumResult<NT>);

template <class T, class S, int BITS, int PASSES, int NT>
__global__ void __launch_bounds__(MEDIUM_WARPS * 32, 2)
linear_medium(const uint4* __restrict__ tiles, const S* __restrict__ scale, const T* __restrict__ x,
              const T* __restrict__ bias, T* __restrict__ y, float* __restrict__ parts, int M, int N, int K, int groups) {
    using Stage = MediumStage<T, S, BITS, PASSES, NT>;
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
        for (int i = threadIdx.x; i < MEDIUM_ROW_TILES * PASSES * CHUNKS; i += MEDIUM_WARPS * 32) {
            const int chunk = i % CHUNKS, pass = i / CHUNKS % PASSES, r = i / (CHUNKS * PASSES);
            const int group = group_of<PASSES>(k_tile, pass, tiles_per_group);
            const bool exists = first_row_tile + r < row_tiles && group < groups;
            const S* from = scale + (exists ? (i64(first_row_tile + r) * groups + group) * TILE_N : 0);
            cp_async_16(&stage.scale[r][pass][16 / sizeof(S) * chunk], from + 16 / sizeof(S) * chunk, exists ? 16 : 0);
        }
    };
    auto fill_x = [&](int k_tile, Stage& stage) {
        if (k_tile >= end) return;
#pragma unroll 2
        for (int i = threadIdx.x; i < 8 * NT * 8; i += MEDIUM_WARPS * 32) {
            const int token = i / 8, column = i % 8 * 8, m = first_token + token, k = k_tile * TILE_K + column;
            const bool exists = m < M && k < row_stride(K);
            cp_async_16(&stage.x[token][column], exists ? x + i64(m) * row_stride(K) + k : x, exists ? 16 : 0);
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

    float total[MEDIUM_R][NT][4] = {};
    for (int i = 0; begin + i < end; ++i) {
        cp_async_wait_group<MEDIUM_STAGES - 2>();
        __syncthreads();  // every thread's part of this stage has landed, and nobody still reads the one before
        Stage& next = stages[(i + MEDIUM_STAGES - 1) % MEDIUM_STAGES];
        fill_weights(begin + i + MEDIUM_STAGES - 1, next);
        fill_x(begin + i + MEDIUM_STAGES - 1, next);
        cp_async_commit();

        const Stage& stage = stages[i % MEDIUM_STAGES];
        u32 a[MEDIUM_R][4][4];
#pragma unroll
        for (int r = 0; r < MEDIUM_R; ++r) {
            uint4 v[TILE_VECTORS<BITS>];
#pragma unroll
            for (int j = 0; j < TILE_VECTORS<BITS>; ++j) v[j] = ld_shared_v4(&stage.tile[MEDIUM_R * warp + r][32 * j + lane]);
            decode_tile<T>(words_of<BITS>(v), a[r]);
        }
#pragma unroll
        for (int j = 0; j < NT; ++j) {
            const uint4* from = reinterpret_cast<const uint4*>(&stage.x[8 * j + g][16 * t]);
            const Activations now = activations_of(ld_shared_v4(from), ld_shared_v4(from + 1));
#pragma unroll
            for (int r = 0; r < MEDIUM_R; ++r)
#pragma unroll
                for (int pass = 0; pass < PASSES; ++pass) {
                    const S* s = stage.scale[MEDIUM_R * warp + r][pass];
                    multiply_tile<T, PASSES>(a[r], now, pass, to_float(s[g]), to_float(s[g + 8]), total[r][j]);
                }
        }
    }

    __syncthreads();  // the stages have been read
    MediumResult<NT>& result = *reinterpret_cast<MediumResult<NT>*>(dynamic);
#pragma unroll
    for (int r = 0; r < MEDIUM_R; ++r)
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                result.sum[8 * j + 2 * t + (i & 1)][16 * (MEDIUM_R * warp + r) + g + 8 * (i >> 1)] = total[r][j][i];
    __syncthreads();
#pragma unroll 2
    for (int i = threadIdx.x; i < 8 * NT * MEDIUM_ROWS; i += MEDIUM_WARPS * 32) {
        const int token = i / MEDIUM_ROWS, row = i % MEDIUM_ROWS;
        const int n = first_row_tile * TILE_N + row, m = first_token + token;
        if (n >= N || m >= M) continue;
        const float sum = result.sum[token][row];
        if (splits > 1) parts[(i64(split) * M + m) * N + n] = sum;
        else y[i64(m) * N + n] = from_float(T(), bias ? sum + to_float(bias[n]) : sum);
    }
}

// y[m][n] = parts[0][m][n] + parts[1][m][n] + ... + bias[n], in this order.  One thread an element, 256 a block.
constexpr int SUM_THREADS = 256;

template <class T>
__global__ void __launch_bounds__(SUM_THREADS)
sum_splits(const float* __restrict__ parts, const T* __restrict__ bias, T* __restrict__ y, int M, int N, int splits) {
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    const i64 i = i64(blockIdx.x) * SUM_THREADS + threadIdx.x, count = i64(M) * N;
    if (i >= count) return;
    float sum = ld_global_f32(parts + i);
    for (int split = 1; split < splits; ++split) sum += ld_global_f32(parts + split * count + i);
    if (bias) sum += to_float(bias[i % N]);
    y[i] = from_float(T(), sum);
}

}  // namespace qat
