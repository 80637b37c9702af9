// Softmax of attention scores with scale, mask and dropout. A row is read from memory once: scaled and masked values wait
// in a float row that stays in the core's own cache (131,072 keys are 512 KB).

struct KeyRange {
  int64_t begin;
  int64_t end;
};

template <class Args>
MLM_INLINE KeyRange visible_keys(const Args& a, int64_t row) {
  if (!a.causal) return {0, a.keys};
  const int64_t position = row % a.queries + a.offset;
  const int64_t end = position + 1 < 0 ? 0 : (position + 1 < a.keys ? position + 1 : a.keys);
  const int64_t begin = position + 1 > a.window ? position + 1 - a.window : 0;
  return {begin < end ? begin : end, end};
}

// Zeros in out[begin..end); the aligned middle goes past the cache when asked to.
template <class T, class V>
MLM_INLINE void put_zeros(T* out, int64_t begin, int64_t end, bool past_cache) {
  if (!past_cache) {
    if (begin < end) std::memset(static_cast<void*>(out + begin), 0, static_cast<size_t>(end - begin) * sizeof(T));
    return;
  }
  constexpr int64_t step = V::N;
  const int64_t first = (begin + step - 1) / step * step;
  const int64_t stop = first < end ? first : end;
  if (begin < stop) std::memset(static_cast<void*>(out + begin), 0, static_cast<size_t>(stop - begin) * sizeof(T));
  columns<V::N>(stop, end, [&](int64_t j, auto tag) MLM_LAMBDA { put(out + j, V::set(0), tag, true); });
}

template <class T, class V>
MLM_INLINE int64_t mask_row_offset(const SoftmaxForward& a, int64_t row) {
  int64_t offset = 0;
  for (int d = a.dims - 1; d >= 0; --d) {
    offset += row % a.sizes[d] * a.mask_strides[d];
    row /= a.sizes[d];
  }
  return offset;
}

// buffer[j] = x[j] * scale (+ mask[j]); returns the maximum.
template <class T, class V>
MLM_INLINE typename V::scalar scaled_row(const SoftmaxForward& a, int64_t row, KeyRange range, typename V::scalar* buffer) {
  using A = typename V::scalar;
  const T* x = static_cast<const T*>(a.x) + row * a.keys;
  const V scale = V::set(static_cast<A>(a.scale));
  const A lowest = -static_cast<A>(__builtin_inf());
  V top[4] = {V::set(lowest), V::set(lowest), V::set(lowest), V::set(lowest)};
  const auto run = [&](auto add_mask) MLM_LAMBDA {
    columns4<V::N>(range.begin, range.end, [&](int64_t j, auto tag, auto k) MLM_LAMBDA {
      const V v = add_mask(load(x + j, tag) * scale, j, tag);
      store(buffer + j, v, tag);
      top[k.value] = max(inside(v, tag, lowest), top[k.value]);
    });
  };
  if (a.mask_kind == kNoMask) {
    run([](V v, int64_t, auto) MLM_LAMBDA { return v; });
  } else {
    const int64_t at = mask_row_offset<T, V>(a, row);
    if (a.mask_key_stride == 0) {
      V shift = V::set(0);
      if (a.mask_kind == kBoolMask)
        shift = V::set(static_cast<const uint8_t*>(a.mask)[at] ? lowest : A(0));
      else if (a.mask_kind == kFloatMask)
        shift = V::set(static_cast<const A*>(a.mask)[at]);
      else
        shift = V::set(sum(load(static_cast<const T*>(a.mask) + at, Tail{1})));
      if (a.mask_kind == kBoolMask && static_cast<const uint8_t*>(a.mask)[at])
        run([&](V, int64_t, auto) MLM_LAMBDA { return shift; });
      else
        run([&](V v, int64_t, auto) MLM_LAMBDA { return v + shift; });
    } else if (a.mask_kind == kBoolMask) {
      const uint8_t* m = static_cast<const uint8_t*>(a.mask) + at;
      run([=](V v, int64_t j, auto tag) MLM_LAMBDA { return hide(v, m + j, tag); });
    } else if (a.mask_kind == kFloatMask) {
      const A* m = static_cast<const A*>(a.mask) + at;
      run([=](V v, int64_t j, auto tag) MLM_LAMBDA { return v + load(m + j, tag); });
    } else {
      const T* m = static_cast<const T*>(a.mask) + at;
      run([=](V v, int64_t j, auto tag) MLM_LAMBDA { return v + load(m + j, tag); });
    }
  }
  return maximum(max(max(top[0], top[1]), max(top[2], top[3])));
}

