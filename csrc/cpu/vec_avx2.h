// Eight floats in one AVX2 register (with FMA and F16C).
#pragma once

#include <immintrin.h>

#include "types.h"

#define MLM_ISA avx2
#define MLM_LEVEL 1

namespace mlm::MLM_ISA {

struct Full {};
struct Tail {
  int count;
};

struct Floats {
  using scalar = float;
  static constexpr int N = 8;
  __m256 v;

  static Floats set(float a) { return {_mm256_set1_ps(a)}; }
  friend Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
};

inline Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Floats sqrt(Floats a) { return {_mm256_sqrt_ps(a.v)}; }
inline float sum(Floats a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float maximum(Floats a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline Floats reciprocal(Floats a) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), a.v)}; }
inline Floats round(Floats a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// p * 2^n in two factors: 2^128 alone has no representation.
inline Floats scale_by_power(Floats p, Floats n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(p.v, a), b)};
}

// a where x is not below the limit (or NaN), else 0.
inline Floats zero_below(Floats a, Floats x, float limit) {
  return {_mm256_and_ps(a.v, _mm256_cmp_ps(x.v, _mm256_set1_ps(limit), _CMP_NLT_UQ))};
}

inline __m256i tail_mask(Tail t) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(t.count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats inside(Floats a, Full, float) { return a; }
inline Floats inside(Floats a, Tail t, float fill) {
  return {_mm256_blendv_ps(_mm256_set1_ps(fill), a.v, _mm256_castsi256_ps(tail_mask(t)))};
}

// --- float
inline Floats load(const float* p, Full) { return {_mm256_loadu_ps(p)}; }
inline Floats load(const float* p, Tail t) { return {_mm256_maskload_ps(p, tail_mask(t))}; }
inline void store(float* p, Floats a, Full) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Floats a, Tail t) { _mm256_maskstore_ps(p, tail_mask(t), a.v); }
inline void stream(float* p, Floats a) { _mm256_stream_ps(p, a.v); }

// --- 16-bit types
inline __m128i load_bits(const void* p, Full) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load_bits(const void* p, Tail t) {
  alignas(16) uint16_t lanes[8] = {};
  std::memcpy(lanes, p, t.count * sizeof(uint16_t));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
}
inline void store_bits(void* p, __m128i bits, Full) { _mm_storeu_si128(static_cast<__m128i*>(p), bits); }
inline void store_bits(void* p, __m128i bits, Tail t) {
  alignas(16) uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), bits);
  std::memcpy(p, lanes, t.count * sizeof(uint16_t));
}
// Eight bfloat16 as 32-bit integers: rounded to the nearest, ties to even; any NaN becomes 0xffff, which is one too.
inline __m256i rounded_bits(Floats a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_or_si256(rounded, nan), 16);
}
inline __m128i narrow_bits(Floats a) {
  const __m256i rounded = rounded_bits(a);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

template <class Tag>
inline Floats load(const bf16* p, Tag tag) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bits(p, tag)), 16))};
}
template <class Tag>
inline void store(bf16* p, Floats a, Tag tag) {
  store_bits(p, narrow_bits(a), tag);
}
inline void stream(bf16* p, Floats a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_bits(a)); }
// Two vectors side by side are packed by half as many instructions.
inline void put_two(bf16* p, Floats a, Floats b, bool past_cache) {
  const __m256i by_halves = _mm256_packus_epi32(rounded_bits(a), rounded_bits(b));
  const __m256i bits = _mm256_permute4x64_epi64(by_halves, _MM_SHUFFLE(3, 1, 2, 0));
  if (past_cache)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}

template <class Tag>
inline Floats load(const f16* p, Tag tag) {
  return {_mm256_cvtph_ps(load_bits(p, tag))};
}
template <class Tag>
inline void store(f16* p, Floats a, Tag tag) {
  store_bits(p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), tag);
}
inline void stream(f16* p, Floats a) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// --- int8, only read
inline Floats widen_bytes(uint64_t bytes) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes))))};
}
inline Floats load(const int8_t* p, Full) {
  uint64_t bytes;
  std::memcpy(&bytes, p, 8);
  return widen_bytes(bytes);
}
inline Floats load(const int8_t* p, Tail t) {
  uint64_t bytes = 0;
  std::memcpy(&bytes, p, t.count);
  return widen_bytes(bytes);
}

// --- bool mask: -inf where the byte is not zero
inline Floats hide_bytes(Floats a, uint64_t bytes) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
  const __m256i shown = _mm256_cmpeq_epi32(wide, _mm256_setzero_si256());
  return {_mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), a.v, _mm256_castsi256_ps(shown))};
}
inline Floats hide(Floats a, const uint8_t* mask, Full) {
  uint64_t bytes;
  std::memcpy(&bytes, mask, 8);
  return hide_bytes(a, bytes);
}
inline Floats hide(Floats a, const uint8_t* mask, Tail t) {
  uint64_t bytes = 0;
  std::memcpy(&bytes, mask, t.count);
  return hide_bytes(a, bytes);
}

inline void fence() { _mm_sfence(); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace mlm::MLM_ISA
