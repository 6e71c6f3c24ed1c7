// The run-time layout of the weights W[n][k]: as matrix A of mma.m16n8k16, so that tokens are the columns of B.
//
// A tile is 16 rows (n) by 64 columns (k).  Tiles lie one after the other along k, then along n; both are padded with
// zero weights.  Lane 4g + t of a warp owns rows g and g + 8 at k = 16t ... 16t + 15 of a tile:
//
//           k    0 ... 15   16 ... 31   32 ... 47   48 ... 63      a step s = 0 ... 3 multiplies k = 16t + 4s + e,
//     row g      |  t = 0  |   t = 1   |   t = 2   |   t = 3  |    e = 0 ... 3, of all four t: 16 of the 64 columns.
//     row g + 8  |  t = 0  |   t = 1   |   t = 2   |   t = 3  |    A step's A registers: a0 row g, e = 0 1; a1 row
//                                                                  g + 8, e = 0 1; a2 row g, e = 2 3; a3 row g + 8.
//
// mma wants lane t to hold columns 2t, 2t + 1 and 2t + 8, 2t + 9; any order of k is right that is the same in A and in
// B.  This one lets a lane read its activations as plain consecutive values: x[16t ... 16t + 15] in two 16-byte loads,
// and B registers of step s are its values 4s, 4s + 1 and 4s + 2, 4s + 3.
//
// INT4: a lane's tile is 4 words (one uint4), word s is step s.  Codes are u = q + 8, nibbles of a word are
//     nibble     7        6        5        4        3        2        1        0
//             e3 g+8   e3 g     e1 g+8   e1 g     e2 g+8   e2 g     e0 g+8   e0 g
// so that nibbles i and i + 4 are register a_i, 16 bits apart.  A tile is 512 bytes: uint4 index = lane.
//
// INT8: a lane's tile is 8 words (two uint4), words 2s and 2s + 1 are step s of rows g and g + 8, byte e is the code q
// in two's complement.  A tile is 1024 bytes: uint4 index = 32 * (s >> 1) + lane.
//
// INT8 activations (mma.m16n8k32) take the same tiles two steps at a time: step p = 0, 1 multiplies k = 16t + 8p + e,
// e = 0 ... 7, of all four t.  Its registers a0 a1 are step 2p of rows g and g + 8, a2 a3 step 2p + 1; b0 b1 are words
// 2p and 2p + 1 of a lane's 16 bytes of x.
//
// Scales lie as [row tile][group][16 rows], padded with zeros: a lane reads two.  Activations are [m][K rounded up to 16
// bytes], padded with zeros.  All of them are aligned to 16 bytes.  Run on the emulator, never yet on a GPU.
#pragma once
#include "ptx.cuh"

namespace qat {

constexpr int TILE_N = 16, TILE_K = 64;
template <int BITS> constexpr int TILE_VECTORS = BITS / 4;  // uint4 of a lane in a tile
template <int BITS> constexpr int TILE_UINT4 = 32 * TILE_VECTORS<BITS>;

PTX_FN int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A lane's part of one tile.
template <int BITS> struct Words { u32 word[BITS]; };

template <int BITS>
PTX_FN Words<BITS> words_of(const uint4 (&v)[TILE_VECTORS<BITS>]) {
    Words<BITS> w;
#pragma unroll
    for (int i = 0; i < TILE_VECTORS<BITS>; ++i) {
        w.word[4 * i] = v[i].x;
        w.word[4 * i + 1] = v[i].y;
        w.word[4 * i + 2] = v[i].z;
        w.word[4 * i + 3] = v[i].w;
    }
    return w;
}

// The A registers of step s, exactly q.  The codes become the mantissa of a float with a known exponent:
//   f16   0x6400 is 1024, one unit in the last place is 1: 0x6400 | u = 1024 + u, and 0x6400 | u << 4 = 1024 + 16 u.
//         (1024 + u) * 1 - 1032 = u - 8 = q;   (1024 + 16 u) / 16 - 72 = 64 + u - 72 = q.
//   bf16  0x4300 is 128, one unit in the last place is 1: 0x4300 | u = 128 + u, and 128 + u - 136 = q.  (Its 7 bits of
//         mantissa leave no room for u << 4.)
// All of these are exact: every value is an integer, or a multiple of 1/16, that the type holds.
PTX_FN void decode(f16, const Words<4>& w, int s, u32 (&a)[4]) {
    const u32 ones = 0x3c003c00u, minus_1032 = 0xe408e408u, sixteenths = 0x2c002c00u, minus_72 = 0xd480d480u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 bits = i < 2 ? w.word[s] : w.word[s] >> 8;
        if (i & 1) a[i] = fma_x2(f16(), lop3<AND_OR>(bits, 0x00f000f0u, 0x64006400u), sixteenths, minus_72);
        else a[i] = fma_x2(f16(), lop3<AND_OR>(bits, 0x000f000fu, 0x64006400u), ones, minus_1032);
    }
}