// buffer[j] = exp(buffer[j] - top), returns the sum.
template <class V>
MLM_INLINE typename V::scalar exp_row(KeyRange range, typename V::scalar top, typename V::scalar* buffer) {
  using A = typename V::scalar;
  const V shift = V::set(top);
  V acc[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
  columns4<V::N>(range.begin, range.end, [&](int64_t j, auto tag, auto k) MLM_LAMBDA {
    const V e = inside(exp(load(buffer + j, tag) - shift), tag, A(0));
    store(buffer + j, e, tag);
    acc[k.value] = acc[k.value] + e;
  });
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// A row of probabilities behind its visible range: zeros in front, values, zeros after. The buffer is padded with zeros up
// to a whole cache line, so that no line is written half past and half through the cache.
template <class T, class V>
MLM_INLINE void write_row(
    T* out, int64_t keys, KeyRange range, typename V::scalar* buffer, typename V::scalar inverse,
    const typename V::scalar* multipliers, bool past_cache) {
  constexpr int64_t line = 64 / sizeof(T);
  int64_t begin = range.begin, end = range.end;
  if (past_cache) {
    for (; begin % line != 0; --begin) buffer[begin - 1] = 0;
    for (; end % line != 0 && end < keys; ++end) buffer[end] = 0;
  }
  put_zeros<T, V>(out, 0, begin, past_cache);
  const V scale = V::set(inverse);
  if (multipliers)
    columns<V::N>(begin, end, [&](int64_t j, auto tag) MLM_LAMBDA {
      put(out + j, load(buffer + j, tag) * scale * load(multipliers + j, tag), tag, past_cache);
    });
  else
    columns<V::N>(begin, end, [&](int64_t j, auto tag) MLM_LAMBDA {
      put(out + j, load(buffer + j, tag) * scale, tag, past_cache);
    });
  put_zeros<T, V>(out, end, keys, past_cache);
}

template <class T, class V>
void softmax_forward(const SoftmaxForward& a, int64_t begin, int64_t end) {
  using A = typename V::scalar;
  const bool drop = a.dropout.threshold != 0;
  Scratch<A, 4096> buffer(a.keys);
  Scratch<A, 4096> multipliers(drop ? a.keys : 0);
  for (int64_t row = begin; row < end; ++row) {
    const KeyRange range = visible_keys(a, row);
    A top = scaled_row<T, V>(a, row, range, buffer.get());
    // Nothing visible: the shift becomes 0, every exp(-inf) is 0 and so is the sum (a NaN still comes through).
    if (top == -static_cast<A>(__builtin_inf())) top = 0;
    const A total = exp_row<V>(range, top, buffer.get());
    const A inverse = total == 0 ? A(0) : A(1) / total;
    T* out = static_cast<T*>(a.out) + row * a.keys;
    if (!drop) {
      write_row<T, V>(out, a.keys, range, buffer.get(), inverse, static_cast<const A*>(nullptr), a.stream);
      continue;
    }
    write_row<T, V>(static_cast<T*>(a.probs) + row * a.keys, a.keys, range, buffer.get(), inverse,
                    static_cast<const A*>(nullptr), a.stream);
    dropout_multipliers(a.dropout, row, 0, a.keys, multipliers.get());
    write_row<T, V>(out, a.keys, range, buffer.get(), inverse, multipliers.get(), a.stream);
  }
  if (a.stream) fence();
}

// dx = scale * p * (g - sum(g * p)), where g has passed back through the dropout.
template <class T, class V>
void softmax_backward(const SoftmaxBackward& a, int64_t begin, int64_t end) {
  using A = typename V::scalar;
  const bool drop = a.dropout.threshold != 0;
  Scratch<A, 4096> multipliers(drop ? a.keys : 0);
  const A* m = multipliers.get();
  for (int64_t row = begin; row < end; ++row) {
    KeyRange range = visible_keys(a, row);
    const T* g = static_cast<const T*>(a.grad) + row * a.keys;
    const T* p = static_cast<const T*>(a.probs) + row * a.keys;
    T* dx = static_cast<T*>(a.dx) + row * a.keys;
    if (a.stream) {  // whole cache lines: probabilities around the range are zero, and so is their gradient
      constexpr int64_t line = 64 / sizeof(T);
      range.begin = range.begin / line * line;
      range.end = (range.end + line - 1) / line * line < a.keys ? (range.end + line - 1) / line * line : a.keys;
    }
    if (drop) dropout_multipliers(a.dropout, row, range.begin, range.end, multipliers.get());
    V acc[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
    columns4<V::N>(range.begin, range.end, [&](int64_t j, auto tag, auto k) MLM_LAMBDA {
      V grad = load(g + j, tag);
      if (drop) grad = grad * load(m + j, tag);
      acc[k.value] = fma(grad, load(p + j, tag), acc[k.value]);
    });
    const V dot = V::set(sum((acc[0] + acc[1]) + (acc[2] + acc[3])));
    const V scale = V::set(static_cast<A>(a.scale));
    put_zeros<T, V>(dx, 0, range.begin, a.stream);
    columns<V::N>(range.begin, range.end, [&](int64_t j, auto tag) MLM_LAMBDA {
      V grad = load(g + j, tag);
      if (drop) grad = grad * load(m + j, tag);
      put(dx + j, (grad - dot) * load(p + j, tag) * scale, tag, a.stream);
    });
    put_zeros<T, V>(dx, range.end, a.keys, a.stream);
  }
  if (a.stream) fence();
}
