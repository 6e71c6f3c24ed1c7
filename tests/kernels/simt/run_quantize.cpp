// Runs the kernels of quantize.cuh in the emulator on the cases of a file, as run_cases does.
//
// For each case: its fields, x, then the norm's weight or the static scale (if any).  The results are codes, then scales.
#include <cstdio>
#include <cstdlib>

#include "quantize.cuh"

using namespace qat;

struct Case {  // 32-bit fields in the order of the file
    int id, norm, is_bf16, M, K, is_static, qmax, half_range, order, seed, touch;
    float eps;
};

static FILE *cases, *results;

template <class T>
static void fill(simt::Global<T>& buffer, bool from_previous_kernel = false) {
    if (fread(buffer.data(), sizeof(T), buffer.count, cases) != buffer.count) exit(2);
    buffer.lock(from_previous_kernel);
}

template <class T>
static std::string run_case(const Case& c) {
    const simt::Touch touch = c.touch ? simt::Touch::start : simt::Touch::end;
    const int padded = row_stride<s8>(c.K);
    simt::Global<T> x("x", size_t(c.M) * row_stride<T>(c.K), touch), weight("weight", c.norm ? row_stride<T>(c.K) : 0, touch);
    simt::Global<float> static_scale("static_scale", c.is_static, touch), token_scale("token_scale", c.M, touch);
    simt::Global<s8> codes("codes", size_t(c.M) * padded, touch);
    fill(x, true), fill(weight), fill(static_scale);
    const float* fixed = c.is_static ? static_scale.data() : nullptr;
    const simt::Options options{simt::Order(c.order), unsigned(c.seed)};
    const std::string error = simt::launch({unsigned(c.M)}, {QUANTIZE_THREADS}, padded * sizeof(T), options, [&] {
        if (c.norm)
            rmsnorm_quantize<T>(x.data(), weight.data(), codes.data(), token_scale.data(), c.K, c.eps, c.qmax, c.half_range);
        else quantize_tokens<T>(x.data(), fixed, codes.data(), token_scale.data(), c.K, c.qmax, c.half_range);
    });
    fwrite(codes.data(), 1, codes.count, results);
    fwrite(token_scale.data(), sizeof(float), c.M, results);
    return error;
}

int main(int, char** arguments) {
    cases = fopen(arguments[1], "rb");
    results = fopen(arguments[2], "wb");
    if (!cases || !results) return perror("run_quantize"), 2;
    for (Case c; fread(&c, sizeof c, 1, cases) == 1;) {
        const std::string error = c.is_bf16 ? run_case<bf16>(c) : run_case<f16>(c);
        if (error.empty()) printf("ok %d\n", c.id);
        else printf("FAIL %d %s\n", c.id, error.c_str());
        fflush(stdout);
    }
    return fclose(results) ? 2 : 0;
}
