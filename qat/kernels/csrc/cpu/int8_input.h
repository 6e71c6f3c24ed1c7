// W4A8 and W8A8: integer weights times integer activations.  Reference: packed_linear in qat/kernels/reference.py.
//
// A row of `packed` holds u = q + 2^(bits-1), lowest first (qat/packing.py):
//
//   W4   byte 0         byte 1         ...      W8   byte 0   byte 1   ...
//        | u1  |  u0  | | u3  |  u2  |               |  u0  | |  u1  |
//
// Sums over a group are exact in int32; then they become floats and are multiplied by the group's scale, and in the
// end by the token's.  The instructions multiply the unsigned u, so that each lane's sum starts from
// -2^(bits-1) * (the activations that it will meet): it ends as the lane's part of sum(q a), and stays below 2^24
// where that does.  That start is the sum over a row of u = 2^(bits-1), negated: `offset` as a byte of weights.
//
// Codes of activations are at most 128 in magnitude.  Int32 overflows from k * 255 * 128 / lanes = 2^31 on: k is at
// most 65536 here (cpu.py).
//
// W4 blocks split into planes: low nibbles (even codes), then high nibbles (odd codes), and so do activations.
// Included once for each instruction set (see vector.h).

#if QAT_ISA == 0

struct IntSums {
  using In = int8_t;
  using Sum = int32_t;
  static constexpr int block = 32;
  static int position(int i) { return i; }
  static Sum start(const int32_t* s) { return *s; }
  static void store(int32_t* to, Sum s) { *to = s; }
  static Vec to_float(Sum s) { return float(s); }
};

struct W4A8 : IntSums {
  static constexpr int bytes = 16, offset = 8 | 8 << 4;
  template <int T>
  static void step(Sum (&sums)[T], const uint8_t* w, const In* x, int64_t x_row) {
    for (int i = 0; i < 16; i++)
      for (int t = 0; t < T; t++)
        sums[t] += (w[i] & 15) * x[t * x_row + 2 * i] + (w[i] >> 4) * x[t * x_row + 2 * i + 1];
  }
};

struct W8A8 : IntSums {
  static constexpr int bytes = 32, offset = 128;
  template <int T>
  static void step(Sum (&sums)[T], const uint8_t* w, const In* x, int64_t x_row) {
    for (int i = 0; i < 32; i++)
      for (int t = 0; t < T; t++) sums[t] += w[i] * x[t * x_row + i];
  }
};

#elif QAT_ISA == 1

struct IntSums {
  using Sum = __m256i;
  static Sum start(const int32_t* s) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s)); }
  static void store(int32_t* to, Sum s) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), s); }
  static Vec to_float(Sum s) { return _mm256_cvtepi32_ps(s); }
};

// maddubs adds pairs of u8 * s8 with saturation at 2^15: two planes' pairs are 4 * 15 * 128 at most, far below.
struct W4A8 : IntSums {
  using In = int8_t;
  static constexpr int block = 64, bytes = 32, offset = 8 | 8 << 4;
  static int position(int i) { return i % 2 * 32 + i / 2; }
  template <int T>
  static void step(Sum (&sums)[T], const uint8_t* w, const In* x, int64_t x_row) {
    const __m256i nibble = _mm256_set1_epi8(15), packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i even = _mm256_and_si256(packed, nibble);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
    for (int t = 0; t < T; t++) {
      const __m256i* a = reinterpret_cast<const __m256i*>(x + t * x_row);
      const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, _mm256_load_si256(a)),
                                             _mm256_maddubs_epi16(odd, _mm256_load_si256(a + 1)));
      sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }
};

// maddubs would saturate (2 * 255 * 128 > 2^15): both sides are widened to 16 bits.
struct W8A8 : IntSums {
  using In = int16_t;
  static constexpr int block = 32, bytes = 32, offset = 128;
  static int position(int i) { return i; }
  template <int T>
  static void step(Sum (&sums)[T], const uint8_t* w, const In* x, int64_t x_row) {
    for (int i = 0; i < 32; i += 16) {
      const __m256i u = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + i)));
      for (int t = 0; t < T; t++) {
        const __m256i a = _mm256_load_si256(reinterpret_cast<const __m256i*>(x + t * x_row + i));
        sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(u, a));
      }
    }
  }
};

#else

// dpbusd adds four u8 * s8 to an int32 lane, without saturation.
struct IntSums {
  using In = int8_t;
  using Sum = __m512i;
  static Sum start(const int32_t* s) { return _mm512_loadu_si512(s); }
  static void store(int32_t* to, Sum s) { _mm512_storeu_si512(to, s); }
  static Vec to_float(Sum s) { return _mm512_cvtepi32_ps(s); }
};

struct W4A8 : IntSums {
  static constexpr int block = 128, bytes = 64, offset = 8 | 8 << 4;
  static int position(int i) { return i % 2 * 64 + i / 2; }
  template <int T>
  static void step(Sum (&sums)[T], const uint8_t* w, const In* x, int64_t x_row) {
    const __m512i nibble = _mm512_set1_epi8(15), packed = _mm512_loadu_si512(w);
    const __m512i even = _mm512_and_si512(packed, nibble);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
    for (int t = 0; t < T; t++) {
      const In* a = x + t * x_row;
      sums[t] = _mm512_dpbusd_epi32(sums[t], even, _mm512_loadu_si512(a));
      sums[t] = _mm512_dpbusd_epi32(sums[t], odd, _mm512_loadu_si512(a + 64));
    }
  }
};

struct W8A8 : IntSums {
  static constexpr int block = 64, bytes = 64, offset = 128;
  static int position(int i) { return i; }
  template <int T>
  static void step(Sum (&sums)[T], const uint8_t* w, const In* x, int64_t x_row) {
    const __m512i u = _mm512_loadu_si512(w);
    for (int t = 0; t < T; t++) sums[t] = _mm512_dpbusd_epi32(sums[t], u, _mm512_loadu_si512(x + t * x_row));
  }
};

#endif
