// Linear layers on packed weights, for CPUs.  Compiled as one file by qat/kernels/cpu.py and called through ctypes.
//
//   weight_only.h   W4A16, W8A16        prepare.h      activations for a kernel
//   int8_input.h    W4A8, W8A8          linear.h       rows, tokens, spans, blocks
//   dequantize.h    tiles of weights    vector.h       float vectors
//   decode.h        what a decoder does between linear layers
//
// The headers are compiled once for each instruction set, in a namespace of its own; a call says which one it wants,
// and `qat_cpu_isa` says what this machine has.  Machines without AVX512 test that path under emulation.
#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define QAT_X86 1
#endif
#if defined(QAT_SIMDE)  // tests: AVX512 emulated on top of AVX2 (build with -mavx2 -mfma -mf16c)
#include "simde_avx512.h"
#endif

#if defined(__clang__)
#define QAT_PRAGMA(text) _Pragma(#text)
#define QAT_BEGIN(features) QAT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define QAT_END _Pragma("clang attribute pop")
#else
#define QAT_PRAGMA(text) _Pragma(#text)
#define QAT_BEGIN(features) _Pragma("GCC push_options") QAT_PRAGMA(GCC target(features))
#define QAT_END _Pragma("GCC pop_options")
#endif

namespace qat {

namespace portable {
#define QAT_ISA 0
#include "dequantize.h"
#include "vector.h"
#include "weight_only.h"
#include "int8_input.h"
#include "prepare.h"
#include "linear.h"
#include "decode.h"
#undef QAT_ISA
}  // namespace portable

#if defined(QAT_X86)

QAT_BEGIN("avx2,fma,f16c")
namespace avx2 {
#define QAT_ISA 1
#include "dequantize.h"
#include "vector.h"
#include "weight_only.h"
#include "int8_input.h"
#include "prepare.h"
#include "linear.h"
#include "decode.h"
#undef QAT_ISA
}  // namespace avx2
QAT_END

#if !defined(QAT_SIMDE)
QAT_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif
namespace avx512 {
#define QAT_ISA 2
#include "vector.h"
#include "weight_only.h"
#include "int8_input.h"
#include "prepare.h"
#include "linear.h"
#include "decode.h"
#undef QAT_ISA
}  // namespace avx512
#if !defined(QAT_SIMDE)
QAT_END
#endif

#endif  // QAT_X86

}  // namespace qat

#define QAT_EXPORT extern "C" __attribute__((visibility("default")))

// 0: portable, 1: AVX2 with FMA and F16C, 2: AVX512 with VNNI as well.
QAT_EXPORT int qat_cpu_isa() {
#if defined(QAT_SIMDE)
  return 2;
#elif defined(QAT_X86)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return 0;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vnni")
             ? 2
             : 1;
#else
  return 0;
#endif
}

// As in Job (common.h), in the order and types of ARGUMENTS in qat/kernels/cpu.py.
struct Arguments {
  const void *x, *y, *bias, *residual, *packed, *scale;
  int64_t m, n, k, group, row_bytes;
  int32_t bits, x_type, scale_type, input, input_bits, isa, threads;
  float input_scale, divisor;
};
static_assert(sizeof(Arguments) == 6 * sizeof(void*) + 40 + 36 + 4, "ARGUMENTS in qat/kernels/cpu.py");

// Returns 0, or 1 where memory ran out.
QAT_EXPORT int qat_linear(const void* arguments) {
  using namespace qat;
  Arguments a;
  std::memcpy(&a, arguments, sizeof a);
  Job job{};
  job.x = a.x, job.y = const_cast<void*>(a.y), job.bias = a.bias, job.residual = a.residual;
  job.packed = static_cast<const uint8_t*>(a.packed), job.scale = a.scale;
  job.m = a.m, job.n = a.n, job.k = a.k, job.group = a.group, job.row_bytes = a.row_bytes, job.bits = a.bits;
  job.x_type = Type(a.x_type), job.scale_type = Type(a.scale_type), job.input = Input(a.input);
  job.input_bits = a.input_bits, job.input_scale = a.input_scale, job.divisor = a.divisor, job.threads = a.threads;
#if defined(QAT_X86)
  if (a.isa == 2) return avx512::linear_of(job);
  if (a.isa == 1) return avx2::linear_of(job);
#endif
  return portable::linear_of(job);
}

// out (n, k) of `type` = codes * scale.
QAT_EXPORT void qat_dequantize(const void* packed, const void* scale, void* out, int64_t n, int64_t k, int64_t group,
                    int64_t row_bytes, int bits, int scale_type, int type, int isa, int threads) {
  using namespace qat;
  const uint8_t* bytes = static_cast<const uint8_t*>(packed);
#if defined(QAT_X86)
  if (isa > 0)
    return parallel(avx2::Dequantize{bytes, scale, out, k, group, row_bytes, bits, Type(scale_type), Type(type)}, n, 16,
                    threads);
#endif
  parallel(portable::Dequantize{bytes, scale, out, k, group, row_bytes, bits, Type(scale_type), Type(type)}, n, 16,
           threads);
}


// The functions of decode.h: their struct's address, and the instruction set.  They return 0, or 1 where memory ran out.
#if defined(QAT_X86)
#define QAT_BY_ISA(call) return isa == 2 ? avx512::call : isa == 1 ? avx2::call : portable::call
#else
#define QAT_BY_ISA(call) return portable::call
#endif
#define QAT_DECODE(name, Struct)                            \
  QAT_EXPORT int name(const void* arguments, int isa) {     \
    using namespace qat;                                    \
    Struct a;                                               \
    std::memcpy(static_cast<void*>(&a), arguments, sizeof a); \
    QAT_BY_ISA(run(a));                                     \
  }
QAT_DECODE(qat_norm, Norm)
QAT_DECODE(qat_rotary, Rotary)
QAT_DECODE(qat_attend, Attend)
QAT_DECODE(qat_gate, Gate)
