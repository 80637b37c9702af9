// bias + GELU (tanh form) and SwiGLU. 0.5 (1 + tanh u) is sigmoid(2u), which needs one exp and one reciprocal.

template <class V>
MLM_INLINE V gelu_gate(V x, V square) {
  using A = typename V::scalar;
  const A k = static_cast<A>(2 * 0.7978845608028654);  // 2 sqrt(2 / pi)
  return sigmoid(x * fma(square, V::set(k * static_cast<A>(0.044715)), V::set(k)));
}

template <class V>
MLM_INLINE V gelu(V x) {
  return x * gelu_gate(x, x * x);
}

// d/dx [x s(2u)] = s + x s (1 - s) 2u'
template <class V>
MLM_INLINE V gelu_slope(V x) {
  using A = typename V::scalar;
  const A k = static_cast<A>(2 * 0.7978845608028654);
  x = min(V::set(A(20)), max(V::set(A(-20)), x));  // the slope is 0 or 1 there; beyond, its parts overflow to inf * 0
  const V square = x * x;
  const V s = gelu_gate(x, square);
  const V inner = fma(square, V::set(3 * k * static_cast<A>(0.044715)), V::set(k));
  return fma(x * inner, s * (V::set(1) - s), s);
}

template <class T, class V>
void gelu_forward(const Activation& a, int64_t begin, int64_t end) {
  using A = typename V::scalar;
  const A* bias = static_cast<const A*>(a.bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.width;
    T* out = static_cast<T*>(a.out) + row * a.width;
    fill<T, V>(out, a.width, a.stream, [&](int64_t j, auto tag) MLM_LAMBDA {
      return gelu(bias ? load(x + j, tag) + load(bias + j, tag) : load(x + j, tag));
    });
  }
  if (a.stream) fence();
}

template <class T, class V>
void gelu_backward(const Activation& a, int64_t begin, int64_t end) {
  using A = typename V::scalar;
  const A* bias = static_cast<const A*>(a.bias);
  for (int64_t block = begin; block < end; ++block) {
    A* dbias = a.dbias ? static_cast<A*>(a.dbias) + block * a.width : nullptr;
    if (dbias) std::memset(dbias, 0, static_cast<size_t>(a.width) * sizeof(A));
    const int64_t first = block * a.rows_per_block;
    const int64_t last = first + a.rows_per_block < a.rows ? first + a.rows_per_block : a.rows;
    for (int64_t row = first; row < last; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.width;
      const T* g = static_cast<const T*>(a.grad) + row * a.width;
      T* dx = static_cast<T*>(a.out) + row * a.width;
      fill<T, V>(dx, a.width, a.stream, [&](int64_t j, auto tag) MLM_LAMBDA {
        V v = load(x + j, tag);
        if (bias) v = v + load(bias + j, tag);
        const V d = inside(load(g + j, tag) * gelu_slope(v), tag, A(0));
        if (dbias) store(dbias + j, load(dbias + j, tag) + d, tag);
        return d;
      });
    }
  }
  if (a.stream) fence();
}

template <class T, class V>
void swiglu_forward(const Activation& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * a.width;
    const T* up = gate + a.width;
    T* out = static_cast<T*>(a.out) + row * a.width;
    fill<T, V>(out, a.width, a.stream, [&](int64_t j, auto tag) MLM_LAMBDA {
      const V x = load(gate + j, tag);
      return x * sigmoid(x) * load(up + j, tag);
    });
  }
  if (a.stream) fence();
}

template <class T, class V>
void swiglu_backward(const Activation& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * a.width;
    const T* up = gate + a.width;
    const T* g = static_cast<const T*>(a.grad) + row * a.width;
    T* dgate = static_cast<T*>(a.out) + row * 2 * a.width;
    T* dup = dgate + a.width;
    lines<T, V>(a.width, [&](int64_t j, auto tag, auto vectors) MLM_LAMBDA {
      constexpr int K = vectors.value;
      V of_gate[K], of_up[K];
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const int64_t at = j + k * V::N;
        const V x = load(gate + at, tag), grad = load(g + at, tag);
        const V s = sigmoid(x);
        const V silu = x * s;
        of_gate[k] = grad * load(up + at, tag) * fma(silu, V::set(1) - s, s);
        of_up[k] = grad * silu;
      }
      put_all<K>(dgate + j, of_gate, tag, a.stream);
      put_all<K>(dup + j, of_up, tag, a.stream);
    });
  }
  if (a.stream) fence();
}
