// W4A16 and W8A16: integer weights times float activations.  Reference: packed_linear in qat/kernels/reference.py.
//
// A row of `packed` holds u = q + 2^(bits-1), lowest first (qat/packing.py):
//
//   W4   byte 0         byte 1         ...      W8   byte 0   byte 1   ...
//        | u1  |  u0  | | u3  |  u2  |               |  u0  | |  u1  |
//
// A code becomes the float q, exactly, and is multiplied by x in float32; the sums over one group are multiplied by
// its scale.  Weights are never rounded to x's type, and x is never quantized.  `position(i)` says where code i of a
// block expects its activation: x is brought into that order once a call, which costs 1/n of the work.
//
// Included once for each instruction set (see vector.h).

#if QAT_ISA == 0

struct W4A16 {
  using In = float;
  using Sum = float;
  static constexpr int block = 32, bytes = 16, offset = 0;
  static int position(int i) { return i; }
  struct Codes {
    float q[32];
  };
  static Codes unpack(const uint8_t* w) {
    Codes c;
    for (int i = 0; i < 16; i++) c.q[2 * i] = float((w[i] & 15) - 8), c.q[2 * i + 1] = float((w[i] >> 4) - 8);
    return c;
  }
  static void add(Sum& s, const Codes& c, const In* x) {
    for (int i = 0; i < 32; i++) s += c.q[i] * x[i];
  }
  static Sum start(const int32_t*) { return 0.0f; }
  static Vec to_float(Sum s) { return s; }
};

struct W8A16 : W4A16 {
  static constexpr int bytes = 32;
  static Codes unpack(const uint8_t* w) {
    Codes c;
    for (int i = 0; i < 32; i++) c.q[i] = float(int(w[i]) - 128);
    return c;
  }
};

#elif QAT_ISA == 1

// A bfloat16 holds q in [-8, 7] exactly; its two bytes come from two 16-entry tables, which one shuffle each looks up
// for 32 codes.  Interleaving the bytes gives pairs of bfloat16, and the halves of a pair are two floats: the even
// one shifted up, the odd one with the even one masked off.
//
//   plane p (0: low nibbles, 1: high)   byte j of 128-bit lane L is code 32 L + 2 j + p
//   interleave half h, pair d, member e: j = 8 h + 2 d + e  ->  vector 4 p + 2 h + e, lane 4 L + d
struct W4A16 {
  using In = float;
  using Sum = __m256;
  static constexpr int block = 64, bytes = 32, offset = 0;
  static int position(int i) {
    const int lane = i / 32, h = i % 32 / 16, d = i % 16 / 4, e = i % 4 / 2, p = i % 2;
    return (4 * p + 2 * h + e) * 8 + 4 * lane + d;
  }
  struct Codes {
    __m256 q[8];
  };
  static Codes unpack(const uint8_t* w) {
    //              q      -8    -7    -6    -5    -4    -3    -2    -1  0     1     2     3     4     5     6     7
    //       bfloat16    c100  c0e0  c0c0  c0a0  c080  c040  c000  bf80  0  3f80  4000  4040  4080  40a0  40c0  40e0
    const __m256i upper = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        char(0xc1), char(0xc0), char(0xc0), char(0xc0), char(0xc0), char(0xc0), char(0xc0), char(0xbf), 0, 0x3f, 0x40,
        0x40, 0x40, 0x40, 0x40, 0x40));
    const __m256i lower = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, char(0xe0), char(0xc0), char(0xa0), char(0x80), 0x40, 0, char(0x80), 0, char(0x80), 0, 0x40, char(0x80),
        char(0xa0), char(0xc0), char(0xe0)));
    const __m256i nibble = _mm256_set1_epi8(15), odd = _mm256_set1_epi32(int(0xffff0000));
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i planes[2] = {_mm256_and_si256(packed, nibble),
                               _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble)};
    Codes c;
    for (int p = 0; p < 2; p++) {
      const __m256i high = _mm256_shuffle_epi8(upper, planes[p]), low = _mm256_shuffle_epi8(lower, planes[p]);
      const __m256i pairs[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
      for (int h = 0; h < 2; h++) {
        c.q[4 * p + 2 * h] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs[h], 16));
        c.q[4 * p + 2 * h + 1] = _mm256_castsi256_ps(_mm256_and_si256(pairs[h], odd));
      }
    }
    return c;
  }
  static void add(Sum& s, const Codes& c, const In* x) {
    for (int i = 0; i < 8; i++) s = _mm256_fmadd_ps(c.q[i], _mm256_load_ps(x + 8 * i), s);
  }
  static Sum start(const int32_t*) { return _mm256_setzero_ps(); }
  static Vec to_float(Sum s) { return s; }
};

