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
#else  // defined by the emulation
float widen(float a);
float widen(bf16 a);
float widen(f16 a);
void narrow(float a, float* p);
void narrow(float a, bf16* p);
void narrow(float a, f16* p);
#endif

template <class T>
__device__ inline T narrowed(float a) {
  T t;
  narrow(a, &t);
  return t;
}

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

enum ParamType : int { kParamFloat = 0, kParamBFloat16 = 1, kParamHalf = 2 };

// A parameter vector (weight or bias) in its own dtype: read once for each row, mostly from cache.
struct Param {
  const void* data;
  int type;

  __device__ explicit operator bool() const { return data != nullptr; }
  __device__ float at(int64_t j) const {
    if (type == kParamFloat) return static_cast<const float*>(data)[j];
    if (type == kParamBFloat16) return widen(static_cast<const bf16*>(data)[j]);
    return widen(static_cast<const f16*>(data)[j]);
  }
  template <int N>
  __device__ void load(int64_t j, float* out) const {
    if (type == kParamFloat) {
      for (int n = 0; n < N; n += N < 4 ? 1 : 4) {
        const auto pack = load_pack<float, (N < 4 ? 1 : 4)>(static_cast<const float*>(data) + j + n);
        for (int i = 0; i < (N < 4 ? 1 : 4); ++i) out[n + i] = pack.v[i];
      }
    } else if (type == kParamBFloat16) {
      const auto pack = load_pack<bf16, N>(static_cast<const bf16*>(data) + j);
      for (int n = 0; n < N; ++n) out[n] = widen(pack.v[n]);
    } else {
      const auto pack = load_pack<f16, N>(static_cast<const f16*>(data) + j);
      for (int n = 0; n < N; ++n) out[n] = widen(pack.v[n]);
    }
  }
};

struct Sum {
  static constexpr float identity = 0.0f;
  __device__ static float of(float a, float b) { return a + b; }
};
struct Max {
  static constexpr float identity = -3.402823466e38f;
  __device__ static float of(float a, float b) { return a > b ? a : b; }
};

template <class Op>
__device__ inline float warp_reduce(float v) {
  for (int step = 16; step > 0; step /= 2) v = Op::of(v, __shfl_xor_sync(0xffffffffu, v, step));
  return v;
}

// Over the threads of a row; every one of them gets the result. All threads of the block must come here together when a
// row has more than one warp.
template <class Op>
__device__ inline float row_reduce(float v) {
  v = warp_reduce<Op>(v);
  if (blockDim.x == 32) return v;
  __shared__ float warps[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, count = blockDim.x >> 5;
  if (lane == 0) warps[warp] = v;
  __syncthreads();
  v = warp_reduce<Op>(lane < count ? warps[lane] : Op::identity);
  __syncthreads();
  return v;
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
