// Parameters to the accumulation type and column sums back from it.

template <class T, class V>
void widen(const void* from, void* to, int64_t count) {
  using A = typename V::scalar;
  const T* x = static_cast<const T*>(from);
  A* out = static_cast<A*>(to);
  columns<V::N>(0, count, [&](int64_t j, auto tag) MLM_LAMBDA { store(out + j, load(x + j, tag), tag); });
}

// out[j] = sum over blocks, in their order, of partial[block, j].
template <class T, class V>
void sum_blocks(const void* from, void* to, int64_t blocks, int64_t width, int64_t begin, int64_t end) {
  using A = typename V::scalar;
  const A* partial = static_cast<const A*>(from);
  T* out = static_cast<T*>(to);
  columns<V::N>(begin, end, [&](int64_t j, auto tag) MLM_LAMBDA {
    V total = V::set(0);
    for (int64_t b = 0; b < blocks; ++b) total = total + load(partial + b * width + j, tag);
    store(out + j, total, tag);
  });
}
