// Runs CUDA kernels on one CPU thread, for tests: every CUDA thread is a fiber, a warp goes from shuffle to shuffle in
// lockstep, a block from barrier to barrier. A warp whose threads do not meet at the same shuffle or barrier, which would
// hang or go wrong on a GPU, ends the program.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(n)
#define __shared__ static
#define MLM_DYNAMIC_SHARED(name) float* name = emulation::dynamic_shared()
#define MLM_LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulation::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); })

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum State { kRunning, kShuffle, kBarrier, kDone };

// A thread, with a stack of its own; kept from block to block. It is entered once through its context, and from then on
// switched to by a jump, which asks nothing of the kernel.
struct Fiber {
  ucontext_t context;
  jmp_buf point;
  bool entered = false;
  std::vector<char> stack = std::vector<char>(32768);
  dim3 index;
  State state = kDone;
  unsigned shuffles = 0;
  float slot[2];
};

inline std::deque<Fiber> fibers;
inline jmp_buf scheduler;
inline size_t current;
inline std::function<void()> body;
inline std::vector<float> dynamic;

inline float* dynamic_shared() { return dynamic.data(); }

__attribute__((noinline)) inline void pause(State state) {
  Fiber& me = fibers[current];
  me.state = state;
  if (_setjmp(me.point) == 0) _longjmp(scheduler, 1);
}

inline void entry() {
  while (true) {
    body();
    pause(kDone);
  }
}

__attribute__((noinline)) inline void resume(size_t i) {
  current = i;
  Fiber& fiber = fibers[i];
  threadIdx = fiber.index;
  fiber.state = kRunning;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.entered) _longjmp(fiber.point, 1);
  fiber.entered = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  makecontext(&fiber.context, entry, 0);
  setcontext(&fiber.context);
}

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulated kernel: %s\n", why);
  std::abort();
}

// Runs a warp up to its next barrier or its end.
inline void run_warp(size_t first, size_t last) {
  do {
    for (size_t i = first; i < last; ++i) resume(i);
    for (size_t i = first; i < last; ++i)
      if (fibers[i].state != fibers[first].state) fail("the threads of a warp part at a shuffle or barrier");
  } while (fibers[first].state == kShuffle);
}

inline void run_block() {
  const size_t count = static_cast<size_t>(blockDim.x) * blockDim.y;
  if (count % 32) fail("a block is not whole warps");
  while (fibers.size() < count) fibers.emplace_back();
  for (size_t i = 0; i < count; ++i) {
    Fiber& f = fibers[i];
    f.index = dim3(static_cast<unsigned>(i % blockDim.x), static_cast<unsigned>(i / blockDim.x));
    f.state = kRunning;
    f.shuffles = 0;
  }
  // Warps take turns in any order between two barriers, as on a GPU: what relies on theirs comes out differently.
  static std::minstd_rand any(1);
  std::vector<size_t> order;
  for (size_t i = 0; i < count; i += 32) order.push_back(i);
  for (bool busy = true; busy;) {
    busy = false;
    std::shuffle(order.begin(), order.end(), any);
    for (const size_t i : order) {
      if (fibers[i].state == kDone) continue;
      run_warp(i, i + 32);
      busy = busy || fibers[i].state == kBarrier;
    }
  }
}

template <class F>
void launch(dim3 grid, dim3 block, size_t shared, F&& kernel) {
  gridDim = grid;
  blockDim = block;
  dynamic.assign(shared / sizeof(float) + 1, NAN);
  body = kernel;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block();
}

}  // namespace emulation

inline void __syncthreads() { emulation::pause(emulation::kBarrier); }

inline float __shfl_xor_sync(unsigned, float value, int step) {
  using namespace emulation;
  Fiber& me = fibers[current];
  const unsigned turn = me.shuffles++ & 1;  // two slots: a thread may be one shuffle ahead of its neighbours
  me.slot[turn] = value;
  const size_t mine = current;
  pause(kShuffle);
  return fibers[mine / 32 * 32 + (mine % 32 ^ static_cast<size_t>(step))].slot[turn];
}