PTX_FN void decode(bf16, const Words<4>& w, int s, u32 (&a)[4]) {
    const u32 ones = 0x3f803f80u, minus_136 = 0xc308c308u;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        a[i] = fma_x2(bf16(), lop3<AND_OR>(w.word[s] >> (4 * i), 0x000f000fu, 0x43004300u), ones, minus_136);
}

// INT8, both types.  With MAGIC = 0x64 (f16, 1024) or 0x43 (bf16, 128) in the upper byte, a code's low 7 bits l and
// its sign bit give
//     MAGIC << 8 | l           = M + l
//     MAGIC << 8 | sign << 7   = M + 128 sign
// (f16: 0x80 is 128 units of 1; bf16: 0x80 is the lowest bit of the exponent, and 2 * 128 = 128 + 128.)  Their
// difference is l - 128 sign = q, in two's complement by definition; all three values are exact integers.
template <class T> struct Magic;
template <> struct Magic<f16> { static constexpr u32 BYTES = 0x64646464u, MINUS_ONES = 0xbc00bc00u; };
template <> struct Magic<bf16> { static constexpr u32 BYTES = 0x43434343u, MINUS_ONES = 0xbf80bf80u; };

template <class T>
PTX_FN void decode(T, const Words<8>& w, int s, u32 (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 even_odd = i < 2 ? 0x4140u : 0x4342u;  // from the top: magic, byte 1 or 3, magic, byte 0 or 2
        const u32 codes = prmt(w.word[2 * s + (i & 1)], Magic<T>::BYTES, even_odd);
        a[i] = fma_x2(T(), codes & 0xff80ff80u, Magic<T>::MINUS_ONES, codes & 0xff7fff7fu);
    }
}

// ---- a lane's activations: 16 consecutive values of one token, in 8 registers ----

struct Activations { u32 pair[8]; };

PTX_FN Activations activations_of(const uint4& low, const uint4& high) {
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

// Values of a 16-byte load, and in a row of x: K rounded up to whole loads.  The caller pads with zeros.
template <class In> constexpr int LOAD = 16 / sizeof(In);
template <class In>
PTX_FN int row_stride(int K) { return ceil_div(K, LOAD<In>) * LOAD<In>; }

// ---- one tile of weights times 8 tokens ----

template <class T, int BITS>
PTX_FN void decode_tile(const Words<BITS>& w, u32 (&a)[4][4]) {
#pragma unroll
    for (int s = 0; s < 4; ++s) decode(T(), w, s, a[s]);
}

// total += scale * (weights x activations), the scale on the exact integer products.  A step mixes k of all four t,
// and those are two groups where groups are 32 wide: each then has its own pass, the other's activations set to zero.
template <class T, int PASSES>
PTX_FN void multiply_tile(const u32 (&a)[4][4], const Activations& x, int pass, float scale_g, float scale_g8,
                          float (&total)[4]) {
    const bool mine = PASSES == 1 || int(threadIdx.x & 3) >> 1 == pass;
    float sum[4] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s) mma_m16n8k16(T(), sum, a[s], mine ? x.pair[2 * s] : 0, mine ? x.pair[2 * s + 1] : 0);
    total[0] += scale_g * sum[0];
    total[1] += scale_g * sum[1];
    total[2] += scale_g8 * sum[2];
    total[3] += scale_g8 * sum[3];
}

// The group of a tile's columns: 32 wide (two passes), a whole number of tiles wide, or all of k (one group).
template <int PASSES>
PTX_FN int group_of(int k_tile, int pass, int tiles_per_group) {
    return PASSES == 2 ? 2 * k_tile + pass : k_tile / tiles_per_group;
}

}  // namespace qat
