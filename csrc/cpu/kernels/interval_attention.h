// Attention in which each query sees one run of keys, and neither end of that run ever moves back from query to query: a
// sliding window, causal or not, cut where a document or the padding begins. A chunk of queries is multiplied with the
// panels of keys that its runs touch; while those are up to some two thousand keys, scores never leave the core's own
// cache. The backward pass makes the probabilities again from the scores and the logarithm of their sum (Dao et al. 2022, section 3.1).
//
// Scores are products with keys that were transposed panel by panel, once for all queries of an item, so that every
// product here is the same small kernel: R rows times whole vectors, both in registers.

// c[r, j] (+)= sum over k in [first, last) of a(r, k) * b[k, j] for R rows and C vectors of columns. a(r, k) is at
// a[r * lda + k], or at a[k * lda + r] where a lies across.
template <class V, int R, int C, bool kAcross>
void product_block(
    const typename V::scalar* a, int64_t lda, const typename V::scalar* b, int64_t ldb, typename V::scalar* c, int64_t ldc,
    int64_t first, int64_t last, bool add) {
  V acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) acc[r][j] = add ? load(c + r * ldc + j * V::N, Full{}) : V::set(0);
  for (int64_t k = first; k < last; ++k) {
    V row[C];
    for (int j = 0; j < C; ++j) row[j] = load(b + k * ldb + j * V::N, Full{});
    for (int r = 0; r < R; ++r) {
      const V x = V::set(kAcross ? a[k * lda + r] : a[r * lda + k]);
      for (int j = 0; j < C; ++j) acc[r][j] = fma(x, row[j], acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) store(c + r * ldc + j * V::N, acc[r][j], Full{});
}

// R rows and any number of whole vectors.
template <class V, int R, bool kAcross>
MLM_INLINE void product_rows_of(
    const typename V::scalar* a, int64_t lda, const typename V::scalar* b, int64_t ldb, typename V::scalar* c, int64_t ldc,
    int64_t columns, int64_t first, int64_t last, bool add) {
  constexpr int C = V::N == 16 ? 4 : 2;  // with R = 6 the accumulators fill the registers of AVX-512, and of AVX2
  int64_t j = 0;
  for (; j + C * V::N <= columns; j += C * V::N)
    product_block<V, R, C, kAcross>(a, lda, b + j, ldb, c + j, ldc, first, last, add);
  if constexpr (C == 4) {
    if (j + 3 * V::N == columns) return product_block<V, R, 3, kAcross>(a, lda, b + j, ldb, c + j, ldc, first, last, add);
    if (j + 2 * V::N == columns) return product_block<V, R, 2, kAcross>(a, lda, b + j, ldb, c + j, ldc, first, last, add);
  }
  if (j < columns) product_block<V, R, 1, kAcross>(a, lda, b + j, ldb, c + j, ldc, first, last, add);
}

template <class V, bool kAcross>
MLM_INLINE void product_any(
    int rows, const typename V::scalar* a, int64_t lda, const typename V::scalar* b, int64_t ldb, typename V::scalar* c,
    int64_t ldc, int64_t columns, int64_t first, int64_t last, bool add) {
  if (rows == 6) return product_rows_of<V, 6, kAcross>(a, lda, b, ldb, c, ldc, columns, first, last, add);
  if (rows == 4) return product_rows_of<V, 4, kAcross>(a, lda, b, ldb, c, ldc, columns, first, last, add);
  if (rows == 2) return product_rows_of<V, 2, kAcross>(a, lda, b, ldb, c, ldc, columns, first, last, add);
  product_rows_of<V, 1, kAcross>(a, lda, b, ldb, c, ldc, columns, first, last, add);
}

// f(row, count) for groups of rows that `product_any` takes.
template <class F>
MLM_INLINE void row_groups(int64_t rows, F&& f) {
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r;
    const int count = left >= 6 ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    f(r, count);
    r += count;
  }
}

MLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MLM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Memory for an item, in whole cache lines.
template <class A>
class Arena {
 public:
  explicit Arena(int64_t count) : memory_(__builtin_malloc(static_cast<size_t>(count) * sizeof(A) + 64)) {
    if (!memory_) __builtin_trap();
    next_ = reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64);
  }
  ~Arena() { __builtin_free(memory_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  A* take(int64_t count) {  // a multiple of a cache line each
    A* taken = next_;
    next_ += count;
    return taken;
  }

 private:
  void* memory_;
  A* next_;
};

// Some queries of one head: rows `lo`..`hi` of keys for each, and the panels that any of them touches.
struct Chunk {
  const int64_t* lo;
  const int64_t* hi;
  int64_t start;
  int64_t rows;
  int64_t first_panel;
  int64_t panels;

  Chunk(const IntervalAttention& a, int64_t sample, int64_t from, int64_t until)
      : lo(a.begin + sample * a.interval_stride + from),
        hi(a.end + sample * a.interval_stride + from),
        start(from),
        rows(smaller(kPanel, until - from)),
        first_panel(lo[0] / kPanel),
        panels(larger(0, (hi[rows - 1] + kPanel - 1) / kPanel - first_panel)) {}

  int64_t width() const { return panels * kPanel; }
  int64_t origin() const { return first_panel * kPanel; }
};

// buffer[row, key] = x[row] . panel of keys, where a row group sees any key of a vector.
template <class V>
MLM_INLINE void chunk_scores(
    const Chunk& chunk, const typename V::scalar* x, const typename V::scalar* panels, int64_t dim,
    typename V::scalar* buffer) {
  const int64_t width = chunk.width();
  for (int64_t p = 0; p < chunk.panels; ++p) {
    const int64_t begin = chunk.origin() + p * kPanel;
    row_groups(chunk.rows, [&](int64_t r, int count) MLM_LAMBDA {
      const int64_t from = larger(chunk.lo[r] - begin, 0) / V::N * V::N;
      const int64_t to = smaller((chunk.hi[r + count - 1] - begin + V::N - 1) / V::N * V::N, kPanel);
      if (from < to)
        product_any<V, false>(count, x + r * dim, dim, panels + p * kPanel * dim + from, kPanel,
                              buffer + r * width + p * kPanel + from, width, to - from, 0, dim, false);
    });
  }
}

// out[row] = sum over the keys a row sees of weights[row, key] * values[key].
template <class V>
MLM_INLINE void chunk_sums(
    const Chunk& chunk, const typename V::scalar* weights, const typename V::scalar* values, int64_t dim,
    typename V::scalar* out) {
  const int64_t width = chunk.width();
  row_groups(chunk.rows, [&](int64_t r, int count) MLM_LAMBDA {
    if (chunk.lo[r] >= chunk.hi[r + count - 1])
      std::memset(static_cast<void*>(out + r * dim), 0, static_cast<size_t>(count * dim) * sizeof(out[0]));
  });
  for (int64_t p = 0; p < chunk.panels; ++p) {
    const int64_t begin = p * kPanel;
    row_groups(chunk.rows, [&](int64_t r, int count) MLM_LAMBDA {
      const int64_t from = larger(chunk.lo[r] - chunk.origin(), begin);
      const int64_t to = smaller(chunk.hi[r + count - 1] - chunk.origin(), begin + kPanel);
      const bool add = chunk.lo[r] - chunk.origin() < begin;  // an earlier panel has begun the sum
      if (from < to)
        product_any<V, false>(count, weights + r * width, width, values, dim, out + r * dim, dim, dim, from, to, add);
    });
  }
}

// out[key] += sum over the rows that see a key of weights[row, key] * x[row]; `out` begins at key 0.
template <class V>
MLM_INLINE void chunk_spread(
    const Chunk& chunk, const typename V::scalar* weights, const typename V::scalar* x, int64_t keys, int64_t dim,
    typename V::scalar* out) {
  const int64_t width = chunk.width();
  int64_t from = 0, to = 0;
  row_groups(smaller(width, keys - chunk.origin()), [&](int64_t j, int count) MLM_LAMBDA {
    const int64_t key = chunk.origin() + j;
    while (from < chunk.rows && chunk.hi[from] <= key) ++from;
    while (to < chunk.rows && chunk.lo[to] < key + count) ++to;
    if (from < to)
      product_any<V, true>(count, weights + j, width, x, dim, out + key * dim, dim, dim, from, to, true);
  });
}

// Rows that lie `stride` apart -> packed ones, times a factor.
template <class T, class V>
MLM_INLINE void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t dim, T factor, T* out) {
  for (int64_t r = 0; r < rows; ++r)
    columns<V::N>(0, dim, [&](int64_t j, auto tag) MLM_LAMBDA {
      store(out + r * dim + j, load(x + r * stride + j, tag) * V::set(factor), tag);
    });
}

// Rows -> panels [dim, kPanel] of kPanel rows each; zeros after the last.
template <class T>
MLM_INLINE void pack_panels(const T* x, int64_t stride, int64_t rows, int64_t dim, T* out) {
  for (int64_t begin = 0; begin < rows; begin += kPanel, out += kPanel * dim) {
    const int64_t count = smaller(kPanel, rows - begin);
    if (count < kPanel) std::memset(static_cast<void*>(out), 0, static_cast<size_t>(kPanel * dim) * sizeof(T));
    for (int64_t d = 0; d < dim; d += 16)  // sixteen columns are a cache line of a row: read it once
      for (int64_t r = 0; r < count; ++r)
        for (int64_t j = d; j < d + 16; ++j) out[j * kPanel + r] = x[(begin + r) * stride + j];
  }
}

