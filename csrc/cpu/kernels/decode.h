// One new token a row through a transformer: products of a weight matrix with a few vectors, and attention of one query
// over cached keys. Both read far more memory than they compute; the aim is to read it once, several lines at a time.

// R outputs of M vectors: weight lines of R rows are in flight together, which one row alone cannot saturate memory with.
// W is the type of the weight: T, that of the bias, or int8. A code is a float in the register, and a row's sum is scaled
// once. The processor's own prefetching follows one stream a page, and rows of a few bytes a weight are several to a page: so
// the lines of the tile after the next are asked for (int8: 1.2 to 1.9 times as fast; measured with rows of 384 to 4,096).
template <class W, class T, class V, int R, int M>
MLM_INLINE void product_tile(const Product& a, int64_t output, int64_t vector) {
  using A = typename V::scalar;
  const W* weight = static_cast<const W*>(a.weight) + output * a.in;
  const A* x = static_cast<const A*>(a.x) + vector * a.in;
  V acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) acc[r][m] = V::set(0);
  constexpr int L = 64 / static_cast<int>(sizeof(W)) / V::N;  // vectors of a cache line of weights
  const int64_t ahead = 2 * R * a.in;
  const auto add = [&](int64_t j, auto tag) MLM_LAMBDA {
    for (int r = 0; r < R; ++r) {
      const V w = load(weight + r * a.in + j, tag);
      for (int m = 0; m < M; ++m) acc[r][m] = fma(w, load(x + m * a.in + j, tag), acc[r][m]);
    }
  };
  int64_t j = 0;
  for (; j + L * V::N <= a.in; j += L * V::N) {
    for (int r = 0; r < R; ++r) prefetch(weight + r * a.in + j + ahead);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) add(j + l * V::N, Full{});
  }
  columns<V::N>(j, a.in, add);
  const T* bias = static_cast<const T*>(a.bias);
  for (int m = 0; m < M; ++m) {
    A* y = static_cast<A*>(a.y) + (vector + m) * a.out + output;
    for (int r = 0; r < R; ++r) {
      A value = sum(acc[r][m]);
      if constexpr (sizeof(W) == 1) value *= a.scale[output + r];
      if (bias) value += sum(load(bias + output + r, Tail{1}));
      y[r] = a.add ? y[r] + value : value;
    }
  }
}

template <class W, class T, class V, int M>
MLM_INLINE void product_rows(const Product& a, int64_t begin, int64_t end, int64_t vector) {
  constexpr int R = 4;
  int64_t output = begin;
  for (; output + R <= end; output += R) product_tile<W, T, V, R, M>(a, output, vector);
  for (; output < end; ++output) product_tile<W, T, V, 1, M>(a, output, vector);
}

// Outputs [begin, end) of all vectors. A few outputs at a time, so that the second four vectors find them in the cache.
template <class W, class T, class V>
void product(const Product& a, int64_t begin, int64_t end) {
  constexpr int64_t step = 16;
  for (int64_t output = begin; output < end; output += step) {
    const int64_t stop = output + step < end ? output + step : end;
    int64_t vector = 0;
    for (; vector + 4 <= a.vectors; vector += 4) product_rows<W, T, V, 4>(a, output, stop, vector);
    for (; vector + 2 <= a.vectors; vector += 2) product_rows<W, T, V, 2>(a, output, stop, vector);
    for (; vector < a.vectors; ++vector) product_rows<W, T, V, 1>(a, output, stop, vector);
  }
}

// sum over keys of weight[key] * values[key], C vectors of the head at a time.
template <class T, class V, int C, class Tag>
MLM_INLINE void weighted_values(
    const typename V::scalar* weight, const T* values, int64_t keys, int64_t dim, typename V::scalar* out, Tag tag) {
  V acc[C];
  for (int c = 0; c < C; ++c) acc[c] = V::set(0);
  for (int64_t key = 0; key < keys; ++key) {
    const V w = V::set(weight[key]);
    for (int c = 0; c < C; ++c) acc[c] = fma(w, load(values + key * dim + c * V::N, tag), acc[c]);
  }
  for (int c = 0; c < C; ++c) store(out + c * V::N, acc[c], tag);
}

template <class T, class V>
MLM_INLINE void attend_head(
    const DecodeAttention& a, const typename V::scalar* query, const T* keys, const T* values, int64_t count,
    typename V::scalar* scores, typename V::scalar* out) {
  using A = typename V::scalar;
  const int64_t dim = a.dim;
  A top = -static_cast<A>(__builtin_inf());
  for (int64_t key = 0; key < count; ++key) {
    V acc = V::set(0);
    columns<V::N>(0, dim, [&](int64_t j, auto tag) MLM_LAMBDA {
      acc = fma(load(keys + key * dim + j, tag), load(query + j, tag), acc);
    });
    scores[key] = sum(acc) * static_cast<A>(a.scale);
    top = scores[key] > top ? scores[key] : top;
  }
  V total = V::set(0);
  columns<V::N>(0, count, [&](int64_t j, auto tag) MLM_LAMBDA {
    const V e = exp(load(scores + j, tag) - V::set(top));
    store(scores + j, e, tag);
    total = total + inside(e, tag, A(0));
  });
  int64_t c = 0;
  for (; c + 4 * V::N <= dim; c += 4 * V::N) weighted_values<T, V, 4>(scores, values + c, count, dim, out + c, Full{});
  columns<V::N>(c, dim, [&](int64_t j, auto tag) MLM_LAMBDA {
    weighted_values<T, V, 1>(scores, values + j, count, dim, out + j, tag);
  });
  const V share = V::set(A(1) / sum(total));
  columns<V::N>(0, dim, [&](int64_t j, auto tag) MLM_LAMBDA { store(out + j, load(out + j, tag) * share, tag); });
}

// Pairs (row, key/value head) [begin, end): stores the row's new key and value, then attends with all its query heads.
template <class T, class V>
void decode_attention(const DecodeAttention& a, int64_t begin, int64_t end) {
  using A = typename V::scalar;
  const int64_t heads_per_group = a.heads / a.groups, width = (a.heads + 2 * a.groups) * a.dim;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t row = pair / a.groups, group = pair % a.groups, position = a.positions[row];
    const A* qkv = static_cast<const A*>(a.qkv) + row * width;
    T* keys = static_cast<T*>(a.keys) + pair * a.capacity * a.dim;
    T* values = static_cast<T*>(a.values) + pair * a.capacity * a.dim;
    const A* new_key = qkv + (a.heads + group) * a.dim;
    const A* new_value = qkv + (a.heads + a.groups + group) * a.dim;
    columns<V::N>(0, a.dim, [&](int64_t j, auto tag) MLM_LAMBDA {
      store(keys + position * a.dim + j, load(new_key + j, tag), tag);
      store(values + position * a.dim + j, load(new_value + j, tag), tag);
    });
    Scratch<A> scores(position + 1);
    for (int64_t head = group * heads_per_group; head < (group + 1) * heads_per_group; ++head)
      attend_head<T, V>(a, qkv + head * a.dim, keys, values, position + 1, scores.get(),
                        static_cast<A*>(a.out) + (row * a.heads + head) * a.dim);
  }
}
