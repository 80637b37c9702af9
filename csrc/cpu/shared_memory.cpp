// CPU operators: sums and gathers over the processes of one machine, through memory that they share.
//
// The segment starts with one counter a rank, each on its own cache line; behind them lie two sets of one slot a rank. A
// round takes a piece of the tensor: copy it into the own slot, publish that, wait until all have, and read the slots. Two
// ranks each add everything up; of more, each adds up its share, in its own slot, publishes that too, and all collect the
// shares: what a rank reads does not grow with their number. Either way parts are added in rank order, so every rank gets the
// same bits. A round is two steps of the counter. Rounds take the two sets in turn: who writes round n + 2 has seen everybody
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
constexpr int64_t kPiece = int64_t{1} << 19;  // of a round: what a core has just written is read from its cache
using Counter = std::atomic<uint64_t>;
static_assert(Counter::is_always_lock_free);

struct Segment {
  char* base;
  int64_t slot;  // bytes
  int64_t rank;
  int64_t size;

  Counter& counter(int64_t r) const { return *reinterpret_cast<Counter*>(base + r * kCounterStride); }
  uint64_t published() const { return counter(rank).load(std::memory_order_relaxed); }
  void publish(uint64_t step) const { counter(rank).store(step, std::memory_order_release); }
  char* slot_of(uint64_t step, int64_t r) const {
    return base + kHeader + (static_cast<int64_t>(step / 2 & 1) * size + r) * slot;
  }
};

// Ranks share cores when there are more of them than cores: spin a little, then let the others run.
void wait_for(const char* op, const Segment& s, int64_t other, uint64_t step, double timeout) {
  for (int spins = 0; spins < 4000; ++spins) {
    if (s.counter(other).load(std::memory_order_acquire) >= step) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  const auto start = std::chrono::steady_clock::now();
  while (s.counter(other).load(std::memory_order_acquire) < step) {
    std::this_thread::yield();
    const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
    MLM_CHECK(waited.count() < timeout, op, "rank ", other, " of the group has not come for ", timeout, " s");
  }
}

// Publish a step and wait until every rank has.
void meet(const char* op, const Segment& s, uint64_t step, double timeout) {
  s.publish(step);
  for (int64_t r = 0; r < s.size; ++r)
    if (r != s.rank) wait_for(op, s, r, step, timeout);
}

Segment open_segment(const char* op, const Tensor& segment, int64_t rank, int64_t size) {
  MLM_CHECK(size >= 1 && size <= kMaxRanks && rank >= 0 && rank < size, op, "no rank ", rank, " in a group of ", size);
  const int64_t bytes = segment.numel() * static_cast<int64_t>(segment.element_size());
  const Segment s{static_cast<char*>(pointer(segment)), (bytes - kHeader) / (2 * size) / 4096 * 4096, rank, size};
  MLM_CHECK(s.slot >= 4096, op, "a `segment` of ", bytes, " bytes is too small for ", size, " ranks");
  return s;
}

int64_t num_bytes(const Tensor& x) { return x.numel() * static_cast<int64_t>(x.element_size()); }

void shared_all_reduce(Tensor x, Tensor segment, int64_t rank, int64_t size, double timeout) {
  const char* op = "shared_all_reduce_";
  check_floating(op, "x", x);
  MLM_CHECK(x.is_contiguous(), op, "`x` is summed in place and must be contiguous");
  const Segment s = open_segment(op, segment, rank, size);
  const auto add = kernels_for(x).sum_parts;
  const int64_t total = num_bytes(x), element = static_cast<int64_t>(x.element_size());
  const int64_t piece = std::min(s.slot, kPiece);
  char* data = static_cast<char*>(pointer(x));
  for (int64_t done = 0; done < total; done += piece) {
    const int64_t length = std::min(piece, total - done);
    const uint64_t step = s.published();
    std::memcpy(s.slot_of(step, rank), data + done, static_cast<size_t>(length));
    // Rank r's share of the piece begins here, on a cache line.
    const auto share = [&](int64_t r) { return std::min(length, (length + 64 * size - 1) / (64 * size) * 64 * r); };
    const bool whole = size <= 2;
    const int64_t begin = whole ? 0 : share(rank), end = whole ? length : share(rank + 1);
    meet(op, s, whole ? step + 2 : step + 1, timeout);
    const void* parts[kMaxRanks];
    for (int64_t r = 0; r < size; ++r) parts[r] = s.slot_of(step, r) + begin;
    add(parts, size, whole ? data + done : s.slot_of(step, rank) + begin, (end - begin) / element);
    if (whole) continue;
    meet(op, s, step + 2, timeout);
    for (int64_t r = 0; r < size; ++r)
      std::memcpy(data + done + share(r), s.slot_of(step, r) + share(r), static_cast<size_t>(share(r + 1) - share(r)));
  }
}

void shared_all_gather(Tensor out, Tensor x, Tensor segment, int64_t rank, int64_t size, double timeout) {
  const char* op = "shared_all_gather_";
  MLM_CHECK(x.is_contiguous() && out.is_contiguous(), op, "`x` and `out` must be contiguous");
  MLM_CHECK(out.scalar_type() == x.scalar_type() && out.numel() == size * x.numel(), op, "`out` must have ", size, " times the ",
            x.numel(), " elements of `x` and its dtype, got ", out.numel());
  const Segment s = open_segment(op, segment, rank, size);
  const int64_t total = num_bytes(x), piece = std::min(s.slot, kPiece);
  const char* data = static_cast<const char*>(pointer(x));
  char* gathered = static_cast<char*>(pointer(out));
  for (int64_t done = 0; done < total; done += piece) {
    const size_t length = static_cast<size_t>(std::min(piece, total - done));
    const uint64_t step = s.published();
    std::memcpy(s.slot_of(step, rank), data + done, length);
    meet(op, s, step + 2, timeout);
    for (int64_t r = 0; r < size; ++r)
      if (r != rank) std::memcpy(gathered + r * total + done, s.slot_of(step, r), length);
  }
  if (gathered + rank * total != data) std::memmove(gathered + rank * total, data, static_cast<size_t>(total));
}

}  // namespace
}  // namespace mlm

STABLE_TORCH_LIBRARY_IMPL(mlm, CPU, m) {
  m.impl("shared_all_reduce_", TORCH_BOX(&mlm::shared_all_reduce));
  m.impl("shared_all_gather_", TORCH_BOX(&mlm::shared_all_gather));
}
