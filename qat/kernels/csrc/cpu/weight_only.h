// W4A16 and W8A16: integer weights times float activations.  Reference: packed_linear in qat/kernels/reference.py.
// BF16: bfloat16 weights, exactly, times float activations, summed in float32; for layers that are not quantized.
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

struct FloatSums {
  using In = float;
  using Sum = float;
  static constexpr int block = 32, offset = 0;
  static int position(int i) { return i; }
  static Sum start(const int32_t*) { return 0.0f; }
  static Vec to_float(Sum s) { return s; }
};

struct W4A16 : FloatSums {
  static constexpr int bytes = 16;
  template <int T>
  static void step(Sum (&sums)[T], const uint8_t* w, const In* x, int64_t x_row) {
    for (int i = 0; i < 16; i++) {
      const float even = float((w[i] & 15) - 8), odd = float((w[i] >> 4) - 8);
      for (int t = 0; t < T; t++) sums[t] += even * x[t * x_row + 2 * i] + odd * x[t * x_row + 2 * i + 1];
    }
  }
};

struct W8A16 : FloatSums {
  static constexpr int bytes = 32;
  template <int T>
  static void step(Sum (&sums)[T], const uint8_t* w, const In* x, int64_t x_row) {
    for (int i = 0; i < 32; i++)
      for (int t = 0; t < T; t++) sums[t] += float(int(w[i]) - 128) * x[t * x_row + i];
  }
};

struct BF16 : FloatSums {
  static constexpr int bytes = 64;
  template <int T>
  static void step(Sum (&sums)[T], const uint8_t* w, const In* x, int64_t x_row) {
    for (int i = 0; i < 32; i++)
      for (int t = 0; t < T; t++) sums[t] += from_bfloat16(uint16_t(w[2 * i] | w[2 * i + 1] << 8)) * x[t * x_row + i];
  }
};

#elif QAT_ISA == 1

// Two vectors a sum: a chain of multiply-adds, each waiting for the one before, is half as long.
struct FloatSums {
  using In = float;
  struct Sum {
    __m256 part[2];
  };
  static constexpr int offset = 0;
  static Sum start(const int32_t*) { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  static Vec to_float(Sum s) { return _mm256_add_ps(s.part[0], s.part[1]); }
  template <int T>
  static void add(Sum (&sums)[T], int part, __m256 q, const In* x, int64_t x_row) {
    for (int t = 0; t < T; t++)
      sums[t].part[part] = _mm256_fmadd_ps(q, _mm256_load_ps(x + t * x_row), sums[t].part[part]);
  }
};

// A bfloat16 holds q in [-8, 7] exactly; its two bytes come from two 16-entry tables, which one shuffle each looks up
// for 32 codes.  Interleaving the bytes gives pairs of bfloat16, and the halves of a pair are two floats: the even
// one shifted up, the odd one with the even one masked off.
//
//   plane p (0: low nibbles, 1: high)   byte j of 128-bit lane L is code 32 L + 2 j + p
//   interleave half h, pair d, member e: j = 8 h + 2 d + e  ->  vector 4 p + 2 h + e, lane 4 L + d
struct W4A16 : FloatSums {
  static constexpr int block = 64, bytes = 32;
  static int position(int i) {
    const int lane = i / 32, h = i % 32 / 16, d = i % 16 / 4, e = i % 4 / 2, p = i % 2;
    return (4 * p + 2 * h + e) * 8 + 4 * lane + d;
  }
  template <int T>
  static void step(Sum (&sums)[T], const uint8_t* w, const In* x, int64_t x_row) {
    const __m256i nibble = _mm256_set1_epi8(15), packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    plane(sums, _mm256_and_si256(packed, nibble), x, x_row);
    plane(sums, _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble), x + 32, x_row);
  }
  template <int T>
  static void plane(Sum (&sums)[T], __m256i u, const In* x, int64_t x_row) {
    //              q      -8    -7    -6    -5    -4    -3    -2    -1  0     1     2     3     4     5     6     7
    //       bfloat16    c100  c0e0  c0c0  c0a0  c080  c040  c000  bf80  0  3f80  4000  4040  4080  40a0  40c0  40e0
    const __m256i upper = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        char(0xc1), char(0xc0), char(0xc0), char(0xc0), char(0xc0), char(0xc0), char(0xc0), char(0xbf), 0, 0x3f, 0x40,
        0x40, 0x40, 0x40, 0x40, 0x40));
    const __m256i lower = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, char(0xe0), char(0xc0), char(0xa0), char(0x80), 0x40, 0, char(0x80), 0, char(0x80), 0, 0x40, char(0x80),
        char(0xa0), char(0xc0), char(0xe0)));
    const __m256i high = _mm256_shuffle_epi8(upper, u), low = _mm256_shuffle_epi8(lower, u);
    pairs(sums, _mm256_unpacklo_epi8(low, high), x, x_row);
    pairs(sums, _mm256_unpackhi_epi8(low, high), x + 16, x_row);
  }
  template <int T>
  static void pairs(Sum (&sums)[T], __m256i two, const In* x, int64_t x_row) {
    const __m256i odd = _mm256_set1_epi32(int(0xffff0000));
    add(sums, 0, _mm256_castsi256_ps(_mm256_slli_epi32(two, 16)), x, x_row);
    add(sums, 1, _mm256_castsi256_ps(_mm256_and_si256(two, odd)), x + 8, x_row);
  }
};

