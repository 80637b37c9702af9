// Runs CUDA kernels on one CPU thread, for tests: every CUDA thread is a fiber, a warp goes from shuffle to shuffle in
// lockstep, a block from barrier to barrier. A warp whose threads do not meet at the same shuffle or barrier, which would
// hang or go wrong on a GPU, ends the program.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  dim3 index;
  State state = kRunning;
  unsigned shuffles = 0;
  float slot[2];
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline size_t current;
inline std::function<void()> body;
inline std::vector<float> dynamic;

inline float* dynamic_shared() { return dynamic.data(); }

inline void pause(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void entry() {
  body();
  fibers[current].state = kDone;
}

inline void resume(size_t i) {
  current = i;
  threadIdx = fibers[i].index;
  fibers[i].state = kRunning;
  swapcontext(&scheduler, &fibers[i].context);
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
  if (fibers.size() < count) fibers.resize(count);
  for (size_t i = 0; i < count; ++i) {
    Fiber& f = fibers[i];
    f.stack.resize(32768);
    f.index = dim3(static_cast<unsigned>(i % blockDim.x), static_cast<unsigned>(i / blockDim.x));
    f.state = kRunning;
    f.shuffles = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &scheduler;
    makecontext(&f.context, entry, 0);
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
