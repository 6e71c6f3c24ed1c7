// One tile of weights times 8 tokens, for each type of activations: all that linear_small and linear_medium do not share.
//
//     Multiply<f16 or bf16, BITS, PASSES>  codes become f16 or bf16; float sums of scale * (codes x activations)
//     Multiply<s8, BITS, PASSES>           codes are bytes; exact int sums of a tile, times its scale, in float sums
//     Multiply<s8, BITS, 0>                one scale a row: exact int sums over all of k, scaled by epilogue.cuh
//
// PASSES are the groups in a tile: 2 where groups are 32 wide.  Sums are in units of 1 / UNIT.
// Alignment: layout.cuh.  Reference: qat.kernels.reference.packed_linear.  Run on the emulator, never yet on a GPU.
#pragma once
#include "layout.cuh"

namespace qat {

template <class In, int BITS, int PASSES_>
struct Multiply {
    static constexpr int PASSES = PASSES_, UNIT = 1;
    using Sum = float;
    using Tokens = Activations;
    struct Tile { u32 a[4][4]; };

    static PTX_FN Tile tile(const Words<BITS>& w) {
        Tile tile;
        decode_tile<In>(w, tile.a);
        return tile;
    }
    static PTX_FN Tokens tokens(const uint4 (&v)[2]) { return activations_of(v[0], v[1]); }
    static PTX_FN void add(const Tile& tile, const Tokens& x, int pass, float scale_g, float scale_g8, Sum (&total)[4]) {
        multiply_tile<In, PASSES>(tile.a, x, pass, scale_g, scale_g8, total);
    }
};

template <int BITS, int PASSES_>
struct Multiply<s8, BITS, PASSES_> {
    static constexpr bool WHOLE = PASSES_ == 0;
    static constexpr int PASSES = WHOLE ? 1 : PASSES_, UNIT = BITS == 4 ? 16 : 1;
    template <bool, class A, class> struct Choose { using Type = A; };
    template <class A, class B> struct Choose<false, A, B> { using Type = B; };
    using Sum = typename Choose<WHOLE, int, float>::Type;
    struct Tokens { u32 word[4]; };
    struct Tile { u32 a[2][4]; };

    // INT8: the words are the registers.  INT4: u = q + 8 in the upper half of a byte, its upper bit flipped, is 16 q in
    // two's complement.  Even nibbles of a word are row g, odd ones row g + 8, both in the order e0 e2 e1 e3.
    static PTX_FN Tile tile(const Words<BITS>& w) {
        Tile tile;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            u32& a = tile.a[i >> 2][i & 3];
            if constexpr (BITS == 8) a = w.word[i];
            else a = lop3<AND_XOR>(i & 1 ? w.word[i >> 1] : w.word[i >> 1] << 4, 0xf0f0f0f0u, 0x80808080u);
        }
        return tile;
    }

    static PTX_FN Tokens tokens(const uint4 (&v)[1]) {
        Tokens x{{v[0].x, v[0].y, v[0].z, v[0].w}};
        if constexpr (BITS == 4)
#pragma unroll
            for (int i = 0; i < 4; ++i) x.word[i] = prmt(x.word[i], 0, 0x3120u);  // to e0 e2 e1 e3
        return x;
    }

    // A tile's sum is at most 2^20 in magnitude: 64 products of 16 * 8 * 128 (INT4) or 128 * 128.  From 2^23 to 2^24 a
    // float's unit in the last place is 1, so an int counted up from the bits of 3 * 2^22 is a float without conversion.
    static PTX_FN void add(const Tile& tile, const Tokens& x, int pass, float scale_g, float scale_g8, Sum (&total)[4]) {
        if constexpr (WHOLE) {
#pragma unroll
            for (int p = 0; p < 2; ++p) mma_m16n8k32(total, tile.a[p], x.word[2 * p], x.word[2 * p + 1]);
        } else {
            const int zero = 0x4b400000;
            const bool mine = PASSES == 1 || int(threadIdx.x & 3) >> 1 == pass;  // as in multiply_tile
            int sum[4] = {zero, zero, zero, zero};
#pragma unroll
            for (int p = 0; p < 2; ++p)
                mma_m16n8k32(sum, tile.a[p], mine ? x.word[2 * p] : 0, mine ? x.word[2 * p + 1] : 0);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                total[i] = fma_rn(i < 2 ? scale_g : scale_g8, as_float(sum[i]) - 12582912.f, total[i]);
        }
    }
};

}  // namespace qat
