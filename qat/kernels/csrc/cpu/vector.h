// The float vector of an instruction set, and the few operations that kernels need of it.  Included once for each
// instruction set, inside its namespace: QAT_ISA is 0 (portable), 1 (AVX2 + FMA + F16C) or 2 (AVX512 + VNNI).

#if QAT_ISA == 0

constexpr int kLanes = 1;
using Vec = float;
using Lanes = int;
inline Vec zero() { return 0.0f; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
inline float sum(Vec v) { return v; }
inline Lanes lanes(const int32_t* index) { return *index; }
inline Vec spread(const float* values, Lanes index) { return values[index]; }

#elif QAT_ISA == 1

constexpr int kLanes = 8;
using Vec = __m256;
using Lanes = __m256i;
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline Lanes lanes(const int32_t* index) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)); }
// values[index[lane]] in each lane; reads kLanes values.
inline Vec spread(const float* values, Lanes index) {
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), index);
}

#else

constexpr int kLanes = 16;
using Vec = __m512;
using Lanes = __m512i;
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline Lanes lanes(const int32_t* index) { return _mm512_loadu_si512(index); }
inline Vec spread(const float* values, Lanes index) { return _mm512_permutexvar_ps(index, _mm512_loadu_ps(values)); }

#endif
