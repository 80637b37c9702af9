// Layer norm and RMS norm, forward and backward, plain and behind a fused residual sum.

template <class V>
struct Moments {
  V mean, rstd;
};

// R rows of A side by side in scratch memory: a 16-bit row is widened once, which saves the later passes the conversion.
template <class T, class A>
constexpr bool kWidens = sizeof(T) != sizeof(A);

// Mean, then the centred sum of squares from the cached rows: no cancellation, whatever the mean. R rows at a time hide each
// other's latencies; a row's result does not depend on R. Row r is at x[r] and, as A, at wide + r * width when kWidens.
template <class T, class V, int R, bool kRms>
MLM_INLINE void row_moments(const T* const* x, typename V::scalar* wide, int64_t width, double eps, Moments<V>* moments) {
  using A = typename V::scalar;
  constexpr bool widens = kWidens<T, A>;
  const A share = A(1) / static_cast<A>(width);
  V acc[R][2];
  const auto clear = [&] {
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = V::set(0);
  };
  clear();
  columns2<V::N>(0, width, [&](int64_t j, auto tag, auto k) MLM_LAMBDA {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V v = load(x[r] + j, tag);
      if constexpr (widens) store(wide + r * width + j, v, tag);
      acc[r][k.value] = kRms ? fma(v, v, acc[r][k.value]) : acc[r][k.value] + v;
    }
  });
  if constexpr (!kRms) {
    for (int r = 0; r < R; ++r) moments[r].mean = V::set(sum(acc[r][0] + acc[r][1]) * share);
    clear();
    columns2<V::N>(0, width, [&](int64_t j, auto tag, auto k) MLM_LAMBDA {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V v;
        if constexpr (widens)
          v = load(wide + r * width + j, tag);
        else
          v = load(x[r] + j, tag);
        const V centred = inside(v - moments[r].mean, tag, A(0));
        acc[r][k.value] = fma(centred, centred, acc[r][k.value]);
      }
    });
  }
  for (int r = 0; r < R; ++r) {
    const V variance = V::set(sum(acc[r][0] + acc[r][1]) * share + static_cast<A>(eps));
    moments[r].rstd = V::set(A(1)) / sqrt(variance);
    if (kRms) moments[r].mean = V::set(0);
  }
}

// total = dropout(x + pre_bias) + residual for one row, rounded to T; returns where the row can be read back from cache.
template <class T, class V>
inline const T* residual_row(const NormForward& a, int64_t row, T* kept, typename V::scalar* multipliers) {
  using A = typename V::scalar;
  const T* x = static_cast<const T*>(a.x) + row * a.width;
  const T* residual = static_cast<const T*>(a.residual) + row * a.width;
  const A* bias = static_cast<const A*>(a.pre_bias);
  T* total = static_cast<T*>(a.total) + row * a.width;
  const bool drop = a.dropout.threshold != 0;
  if (drop) dropout_multipliers(a.dropout, row, 0, a.width, multipliers);
  columns<V::N>(0, a.width, [&](int64_t j, auto tag) MLM_LAMBDA {
    V v = load(x + j, tag);
    if (bias) v = v + load(bias + j, tag);
    const V r = load(residual + j, tag);
    v = drop ? fma(v, load(multipliers + j, tag), r) : v + r;
    put(total + j, v, tag, a.stream);
    if (a.stream) store(kept + j, v, tag);
  });
  return a.stream ? kept : total;
}

// out = (x - mean) rstd weight + bias. Taking the mean off first keeps a constant row at exactly the bias.
template <class T, class V, int R, bool kRms>
MLM_INLINE void norm_output(
    const NormForward& a, const typename V::scalar* const* x, const Moments<V>* moments, int64_t row) {
  using A = typename V::scalar;
  const A* weight = static_cast<const A*>(a.weight);
  const A* bias = static_cast<const A*>(a.bias);
  T* out = static_cast<T*>(a.out) + row * a.width;
  columns<V::N>(0, a.width, [&](int64_t j, auto tag) MLM_LAMBDA {
    const V w = load(weight + j, tag);
    const V b = !kRms && bias ? load(bias + j, tag) : V::set(0);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V v = load(x[r] + j, tag);
      const V y = kRms ? v * moments[r].rstd * w : fma((v - moments[r].mean) * moments[r].rstd, w, b);
      put(out + r * a.width + j, y, tag, a.stream);
    }
  });
}

