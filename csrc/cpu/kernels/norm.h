// Layer norm and RMS norm, forward and backward, plain and behind a fused residual sum.

template <class V>
struct Moments {
  V mean, rstd;
};

// Mean, then the centred sum of squares from the cached rows: no cancellation, whatever the mean. R rows at a time hide each
// other's latencies; a row's result does not depend on R.
template <class T, class V, int R, bool kRms>
MLM_INLINE void row_moments(const T* const* x, int64_t width, double eps, Moments<V>* moments) {
  using A = typename V::scalar;
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
      acc[r][k.value] = kRms ? fma(v, v, acc[r][k.value]) : acc[r][k.value] + v;
    }
  });
  if constexpr (!kRms) {
    for (int r = 0; r < R; ++r) moments[r].mean = V::set(sum(acc[r][0] + acc[r][1]) * share);
    clear();
    columns2<V::N>(0, width, [&](int64_t j, auto tag, auto k) MLM_LAMBDA {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V centred = inside(load(x[r] + j, tag) - moments[r].mean, tag, A(0));
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
  lines<T, V>(a.width, [&](int64_t j, auto tag, auto vectors) MLM_LAMBDA {
    constexpr int K = vectors.value;
    V v[K];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const int64_t at = j + k * V::N;
      v[k] = load(x + at, tag);
      if (bias) v[k] = v[k] + load(bias + at, tag);
      const V r = load(residual + at, tag);
      v[k] = drop ? fma(v[k], load(multipliers + at, tag), r) : v[k] + r;
    }
    put_all<K>(total + j, v, tag, a.stream);
    if (a.stream) put_all<K>(kept + j, v, tag, false);
  });
  return a.stream ? kept : total;
}

// out = (x - mean) rstd weight + bias. Taking the mean off first keeps a constant row at exactly the bias.
template <class T, class V, int R, bool kRms>
MLM_INLINE void norm_output(
    const NormForward& a, const T* const* x, const Moments<V>* moments, int64_t row) {
  using A = typename V::scalar;
  const A* weight = static_cast<const A*>(a.weight);
  const A* bias = static_cast<const A*>(a.bias);
  T* out = static_cast<T*>(a.out) + row * a.width;
  // The next rows are on their way while these, in the cache, keep the processor busy.
  const T* next = static_cast<const T*>(a.x) + (row + R) * a.width;
  lines<T, V>(a.width, [&](int64_t j, auto tag, auto vectors) MLM_LAMBDA {
    constexpr int K = vectors.value;
    V w[K], b[K];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      w[k] = load(weight + j + k * V::N, tag);
      b[k] = !kRms && bias ? load(bias + j + k * V::N, tag) : V::set(0);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (a.stream) prefetch(next + r * a.width + j);
      V y[K];
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const V v = load(x[r] + j + k * V::N, tag);
        y[k] = kRms ? v * moments[r].rstd * w[k] : fma((v - moments[r].mean) * moments[r].rstd, w[k], b[k]);
      }
      put_all<K>(out + r * a.width + j, y, tag, a.stream);
    }
  });
}

template <class T, class V, int R, bool kRms>
inline void norm_forward_rows(const NormForward& a, int64_t row, T* kept, typename V::scalar* multipliers) {
  using A = typename V::scalar;
  const T* x[R];
  for (int r = 0; r < R; ++r)
    x[r] = a.total ? residual_row<T, V>(a, row + r, kept + r * a.width, multipliers)
                   : static_cast<const T*>(a.x) + (row + r) * a.width;
  Moments<V> moments[R];
  row_moments<T, V, R, kRms>(x, a.width, a.eps, moments);
  for (int r = 0; r < R; ++r) {
    store(static_cast<A*>(a.rstd) + row + r, moments[r].rstd, Tail{1});
    if (!kRms) store(static_cast<A*>(a.mean) + row + r, moments[r].mean, Tail{1});
  }
  norm_output<T, V, R, kRms>(a, x, moments, row);
}

template <class T, class V, bool kRms>
inline void norm_forward_range(const NormForward& a, int64_t begin, int64_t end) {
  using A = typename V::scalar;
  // Four rows of up to 1,024 stay in the L1 cache together; of wider ones two still hide each other's latencies.
  const int64_t group = a.width <= 1024 ? 4 : 2;
  Scratch<T> kept(a.total && a.stream ? group * a.width : 0);
  Scratch<A> multipliers(a.dropout.threshold ? a.width : 0);
  int64_t row = begin;
  for (; row + group <= end; row += group)
    group == 4 ? norm_forward_rows<T, V, 4, kRms>(a, row, kept.get(), multipliers.get())
               : norm_forward_rows<T, V, 2, kRms>(a, row, kept.get(), multipliers.get());
  for (; row < end; ++row) norm_forward_rows<T, V, 1, kRms>(a, row, kept.get(), multipliers.get());
  if (a.stream) fence();
}

