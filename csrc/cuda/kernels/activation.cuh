// bias + GELU (tanh form) and SwiGLU. 0.5 (1 + tanh u) is sigmoid(2u).
#pragma once

#include "column_sums.cuh"
#include "device.cuh"

namespace mlm::cuda {

struct Activation {
  const void* x;
  Param bias;
  const void* grad;  // backward only
  void* out;
  float* dbias;  // [gridDim.y, width] or null
  int64_t rows;
  int64_t width;  // of the output of swiglu (x is twice as wide), of both for gelu
  int64_t rows_per_block;
};

// 0 below -80 (the result would be under 2e-35), so that the largest negative numbers come out of an activation as 0; NaN
// passes. An overflow of the exponential is not selected.
__device__ inline float sigmoid(float x) {
  const float s = divide_fast(1.0f, 1.0f + exp_fast(-x));
  return x < -80.0f ? 0.0f : s;
}

constexpr float kGelu = 1.5957691216057308f;  // 2 sqrt(2 / pi)

__device__ inline float gelu(float x) { return x * sigmoid(x * (kGelu + kGelu * 0.044715f * x * x)); }

__device__ inline float gelu_slope(float x) {
  x = x > 20.0f ? 20.0f : (x < -20.0f ? -20.0f : x);  // the slope is 0 or 1 there; beyond, its parts overflow
  const float square = x * x;
  const float s = sigmoid(x * (kGelu + kGelu * 0.044715f * square));
  return s + x * (kGelu + 3.0f * kGelu * 0.044715f * square) * s * (1.0f - s);
}

// Rows of the block: threadIdx.y and on, columns: threadIdx.x and on. f(row, column) for every pack.
template <int N, class F>
__device__ inline void every_pack(int64_t rows, int64_t width, F&& f) {
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += row_step)
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * N; column < width;
         column += static_cast<int64_t>(blockDim.x) * N)
      f(row, column);
}

template <class T, int N>
__global__ void gelu_forward_kernel(Activation a) {
  every_pack<N>(a.rows, a.width, [&](int64_t row, int64_t column) {
    const int64_t at = row * a.width + column;
    float x[N], bias[N];
    load_wide<T, N>(a.x, at, x);
    if (a.bias) a.bias.load<N>(column, bias);
    for (int n = 0; n < N; ++n) x[n] = gelu(x[n] + (a.bias ? bias[n] : 0.0f));
    store_pack<T, N>(static_cast<T*>(a.out) + at, narrow_pack<T, N>(x));
  });
}

// Block (32, 8): 32 packs of columns by rows_per_block rows, so that the column sums stay in registers. Grid (columns, rows).
template <class T, int N>
__global__ void gelu_backward_kernel(Activation a) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x) * N;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * a.rows_per_block;
  const int64_t last = first + a.rows_per_block < a.rows ? first + a.rows_per_block : a.rows;
  float sums[N], bias[N];
  for (int n = 0; n < N; ++n) sums[n] = bias[n] = 0.0f;
  if (column < a.width) {
    if (a.bias) a.bias.load<N>(column, bias);
    for (int64_t row = first + threadIdx.y; row < last; row += blockDim.y) {
      const int64_t at = row * a.width + column;
      float x[N], g[N];
      load_wide<T, N>(a.x, at, x);
      load_wide<T, N>(a.grad, at, g);
      for (int n = 0; n < N; ++n) {
        g[n] *= gelu_slope(x[n] + bias[n]);
        sums[n] += g[n];
      }
      store_pack<T, N>(static_cast<T*>(a.out) + at, narrow_pack<T, N>(g));
    }
  }
  if (a.dbias) write_tile_sums<N>(sums, a.dbias + static_cast<int64_t>(blockIdx.y) * a.width, column, a.width);
}

template <class T, int N>
__global__ void swiglu_forward_kernel(Activation a) {
  every_pack<N>(a.rows, a.width, [&](int64_t row, int64_t column) {
    const int64_t at = row * 2 * a.width + column;
    float gate[N], up[N];
    load_wide<T, N>(a.x, at, gate);
    load_wide<T, N>(a.x, at + a.width, up);
    for (int n = 0; n < N; ++n) up[n] *= gate[n] * sigmoid(gate[n]);
    store_pack<T, N>(static_cast<T*>(a.out) + row * a.width + column, narrow_pack<T, N>(up));
  });
}

template <class T, int N>
__global__ void swiglu_backward_kernel(Activation a) {
  every_pack<N>(a.rows, a.width, [&](int64_t row, int64_t column) {
    const int64_t at = row * 2 * a.width + column;
    float gate[N], up[N], grad[N];
    load_wide<T, N>(a.x, at, gate);
    load_wide<T, N>(a.x, at + a.width, up);
    load_wide<T, N>(a.grad, row * a.width + column, grad);
    for (int n = 0; n < N; ++n) {
      const float s = sigmoid(gate[n]), silu = gate[n] * s;
      gate[n] = grad[n] * up[n] * (s + silu * (1.0f - s));
      up[n] = grad[n] * silu;
    }
    store_pack<T, N>(static_cast<T*>(a.out) + at, narrow_pack<T, N>(gate));
    store_pack<T, N>(static_cast<T*>(a.out) + at + a.width, narrow_pack<T, N>(up));
  });
}

}  // namespace mlm::cuda
