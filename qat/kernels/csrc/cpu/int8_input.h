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

struct W4A8 {
  using In = int8_t;
  using Sum = int32_t;
  static constexpr int block = 32, bytes = 16, offset = 8 | 8 << 4;
  static int position(int i) { return i; }
  struct Codes {
    uint8_t u[32];
  };
  static Codes unpack(const uint8_t* w) {
    Codes c;
    for (int i = 0; i < 16; i++) c.u[2 * i] = w[i] & 15, c.u[2 * i + 1] = w[i] >> 4;
    return c;
  }
  static void add(Sum& s, const Codes& c, const In* x) {
    for (int i = 0; i < 32; i++) s += int(c.u[i]) * int(x[i]);
  }
  static Sum start(const int32_t* s) { return *s; }
  static void store(int32_t* to, Sum s) { *to = s; }
  static Vec to_float(Sum s) { return float(s); }
};

struct W8A8 : W4A8 {
  static constexpr int bytes = 32, offset = 128;
  static Codes unpack(const uint8_t* w) {
    Codes c;
    std::memcpy(c.u, w, 32);
    return c;
  }
};

#elif QAT_ISA == 1

struct Int32Sums {
  using Sum = __m256i;
  static Sum start(const int32_t* s) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s)); }
  static void store(int32_t* to, Sum s) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), s); }
  static Vec to_float(Sum s) { return _mm256_cvtepi32_ps(s); }
};

// maddubs adds pairs of u8 * s8 with saturation at 2^15: two planes' pairs are 4 * 15 * 128 at most, far below.
struct W4A8 : Int32Sums {
  using In = int8_t;
  static constexpr int block = 64, bytes = 32, offset = 8 | 8 << 4;
  static int position(int i) { return i % 2 * 32 + i / 2; }
  struct Codes {
    __m256i even, odd;
  };
  static Codes unpack(const uint8_t* w) {
    const __m256i nibble = _mm256_set1_epi8(15), packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    return {_mm256_and_si256(packed, nibble), _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble)};
  }
  static void add(Sum& s, const Codes& c, const In* x) {
    const __m256i* a = reinterpret_cast<const __m256i*>(x);
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(c.even, _mm256_load_si256(a)),
                                           _mm256_maddubs_epi16(c.odd, _mm256_load_si256(a + 1)));
    s = _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

// maddubs would saturate (2 * 255 * 128 > 2^15): both sides are widened to 16 bits.
struct W8A8 : Int32Sums {
  using In = int16_t;
  static constexpr int block = 32, bytes = 32, offset = 128;
  static int position(int i) { return i; }
  struct Codes {
    __m256i u[2];
  };
  static Codes unpack(const uint8_t* w) {
    const __m128i* p = reinterpret_cast<const __m128i*>(w);
    return {{_mm256_cvtepu8_epi16(_mm_loadu_si128(p)), _mm256_cvtepu8_epi16(_mm_loadu_si128(p + 1))}};
  }
  static void add(Sum& s, const Codes& c, const In* x) {
    const __m256i* a = reinterpret_cast<const __m256i*>(x);
    s = _mm256_add_epi32(s, _mm256_madd_epi16(c.u[0], _mm256_load_si256(a)));
    s = _mm256_add_epi32(s, _mm256_madd_epi16(c.u[1], _mm256_load_si256(a + 1)));
  }
};

#else

// dpbusd adds four u8 * s8 to an int32 lane, without saturation.
struct Int32Sums {
  using In = int8_t;
  using Sum = __m512i;
  static Sum start(const int32_t* s) { return _mm512_loadu_si512(s); }
  static void store(int32_t* to, Sum s) { _mm512_storeu_si512(to, s); }
  static Vec to_float(Sum s) { return _mm512_cvtepi32_ps(s); }
};

struct W4A8 : Int32Sums {
  static constexpr int block = 128, bytes = 64, offset = 8 | 8 << 4;
  static int position(int i) { return i % 2 * 64 + i / 2; }
  struct Codes {
    __m512i even, odd;
  };
  static Codes unpack(const uint8_t* w) {
    const __m512i nibble = _mm512_set1_epi8(15), packed = _mm512_loadu_si512(w);
    return {_mm512_and_si512(packed, nibble), _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble)};
  }
  static void add(Sum& s, const Codes& c, const In* x) {
    s = _mm512_dpbusd_epi32(s, c.even, _mm512_loadu_si512(x));
    s = _mm512_dpbusd_epi32(s, c.odd, _mm512_loadu_si512(x + 64));
  }
};

struct W8A8 : Int32Sums {
  static constexpr int block = 64, bytes = 64, offset = 128;
  static int position(int i) { return i; }
  struct Codes {
    __m512i u;
  };
  static Codes unpack(const uint8_t* w) { return {_mm512_loadu_si512(w)}; }
  static void add(Sum& s, const Codes& c, const In* x) { s = _mm512_dpbusd_epi32(s, c.u, _mm512_loadu_si512(x)); }
};

#endif
