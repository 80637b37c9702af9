// What all CUDA kernels share: storage types, 16-byte packs, reductions over the threads of a row, dropout.
//
// Threads of a row: blockDim.x, a multiple of 32; blockDim.y rows share a block, only where a row is one warp. So every
// warp works on one row, and a row is reduced with shuffles, plus shared memory where it is more than a warp. The order
// of every sum is fixed: same input, same bits.
//
// These headers know nothing of torch and little of CUDA: the test suite also compiles them for the CPU, against an
// emulation of threads, shuffles and barriers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MLM_DYNAMIC_SHARED(name) extern __shared__ float name[]
#define MLM_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#endif

namespace mlm::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#if defined(__CUDACC__)
__device__ inline float widen(float a) { return a; }
__device__ inline float widen(bf16 a) { return __uint_as_float(static_cast<uint32_t>(a.bits) << 16); }
__device__ inline float widen(f16 a) { return __half2float(__ushort_as_half(a.bits)); }
__device__ inline void narrow(float a, float* p) { *p = a; }
__device__ inline void narrow(float a, bf16* p) { p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(a)); }
__device__ inline void narrow(float a, f16* p) { p->bits = __half_as_ushort(__float2half_rn(a)); }

// Two half-precision values in a word, the first in its lower half.
__device__ inline void widen_pair(uint32_t word, float* out, bf16) {
  out[0] = __uint_as_float(word << 16);
  out[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ inline void widen_pair(uint32_t word, float* out, f16) {
  __half2 pair;
  __builtin_memcpy(&pair, &word, 4);
  const float2 wide = __half22float2(pair);
  out[0] = wide.x;
  out[1] = wide.y;
}
__device__ inline uint32_t narrow_pair(float a, float b, bf16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  uint32_t word;
  __builtin_memcpy(&word, &pair, 4);
  return word;
}
__device__ inline uint32_t narrow_pair(float a, float b, f16) {
  const __half2 pair = __floats2half2_rn(a, b);
  uint32_t word;
  __builtin_memcpy(&word, &pair, 4);
  return word;
}

// 2^a to two units in the last place, one instruction; 0 for -inf, NaN for NaN.
__device__ inline float exp2_fast(float a) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(a));
  return out;
}
// a / b to two units in the last place, for b up to 2^126.
__device__ inline float divide_fast(float a, float b) { return __fdividef(a, b); }
#else  // defined by the emulation
float widen(float a);
float widen(bf16 a);
float widen(f16 a);
void narrow(float a, float* p);
void narrow(float a, bf16* p);
void narrow(float a, f16* p);
template <class T>
void widen_pair(uint32_t word, float* out, T) {
  T pair[2];
  __builtin_memcpy(pair, &word, 4);
  out[0] = widen(pair[0]);
  out[1] = widen(pair[1]);
}
template <class T>
uint32_t narrow_pair(float a, float b, T) {
  T pair[2];
  narrow(a, &pair[0]);
  narrow(b, &pair[1]);
  uint32_t word;
  __builtin_memcpy(&word, pair, 4);
  return word;
}
float exp2_fast(float a);
float divide_fast(float a, float b);
#endif

constexpr float kLog2e = 1.4426950408889634f;

__device__ inline float exp_fast(float a) { return exp2_fast(a * kLog2e); }

// N values moved by one instruction where N * sizeof(T) is 16.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T v[N];
};

template <class T, int N>
__device__ inline Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <class T, int N>
__device__ inline void store_pack(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// Half-precision values are converted two at a time: alone, each takes twice the instructions, and at two bytes a value it
// is instructions that the kernels run out of, not bandwidth.
template <class T, int N>
__device__ inline void widen_pack(const Pack<T, N>& pack, float* out) {
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    uint32_t words[N / 2];
    __builtin_memcpy(words, &pack, sizeof(pack));
#pragma unroll
    for (int n = 0; n < N / 2; ++n) widen_pair(words[n], out + 2 * n, T{});
  } else {
    for (int n = 0; n < N; ++n) out[n] = widen(pack.v[n]);
  }
}
template <class T, int N>
__device__ inline Pack<T, N> narrow_pack(const float* v) {
  Pack<T, N> pack;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    uint32_t words[N / 2];
#pragma unroll
    for (int n = 0; n < N / 2; ++n) words[n] = narrow_pair(v[2 * n], v[2 * n + 1], T{});
    __builtin_memcpy(&pack, words, sizeof(pack));
  } else {
    for (int n = 0; n < N; ++n) narrow(v[n], &pack.v[n]);
  }
  return pack;
}
template <class T, int N>
__device__ inline void load_wide(const void* base, int64_t at, float* out) {
  widen_pack<T, N>(load_pack<T, N>(static_cast<const T*>(base) + at), out);
}