template <class T, class V, int R, bool kRms>
inline void norm_forward_rows(
    const NormForward& a, int64_t row, T* kept, typename V::scalar* wide, typename V::scalar* multipliers) {
  using A = typename V::scalar;
  const T* x[R];
  const A* wide_rows[R];
  for (int r = 0; r < R; ++r) {
    x[r] = a.total ? residual_row<T, V>(a, row + r, kept + r * a.width, multipliers)
                   : static_cast<const T*>(a.x) + (row + r) * a.width;
    if constexpr (kWidens<T, A>)
      wide_rows[r] = wide + r * a.width;
    else
      wide_rows[r] = x[r];
  }
  Moments<V> moments[R];
  row_moments<T, V, R, kRms>(x, wide, a.width, a.eps, moments);
  for (int r = 0; r < R; ++r) {
    store(static_cast<A*>(a.rstd) + row + r, moments[r].rstd, Tail{1});
    if (!kRms) store(static_cast<A*>(a.mean) + row + r, moments[r].mean, Tail{1});
  }
  norm_output<T, V, R, kRms>(a, wide_rows, moments, row);
}

template <class T, class V, bool kRms>
inline void norm_forward_range(const NormForward& a, int64_t begin, int64_t end) {
  using A = typename V::scalar;
  // Four rows together while they stay in the L1 cache.
  const int group = a.width <= 2048 ? 4 : 1;
  Scratch<T> kept(a.total && a.stream ? group * a.width : 0);
  Scratch<A> wide(kWidens<T, A> ? group * a.width : 0);
  Scratch<A> multipliers(a.dropout.threshold ? a.width : 0);
  int64_t row = begin;
  if (group == 4)
    for (; row + 4 <= end; row += 4)
      norm_forward_rows<T, V, 4, kRms>(a, row, kept.get(), wide.get(), multipliers.get());
  for (; row < end; ++row) norm_forward_rows<T, V, 1, kRms>(a, row, kept.get(), wide.get(), multipliers.get());
  if (a.stream) fence();
}

template <class T, class V>
void norm_forward(const NormForward& a, int64_t begin, int64_t end) {
  a.rms ? norm_forward_range<T, V, true>(a, begin, end) : norm_forward_range<T, V, false>(a, begin, end);
}

template <class A>
struct BackwardScratch {
  A* multipliers;  // [R, width]
  A* grad;         // [R, width], 16-bit input only
  A* x;
};

// R rows together: weight, dweight and dbias are read and written once for all of them. kKeep: the second pass finds 16-bit
// rows already widened.
template <class T, class V, bool kRms, bool kResidual, bool kKeep, int R>
inline void norm_backward_rows(
    const NormBackward& a, int64_t row, int64_t block, const BackwardScratch<typename V::scalar>& scratch) {
  using A = typename V::scalar;
  const int64_t w = a.width;
  const T* x = static_cast<const T*>(a.x) + row * w;
  const T* grad = static_cast<const T*>(a.grad) + row * w;
  const T* grad_total = a.grad_total ? static_cast<const T*>(a.grad_total) + row * w : nullptr;
  const A* weight = static_cast<const A*>(a.weight);
  T* dx = static_cast<T*>(a.dx) + row * w;
  T* dbranch = a.dbranch ? static_cast<T*>(a.dbranch) + row * w : nullptr;
  A* dweight = static_cast<A*>(a.dweight) + block * w;
  A* dbias = a.dbias ? static_cast<A*>(a.dbias) + block * w : nullptr;
  A* dpre = a.dpre_bias ? static_cast<A*>(a.dpre_bias) + block * w : nullptr;

  V s1[R], s2[R], mean[R], rstd[R];
  for (int r = 0; r < R; ++r) {
    s1[r] = s2[r] = V::set(0);
    mean[r] = V::set(kRms ? A(0) : static_cast<const A*>(a.mean)[row + r]);
    rstd[r] = V::set(static_cast<const A*>(a.rstd)[row + r]);
  }
  columns<V::N>(0, w, [&](int64_t j, auto tag) MLM_LAMBDA {
    const V wt = load(weight + j, tag);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V g = load(grad + r * w + j, tag), v = load(x + r * w + j, tag);
      if constexpr (kKeep) {
        store(scratch.grad + r * w + j, g, tag);
        store(scratch.x + r * w + j, v, tag);
      }
      const V gw = g * wt;
      if (!kRms) s1[r] = s1[r] + gw;
      s2[r] = fma(gw, kRms ? v : v - mean[r], s2[r]);
    }
  });
  // d = rstd (g w - mean(g w) - xhat mean(g w xhat)), xhat = (x - mean) rstd
  V k1[R], k2[R];
  for (int r = 0; r < R; ++r) {
    const A scale = static_cast<const A*>(a.rstd)[row + r];
    k1[r] = V::set(kRms ? A(0) : -scale * sum(s1[r]) / static_cast<A>(w));
    k2[r] = V::set(-scale * scale * sum(s2[r]) / static_cast<A>(w));
  }
  if (kResidual && dbranch)
    for (int r = 0; r < R; ++r) dropout_multipliers(a.dropout, row + r, 0, w, scratch.multipliers + r * w);
  columns<V::N>(0, w, [&](int64_t j, auto tag) MLM_LAMBDA {
    const V wt = load(weight + j, tag);
    V dw = load(dweight + j, tag);
    V db = !kRms && dbias ? load(dbias + j, tag) : V::set(0);
    V dp = kResidual && dpre ? load(dpre + j, tag) : V::set(0);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      V g, v;
      if constexpr (kKeep) {
        g = load(scratch.grad + r * w + j, tag);
        v = load(scratch.x + r * w + j, tag);
      } else {
        g = load(grad + r * w + j, tag);
        v = load(x + r * w + j, tag);
      }
      const V xhat = (kRms ? v : v - mean[r]) * rstd[r];
      dw = fma(g, xhat, dw);
      if (!kRms) db = db + g;
      V d = kRms ? g * wt * rstd[r] : fma(g * wt, rstd[r], k1[r]);
      d = fma(xhat, k2[r], d);
      if (kResidual) {
        if (grad_total) d = d + load(grad_total + r * w + j, tag);
        V branch = d;
        if (dbranch) {
          branch = d * load(scratch.multipliers + r * w + j, tag);
          put(dbranch + r * w + j, branch, tag, a.stream);
        }
        dp = dp + branch;
      }
      put(dx + r * w + j, d, tag, a.stream);
    }
    store(dweight + j, dw, tag);
    if (!kRms && dbias) store(dbias + j, db, tag);
    if (kResidual && dpre) store(dpre + j, dp, tag);
  });
}

