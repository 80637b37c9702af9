// Counter-based dropout: the fate of element (row, column) is a function of the seed, the row and the column alone, so the
// mask does not depend on the number of threads and the backward pass makes it again instead of storing it.
// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): counter (column / 4, row, 0), word
// column % 4. The CUDA kernels use the same map.

// Multipliers 0 or `scale` for columns [begin, end) of a row, written to out[begin..end).
template <class A>
inline void dropout_multipliers(const Dropout& d, int64_t row, int64_t begin, int64_t end, A* out) {
  constexpr int kLanes = 16;
  const A scale = static_cast<A>(d.scale);
  for (int64_t block = begin / (4 * kLanes); block * 4 * kLanes < end; ++block) {
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      c0[i] = static_cast<uint32_t>(block * kLanes + i);
      c1[i] = static_cast<uint32_t>(row);
      c2[i] = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
      c3[i] = 0;
    }
    uint32_t k0 = static_cast<uint32_t>(d.seed), k1 = static_cast<uint32_t>(d.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      for (int i = 0; i < kLanes; ++i) {
        const uint64_t a = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
        const uint64_t b = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
        c0[i] = static_cast<uint32_t>(b >> 32) ^ c1[i] ^ k0;
        c1[i] = static_cast<uint32_t>(b);
        c2[i] = static_cast<uint32_t>(a >> 32) ^ c3[i] ^ k1;
        c3[i] = static_cast<uint32_t>(a);
      }
    }
    A drawn[4 * kLanes];
    for (int i = 0; i < kLanes; ++i) {
      drawn[4 * i] = c0[i] < d.threshold ? A(0) : scale;
      drawn[4 * i + 1] = c1[i] < d.threshold ? A(0) : scale;
      drawn[4 * i + 2] = c2[i] < d.threshold ? A(0) : scale;
      drawn[4 * i + 3] = c3[i] < d.threshold ? A(0) : scale;
    }
    const int64_t first = block * 4 * kLanes;
    const int64_t from = first > begin ? first : begin;
    const int64_t to = first + 4 * kLanes < end ? first + 4 * kLanes : end;
    std::memcpy(out + from, drawn + (from - first), static_cast<size_t>(to - from) * sizeof(A));
  }
}
