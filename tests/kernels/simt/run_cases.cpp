// Runs the cases of a file in the emulator: repack, then a kernel on what it wrote.
//
//     run_cases CASES RESULTS      prints "ok ID" or "FAIL ID what happened" for each case
//
// CASES is written by tests/kernels/emulator.py: for each case the fields of Case, then packed, scales, x, and token
// scales, bias and residual (if any).  RESULTS gets what the kernels wrote.  INSTANCES and ONLY say what is compiled.
#include <cstdio>
#include <cstdlib>

#include "dequantize.cuh"
#include "linear_medium.cuh"
#include "linear_small.cuh"
#include "repack.cuh"

using namespace qat;

#ifndef INSTANCES  // types of activations, results and scales, bits, passes (0: one scale a row, INT8 activations)
#define INSTANCES                                                                                               \
    X(f16, f16, f16, 4, 1) X(f16, f16, f16, 4, 2) X(f16, f16, f16, 8, 1) X(f16, f16, f16, 8, 2)                 \
    X(f16, f16, float, 4, 1) X(f16, f16, float, 4, 2) X(f16, f16, float, 8, 1) X(f16, f16, float, 8, 2)         \
    X(bf16, bf16, bf16, 4, 1) X(bf16, bf16, bf16, 4, 2) X(bf16, bf16, bf16, 8, 1) X(bf16, bf16, bf16, 8, 2)     \
    X(bf16, bf16, float, 4, 1) X(bf16, bf16, float, 4, 2) X(bf16, bf16, float, 8, 1) X(bf16, bf16, float, 8, 2)
#endif

enum Kernel { SMALL, MEDIUM, DEQUANTIZE };
#ifndef ONLY
#define ONLY -1
#endif
constexpr bool built(Kernel kernel) { return ONLY < 0 || ONLY == kernel; }

struct Case {  // int32 fields in the order of the file; `variant` is R or NT
    int id, kernel, is_bf16, float_scale, bits, passes, variant, M, N, K, groups, splits, has_bias, order, seed, touch;
    int int8_input, has_residual, swiglu;
};

static FILE *cases, *results;

static void must_read(void* to, size_t bytes) {
    if (fread(to, 1, bytes, cases) != bytes) {
        fprintf(stderr, "the case file ends too early\n");
        exit(2);
    }
}

template <class T>
static void fill(simt::Global<T>& buffer, bool from_previous_kernel = false) {
    must_read(buffer.data(), buffer.count * sizeof(T));
    buffer.lock(from_previous_kernel);
}

template <class In, class T, class S, int BITS, int PASSES>
struct Run {
    const Case& c;
    const uint4* tiles;
    const S* scale;
    const In* x;
    const float* token_scale;
    const T *bias, *residual;
    T* y;
    simt::Options options;

    template <int R>
    std::string small() {
        const dim3 grid{unsigned(ceil_div(ceil_div(c.N, TILE_N), R)), unsigned(ceil_div(c.M, SMALL_TOKENS))};
        return simt::launch(grid, {SMALL_WARPS * 32}, 0, options, [&] {
            linear_small<In, T, S, BITS, PASSES, R>(tiles, scale, x, token_scale, bias, residual, y, c.M, c.N, c.K, c.groups,
                                                    c.swiglu);
        });
    }

    template <int NT>
    std::string medium() {
        using Mul = Multiply<In, BITS, PASSES>;
        using Sum = typename Mul::Sum;
        const dim3 grid{unsigned(ceil_div(ceil_div(c.N, TILE_N), MEDIUM_ROW_TILES)), unsigned(c.splits),
                        unsigned(ceil_div(c.M, 8 * NT))};
        simt::Global<Sum> parts("parts", c.splits > 1 ? size_t(c.splits) * c.M * c.N : 0);
        constexpr int shared = MEDIUM_SHARED_BYTES<In, S, BITS, PASSES, NT>;
        std::string error = simt::launch(grid, {MEDIUM_WARPS * 32}, shared, options, [&] {
            linear_medium<In, T, S, BITS, PASSES, NT>(tiles, scale, x, token_scale, bias, residual, y, parts.data(), c.M, c.N,
                                                      c.K, c.groups, c.swiglu);
        });
        if (!error.empty() || c.splits == 1) return error;
        parts.lock(true);
        return simt::launch({unsigned(ceil_div(c.M * c.N, SUM_THREADS))}, {SUM_THREADS}, 0, options, [&] {
            sum_splits<T, S, Sum, Mul::UNIT>(parts.data(), scale, token_scale, bias, residual, y, c.M, c.N, c.splits,
                                             c.swiglu);
        });
    }

