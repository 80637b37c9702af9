// Sixteen floats in one AVX-512 register (F, BW, VL, DQ). Compiled a second time with AVX512_BF16, whose one rounding
// instruction takes the place of eight; it also flushes results below 1.2e-38 to zero.
#pragma once

#include <immintrin.h>

#include "types.h"

#if defined(__AVX512BF16__)
#define MLM_ISA avx512bf16
#define MLM_LEVEL 3
#else
#define MLM_ISA avx512
#define MLM_LEVEL 2
#endif

namespace mlm::MLM_ISA {

struct Full {};
struct Tail {
  int count;
};

struct Floats {
  using scalar = float;
  static constexpr int N = 16;
  __m512 v;

  static Floats set(float a) { return {_mm512_set1_ps(a)}; }
  friend Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
};

inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// max and min return the second argument when either is NaN.
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats sqrt(Floats a) { return {_mm512_sqrt_ps(a.v)}; }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float maximum(Floats a) { return _mm512_reduce_max_ps(a.v); }

// 1 / a for a in the normal range: the 14-bit estimate and one Newton step (relative error 2^-27).
inline Floats reciprocal(Floats a) {
  const __m512 r = _mm512_rcp14_ps(a.v);
  return {_mm512_mul_ps(r, _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(2.0f)))};
}

inline Floats scale_by_power(Floats p, Floats n) { return {_mm512_scalef_ps(p.v, n.v)}; }
inline Floats round(Floats a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// a where x is not below the limit (or NaN), else 0.
inline Floats zero_below(Floats a, Floats x, float limit) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_NLT_UQ), a.v)};
}

inline __mmask16 tail_mask(Tail t) { return static_cast<__mmask16>((1u << t.count) - 1u); }

// Keeps the lanes of `a` that are inside the tail, puts `fill` in the others.
inline Floats inside(Floats a, Full, float) { return a; }
inline Floats inside(Floats a, Tail t, float fill) {
  return {_mm512_mask_blend_ps(tail_mask(t), _mm512_set1_ps(fill), a.v)};
}

// --- float
inline Floats load(const float* p, Full) { return {_mm512_loadu_ps(p)}; }
inline Floats load(const float* p, Tail t) { return {_mm512_maskz_loadu_ps(tail_mask(t), p)}; }
inline void store(float* p, Floats a, Full) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Floats a, Tail t) { _mm512_mask_storeu_ps(p, tail_mask(t), a.v); }
inline void stream(float* p, Floats a) { _mm512_stream_ps(p, a.v); }

// --- bfloat16: the upper half of a float, rounded to nearest even
inline __m512 widen_bits(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m256i narrow_bits(Floats a) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
inline __m256i load_bits(const void* p, Full) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m256i load_bits(const void* p, Tail t) { return _mm256_maskz_loadu_epi16(tail_mask(t), p); }
inline void store_bits(void* p, __m256i bits, Full) { _mm256_storeu_si256(static_cast<__m256i*>(p), bits); }
inline void store_bits(void* p, __m256i bits, Tail t) { _mm256_mask_storeu_epi16(p, tail_mask(t), bits); }

template <class Tag>
inline Floats load(const bf16* p, Tag tag) {
  return {widen_bits(load_bits(p, tag))};
}
template <class Tag>
inline void store(bf16* p, Floats a, Tag tag) {
  store_bits(p, narrow_bits(a), tag);
}
inline void stream(bf16* p, Floats a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bits(a)); }

// --- float16
template <class Tag>
inline Floats load(const f16* p, Tag tag) {
  return {_mm512_cvtph_ps(load_bits(p, tag))};
}
inline __m256i half_bits(Floats a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
template <class Tag>
inline void store(f16* p, Floats a, Tag tag) {
  store_bits(p, half_bits(a), tag);
}
inline void stream(f16* p, Floats a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half_bits(a)); }

// --- int8, only read
inline Floats widen_bytes(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}; }
inline Floats load(const int8_t* p, Full) { return widen_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Floats load(const int8_t* p, Tail t) { return widen_bytes(_mm_maskz_loadu_epi8(tail_mask(t), p)); }

// --- bool mask: -inf where the byte is not zero
inline Floats hide(Floats a, const uint8_t* mask, Full) {
  const __mmask16 m = _mm512_test_epi32_mask(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(mask))), _mm512_set1_epi32(0xff));
  return {_mm512_mask_mov_ps(a.v, m, _mm512_set1_ps(-__builtin_inff()))};
}
inline Floats hide(Floats a, const uint8_t* mask, Tail t) {
  const __mmask16 m = _mm512_test_epi32_mask(
      _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(tail_mask(t), mask)), _mm512_set1_epi32(0xff));
  return {_mm512_mask_mov_ps(a.v, m, _mm512_set1_ps(-__builtin_inff()))};
}

// Two vectors side by side are a whole cache line, written at once.
inline void put_bits(void* p, __m256i a, __m256i b, bool past_cache) {
  const __m512i line = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  if (past_cache)
    _mm512_stream_si512(static_cast<__m512i*>(p), line);
  else
    _mm512_storeu_si512(p, line);
}
inline void put_two(bf16* p, Floats a, Floats b, bool past_cache) {
  put_bits(p, narrow_bits(a), narrow_bits(b), past_cache);
}
inline void put_two(f16* p, Floats a, Floats b, bool past_cache) {
  put_bits(p, half_bits(a), half_bits(b), past_cache);
}

inline void fence() { _mm_sfence(); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace mlm::MLM_ISA