struct W8A16 {
  using In = float;
  using Sum = __m256;
  static constexpr int block = 32, bytes = 32, offset = 0;
  static int position(int i) { return i; }
  struct Codes {
    __m256 q[4];
  };
  static Codes unpack(const uint8_t* w) {
    Codes c;
    for (int i = 0; i < 4; i++) {
      const __m256i u = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + 8 * i)));
      c.q[i] = _mm256_cvtepi32_ps(_mm256_sub_epi32(u, _mm256_set1_epi32(128)));
    }
    return c;
  }
  static void add(Sum& s, const Codes& c, const In* x) {
    for (int i = 0; i < 4; i++) s = _mm256_fmadd_ps(c.q[i], _mm256_load_ps(x + 8 * i), s);
  }
  static Sum start(const int32_t*) { return _mm256_setzero_ps(); }
  static Vec to_float(Sum s) { return s; }
};

#else

// One permutation looks 16 codes up in a table of 16 floats; it reads only the low 4 bits of each index, so that
// code i of 32-bit word L is selected by shifting all words down by 4 i:  code 8 L + i -> vector i, lane L.
struct W4A16 {
  using In = float;
  using Sum = __m512;
  static constexpr int block = 128, bytes = 64, offset = 0;
  static int position(int i) { return i % 8 * 16 + i / 8; }
  struct Codes {
    __m512 q[8];
  };
  static Codes unpack(const uint8_t* w) {
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i packed = _mm512_loadu_si512(w);
    Codes c;
    c.q[0] = _mm512_permutexvar_ps(packed, table);
    c.q[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4), table);
    c.q[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 8), table);
    c.q[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 12), table);
    c.q[4] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 16), table);
    c.q[5] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 20), table);
    c.q[6] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 24), table);
    c.q[7] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 28), table);
    return c;
  }
  static void add(Sum& s, const Codes& c, const In* x) {
    for (int i = 0; i < 8; i++) s = _mm512_fmadd_ps(c.q[i], _mm512_loadu_ps(x + 16 * i), s);
  }
  static Sum start(const int32_t*) { return _mm512_setzero_ps(); }
  static Vec to_float(Sum s) { return s; }
};

struct W8A16 {
  using In = float;
  using Sum = __m512;
  static constexpr int block = 32, bytes = 32, offset = 0;
  static int position(int i) { return i; }
  struct Codes {
    __m512 q[2];
  };
  static Codes unpack(const uint8_t* w) {
    Codes c;
    for (int i = 0; i < 2; i++) {
      const __m512i u = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * i)));
      c.q[i] = _mm512_cvtepi32_ps(_mm512_sub_epi32(u, _mm512_set1_epi32(128)));
    }
    return c;
  }
  static void add(Sum& s, const Codes& c, const In* x) {
    for (int i = 0; i < 2; i++) s = _mm512_fmadd_ps(c.q[i], _mm512_loadu_ps(x + 16 * i), s);
  }
  static Sum start(const int32_t*) { return _mm512_setzero_ps(); }
  static Vec to_float(Sum s) { return s; }
};

#endif
