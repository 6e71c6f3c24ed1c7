// What all kernels share: a call's arguments, number formats, threads.  No torch, no exceptions.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace qat {

enum Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Input : int { kAsIs = 0, kDynamic = 1, kStatic = 2 };

// y (m, n) = residual (m, n) + fq(x) (m, k) @ dequantize(packed) (n, k).T + bias (n); as qat/kernels/reference.py
// computes it: rounded to x's type, and again after the residual is added.
struct Job {
  const void* x;
  void* y;
  const void* bias;       // x's type, or null
  const void* residual;   // x's type, or null; may be y
  const uint8_t* packed;  // (n, row_bytes): qat/packing.py draws a row; bfloat16 where bits is 16
  const void* scale;      // (n, k / group); null for ones
  int64_t m, n, k, group, row_bytes;
  int bits;
  Type x_type, scale_type;
  Input input;
  int input_bits;
  float input_scale;  // static
  float divisor;      // dynamic: a token's scale is absmax / divisor
  int threads;

  // How the kernels walk a row: blocks of codes that one step unpacks; spans of blocks (or of one) whose sums are
  // scaled together; `span_scales` scales apply to a span, each to its share of the vector's lanes.
  int64_t blocks, full_blocks, spans, span_blocks, span_scales, scale_stride;
  void* prepared;      // (m, blocks * block): activations in the order in which the kernel meets the codes
  int32_t* start;      // (m, spans, lanes): what integer sums start from
  float* token_scale;  // (m)
};

// What a decoder does to one token of each row between linear layers (decode.h), in the order of the structs in
// qat/kernels/cpu_decode.py.  Tensors are contiguous and of `type`.
struct Norm {  // y = weight * rounded(x / rms(x)), rounded
  const void *x, *weight;
  void* y;
  int64_t m, k;
  int32_t type;
  float epsilon;
};

struct Heads {
  int64_t batch, heads, kv_heads, head_dim, capacity;
  const int64_t *slot, *start;  // (1) where the token goes; (batch) the first slot that is not padding
};

struct Rotary {  // query (batch, heads, head_dim) and the token's slot of keys, values (batch, kv_heads, capacity, head_dim)
  const void *qkv, *cos, *sin;  // (batch, heads + 2 kv_heads, head_dim); (positions, head_dim)
  void *query, *keys, *values;
  Heads shape;
  int32_t type, unused;
};

struct Attend {  // out (batch, heads, head_dim), from slot `start` to `slot`
  const void *query, *keys, *values;
  void* out;
  Heads shape;
  int32_t type, threads;
  float scale, unused;
};

struct Gate {  // y (m, n) = silu(gate) * up, each rounded; gate_up (m, 2 n)
  const void* gate_up;
  void* y;
  int64_t m, n;
  int32_t type, threads;
};

// -- number formats ---------------------------------------------------------------------------------------------

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float from_bfloat16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

// Round half to even: adding 0x7fff carries into the kept half above one half, and at one half where the kept
// half is odd, which adds the missing 1.  A NaN could carry into infinity, so it is written out.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A half's exponent and mantissa, moved to a float's places, read 2^112 too small: the biases are 15 and 127.
// The product is exact, subnormals included.
inline float from_float16(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13, sign = uint32_t(half & 0x8000) << 16;
  if ((half & 0x7c00) == 0x7c00) return float_of(sign | 0x7f800000 | magnitude);
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}

// Below 2^-14 halves are multiples of 2^-24, the spacing of floats in [0.5, 1): adding 0.5 rounds to one, half to
// even.  From there on as `to_bfloat16`, 13 bits being dropped; a carry into the exponent is right, to infinity too.
inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x47800000) return uint16_t(sign | 0x7c00);  // 2^16 and above
  if (magnitude < 0x38800000) return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

inline float load_as_float(const void* data, Type type, int64_t i) {
  if (type == kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t half = static_cast<const uint16_t*>(data)[i];
  return type == kBFloat16 ? from_bfloat16(half) : from_float16(half);
}

inline void store_float(void* data, Type type, int64_t i, float value) {
  if (type == kFloat32) static_cast<float*>(data)[i] = value;
  else static_cast<uint16_t*>(data)[i] = type == kBFloat16 ? to_bfloat16(value) : to_float16(value);
}

// A float as `type` holds it.
inline float rounded(float value, Type type) {
  if (type == kFloat32) return value;
  return type == kBFloat16 ? from_bfloat16(to_bfloat16(value)) : from_float16(to_float16(value));
}

// -- threads ----------------------------------------------------------------------------------------------------

// OpenMP's runtime is called by name and not through pragmas, and the library is linked without one: the name
// resolves to the runtime that torch has loaded, so that its threads do the work; two runtimes would fight for the
// cores.  It also frees the build from the compiler's own OpenMP (clang's has other entry names).  Weak: where torch
// has no such runtime, the address is null and one thread does everything.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

// body.run(first, last) for chunks of [0, count), on up to `threads` threads; chunks go to whoever is free.
template <class Body>
void parallel(const Body& body, int64_t count, int64_t chunk, int threads) {
  struct Shared {
    const Body& body;
    int64_t count, chunk;
    std::atomic<int64_t> next;
    static void work(void* self) {
      Shared& s = *static_cast<Shared*>(self);
      for (int64_t i = s.next.fetch_add(s.chunk); i < s.count; i = s.next.fetch_add(s.chunk))
        s.body.run(i, i + s.chunk < s.count ? i + s.chunk : s.count);
    }
  } shared{body, count, chunk, {0}};
  if (threads > 1 && count > chunk && GOMP_parallel) GOMP_parallel(Shared::work, &shared, unsigned(threads), 0);
  else Shared::work(&shared);
}

}  // namespace qat