enum ParamType : int { kParamFloat = 0, kParamBFloat16 = 1, kParamHalf = 2 };

// A parameter vector (weight or bias) in its own dtype: read once for each row, mostly from cache.
struct Param {
  const void* data;
  int type;

  __device__ explicit operator bool() const { return data != nullptr; }
  template <int N>
  __device__ void load(int64_t j, float* out) const {
    if (type == kParamFloat) {
      constexpr int kQuad = N < 4 ? N : 4;
#pragma unroll
      for (int n = 0; n < N; n += kQuad) load_wide<float, kQuad>(data, j + n, out + n);
    } else if (type == kParamBFloat16) {
      load_wide<bf16, N>(data, j, out);
    } else {
      load_wide<f16, N>(data, j, out);
    }
  }
};

struct Sum {
  static constexpr float identity = 0.0f;
  __device__ static float of(float a, float b) { return a + b; }
};
// Passes over NaN, which the sum that follows brings to the result.
struct Max {
  static constexpr float identity = -__builtin_huge_valf();
  __device__ static float of(float a, float b) { return fmaxf(a, b); }
};

template <class Op>
__device__ inline float warp_reduce(float v) {
  for (int step = 16; step > 0; step /= 2) v = Op::of(v, __shfl_xor_sync(0xffffffffu, v, step));
  return v;
}

// Over the threads of a row, `C` values at once; every thread gets the results. All threads of the block must come here
// together when a row has more than one warp. Two calls after each other take turns 0 and 1: a thread that writes for the
// next one has passed the barrier of this one, so one barrier is enough.
template <class Op, int C>
__device__ inline void row_reduce(float (&v)[C], int turn) {
#pragma unroll
  for (int c = 0; c < C; ++c) v[c] = warp_reduce<Op>(v[c]);
  if (blockDim.x == 32) return;
  __shared__ float warps[2][C][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, count = blockDim.x >> 5;
  if (lane == 0)
    for (int c = 0; c < C; ++c) warps[turn][c][warp] = v[c];
  __syncthreads();
#pragma unroll
  for (int c = 0; c < C; ++c) v[c] = warp_reduce<Op>(lane < count ? warps[turn][c][lane] : Op::identity);
}
template <class Op>
__device__ inline float row_reduce(float v, int turn) {
  float one[1] = {v};
  row_reduce<Op, 1>(one, turn);
  return one[0];
}

// Counter-based dropout, the same map as on the CPU (csrc/cpu/kernels/dropout.h): Philox4x32-10 with counter
// (column / 4, row, 0), word column % 4.
struct Dropout {
  const int64_t* seed;  // on the device: no host synchronisation
  uint32_t threshold;   // 0 = keep all
  float scale;
};

struct Words {
  uint32_t v[4];
};

__device__ inline Words philox(uint64_t seed, uint32_t c0, uint64_t row) {
  uint32_t c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u, b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
  }
  return {{c0, c1, c2, c3}};
}

// Multipliers of N columns from `column` on. N is 1, or a multiple of 4 with `column` a multiple of 4.
template <int N>
__device__ inline void dropout_multipliers(const Dropout& d, uint64_t seed, int64_t row, int64_t column, float* out) {
  for (int n = 0; n < N; n += 4) {
    const Words words = philox(seed, static_cast<uint32_t>((column + n) / 4), static_cast<uint64_t>(row));
    if (N == 1) {
      out[0] = words.v[column % 4] < d.threshold ? 0.0f : d.scale;
    } else {
      for (int i = 0; i < 4; ++i) out[n + (N == 1 ? 0 : i)] = words.v[i] < d.threshold ? 0.0f : d.scale;
    }
  }
}

}  // namespace mlm::cuda