// Zeros where a row of a chunk sees nothing.
template <class A>
MLM_INLINE void clear_outside(A* row, KeyRange seen, int64_t width) {
  if (seen.begin >= seen.end) seen = {width, width};
  std::memset(static_cast<void*>(row), 0, static_cast<size_t>(seen.begin) * sizeof(A));
  std::memset(static_cast<void*>(row + seen.end), 0, static_cast<size_t>(width - seen.end) * sizeof(A));
}

// What an item of the plan works on: some queries of one head (of queries forward, of keys backward, where all queries that
// share it are added up).
struct Item {
  int64_t sample;
  int64_t head;
  int64_t start;
  int64_t stop;
  int64_t first_key;  // of the panels any of its chunks touches
  int64_t num_keys;

  Item(const IntervalAttention& a, int64_t number) {
    const int64_t segment = a.phase + number % a.items_a_head * a.phases;
    sample = number / a.items_a_head / a.heads_a_sample;
    head = number / a.items_a_head % a.heads_a_sample;
    start = segment * a.segment;
    stop = smaller(start + a.segment, a.queries);
    const int64_t shift = sample * a.interval_stride;
    first_key = a.begin[shift + start] / kPanel * kPanel;
    num_keys = larger(0, smaller((a.end[shift + stop - 1] + kPanel - 1) / kPanel * kPanel, a.keys) - first_key);
  }
  int64_t padded() const { return (num_keys + kPanel - 1) / kPanel * kPanel; }
};

template <class T>
MLM_INLINE const T* rows_of(const Strided& x, int64_t sample, int64_t head, int64_t row) {
  return static_cast<const T*>(x.data) + sample * x.sample + head * x.head + row * x.row;
}

// The widest chunk of an item, in keys.
MLM_INLINE int64_t widest(const IntervalAttention& a, const Item& item) {
  int64_t width = 0;
  for (int64_t start = item.start; start < item.stop; start += kPanel)
    width = larger(width, Chunk(a, item.sample, start, item.stop).width());
  return width;
}

// Rows of scores -> exponentials, zero where nothing is seen; `lse` gets the logarithm of each sum, `inverse` 1 / sum.
template <class V>
MLM_INLINE void chunk_softmax(
    const Chunk& chunk, typename V::scalar* buffer, typename V::scalar* lse, typename V::scalar* inverse) {
  using A = typename V::scalar;
  const A lowest = -static_cast<A>(__builtin_inf());
  for (int64_t r = 0; r < chunk.rows; ++r) {
    A* row = buffer + r * chunk.width();
    const KeyRange seen{chunk.lo[r] - chunk.origin(), chunk.hi[r] - chunk.origin()};
    clear_outside(row, seen, chunk.width());
    V top[4] = {V::set(lowest), V::set(lowest), V::set(lowest), V::set(lowest)};
    columns4<V::N>(seen.begin, seen.end, [&](int64_t j, auto tag, auto k) MLM_LAMBDA {
      top[k.value] = max(inside(load(row + j, tag), tag, lowest), top[k.value]);
    });
    A shift = maximum(max(max(top[0], top[1]), max(top[2], top[3])));
    if (shift == lowest) shift = 0;
    const A total = exp_row<V>(seen, shift, row);
    lse[r] = total == 0 ? A(0) : shift + static_cast<A>(__builtin_log(static_cast<double>(total)));
    inverse[r] = total == 0 ? A(0) : A(1) / total;
  }
}

