// One double as a vector of width 1: float64 is there for gradient checks, not for speed. Included inside each
// instruction set's namespace, after its Floats.

struct Doubles {
  using scalar = double;
  static constexpr int N = 1;
  double v;

  static Doubles set(double a) { return {a}; }
  friend Doubles operator+(Doubles a, Doubles b) { return {a.v + b.v}; }
  friend Doubles operator-(Doubles a, Doubles b) { return {a.v - b.v}; }
  friend Doubles operator*(Doubles a, Doubles b) { return {a.v * b.v}; }
  friend Doubles operator/(Doubles a, Doubles b) { return {a.v / b.v}; }
};

inline Doubles fma(Doubles a, Doubles b, Doubles c) { return {a.v * b.v + c.v}; }
inline Doubles max(Doubles a, Doubles b) { return {a.v > b.v ? a.v : b.v}; }
inline Doubles min(Doubles a, Doubles b) { return {a.v < b.v ? a.v : b.v}; }
inline Doubles sqrt(Doubles a) { return {__builtin_sqrt(a.v)}; }
inline double sum(Doubles a) { return a.v; }
inline double maximum(Doubles a) { return a.v; }
inline Doubles reciprocal(Doubles a) { return {1.0 / a.v}; }
inline Doubles zero_below(Doubles a, Doubles x, double limit) { return {x.v < limit ? 0.0 : a.v}; }
inline Doubles inside(Doubles a, Full, double) { return a; }
inline Doubles inside(Doubles a, Tail, double) { return a; }
template <class Tag>
inline Doubles load(const double* p, Tag) {
  return {*p};
}
template <class Tag>
inline void store(double* p, Doubles a, Tag) {
  *p = a.v;
}
inline void stream(double* p, Doubles a) { *p = a.v; }
template <class Tag>
inline Doubles hide(Doubles a, const uint8_t* mask, Tag) {
  return {*mask ? -__builtin_inf() : a.v};
}
inline Doubles exp(Doubles a) { return {__builtin_exp(a.v)}; }