template <class T, class V>
void norm_forward(const NormForward& a, int64_t begin, int64_t end) {
  a.rms ? norm_forward_range<T, V, true>(a, begin, end) : norm_forward_range<T, V, false>(a, begin, end);
}

// R rows together: weight, dweight and dbias are read and written once for all of them. multipliers: A[R, width].
template <class T, class V, bool kRms, bool kResidual, int R>
inline void norm_backward_rows(const NormBackward& a, int64_t row, int64_t block, typename V::scalar* multipliers) {
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
    for (int r = 0; r < R; ++r) dropout_multipliers(a.dropout, row + r, 0, w, multipliers + r * w);
  lines<T, V>(w, [&](int64_t j, auto tag, auto vectors) MLM_LAMBDA {
    constexpr int K = vectors.value;
    V dw[K], db[K], dp[K];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const int64_t at = j + k * V::N;
      dw[k] = load(dweight + at, tag);
      db[k] = !kRms && dbias ? load(dbias + at, tag) : V::set(0);
      dp[k] = kResidual && dpre ? load(dpre + at, tag) : V::set(0);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (a.stream) {  // the next rows
        prefetch(grad + (R + r) * w + j);
        prefetch(x + (R + r) * w + j);
      }
      V d[K], branch[K];
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const int64_t column = j + k * V::N, at = r * w + column;
        const V wt = load(weight + column, tag), g = load(grad + at, tag), v = load(x + at, tag);
        const V xhat = (kRms ? v : v - mean[r]) * rstd[r];
        dw[k] = fma(g, xhat, dw[k]);
        if (!kRms) db[k] = db[k] + g;
        d[k] = kRms ? g * wt * rstd[r] : fma(g * wt, rstd[r], k1[r]);
        d[k] = fma(xhat, k2[r], d[k]);
        if (kResidual) {
          if (grad_total) d[k] = d[k] + load(grad_total + at, tag);
          branch[k] = dbranch ? d[k] * load(multipliers + at, tag) : d[k];
          dp[k] = dp[k] + branch[k];
        }
      }
      put_all<K>(dx + r * w + j, d, tag, a.stream);
      if (kResidual && dbranch) put_all<K>(dbranch + r * w + j, branch, tag, a.stream);
    }
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const int64_t at = j + k * V::N;
      store(dweight + at, dw[k], tag);
      if (!kRms && dbias) store(dbias + at, db[k], tag);
      if (kResidual && dpre) store(dpre + at, dp[k], tag);
    }
  });
}

template <class T, class V, bool kRms, bool kResidual>
inline void norm_backward_blocks(const NormBackward& a, int64_t begin, int64_t end) {
  using A = typename V::scalar;
  constexpr int R = 4;
  Scratch<A> multipliers(a.dbranch ? R * a.width : 0);
  for (int64_t block = begin; block < end; ++block) {
    const size_t bytes = static_cast<size_t>(a.width) * sizeof(A);
    std::memset(static_cast<A*>(a.dweight) + block * a.width, 0, bytes);
    if (a.dbias) std::memset(static_cast<A*>(a.dbias) + block * a.width, 0, bytes);
    if (a.dpre_bias) std::memset(static_cast<A*>(a.dpre_bias) + block * a.width, 0, bytes);
    int64_t row = block * a.rows_per_block;
    const int64_t last = row + a.rows_per_block < a.rows ? row + a.rows_per_block : a.rows;
    for (; row + R <= last; row += R) norm_backward_rows<T, V, kRms, kResidual, R>(a, row, block, multipliers.get());
    for (; row < last; ++row) norm_backward_rows<T, V, kRms, kResidual, 1>(a, row, block, multipliers.get());
  }
  if (a.stream) fence();
}

template <class T, class V>
void norm_backward(const NormBackward& a, int64_t begin, int64_t end) {
  const bool residual = a.grad_total || a.dbranch || a.dpre_bias;
  if (a.rms)
    residual ? norm_backward_blocks<T, V, true, true>(a, begin, end) : norm_backward_blocks<T, V, true, false>(a, begin, end);
  else
    residual ? norm_backward_blocks<T, V, false, true>(a, begin, end)
             : norm_backward_blocks<T, V, false, false>(a, begin, end);
}