// Scores and gradients of the probabilities -> probabilities and gradients of the scores, in place.
template <class V>
MLM_INLINE void chunk_softmax_gradient(
    const Chunk& chunk, typename V::scalar* scores, typename V::scalar* grads, const typename V::scalar* lse) {
  using A = typename V::scalar;
  for (int64_t r = 0; r < chunk.rows; ++r) {
    A* row = scores + r * chunk.width();
    A* grad = grads + r * chunk.width();
    const KeyRange seen{chunk.lo[r] - chunk.origin(), chunk.hi[r] - chunk.origin()};
    clear_outside(row, seen, chunk.width());
    clear_outside(grad, seen, chunk.width());
    const V shift = V::set(lse[r]);
    V acc[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
    columns4<V::N>(seen.begin, seen.end, [&](int64_t j, auto tag, auto k) MLM_LAMBDA {
      const V p = inside(exp(load(row + j, tag) - shift), tag, A(0));
      store(row + j, p, tag);
      acc[k.value] = fma(p, load(grad + j, tag), acc[k.value]);
    });
    const V dot = V::set(sum((acc[0] + acc[1]) + (acc[2] + acc[3])));
    columns<V::N>(seen.begin, seen.end, [&](int64_t j, auto tag) MLM_LAMBDA {
      store(grad + j, load(row + j, tag) * (load(grad + j, tag) - dot), tag);
    });
  }
}

template <class T, class V>
void interval_attention_forward(const IntervalAttention& a, int64_t begin, int64_t end) {
  for (int64_t number = begin; number < end; ++number) {
    const Item item(a, number);
    const int64_t keys = item.padded(), dim = a.dim, width = widest(a, item), group = item.head / (a.heads / a.groups);
    Arena<T> memory(2 * keys * dim + kPanel * (dim + width + 1));
    T *panels = memory.take(keys * dim), *values = memory.take(keys * dim), *query = memory.take(kPanel * dim),
      *scores = memory.take(kPanel * width), *inverse = memory.take(kPanel);
    pack_panels(rows_of<T>(a.key, item.sample, group, item.first_key), a.key.row, item.num_keys, dim, panels);
    pack_rows<T, V>(rows_of<T>(a.value, item.sample, group, item.first_key), a.value.row, item.num_keys, dim, T(1), values);
    for (int64_t start = item.start; start < item.stop; start += kPanel) {
      const Chunk chunk(a, item.sample, start, item.stop);
      const int64_t row = (item.sample * a.heads + item.head) * a.queries + start;
      T* out = static_cast<T*>(a.out) + row * dim;
      const int64_t skipped = (chunk.origin() - item.first_key) * dim;
      pack_rows<T, V>(rows_of<T>(a.query, item.sample, item.head, start), a.query.row, chunk.rows, dim,
                      static_cast<T>(a.scale), query);
      chunk_scores<V>(chunk, query, panels + skipped, dim, scores);
      chunk_softmax<V>(chunk, scores, static_cast<T*>(a.lse) + row, inverse);
      chunk_sums<V>(chunk, scores, values + skipped, dim, out);
      for (int64_t r = 0; r < chunk.rows; ++r) {
        if (inverse[r] == 0) {  // sees nothing: zeros, even where others of its row group see an infinity
          std::memset(static_cast<void*>(out + r * dim), 0, static_cast<size_t>(dim) * sizeof(T));
          continue;
        }
        columns<V::N>(0, dim, [&](int64_t j, auto tag) MLM_LAMBDA {
          store(out + r * dim + j, load(out + r * dim + j, tag) * V::set(inverse[r]), tag);
        });
      }
    }
  }
}

template <class T, class V>
void interval_attention_backward(const IntervalAttention& a, int64_t begin, int64_t end) {
  for (int64_t number = begin; number < end; ++number) {
    const Item item(a, number);
    const int64_t keys = item.padded(), dim = a.dim, repeats = a.heads / a.groups, width = widest(a, item);
    Arena<T> memory(3 * keys * dim + 2 * kPanel * (dim + width));
    T *key_panels = memory.take(keys * dim), *value_panels = memory.take(keys * dim), *key = memory.take(keys * dim),
      *query = memory.take(kPanel * dim), *grad = memory.take(kPanel * dim), *scores = memory.take(kPanel * width),
      *grads = memory.take(kPanel * width);
    const T* first = rows_of<T>(a.key, item.sample, item.head, item.first_key);
    pack_panels(first, a.key.row, item.num_keys, dim, key_panels);
    pack_rows<T, V>(first, a.key.row, item.num_keys, dim, static_cast<T>(a.scale), key);
    pack_panels(rows_of<T>(a.value, item.sample, item.head, item.first_key), a.value.row, item.num_keys, dim,
                value_panels);
    const int64_t whole = (item.sample * a.groups + item.head) * a.keys * dim;
    T *dkey = static_cast<T*>(a.dkey) + whole, *dvalue = static_cast<T*>(a.dvalue) + whole;
    for (int64_t head = item.head * repeats; head < (item.head + 1) * repeats; ++head)
      for (int64_t start = item.start; start < item.stop; start += kPanel) {
        const Chunk chunk(a, item.sample, start, item.stop);
        const int64_t row = (item.sample * a.heads + head) * a.queries + start;
        const int64_t skipped = (chunk.origin() - item.first_key) * dim;
        pack_rows<T, V>(rows_of<T>(a.query, item.sample, head, start), a.query.row, chunk.rows, dim,
                        static_cast<T>(a.scale), query);
        pack_rows<T, V>(rows_of<T>(a.grad, item.sample, head, start), a.grad.row, chunk.rows, dim, T(1), grad);
        chunk_scores<V>(chunk, query, key_panels + skipped, dim, scores);
        chunk_scores<V>(chunk, grad, value_panels + skipped, dim, grads);
        chunk_softmax_gradient<V>(chunk, scores, grads, static_cast<const T*>(a.lse) + row);
        chunk_sums<V>(chunk, grads, key + skipped, dim, static_cast<T*>(a.out) + row * dim);
        chunk_spread<V>(chunk, grads, query, a.keys, dim, dkey);
        chunk_spread<V>(chunk, scores, grad, a.keys, dim, dvalue);
      }
  }
}
