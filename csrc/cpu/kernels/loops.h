// Loops over the columns of a row, vector by vector, with a short last vector; scratch memory; exp.
#define MLM_INLINE inline __attribute__((always_inline))
#define MLM_LAMBDA __attribute__((always_inline))

template <int I>
struct Index {
  static constexpr int value = I;
};

// f(column, Full | Tail) over [begin, end).
template <int N, class F>
MLM_INLINE void columns(int64_t begin, int64_t end, F&& f) {
  int64_t j = begin;
  for (; j + N <= end; j += N) f(j, Full{});
  if (j < end) f(j, Tail{static_cast<int>(end - j)});
}

// The same with two independent accumulators in flight: f(column, Full | Tail, Index<which accumulator>).
template <int N, class F>
MLM_INLINE void columns2(int64_t begin, int64_t end, F&& f) {
  int64_t j = begin;
  for (; j + 2 * N <= end; j += 2 * N) {
    f(j, Full{}, Index<0>{});
    f(j + N, Full{}, Index<1>{});
  }
  for (; j + N <= end; j += N) f(j, Full{}, Index<0>{});
  if (j < end) f(j, Tail{static_cast<int>(end - j)}, Index<1>{});
}

// The same with four independent accumulators in flight: f(column, Full | Tail, Index<which accumulator>).
template <int N, class F>
MLM_INLINE void columns4(int64_t begin, int64_t end, F&& f) {
  int64_t j = begin;
  for (; j + 4 * N <= end; j += 4 * N) {
    f(j, Full{}, Index<0>{});
    f(j + N, Full{}, Index<1>{});
    f(j + 2 * N, Full{}, Index<2>{});
    f(j + 3 * N, Full{}, Index<3>{});
  }
  for (; j + N <= end; j += N) f(j, Full{}, Index<0>{});
  if (j < end) f(j, Tail{static_cast<int>(end - j)}, Index<1>{});
}

// Writes past the cache when asked to; a tail is never wide enough for that.
template <class T, class V>
MLM_INLINE void put(T* p, V v, Full full, bool past_cache) {
  if (past_cache)
    stream(p, v);
  else
    store(p, v, full);
}
template <class T, class V>
MLM_INLINE void put(T* p, V v, Tail tail, bool) {
  store(p, v, tail);
}

// Whole vectors side by side; an instruction set may have a quicker way for a type.
template <class T, class V>
MLM_INLINE void put_two(T* p, V a, V b, bool past_cache) {
  put(p, a, Full{}, past_cache);
  put(p + V::N, b, Full{}, past_cache);
}

// Writes vectors that lie side by side, one right after the other: where a line goes past the cache, loads between its parts
// let some of it leave the processor before the rest arrives, and that costs two trips to memory.
template <int K, class T, class V, class Tag>
MLM_INLINE void put_all(T* p, const V* v, Tag tag, bool past_cache) {
  if constexpr (K % 2 == 0) {  // which a tail never is
#pragma GCC unroll 2
    for (int k = 0; k < K; k += 2) put_two(p + k * V::N, v[k], v[k + 1], past_cache);
  } else {
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) put(p + k * V::N, v[k], tag, past_cache);
  }
}

// f(column, Full | Tail, Index<vectors from there on>) over [0, end): by whole cache lines of T while there are any (four
// vectors at most: more do not fit into registers). For ``put_all``, and for loops over several rows at once: rows of a power
// of two fall into the same places of the L1 cache, and a line that is left in the middle is fetched again for its rest.
template <class T, class V, class F>
MLM_INLINE void lines(int64_t end, F&& f) {
  constexpr int whole = 64 / static_cast<int>(sizeof(T) * V::N);
  constexpr int K = sizeof(T) == sizeof(double) ? 1 : whole < 4 ? whole : 4;
  int64_t j = 0;
  if constexpr (K > 1)
    for (; j + K * V::N <= end; j += K * V::N) f(j, Full{}, Index<K>{});
  for (; j + V::N <= end; j += V::N) f(j, Full{}, Index<1>{});
  if (j < end) f(j, Tail{static_cast<int>(end - j)}, Index<1>{});
}

// out[j] = f(j, Full | Tail) over a row, written by whole cache lines.
template <class T, class V, class F>
MLM_INLINE void fill(T* out, int64_t width, bool past_cache, F&& f) {
  lines<T, V>(width, [&](int64_t j, auto tag, auto vectors) MLM_LAMBDA {
    constexpr int K = vectors.value;
    V v[K];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) v[k] = f(j + k * V::N, tag);
    put_all<K>(out + j, v, tag, past_cache);
  });
}

// Row buffer: on the stack while it is small.
template <class A, int kOnStack = 2048>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(stack_) {
    if (count > kOnStack) data_ = heap_ = static_cast<A*>(__builtin_malloc(static_cast<size_t>(count) * sizeof(A)));
    if (!data_) __builtin_trap();
  }
  ~Scratch() {
    if (heap_) __builtin_free(heap_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() { return data_; }

 private:
  alignas(64) A stack_[kOnStack];
  A* heap_ = nullptr;
  A* data_;
};

// e^x: x = n ln2 + r with |r| <= ln2 / 2 (Cody and Waite), a degree-6 Taylor-like polynomial in r fitted for the interval,
// then 2^n. Relative error about 1 ulp; infinity above 88.7, NaN stays NaN. 0 below -86.6 (2.5e-38): a masked score is -inf,
// and a result below the normal range would cost a hundred cycles each.
MLM_INLINE Floats exp(Floats argument) {
  constexpr float lowest = -86.6f;
  const Floats x = min(Floats::set(89.0f), max(Floats::set(lowest), argument));
  const Floats n = round(x * Floats::set(1.44269504f));
  Floats r = fma(n, Floats::set(-0.693145752f), x);
  r = fma(n, Floats::set(-1.42860677e-6f), r);
  Floats p = fma(r, Floats::set(1.3981999e-3f), Floats::set(8.3334519e-3f));
  p = fma(p, r, Floats::set(4.1665795e-2f));
  p = fma(p, r, Floats::set(1.6666666e-1f));
  p = fma(p, r, Floats::set(0.5f));
  p = fma(p * r, r, r) + Floats::set(1.0f);
  return zero_below(scale_by_power(p, n), argument, lowest);
}

// 0 below -80 (the result would be under 2e-35), so that the largest negative numbers come out of an activation as 0; the
// clamp keeps the reciprocal in the normal range.
template <class V>
MLM_INLINE V sigmoid(V x) {
  using A = typename V::scalar;
  constexpr A limit = sizeof(A) == 8 ? 700 : 80;
  const V s = reciprocal(V::set(A(1)) + exp(min(V::set(limit), V::set(A(0)) - x)));
  return zero_below(s, x, -limit);
}