struct W8A16 : FloatSums {
  static constexpr int block = 32, bytes = 32;
  static int position(int i) { return i; }
  template <int T>
  static void step(Sum (&sums)[T], const uint8_t* w, const In* x, int64_t x_row) {
    for (int i = 0; i < 4; i++) {
      const __m256i u = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + 8 * i)));
      add(sums, i % 2, _mm256_cvtepi32_ps(_mm256_sub_epi32(u, _mm256_set1_epi32(128))), x + 8 * i, x_row);
    }
  }
};

// A 32-bit word is two bfloat16: the even one shifted up is a float, and so is the odd one with the even masked off.
struct BF16 : FloatSums {
  static constexpr int block = 32, bytes = 64;
  static int position(int i) { return i / 16 * 16 + i % 2 * 8 + i % 16 / 2; }
  template <int T>
  static void step(Sum (&sums)[T], const uint8_t* w, const In* x, int64_t x_row) {
    for (int i = 0; i < 2; i++)
      W4A16::pairs(sums, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * i)), x + 16 * i, x_row);
  }
};

#else

// R rows at once: each activation is loaded once for all of them.  With 4 tokens of 2,048 inputs x fills the first
// cache, and reading it again for every row took longer than the arithmetic.
struct FloatSums {
  using In = float;
  using Sum = __m512;
  static constexpr int offset = 0;
  static Sum start(const int32_t*) { return _mm512_setzero_ps(); }
  static Vec to_float(Sum s) { return s; }
  template <int R, int T>
  static void add(Sum (&sums)[R][T], const __m512 (&q)[R], const In* x, int64_t x_row) {
    for (int t = 0; t < T; t++) {
      const __m512 value = _mm512_loadu_ps(x + t * x_row);
      for (int r = 0; r < R; r++) sums[r][t] = _mm512_fmadd_ps(q[r], value, sums[r][t]);
    }
  }
};

// One permutation looks 16 codes up in a table of 16 floats; it reads only the low 4 bits of each index, so that
// code i of 32-bit word L is selected by shifting all words down by 4 i:  code 8 L + i -> vector i, lane L.
struct W4A16 : FloatSums {
  static constexpr int block = 128, bytes = 64;
  static int position(int i) { return i % 8 * 16 + i / 8; }
  template <int R, int T>
  static void steps(Sum (&sums)[R][T], const uint8_t* const (&w)[R], const In* x, int64_t x_row) {
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m512i packed[R];
    __m512 q[R];
    for (int r = 0; r < R; r++) packed[r] = _mm512_loadu_si512(w[r]);
    for (int i = 0; i < 8; i++) {
      for (int r = 0; r < R; r++) {
        q[r] = _mm512_permutexvar_ps(packed[r], table);
        packed[r] = _mm512_srli_epi32(packed[r], 4);
      }
      add(sums, q, x + 16 * i, x_row);
    }
  }
};

struct W8A16 : FloatSums {
  static constexpr int block = 32, bytes = 32;
  static int position(int i) { return i; }
  template <int R, int T>
  static void steps(Sum (&sums)[R][T], const uint8_t* const (&w)[R], const In* x, int64_t x_row) {
    __m512 q[R];
    for (int i = 0; i < 2; i++) {
      for (int r = 0; r < R; r++) {
        const __m512i u = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w[r] + 16 * i)));
        q[r] = _mm512_cvtepi32_ps(_mm512_sub_epi32(u, _mm512_set1_epi32(128)));
      }
      add(sums, q, x + 16 * i, x_row);
    }
  }
};

struct BF16 : FloatSums {
  static constexpr int block = 32, bytes = 64;
  static int position(int i) { return i % 2 * 16 + i / 2; }
  template <int R, int T>
  static void steps(Sum (&sums)[R][T], const uint8_t* const (&w)[R], const In* x, int64_t x_row) {
    const __m512i odd = _mm512_set1_epi32(int(0xffff0000));
    __m512 first[R], second[R];
    for (int r = 0; r < R; r++) {
      const __m512i two = _mm512_loadu_si512(w[r]);
      first[r] = _mm512_castsi512_ps(_mm512_slli_epi32(two, 16));
      second[r] = _mm512_castsi512_ps(_mm512_and_si512(two, odd));
    }
    add(sums, first, x, x_row);
    add(sums, second, x + 16, x_row);
  }
};

#endif
