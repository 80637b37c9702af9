// The two passes of a cross entropy, and AdamW.
#pragma once

#include "device.cuh"

namespace mlm::cuda {

struct CrossEntropy {
  void* logits;
  const int64_t* labels;
  float* maximum;
  float* sum;
  float* target;
  const float* lse;
  const float* scale;
  int64_t stride;
  int64_t width;
  int64_t num_valid;
  int64_t vocab_start;
};

// Running maximum and the sum of exponentials below it.
struct Running {
  float top = -__builtin_huge_valf();
  float sum = 0.0f;

  template <int N>
  __device__ void add(const float* v) {
    float high = top;
    for (int n = 0; n < N; ++n) high = v[n] > high || v[n] != v[n] ? v[n] : high;
    if (high == -__builtin_huge_valf()) return;
    sum = sum == 0.0f ? 0.0f : sum * expf(top - high);
    top = high;
    for (int n = 0; n < N; ++n) sum += expf(v[n] - top);
  }
};

struct HighestOrNan {
  static constexpr float identity = -__builtin_huge_valf();
  __device__ static float of(float a, float b) { return a > b || a != a ? a : b; }
};

// One block a row, one read of the logits.
template <class T, int N>
__global__ void __launch_bounds__(1024) cross_entropy_stats_kernel(CrossEntropy a) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.logits) + row * a.stride;
  Running running;
  const int64_t whole = a.num_valid / N * N;
  for (int64_t j = static_cast<int64_t>(threadIdx.x) * N; j < whole; j += static_cast<int64_t>(blockDim.x) * N) {
    const Pack<T, N> pack = load_pack<T, N>(x + j);
    float v[N];
    for (int n = 0; n < N; ++n) v[n] = widen(pack.v[n]);
    running.add<N>(v);
  }
  for (int64_t j = whole + threadIdx.x; j < a.num_valid; j += blockDim.x) {
    const float v = widen(x[j]);
    running.add<1>(&v);
  }
  const float top = row_reduce<HighestOrNan>(running.top);
  const float sum = row_reduce<Sum>(running.sum == 0.0f ? 0.0f : running.sum * expf(running.top - top));
  if (threadIdx.x != 0) return;
  const int64_t local = a.labels[row] - a.vocab_start;
  a.maximum[row] = top;
  a.sum[row] = sum;
  a.target[row] = local >= 0 && local < a.num_valid ? widen(x[local]) : 0.0f;
}

// Grid (rows, pieces of a row). Every element is read and written by one thread.
template <class T, int N>
__global__ void __launch_bounds__(1024) cross_entropy_grad_kernel(CrossEntropy a) {
  const int64_t row = blockIdx.x;
  T* x = static_cast<T*>(a.logits) + row * a.stride;
  const float lse = a.lse[row], scale = a.scale[row];
  const int64_t local = a.labels[row] - a.vocab_start;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x;
  const auto gradient = [&](T logit, int64_t j) {
    if (j >= a.num_valid) return narrowed<T>(0.0f);
    return narrowed<T>((expf(widen(logit) - lse) - (j == local ? 1.0f : 0.0f)) * scale);
  };
  const int64_t whole = a.width / N;
  for (int64_t i = first; i < whole; i += step) {
    Pack<T, N> pack = load_pack<T, N>(x + i * N);
    for (int n = 0; n < N; ++n) pack.v[n] = gradient(pack.v[n], i * N + n);
    store_pack<T, N>(x + i * N, pack);
  }
  for (int64_t j = whole * N + first; j < a.width; j += step) x[j] = gradient(x[j], j);
}

struct AdamW {
  float* master;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  void* copy;
  int copy_type;  // ParamType
  int64_t count;
  float decay;
  float beta2;
  float one_minus_beta1;
  float one_minus_beta2;
  float step_size;
  float inv_sqrt_bias2;
  float eps;
  float grad_scale;
};

template <class C, int N>
__device__ inline void store_copy(C* p, const Pack<float, N>& values) {
  Pack<C, N> out;
  for (int n = 0; n < N; ++n) narrow(values.v[n], &out.v[n]);
  store_pack<C, N>(p, out);
}

template <class T, int N>
__global__ void adamw_kernel(AdamW a) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  for (int64_t j = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N; j < a.count; j += step) {
    const Pack<T, N> grad = load_pack<T, N>(static_cast<const T*>(a.grad) + j);
    Pack<float, N> p = load_pack<float, N>(a.master + j), m = load_pack<float, N>(a.exp_avg + j);
    Pack<float, N> v = load_pack<float, N>(a.exp_avg_sq + j);
    for (int n = 0; n < N; ++n) {
      const float g = widen(grad.v[n]) * a.grad_scale;
      m.v[n] += (g - m.v[n]) * a.one_minus_beta1;
      v.v[n] = v.v[n] * a.beta2 + g * g * a.one_minus_beta2;
      p.v[n] = p.v[n] * a.decay - a.step_size * m.v[n] / (sqrtf(v.v[n]) * a.inv_sqrt_bias2 + a.eps);
    }
    store_pack<float, N>(a.master + j, p);
    store_pack<float, N>(a.exp_avg + j, m);
    store_pack<float, N>(a.exp_avg_sq + j, v);
    if (!a.copy) continue;
    if (a.copy_type == kParamFloat)
      store_pack<float, N>(static_cast<float*>(a.copy) + j, p);
    else if (a.copy_type == kParamBFloat16)
      store_copy<bf16, N>(static_cast<bf16*>(a.copy) + j, p);
    else
      store_copy<f16, N>(static_cast<f16*>(a.copy) + j, p);
  }
}

}  // namespace mlm::cuda
