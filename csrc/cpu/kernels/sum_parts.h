// out[j] = sum over parts, in their order, of part[j], added up in the accumulation type and rounded once.

template <class T, class V>
void sum_parts(const void* const* parts, int64_t count, void* to, int64_t length) {
  T* out = static_cast<T*>(to);
  columns<V::N>(0, length, [&](int64_t j, auto tag) MLM_LAMBDA {
    V total = load(static_cast<const T*>(parts[0]) + j, tag);
    for (int64_t p = 1; p < count; ++p) total = total + load(static_cast<const T*>(parts[p]) + j, tag);
    store(out + j, total, tag);
  });
}
