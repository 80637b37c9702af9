// CPU operator: sum over the processes of one machine, through memory that they share.
//
// The segment starts with one counter a rank, each on its own cache line; behind them lie two sets of one slot a rank. A
// round: copy a piece into the own slot, publish the round's number, wait until all have published it, add the slots up in
// rank order (so every rank gets the same bits). Rounds take the two sets in turn: who writes round n + 2 has seen everybody
// publish n + 1, and they did that after reading n.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "launch.h"

namespace mlm {
namespace {

constexpr int64_t kCounterStride = 64;
constexpr int64_t kHeader = 4096;
constexpr int kMaxRanks = 32;
using Counter = std::atomic<uint64_t>;
static_assert(Counter::is_always_lock_free);

struct Segment {
  char* base;
  int64_t slot;  // bytes
  int64_t rank;
  int64_t size;

  Counter& counter(int64_t r) const { return *reinterpret_cast<Counter*>(base + r * kCounterStride); }
  char* slot_of(uint64_t round, int64_t r) const {
    return base + kHeader + (static_cast<int64_t>(round & 1) * size + r) * slot;
  }
};

// Ranks share cores when there are more of them than cores: spin a little, then let the others run.
void wait_for(const Segment& s, int64_t other, uint64_t round, double timeout) {
  for (int spins = 0; spins < 4000; ++spins) {
    if (s.counter(other).load(std::memory_order_acquire) >= round) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  const auto start = std::chrono::steady_clock::now();
  while (s.counter(other).load(std::memory_order_acquire) < round) {
    std::this_thread::yield();
    const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
    MLM_CHECK(waited.count() < timeout, "shared_all_reduce_", "rank ", other, " of the group has not come for ", timeout, " s");
  }
}

void shared_all_reduce(Tensor x, Tensor segment, int64_t rank, int64_t size, double timeout) {
  const char* op = "shared_all_reduce_";
  check_floating(op, "x", x);
  MLM_CHECK(x.is_contiguous(), op, "`x` is summed in place and must be contiguous");
  MLM_CHECK(size >= 1 && size <= kMaxRanks && rank >= 0 && rank < size, op, "no rank ", rank, " in a group of ", size);
  const int64_t bytes = segment.numel() * static_cast<int64_t>(segment.element_size());
  const Segment s{static_cast<char*>(pointer(segment)), (bytes - kHeader) / (2 * size) / 4096 * 4096, rank, size};
  MLM_CHECK(s.slot >= 4096, op, "a `segment` of ", bytes, " bytes is too small for ", size, " ranks");
  const auto add = kernels_for(x).sum_parts;
  const int64_t total = x.numel() * static_cast<int64_t>(x.element_size());
  char* data = static_cast<char*>(pointer(x));
  for (int64_t done = 0; done < total; done += s.slot) {
    const int64_t length = std::min(s.slot, total - done);
    const uint64_t round = s.counter(rank).load(std::memory_order_relaxed) + 1;
    std::memcpy(s.slot_of(round, rank), data + done, static_cast<size_t>(length));
    s.counter(rank).store(round, std::memory_order_release);
    const void* parts[kMaxRanks];
    for (int64_t r = 0; r < size; ++r) {
      if (r != rank) wait_for(s, r, round, timeout);
      parts[r] = s.slot_of(round, r);
    }
    add(parts, size, data + done, length / static_cast<int64_t>(x.element_size()));
  }
}

}  // namespace
}  // namespace mlm

STABLE_TORCH_LIBRARY_IMPL(mlm, CPU, m) {
  m.impl("shared_all_reduce_", TORCH_BOX(&mlm::shared_all_reduce));
}
