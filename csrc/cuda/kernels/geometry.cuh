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

// How many packs a thread of a kernel takes: `few`, while that needs no more than `narrow` threads a row, then more, `most`
// being what it can hold in registers; `threads`: what a block may have.
struct Share {
  int few, narrow, most, threads;
};

inline Geometry row_geometry(int64_t width, int pack, Share share) {
  const int64_t packs = (width + pack - 1) / pack;
  const auto threads_for = [&](int each) { return power_of_two_above((packs + each - 1) / each); };
  int64_t block = threads_for(share.few);
  block = block < 32 ? 32 : block > share.narrow ? share.narrow : block;
  if (block * share.most < packs) block = threads_for(share.most);
  if (block > share.threads) return {dim3(static_cast<unsigned>(share.threads)), 0};
  const int64_t each = power_of_two_above((packs + block - 1) / block);
  return {dim3(static_cast<unsigned>(block), block == 32 ? 4 : 1), static_cast<int>(each)};
}

inline unsigned row_blocks(int64_t rows, const dim3& block) {
  return static_cast<unsigned>((rows + block.y - 1) / block.y);
}

// The shares below, for packs of 8, 4 and 1 values, are what was fastest on an H200 (docs/performance.md).

constexpr Share norm_forward_share(int pack) {
  return pack == 8 ? Share{4, 256, 8, 1024} : pack == 4 ? Share{2, 512, 8, 1024} : Share{8, 1024, 8, 1024};
}

constexpr Share norm_backward_share(int pack, bool residual) {
  if (pack == 8) return residual ? Share{2, 512, 4, 512} : Share{2, 256, 4, 512};
  return pack == 4 ? Share{2, 1024, 4, 1024} : Share{8, 1024, 8, 1024};
}
// Rows at a time: two take half of the barriers and of the traffic of the column sums, where there are registers for them.
constexpr int norm_backward_rows(int pack, int packs, bool residual) {
  return pack == 8 && (!residual || packs == 2) ? 2 : 1;
}
// Threads that the compiler must have registers for.
constexpr int norm_backward_bound(int pack, int packs, bool residual) {
  return pack != 8 || packs == 1 ? 1024 : residual || packs == 4 ? 512 : 768;
}

// f(true_type) or f(false_type): kernels without a residual have fewer registers to find.
template <class F>
void by_residual(bool residual, F&& f) {
  if (residual)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// What a forward kernel of softmax is compiled for; kAnything: dropout, and any mask, read value by value.
enum SoftmaxForm : int { kPlain = 0, kCausalOnly = 1, kByteMask = 2, kAnything = 3 };

constexpr Share softmax_forward_share(int pack, int form) {
  if (pack == 1) return {8, 1024, 8, 1024};
  if (form == kPlain) return pack == 8 ? Share{2, 1024, 2, 1024} : Share{2, 512, 8, 1024};
  if (form == kCausalOnly) return pack == 8 ? Share{2, 512, 4, 1024} : Share{4, 1024, 4, 1024};
  return {form == kByteMask ? 4 : 2, 1024, 4, 1024};
}

constexpr Share softmax_backward_share(int pack) {
  return pack == 1 ? Share{8, 1024, 8, 1024} : Share{2, 512, 4, 1024};
}

// f(Int<form>{}). Rows that are not aligned (N = 1) make do with the general kernel.
template <int N, class F>
void by_form(int form, F&& f) {
  if constexpr (N == 1) {
    f(Int<kAnything>{});
  } else {
    if (form == kAnything)
      f(Int<kAnything>{});
    else if (form == kPlain)
      f(Int<kPlain>{});
    else if (form == kCausalOnly)
      f(Int<kCausalOnly>{});
    else
      f(Int<kByteMask>{});
  }
}

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
