// bias + GELU (tanh form) and SwiGLU. 0.5 (1 + tanh u) is sigmoid(2u).
#pragma once

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

// The clamp keeps inf / inf out: beyond 80 the result is below 2e-35.
__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(x < -80.0f ? 80.0f : -x)); }

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
    Pack<T, N> x = load_pack<T, N>(static_cast<const T*>(a.x) + at);
    float bias[N];
    if (a.bias) a.bias.load<N>(column, bias);
    for (int n = 0; n < N; ++n) narrow(gelu(widen(x.v[n]) + (a.bias ? bias[n] : 0.0f)), &x.v[n]);
    store_pack<T, N>(static_cast<T*>(a.out) + at, x);
  });
}

// Block (32, y): 32 packs of columns by rows_per_block rows, so that the column sums stay in registers. Grid (columns, rows).
template <class T, int N>
__global__ void gelu_backward_kernel(Activation a) {
  __shared__ float shared[8][32 * N + 1];
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x) * N;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * a.rows_per_block;
  const int64_t last = first + a.rows_per_block < a.rows ? first + a.rows_per_block : a.rows;
  float sums[N], bias[N];
  for (int n = 0; n < N; ++n) sums[n] = bias[n] = 0.0f;
  if (column < a.width) {
    if (a.bias) a.bias.load<N>(column, bias);
    for (int64_t row = first + threadIdx.y; row < last; row += blockDim.y) {
      const int64_t at = row * a.width + column;
      const Pack<T, N> x = load_pack<T, N>(static_cast<const T*>(a.x) + at);
      Pack<T, N> g = load_pack<T, N>(static_cast<const T*>(a.grad) + at);
      for (int n = 0; n < N; ++n) {
        const float d = widen(g.v[n]) * gelu_slope(widen(x.v[n]) + bias[n]);
        sums[n] += d;
        narrow(d, &g.v[n]);
      }
      store_pack<T, N>(static_cast<T*>(a.out) + at, g);
    }
  }
  if (!a.dbias) return;
  for (int n = 0; n < N; ++n) shared[threadIdx.y][threadIdx.x * N + n] = sums[n];
  __syncthreads();
  if (threadIdx.y != 0 || column >= a.width) return;
  for (int n = 0; n < N; ++n) {
    float sum = 0.0f;
    for (int y = 0; y < static_cast<int>(blockDim.y); ++y) sum += shared[y][threadIdx.x * N + n];
    a.dbias[static_cast<int64_t>(blockIdx.y) * a.width + column + n] = sum;
  }
}

template <class T, int N>
__global__ void swiglu_forward_kernel(Activation a) {
  every_pack<N>(a.rows, a.width, [&](int64_t row, int64_t column) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * a.width + column;
    Pack<T, N> x = load_pack<T, N>(gate);
    const Pack<T, N> up = load_pack<T, N>(gate + a.width);
    for (int n = 0; n < N; ++n) {
      const float v = widen(x.v[n]);
      narrow(v * sigmoid(v) * widen(up.v[n]), &x.v[n]);
    }
    store_pack<T, N>(static_cast<T*>(a.out) + row * a.width + column, x);
  });
}

template <class T, int N>
__global__ void swiglu_backward_kernel(Activation a) {
  every_pack<N>(a.rows, a.width, [&](int64_t row, int64_t column) {
    const int64_t at = row * 2 * a.width + column;
    Pack<T, N> gate = load_pack<T, N>(static_cast<const T*>(a.x) + at);
    Pack<T, N> up = load_pack<T, N>(static_cast<const T*>(a.x) + at + a.width);
    const Pack<T, N> grad = load_pack<T, N>(static_cast<const T*>(a.grad) + row * a.width + column);
    for (int n = 0; n < N; ++n) {
      const float x = widen(gate.v[n]), u = widen(up.v[n]), g = widen(grad.v[n]);
      const float s = sigmoid(x), silu = x * s;
      narrow(g * u * (s + silu * (1.0f - s)), &gate.v[n]);
      narrow(g * silu, &up.v[n]);
    }
    store_pack<T, N>(static_cast<T*>(a.out) + at, gate);
    store_pack<T, N>(static_cast<T*>(a.out) + at + a.width, up);
  });
}

}  // namespace mlm::cuda