    std::string dense() {
        const int all = ceil_div(c.N, TILE_N) * ceil_div(c.K, TILE_K);
        return simt::launch({unsigned(ceil_div(all, DEQUANTIZE_WARPS))}, {DEQUANTIZE_WARPS * 32}, 0, options,
                            [&] { dequantize<T, S, BITS, PASSES>(tiles, scale, y, c.N, c.K, c.groups); });
    }

    std::string run() {
        if constexpr (built(SMALL)) {
            if (c.kernel == SMALL && c.variant == 1) return small<1>();
            if (c.kernel == SMALL && c.variant == 2) return small<2>();
        }
        if constexpr (built(MEDIUM)) {
            if (c.kernel == MEDIUM && c.variant == 2) return medium<2>();
            if (c.kernel == MEDIUM && c.variant == 4) return medium<4>();
            if constexpr (PASSES != 2)  // see linear_medium.cuh
                if (c.kernel == MEDIUM && c.variant == 8) return medium<8>();
        }
        if constexpr (built(DEQUANTIZE) && PASSES > 0)
            if (c.kernel == DEQUANTIZE) return dense();
        return "no such kernel";
    }
};

template <class In, class T, class S, int BITS, int PASSES>
static std::string run_case(const Case& c) {
    const simt::Touch touch = c.touch ? simt::Touch::start : simt::Touch::end;
    const simt::Options options{simt::Order(c.order), unsigned(c.seed)};
    const int row_tiles = ceil_div(c.N, TILE_N), k_tiles = ceil_div(c.K, TILE_K);
    const size_t outputs = c.swiglu ? c.N / 2 : c.N;
    simt::Global<u32> packed("packed", size_t(c.N) * ceil_div(c.K, 32 / BITS), touch);
    simt::Global<S> scale("scale", size_t(row_tiles) * c.groups * TILE_N, touch);
    simt::Global<In> x("x", size_t(c.M) * row_stride<In>(c.K), touch);
    simt::Global<float> token_scale("token_scale", c.int8_input ? c.M : 0, touch);
    simt::Global<T> bias("bias", c.has_bias ? c.N : 0, touch), residual("residual", c.has_residual ? c.M * c.N : 0, touch);
    simt::Global<T> y("y", c.kernel == DEQUANTIZE ? size_t(c.N) * row_stride<T>(c.K) : c.M * outputs, touch);
    simt::Global<uint4> tiles("tiles", size_t(row_tiles) * k_tiles * TILE_UINT4<BITS>, touch);
    fill(packed), fill(scale), fill(x, true), fill(token_scale, true), fill(bias), fill(residual, true);

    std::string error = simt::launch({unsigned(ceil_div(int(tiles.count), REPACK_THREADS))}, {REPACK_THREADS}, 0, options,
                                     [&] { repack<BITS>(packed.data(), tiles.data(), c.N, c.K); });
    tiles.lock();
    if (error.empty())
        error = Run<In, T, S, BITS, PASSES>{c,
                                            tiles.data(),
                                            scale.data(),
                                            x.data(),
                                            c.int8_input ? token_scale.data() : nullptr,
                                            c.has_bias ? bias.data() : nullptr,
                                            c.has_residual ? residual.data() : nullptr,
                                            y.data(),
                                            options}
                    .run();
    fwrite(y.data(), sizeof(T), y.count, results);
    return error;
}

static std::string dispatch(const Case& c) {
#define X(IN, T, S, BITS, PASSES)                                                                                    \
    if (c.int8_input == (#IN[0] == 's') && c.is_bf16 == (#T[0] == 'b') && c.float_scale == (#S[1] == 'l') &&         \
        c.bits == BITS && c.passes == PASSES)                                                                        \
        return run_case<IN, T, S, BITS, PASSES>(c);
    INSTANCES
#undef X
    fprintf(stderr, "case %d: not among the instances of this build\n", c.id);
    exit(2);
}

int main(int, char** arguments) {
    cases = fopen(arguments[1], "rb");
    results = fopen(arguments[2], "wb");
    if (!cases || !results) return perror("run_cases"), 2;
    for (Case c; fread(&c, sizeof c, 1, cases) == 1;) {
        const std::string error = dispatch(c);
        if (error.empty()) printf("ok %d\n", c.id);
        else printf("FAIL %d %s\n", c.id, error.c_str());
        fflush(stdout);
    }
    return fclose(results) ? 2 : 0;
}
