// Four floats in the compiler's own vector type, for any processor: SSE2, NEON or whatever the baseline offers.
#pragma once

#include "types.h"

#define MLM_ISA plain
#define MLM_LEVEL 0

namespace mlm::MLM_ISA {

struct Full {};
struct Tail {
  int count;
};

typedef float Lanes __attribute__((vector_size(16)));
typedef int32_t LaneBits __attribute__((vector_size(16)));

struct Floats {
  using scalar = float;
  static constexpr int N = 4;
  Lanes v;

  static Floats set(float a) { return {Lanes{a, a, a, a}}; }
  friend Floats operator+(Floats a, Floats b) { return {a.v + b.v}; }
  friend Floats operator-(Floats a, Floats b) { return {a.v - b.v}; }
  friend Floats operator*(Floats a, Floats b) { return {a.v * b.v}; }
  friend Floats operator/(Floats a, Floats b) { return {a.v / b.v}; }
};

// Two roundings: a true fma is a library call on a baseline processor.
inline Floats fma(Floats a, Floats b, Floats c) { return {a.v * b.v + c.v}; }
inline Floats max(Floats a, Floats b) { return {a.v > b.v ? a.v : b.v}; }
inline Floats min(Floats a, Floats b) { return {a.v < b.v ? a.v : b.v}; }
inline Floats sqrt(Floats a) {
  return {Lanes{__builtin_sqrtf(a.v[0]), __builtin_sqrtf(a.v[1]), __builtin_sqrtf(a.v[2]), __builtin_sqrtf(a.v[3])}};
}
inline float sum(Floats a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float maximum(Floats a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}
inline Floats reciprocal(Floats a) { return {1.0f / a.v}; }
// Adding and taking away 1.5 * 2^23 rounds to nearest even for |a| < 2^22.
inline Floats round(Floats a) { return {(a.v + 12582912.0f) - 12582912.0f}; }

// p * 2^n in two factors: 2^128 alone has no representation.
inline Floats scale_by_power(Floats p, Floats n) {
  const LaneBits whole = __builtin_convertvector(n.v, LaneBits);
  const LaneBits half = whole >> 1;
  const LaneBits a = (half + 127) << 23, b = (whole - half + 127) << 23;
  return {p.v * reinterpret_cast<const Lanes&>(a) * reinterpret_cast<const Lanes&>(b)};
}
// a where x is not below the limit (or NaN), else 0.
inline Floats zero_below(Floats a, Floats x, float limit) {
  const Lanes zero = {};
  return {x.v < limit ? zero : a.v};
}
inline Floats inside(Floats a, Full, float) { return a; }
inline Floats inside(Floats a, Tail t, float fill) {
  for (int i = t.count; i < Floats::N; ++i) a.v[i] = fill;
  return a;
}

// --- scalar conversions
inline float widen_one(float a) { return a; }
inline float widen_one(int8_t a) { return a; }
inline float widen_one(bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float widen_one(f16 a) {
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000) << 16;
  const uint32_t exponent = (a.bits >> 10) & 31, fraction = a.bits & 0x3ff;
  float f;
  if (exponent == 0) {
    f = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -f : f;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void narrow_one(float a, float* p) { *p = a; }
inline void narrow_one(float a, bf16* p) {
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  p->bits = a != a ? 0x7fc0 : static_cast<uint16_t>((bits + ((bits >> 16) & 1) + 0x7fff) >> 16);
}
inline void narrow_one(float a, f16* p) {
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    p->bits = static_cast<uint16_t>(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // rounds to 65,536 or more
    p->bits = static_cast<uint16_t>(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // below 2^-14: the float adder rounds to steps of 2^-24
    float tiny;
    std::memcpy(&tiny, &magnitude, 4);
    tiny += 0.5f;
    uint32_t sum;
    std::memcpy(&sum, &tiny, 4);
    p->bits = static_cast<uint16_t>(sign | (sum - 0x3f000000));
  } else {
    const uint32_t odd = (magnitude >> 13) & 1;
    p->bits = static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
  }
}

// Keeps the templates below away from double, which vec_double.h loads and stores.
template <class T>
struct Stored {};
template <>
struct Stored<float> {
  using yes = void;
};
template <>
struct Stored<int8_t> {  // only read
  using yes = void;
};
template <>
struct Stored<bf16> {
  using yes = void;
};
template <>
struct Stored<f16> {
  using yes = void;
};

template <class T, class = typename Stored<T>::yes>
inline Floats load(const T* p, Full) {
  return {Lanes{widen_one(p[0]), widen_one(p[1]), widen_one(p[2]), widen_one(p[3])}};
}
template <class T, class = typename Stored<T>::yes>
inline Floats load(const T* p, Tail t) {
  Floats a = Floats::set(0);
  for (int i = 0; i < t.count; ++i) a.v[i] = widen_one(p[i]);
  return a;
}
template <class T, class = typename Stored<T>::yes>
inline void store(T* p, Floats a, Full) {
  for (int i = 0; i < Floats::N; ++i) narrow_one(a.v[i], p + i);
}
template <class T, class = typename Stored<T>::yes>
inline void store(T* p, Floats a, Tail t) {
  for (int i = 0; i < t.count; ++i) narrow_one(a.v[i], p + i);
}
template <class T, class = typename Stored<T>::yes>
inline void stream(T* p, Floats a) {
  store(p, a, Full{});
}
inline Floats hide(Floats a, const uint8_t* mask, Full) {
  for (int i = 0; i < Floats::N; ++i) a.v[i] = mask[i] ? -__builtin_inff() : a.v[i];
  return a;
}
inline Floats hide(Floats a, const uint8_t* mask, Tail t) {
  for (int i = 0; i < t.count; ++i) a.v[i] = mask[i] ? -__builtin_inff() : a.v[i];
  return a;
}
inline void fence() {}
inline void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace mlm::MLM_ISA
