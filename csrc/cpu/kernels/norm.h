// Layer norm and RMS norm, forward and backward, plain and behind a fused residual sum.

template <class T, class V>
struct RowMoments {
  using A = typename V::scalar;

  // Mean, then the centred sum of squares from the cached row: no cancellation, whatever the mean.
  static MLM_INLINE void of(const T* x, int64_t width, double eps, bool rms, A* mean, A* rstd) {
    V acc[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
    A m = 0;
    if (!rms) {
      columns4<V::N>(0, width, [&](int64_t j, auto tag, auto k) MLM_LAMBDA {
        acc[k.value] = acc[k.value] + load(x + j, tag);
      });
      m = sum((acc[0] + acc[1]) + (acc[2] + acc[3])) / static_cast<A>(width);
      for (V& a : acc) a = V::set(0);
    }
    const V centre = V::set(m);
    columns4<V::N>(0, width, [&](int64_t j, auto tag, auto k) MLM_LAMBDA {
      const V d = inside(load(x + j, tag) - centre, tag, A(0));
      acc[k.value] = fma(d, d, acc[k.value]);
    });
    const A squares = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
    *mean = m;
    *rstd = sum(V::set(A(1)) / sqrt(V::set(squares / static_cast<A>(width) + static_cast<A>(eps)))) / static_cast<A>(V::N);
  }
};

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

template <class T, class V>
void norm_forward(const NormForward& a, int64_t begin, int64_t end) {
  using A = typename V::scalar;
  const A* weight = static_cast<const A*>(a.weight);
  const A* bias = static_cast<const A*>(a.bias);
  Scratch<T> kept(a.total && a.stream ? a.width : 0);
  Scratch<A> multipliers(a.dropout.threshold ? a.width : 0);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = a.total ? residual_row<T, V>(a, row, kept.get(), multipliers.get())
                         : static_cast<const T*>(a.x) + row * a.width;
    T* out = static_cast<T*>(a.out) + row * a.width;
    A mean, rstd;
    RowMoments<T, V>::of(x, a.width, a.eps, a.rms, &mean, &rstd);
    static_cast<A*>(a.rstd)[row] = rstd;
    const V m = V::set(mean), s = V::set(rstd);
    if (a.rms) {
      columns<V::N>(0, a.width, [&](int64_t j, auto tag) MLM_LAMBDA {
        put(out + j, load(x + j, tag) * s * load(weight + j, tag), tag, a.stream);
      });
      continue;
    }
    static_cast<A*>(a.mean)[row] = mean;
    columns<V::N>(0, a.width, [&](int64_t j, auto tag) MLM_LAMBDA {
      const V b = bias ? load(bias + j, tag) : V::set(0);
      put(out + j, fma((load(x + j, tag) - m) * s, load(weight + j, tag), b), tag, a.stream);
    });
  }
  if (a.stream) fence();
}

// R rows together: weight, dweight and dbias are read and written once for all of them.
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
      const V gw = load(grad + r * w + j, tag) * wt;
      const V xc = load(x + r * w + j, tag) - mean[r];
      if (!kRms) s1[r] = s1[r] + gw;
      s2[r] = fma(gw, xc, s2[r]);
    }
  });
  V c1[R], c2[R];
  for (int r = 0; r < R; ++r) {
    const A scale = sum(rstd[r]) / static_cast<A>(V::N);
    c1[r] = V::set(kRms ? A(0) : sum(s1[r]) / static_cast<A>(w));
    c2[r] = V::set(sum(s2[r]) * scale / static_cast<A>(w));
  }
  if (kResidual && dbranch)
    for (int r = 0; r < R; ++r) dropout_multipliers(a.dropout, row + r, 0, w, multipliers + r * w);
  columns<V::N>(0, w, [&](int64_t j, auto tag) MLM_LAMBDA {
    const V wt = load(weight + j, tag);
    V dw = load(dweight + j, tag);
    V db = !kRms && dbias ? load(dbias + j, tag) : V::set(0);
    V dp = kResidual && dpre ? load(dpre + j, tag) : V::set(0);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V g = load(grad + r * w + j, tag);
      const V xhat = (load(x + r * w + j, tag) - mean[r]) * rstd[r];
      dw = fma(g, xhat, dw);
      if (!kRms) db = db + g;
      V d = kRms ? g * wt - xhat * c2[r] : g * wt - c1[r] - xhat * c2[r];
      d = d * rstd[r];
      if (kResidual) {
        if (grad_total) d = d + load(grad_total + r * w + j, tag);
        V branch = d;
        if (dbranch) {
          branch = d * load(multipliers + r * w + j, tag);
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
