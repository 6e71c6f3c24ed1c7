// repack: canonical bytes -> the run-time layout of layout.cuh.
//
//     packed  [N][words]   the stream of qat.packing: codes u = q + 2^(BITS - 1), low bits first, `words` 32-bit words
//     tiles   [row tiles][k tiles][TILE_UINT4] uint4, padded to 16 rows and 64 columns with q = 0
//
// One thread writes one uint4, threads along a tile: 256 threads a block, as many blocks as it takes.  A thread reads
// the words of rows g and g + 8 that hold its columns; a warp writes 512 contiguous bytes.
// Alignment: tiles 16 bytes.  Reference: qat.packing.unpack.
// Registers: at most 32.  Run on the emulator, never yet on a GPU.
#pragma once
#include "layout.cuh"

namespace qat {

constexpr int REPACK_THREADS = 256;

// Word i of row n; codes outside of the matrix are replaced by q = 0.
template <int BITS>
PTX_FN u32 canonical_word(const u32* packed, int n, int i, int N, int K) {
    constexpr int CODES = 32 / BITS;
    constexpr u32 ZEROS = BITS == 4 ? 0x88888888u : 0x80808080u;
    const int left = K - i * CODES;  // codes from this word's first to the end of the row
    if (n >= N || left <= 0) return ZEROS;
    const u32 word = packed[i64(n) * ceil_div(K, CODES) + i];
    if (left >= CODES) return word;
    const u32 keep = (1u << BITS * left) - 1;
    return (word & keep) | (ZEROS & ~keep);
}

// Four codes e0 e1 e2 e3, nibbles 0 to 3, to nibbles 0, 4, 2, 6: e1 and e3 move up by 12 bits.
PTX_FN u32 spread(u32 codes) { return (codes & 0x0f0fu) | (codes & 0xf0f0u) << 12; }

// Word `index` of a lane's tile.
template <int BITS>
PTX_FN u32 tile_word(const u32* packed, int n, int k, int index, int N, int K) {
    if constexpr (BITS == 4) {
        const int word = k / 8 + index / 2, shift = 16 * (index & 1);  // a canonical word is two steps
        const u32 low = canonical_word<4>(packed, n, word, N, K) >> shift & 0xffff;
        const u32 high = canonical_word<4>(packed, n + 8, word, N, K) >> shift & 0xffff;
        return spread(low) | spread(high) << 4;
    } else {  // u = q + 128 to two's complement: the upper bit flips
        return canonical_word<8>(packed, n + 8 * (index & 1), k / 4 + index / 2, N, K) ^ 0x80808080u;
    }
}

template <int BITS>
__global__ void __launch_bounds__(REPACK_THREADS)
repack(const u32* __restrict__ packed, uint4* __restrict__ tiles, int N, int K) {
    const int k_tiles = ceil_div(K, TILE_K);
    const i64 i = i64(blockIdx.x) * REPACK_THREADS + threadIdx.x;
    const int lane = int(i % 32), vector = int(i / 32 % TILE_VECTORS<BITS>);
    const i64 tile = i / TILE_UINT4<BITS>;
    const int row_tile = int(tile / k_tiles), k_tile = int(tile % k_tiles);
    if (row_tile >= ceil_div(N, TILE_N)) return;
    const int n = row_tile * TILE_N + lane / 4, k = k_tile * TILE_K + 16 * (lane % 4);
    uint4 v;
    v.x = tile_word<BITS>(packed, n, k, 4 * vector, N, K);
    v.y = tile_word<BITS>(packed, n, k, 4 * vector + 1, N, K);
    v.z = tile_word<BITS>(packed, n, k, 4 * vector + 2, N, K);
    v.w = tile_word<BITS>(packed, n, k, 4 * vector + 3, N, K);
    tiles[i] = v;
}

}  // namespace qat