template <class T, class V, bool kRms, bool kResidual, bool kKeep>
inline void norm_backward_blocks(const NormBackward& a, int64_t begin, int64_t end) {
  using A = typename V::scalar;
  constexpr int R = 4;
  Scratch<A> multipliers(a.dbranch ? R * a.width : 0);
  Scratch<A> grad(kKeep ? R * a.width : 0), x(kKeep ? R * a.width : 0);
  const BackwardScratch<A> scratch{multipliers.get(), grad.get(), x.get()};
  for (int64_t block = begin; block < end; ++block) {
    const size_t bytes = static_cast<size_t>(a.width) * sizeof(A);
    std::memset(static_cast<A*>(a.dweight) + block * a.width, 0, bytes);
    if (a.dbias) std::memset(static_cast<A*>(a.dbias) + block * a.width, 0, bytes);
    if (a.dpre_bias) std::memset(static_cast<A*>(a.dpre_bias) + block * a.width, 0, bytes);
    int64_t row = block * a.rows_per_block;
    const int64_t last = row + a.rows_per_block < a.rows ? row + a.rows_per_block : a.rows;
    for (; row + R <= last; row += R) norm_backward_rows<T, V, kRms, kResidual, kKeep, R>(a, row, block, scratch);
    for (; row < last; ++row) norm_backward_rows<T, V, kRms, kResidual, kKeep, 1>(a, row, block, scratch);
  }
  if (a.stream) fence();
}

template <class T, class V, bool kRms, bool kResidual>
inline void norm_backward_pick(const NormBackward& a, int64_t begin, int64_t end) {
  if constexpr (kWidens<T, typename V::scalar>)
    if (a.width <= 768)  // four rows of x and grad in float: 24 KB of the L1 cache
      return norm_backward_blocks<T, V, kRms, kResidual, true>(a, begin, end);
  norm_backward_blocks<T, V, kRms, kResidual, false>(a, begin, end);
}

template <class T, class V>
void norm_backward(const NormBackward& a, int64_t begin, int64_t end) {
  const bool residual = a.grad_total || a.dbranch || a.dpre_bias;
  if (a.rms)
    residual ? norm_backward_pick<T, V, true, true>(a, begin, end) : norm_backward_pick<T, V, true, false>(a, begin, end);
  else
    residual ? norm_backward_pick<T, V, false, true>(a, begin, end) : norm_backward_pick<T, V, false, false>(a, begin, end);
}
