// The two passes of a cross entropy. Sums are kept in float32 (double for double input) and written as float32.

template <class T, class V>
void cross_entropy_stats(const CrossEntropy& a, int64_t begin, int64_t end) {
  using A = typename V::scalar;
  // Online softmax (Milakov and Gimelshein 2018) by chunks that stay in the L1 cache: one read of the logits.
  constexpr int64_t chunk = 2048;
  const A lowest = -static_cast<A>(__builtin_inf());
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.logits) + row * a.stride;
    A top = lowest, total = 0;
    for (int64_t from = 0; from < a.num_valid; from += chunk) {
      const int64_t to = from + chunk < a.num_valid ? from + chunk : a.num_valid;
      V high[4] = {V::set(lowest), V::set(lowest), V::set(lowest), V::set(lowest)};
      columns4<V::N>(from, to, [&](int64_t j, auto tag, auto k) MLM_LAMBDA {
        high[k.value] = max(inside(load(x + j, tag), tag, lowest), high[k.value]);
      });
      const A here = maximum(max(max(high[0], high[1]), max(high[2], high[3])));
      if (here > top) {
        if (total != 0) total *= sum(exp(V::set(top - here))) / static_cast<A>(V::N);
        top = here;
      }
      const V shift = V::set(top == lowest ? A(0) : top);
      V acc[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
      columns4<V::N>(from, to, [&](int64_t j, auto tag, auto k) MLM_LAMBDA {
        acc[k.value] = acc[k.value] + inside(exp(load(x + j, tag) - shift), tag, A(0));
      });
      total += sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
    }
    const int64_t local = a.labels[row] - a.vocab_start;
    const bool inside_slice = local >= 0 && local < a.num_valid;
    a.maximum[row] = static_cast<float>(top);
    a.sum[row] = static_cast<float>(total);
    a.target[row] = inside_slice ? static_cast<float>(sum(inside(load(x + local, Tail{1}), Tail{1}, A(0)))) : 0.0f;
  }
}

template <class T, class V>
void cross_entropy_grad(const CrossEntropy& a, int64_t begin, int64_t end) {
  using A = typename V::scalar;
  for (int64_t row = begin; row < end; ++row) {
    T* x = static_cast<T*>(a.logits) + row * a.stride;
    const V lse = V::set(static_cast<A>(a.lse[row]));
    const V scale = V::set(static_cast<A>(a.scale[row]));
    const int64_t local = a.labels[row] - a.vocab_start;
    const bool inside_slice = local >= 0 && local < a.num_valid;
    V at_label = V::set(0);
    if (inside_slice) at_label = (exp(load(x + local, Tail{1}) - lse) - V::set(1)) * scale;
    columns<V::N>(0, a.num_valid, [&](int64_t j, auto tag) MLM_LAMBDA {
      store(x + j, exp(load(x + j, tag) - lse) * scale, tag);
    });
    if (inside_slice) store(x + local, at_label, Tail{1});
    std::memset(static_cast<void*>(x + a.num_valid), 0, static_cast<size_t>(a.width - a.num_valid) * sizeof(T));
  }
}
