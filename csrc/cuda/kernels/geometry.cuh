// How rows are laid over threads. Host code, shared by the launchers and the emulation of the test suite.
#pragma once

#include <cstdint>
#include <type_traits>

namespace mlm::cuda {

template <int I>
using Int = std::integral_constant<int, I>;

// How the threads of a block share rows: `packs` packs a thread, 0 where a row is too wide to be held in registers.
struct Geometry {
  dim3 block;
  int packs;
};

inline int64_t power_of_two_above(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// `most`: packs a thread can hold; `threads`: threads a block may have.
inline Geometry row_geometry(int64_t width, int pack, int most, int threads) {
  const int64_t packs = (width + pack - 1) / pack;
  const int in_warp = most < 4 ? most : 4;
  if (packs <= 32 * in_warp) return {dim3(32, 4), static_cast<int>(power_of_two_above((packs + 31) / 32))};
  int64_t block = power_of_two_above((packs + 1) / 2);
  block = block < 64 ? 64 : block > threads ? threads : block;
  const int64_t each = power_of_two_above((packs + block - 1) / block);
  return {dim3(static_cast<unsigned>(block)), each <= most ? static_cast<int>(each) : 0};
}

inline unsigned row_blocks(int64_t rows, const dim3& block) {
  return static_cast<unsigned>((rows + block.y - 1) / block.y);
}

// Packs of N values a thread of each kernel can hold in registers.
constexpr int kNormForwardPacks = 8;
// 16 values and three column sums of each: what 512 threads have registers for.
constexpr int norm_backward_packs(int pack) { return pack == 8 ? 2 : pack == 4 ? 4 : 8; }
// 32 floats.
constexpr int softmax_forward_packs(int pack) { return pack == 8 ? 4 : 8; }
// 16 pairs of floats.
constexpr int softmax_backward_packs(int pack) { return pack == 8 ? 2 : pack == 4 ? 4 : 8; }

// f(Int<packs>{}) for the powers of two up to kMost; the caller has dealt with 0. Rows that are not aligned (N = 1) make do
// with one kernel, which skips the packs beyond the row.
template <int N, int kMost, class F>
void by_packs(int packs, F&& f) {
  if constexpr (N == 1) {
    f(Int<kMost>{});
  } else {
    if (packs == 1)
      f(Int<1>{});
    else if (packs == 2 || kMost == 2)
      f(Int<(kMost < 2 ? kMost : 2)>{});
    else if (packs == 4 || kMost == 4)
      f(Int<(kMost < 4 ? kMost : 4)>{});
    else
      f(Int<(kMost < 8 ? kMost : 8)>{});
  }
}

}  // namespace mlm::cuda
