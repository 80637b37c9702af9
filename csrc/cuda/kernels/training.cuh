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

// Running maximum and the sum of exponentials below it. A NaN is in the sum.
struct Running {
  float top = -__builtin_huge_valf();
  float sum = 0.0f;

  template <int N>
  __device__ void add(const float* v) {
    float high = top;
    for (int n = 0; n < N; ++n) high = fmaxf(high, v[n]);
    const float base = high == -__builtin_huge_valf() ? 0.0f : high;
    sum *= exp_fast(top - base);  // 0 the first time, when top is -inf and sum is 0
    top = high;
    for (int n = 0; n < N; ++n) sum += exp_fast(v[n] - base);
  }
};

// One block a row, one read of the logits.
template <class T, int N>
__global__ void __launch_bounds__(1024) cross_entropy_stats_kernel(CrossEntropy a) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.logits) + row * a.stride;
  Running running;
  const int64_t whole = a.num_valid / N * N;
  for (int64_t j = static_cast<int64_t>(threadIdx.x) * N; j < whole; j += static_cast<int64_t>(blockDim.x) * N) {
    float v[N];
    load_wide<T, N>(x, j, v);
    running.add<N>(v);
  }
  for (int64_t j = whole + threadIdx.x; j < a.num_valid; j += blockDim.x) {
    const float v = widen(x[j]);
    running.add<1>(&v);
  }
  const float top = row_reduce<Max>(running.top, 0);
  const float sum = row_reduce<Sum>(running.sum * exp_fast(running.top - (top == -__builtin_huge_valf() ? 0.0f : top)), 1);
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
  const auto gradient = [&](float logit, int64_t j) {
    if (j >= a.num_valid) return 0.0f;
    return (exp_fast(logit - lse) - (j == local ? 1.0f : 0.0f)) * scale;
  };
  const int64_t whole = a.width / N;
  for (int64_t i = first; i < whole; i += step) {
    float v[N];
    load_wide<T, N>(x, i * N, v);
    for (int n = 0; n < N; ++n) v[n] = gradient(v[n], i * N + n);
    store_pack<T, N>(x + i * N, narrow_pack<T, N>(v));
  }
  for (int64_t j = whole * N + first; j < a.width; j += step) narrow(gradient(widen(x[j]), j), x + j);
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
  store_pack<C, N>(p, narrow_pack<C, N>(values.v));
}

template <class T, int N>
__global__ void adamw_kernel(AdamW a) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  for (int64_t j = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N; j < a.count; j += step) {
    float grad[N];
    load_wide<T, N>(a.grad, j, grad);
    Pack<float, N> p = load_pack<float, N>(a.master + j), m = load_pack<float, N>(a.exp_avg + j);
    Pack<float, N> v = load_pack<float, N>(a.exp_avg_sq + j);
    for (int n = 0; n < N; ++n) {
      const float g = grad[n] * a.grad_scale;
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
