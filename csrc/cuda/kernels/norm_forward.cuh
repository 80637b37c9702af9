// Layer norm and RMS norm, forward, plain and behind a fused residual sum.
// One row per warp or block, held in registers between the passes; rows too wide for that are read again.
#pragma once

#include "device.cuh"
#include "geometry.cuh"

namespace mlm::cuda {

struct NormForward {
  const void* x;
  const void* residual;  // residual form only, else null
  Param pre_bias;
  Param weight;
  Param bias;
  void* total;  // residual form only
  void* out;
  float* mean;  // null for RMS norm
  float* rstd;
  int64_t rows;
  int64_t width;
  float eps;
  Dropout dropout;
};

// x of one pack; in the residual form dropout(x + pre_bias) + residual, rounded to T and stored.
template <class T, int N, bool kResidual>
__device__ inline Pack<T, N> norm_input(const NormForward& a, int64_t row, int column, uint64_t seed) {
  const int64_t at = row * a.width + column;
  const Pack<T, N> x = load_pack<T, N>(static_cast<const T*>(a.x) + at);
  if constexpr (!kResidual) return x;
  float v[N], other[N];
  widen_pack<T, N>(x, v);
  if (a.pre_bias) {
    a.pre_bias.load<N>(column, other);
    for (int n = 0; n < N; ++n) v[n] += other[n];
  }
  if (a.dropout.threshold) {
    dropout_multipliers<N>(a.dropout, seed, row, column, other);
    for (int n = 0; n < N; ++n) v[n] *= other[n];
  }
  load_wide<T, N>(a.residual, at, other);
  for (int n = 0; n < N; ++n) v[n] += other[n];
  const Pack<T, N> total = narrow_pack<T, N>(v);
  store_pack<T, N>(static_cast<T*>(a.total) + at, total);
  return total;
}

template <class T, int N>
__device__ inline void norm_output(
    const NormForward& a, int64_t row, int column, const Pack<T, N>& x, float mean, float rstd) {
  float v[N], weight[N], bias[N];
  widen_pack<T, N>(x, v);
  a.weight.load<N>(column, weight);
  if (a.bias) a.bias.load<N>(column, bias);
  for (int n = 0; n < N; ++n) v[n] = (v[n] - mean) * rstd * weight[n] + (a.bias ? bias[n] : 0.0f);
  store_pack<T, N>(static_cast<T*>(a.out) + row * a.width + column, narrow_pack<T, N>(v));
}

__device__ inline void store_statistics(const NormForward& a, int64_t row, float mean, float rstd) {
  if (threadIdx.x != 0) return;
  a.rstd[row] = rstd;
  if (a.mean) a.mean[row] = mean;
}

// K packs a thread hold the row: one read, one write.
template <class T, int N, int K, bool kResidual>
__global__ void __launch_bounds__(1024) norm_forward_kernel(NormForward a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;  // whole warps only: see device.cuh
  const uint64_t seed = kResidual && a.dropout.threshold ? static_cast<uint64_t>(*a.dropout.seed) : 0;
  const int width = static_cast<int>(a.width), first = threadIdx.x * N, step = blockDim.x * N;
  const float share = 1.0f / static_cast<float>(width);
  Pack<T, N> x[K];
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (first + k * step < width) x[k] = norm_input<T, N, kResidual>(a, row, first + k * step, seed);
  float sum = 0.0f, v[N];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (first + k * step >= width) continue;
    widen_pack<T, N>(x[k], v);
    for (int n = 0; n < N; ++n) sum += v[n];
  }
  const float mean = a.mean ? row_reduce<Sum>(sum, 0) * share : 0.0f;
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (first + k * step >= width) continue;
    widen_pack<T, N>(x[k], v);
    for (int n = 0; n < N; ++n) squares += (v[n] - mean) * (v[n] - mean);
  }
  const float rstd = 1.0f / sqrtf(row_reduce<Sum>(squares, 1) * share + a.eps);
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (first + k * step < width) norm_output<T, N>(a, row, first + k * step, x[k], mean, rstd);
  store_statistics(a, row, mean, rstd);
}

// Mean and sum of squared distances from it of some values, joined as Chan, Golub and LeVeque (1979) do.
struct Moments {
  float count = 0.0f, mean = 0.0f, squares = 0.0f;

  template <int N>
  __device__ void add(const float* v) {
    float sum = 0.0f, spread = 0.0f;
    for (int n = 0; n < N; ++n) sum += v[n];
    const float centre = sum / N;
    for (int n = 0; n < N; ++n) spread += (v[n] - centre) * (v[n] - centre);
    const float total = count + N, away = centre - mean;
    squares += spread + away * away * count * (N / total);
    mean += away * (N / total);
    count = total;
  }
};

// Any width: the row is read twice, the second time backwards, where its end is still in cache.
template <class T, int N, bool kResidual>
__global__ void __launch_bounds__(1024) norm_forward_wide_kernel(NormForward a) {
  const int64_t row = blockIdx.x;
  const uint64_t seed = kResidual && a.dropout.threshold ? static_cast<uint64_t>(*a.dropout.seed) : 0;
  const int width = static_cast<int>(a.width), first = threadIdx.x * N, step = blockDim.x * N;
  const float share = 1.0f / static_cast<float>(width);
  Moments moments;
  float v[N], squares = 0.0f;
  int column = first;
  for (; column < width; column += step) {
    widen_pack<T, N>(norm_input<T, N, kResidual>(a, row, column, seed), v);
    if (a.mean)
      moments.add<N>(v);
    else
      for (int n = 0; n < N; ++n) squares += v[n] * v[n];
  }
  float mean = 0.0f;
  if (a.mean) {
    mean = row_reduce<Sum>(moments.mean * moments.count, 0) * share;
    squares = moments.squares + moments.count * (moments.mean - mean) * (moments.mean - mean);
  }
  const float rstd = 1.0f / sqrtf(row_reduce<Sum>(squares, 1) * share + a.eps);
  // A thread reads back only what it wrote itself.
  const T* x = static_cast<const T*>(kResidual ? a.total : a.x) + row * a.width;
  for (column -= step; column >= 0; column -= step)
    norm_output<T, N>(a, row, column, load_pack<T, N>(x + column), mean, rstd);
  store_statistics(a, row, mean, rstd);
}

}  // namespace mlm::cuda
