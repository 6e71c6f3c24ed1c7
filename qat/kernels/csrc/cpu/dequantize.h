// Rows of weights as floats, in their own order, for torch's matrix product where there are many tokens.
// Reference: qat.functional.dequantize(qat.packing.unpack(...)); q * scale in float32, then rounded to `type`.
// Included for the portable and the AVX2 instruction set (see vector.h).

struct Dequantize {
  const uint8_t* packed;
  const void* scale;
  void* out;
  int64_t k, group, row_bytes;
  int bits;
  Type scale_type, type;

  void run(int64_t first, int64_t last) const {
    for (int64_t n = first; n < last; n++) {
      const uint8_t* row = packed + n * row_bytes;
      for (int64_t g = 0; g < k / group; g++) {
        const float factor = load_as_float(scale, scale_type, n * (k / group) + g);
        int64_t i = g * group;
        const int64_t end = i + group;
#if QAT_ISA > 0
        if (i % 2 == 0)
          for (; i + 16 <= end; i += 16) sixteen(row, i, n * k + i, _mm256_set1_ps(factor));
#endif
        for (; i < end; i++) {
          const int u = bits == 8 ? row[i] : row[i / 2] >> (i % 2 * 4) & 15;
          store_float(out, type, n * k + i, float(u - (1 << (bits - 1))) * factor);
        }
      }
    }
  }

#if QAT_ISA > 0
  void sixteen(const uint8_t* row, int64_t i, int64_t to, __m256 factor) const {
    __m128i u;
    if (bits == 8) {
      u = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
    } else {  // interleaving the low and the high nibbles puts the codes in order
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + i / 2)), nibble = _mm_set1_epi8(15);
      u = _mm_unpacklo_epi8(_mm_and_si128(bytes, nibble), _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
    }
    const __m256i middle = _mm256_set1_epi32(1 << (bits - 1));
    for (int h = 0; h < 2; h++, u = _mm_unpackhi_epi64(u, u)) {
      const __m256i q = _mm256_sub_epi32(_mm256_cvtepu8_epi32(u), middle);
      store(to + 8 * h, _mm256_mul_ps(_mm256_cvtepi32_ps(q), factor));
    }
  }

  void store(int64_t at, __m256 v) const {
    if (type == kFloat32) {
      _mm256_storeu_ps(static_cast<float*>(out) + at, v);
      return;
    }
    __m128i* halves = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + at);
    if (type == kFloat16) {
      _mm_storeu_si128(halves, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      return;
    }
    // to_bfloat16 in eight lanes
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i kept = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    kept = _mm256_blendv_epi8(kept, _mm256_set1_epi32(0x7fc0), nan);
    _mm_storeu_si128(halves, _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)));
  }
#endif
};
