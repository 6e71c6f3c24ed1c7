// What becomes of a sum over k: y[m][n], or y[m][n / 2] for SwiGLU, in f16 or bf16.
//
//     value   = sum                                       activations in f16 or bf16
//             = (sum / UNIT) * token_scale[m]             INT8 activations; Sum is float: scaled group by group
//             = (sum * scale[n] / UNIT) * token_scale[m]  INT8 activations; Sum is int: one scale a row
//     linear  = round(value + bias[n])
//     y       = linear
//             = round(residual[m][n] + linear)            with a residual
//             = round(round(silu(gate)) * up)             SwiGLU: gate is linear of row 2j, up that of row 2j + 1
//
// Each round is to the type, so that a fused layer gives the bits of the same layers one after the other.  (silu is
// g / (1 + exp(-g)) in float, exp to a few units in the last place.)  UNIT is a power of two: dividing by it is exact.
// Reference: qat.kernels.reference.packed_linear and torch's silu.  Run on the emulator, never yet on a GPU.
#pragma once
#include "ptx.cuh"

namespace qat {

template <class T>
PTX_FN T silu(T gate) {
    const float g = to_float(gate), minus_log2_e = -1.4426950408889634f;
    return from_float(T(), div_rn(g, 1.f + exp2_approx(mul_rn(g, minus_log2_e))));
}

template <class T, class S, class Sum, int UNIT>
struct Output {
    const S* scale;
    const float* token_scale;  // null where activations are not INT8
    const T *bias, *residual;  // may be null
    T* y;
    int N, swiglu;

    PTX_FN float value(float sum, int m, int) const {
        return token_scale ? mul_rn(mul_rn(sum, 1.f / UNIT), ld_global(token_scale + m)) : sum;
    }
    PTX_FN float value(int sum, int m, int n) const {
        return mul_rn(mul_rn(float(sum), mul_rn(to_float(scale[n]), 1.f / UNIT)), ld_global(token_scale + m));
    }
    PTX_FN T linear(Sum sum, int m, int n) const {
        const float v = value(sum, m, n);
        return from_float(T(), bias ? v + to_float(bias[n]) : v);
    }

    // sum_of(d) is the sum of row n + d.  SwiGLU needs two; odd rows are written with the even ones before them.
    template <class SumOf>
    PTX_FN void store(int m, int n, SumOf sum_of) const {
        if (swiglu) {
            if (n & 1) return;
            const T gate = linear(sum_of(0), m, n), up = linear(sum_of(1), m, n + 1);
            y[i64(m) * (N / 2) + n / 2] = from_float(T(), to_float(silu(gate)) * to_float(up));
            return;
        }
        const i64 at = i64(m) * N + n;
        T out = linear(sum_of(0), m, n);
        if (residual) out = from_float(T(), to_float(ld_global(residual + at)) + to_float(out));
        y[at] = out;
    }
};

}  // namespace qat
