// The AVX512 instructions that the kernels use, emulated by SIMDe on machines without them: proves the arithmetic,
// says nothing about speed.  Names are given one by one, because the compiler's own header has defined its versions.
#include <simde/x86/avx512/cast.h>
#include <simde/x86/avx512/dpbusd.h>
#include <simde/x86/avx512/fmadd.h>
#include <simde/x86/avx512/loadu.h>
#include <simde/x86/avx512/permutexvar.h>
#include <simde/x86/avx512/setr.h>
#include <simde/x86/avx512/slli.h>
#include <simde/x86/avx512/srli.h>
#include <simde/x86/avx512/storeu.h>
#include <simde/x86/avx512/sub.h>
#include <simde/x86/avx512/and.h>
#include <simde/x86/avx512/set1.h>
#include <simde/x86/avx512/setzero.h>

#define __m512 simde__m512
#define __m512i simde__m512i
#define _mm512_and_si512 simde_mm512_and_si512
#define _mm512_castsi512_ps simde_mm512_castsi512_ps
#define _mm512_dpbusd_epi32 simde_mm512_dpbusd_epi32
#define _mm512_fmadd_ps simde_mm512_fmadd_ps
#define _mm512_loadu_ps simde_mm512_loadu_ps
#define _mm512_loadu_si512 simde_mm512_loadu_si512
#define _mm512_permutexvar_ps simde_mm512_permutexvar_ps
#define _mm512_set1_epi32 simde_mm512_set1_epi32
#define _mm512_set1_epi8 simde_mm512_set1_epi8
#define _mm512_setr_ps simde_mm512_setr_ps
#define _mm512_setzero_ps simde_mm512_setzero_ps
#define _mm512_slli_epi32 simde_mm512_slli_epi32
#define _mm512_srli_epi16 simde_mm512_srli_epi16
#define _mm512_srli_epi32 simde_mm512_srli_epi32
#define _mm512_storeu_si512 simde_mm512_storeu_si512
#define _mm512_sub_epi32 simde_mm512_sub_epi32
#define _mm512_reduce_add_ps reduce_add
#define _mm512_cvtepi32_ps to_floats
#define _mm512_cvtepu8_epi32 widen

inline float reduce_add(simde__m512 v) {
  float lanes[16], sum = 0;
  simde_mm512_storeu_ps(lanes, v);
  for (float lane : lanes) sum += lane;
  return sum;
}

inline simde__m512i widen(__m128i bytes) {
  int32_t lanes[16];
  for (int i = 0; i < 16; i++) lanes[i] = reinterpret_cast<const uint8_t*>(&bytes)[i];
  return simde_mm512_loadu_si512(lanes);
}

inline simde__m512 to_floats(simde__m512i v) {
  int32_t integers[16];
  float floats[16];
  simde_mm512_storeu_si512(integers, v);
  for (int i = 0; i < 16; i++) floats[i] = float(integers[i]);
  return simde_mm512_loadu_ps(floats);
}
