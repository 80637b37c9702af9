// Softmax of attention scores with scale, mask and dropout. A row is held in registers while it fits (32 values a
// thread), else read twice: once with a running maximum (Milakov and Gimelshein 2018), once to write.
#pragma once

#include "device.cuh"

namespace mlm::cuda {

enum MaskKind : int { kNoMask = 0, kBoolMask = 1, kFloatMask = 2, kSameMask = 3 };
constexpr int kMaxDims = 8;

struct Causal {
  bool on;
  int64_t queries;
  int64_t offset;
  int64_t window;
};

struct SoftmaxForward {
  const void* x;
  void* out;
  void* probs;  // before dropout; null without dropout
  const void* mask;
  int mask_kind;  // kFloatMask: float values, kSameMask: dtype of x
  int dims;
  int64_t sizes[kMaxDims];
  int64_t mask_strides[kMaxDims];
  int64_t mask_key_stride;
  int64_t rows;
  int64_t keys;
  float scale;
  Causal causal;
  Dropout dropout;
};

struct SoftmaxBackward {
  const void* grad;
  const void* probs;
  void* dx;
  int64_t rows;
  int64_t keys;
  float scale;
  Causal causal;
  Dropout dropout;
};

struct KeyRange {
  int64_t begin, end;
};

__device__ inline KeyRange visible_keys(const Causal& c, int64_t row, int64_t keys) {
  if (!c.on) return {0, keys};
  const int64_t next = row % c.queries + c.offset + 1;
  const int64_t end = next < 0 ? 0 : (next < keys ? next : keys);
  const int64_t begin = next > c.window ? next - c.window : 0;
  return {begin < end ? begin : end, end};
}

__device__ inline int64_t mask_row(const SoftmaxForward& a, int64_t row) {
  int64_t offset = 0;
  for (int d = a.dims - 1; d >= 0; --d) {
    offset += row % a.sizes[d] * a.mask_strides[d];
    row /= a.sizes[d];
  }
  return offset;
}

__device__ inline float minus_infinity() { return -__builtin_huge_valf(); }

// Scaled and masked scores of one pack; -inf outside the visible range, which is not read where a pack misses it whole.
template <class T, int N>
__device__ inline void scaled_pack(
    const SoftmaxForward& a, const T* x, int64_t mask, int64_t column, KeyRange range, float* out) {
  for (int n = 0; n < N; ++n) out[n] = minus_infinity();
  if (column + N <= range.begin || column >= range.end) return;
  const Pack<T, N> pack = load_pack<T, N>(x + column);
  for (int n = 0; n < N; ++n) {
    const int64_t j = column + n;
    if (j < range.begin || j >= range.end) continue;
    float v = widen(pack.v[n]) * a.scale;
    const int64_t at = mask + j * a.mask_key_stride;
    if (a.mask_kind == kBoolMask)
      v = static_cast<const uint8_t*>(a.mask)[at] ? minus_infinity() : v;
    else if (a.mask_kind == kFloatMask)
      v += static_cast<const float*>(a.mask)[at];
    else if (a.mask_kind == kSameMask)
      v += widen(static_cast<const T*>(a.mask)[at]);
    out[n] = v;
  }
}

// NaN counts as the largest, so that it reaches the result as it does in torch.
struct TopScore {
  static constexpr float identity = -__builtin_huge_valf();
  __device__ static float of(float a, float b) { return a > b || a != a ? a : b; }
};

template <class T, int N>
__device__ inline void put_probabilities(
    const SoftmaxForward& a, int64_t row, int64_t column, const float* exps, float inverse, uint64_t seed) {
  const int64_t at = row * a.keys + column;
  Pack<T, N> out;
  for (int n = 0; n < N; ++n) narrow(exps[n] * inverse, &out.v[n]);
  if (!a.dropout.threshold) {
    store_pack<T, N>(static_cast<T*>(a.out) + at, out);
    return;
  }
  store_pack<T, N>(static_cast<T*>(a.probs) + at, out);
  float keep[N];
  dropout_multipliers<N>(a.dropout, seed, row, column, keep);
  for (int n = 0; n < N; ++n) narrow(exps[n] * inverse * keep[n], &out.v[n]);
  store_pack<T, N>(static_cast<T*>(a.out) + at, out);
}

template <class T, int N, int K>
__global__ void __launch_bounds__(1024) softmax_forward_kernel(SoftmaxForward a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  const uint64_t seed = a.dropout.threshold ? static_cast<uint64_t>(*a.dropout.seed) : 0;
  const KeyRange range = visible_keys(a.causal, row, a.keys);
  const int64_t mask = a.mask_kind == kNoMask ? 0 : mask_row(a, row);
  const T* x = static_cast<const T*>(a.x) + row * a.keys;
  float v[K][N];
  float top = minus_infinity();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t column = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * N;
    scaled_pack<T, N>(a, x, mask, column, range, v[k]);
    for (int n = 0; n < N; ++n) top = TopScore::of(top, v[k][n]);
  }
  top = row_reduce<TopScore>(top);
  if (top == minus_infinity()) top = 0.0f;  // nothing visible: every exp(-inf) is 0, and so is the row
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k)
    for (int n = 0; n < N; ++n) {
      v[k][n] = expf(v[k][n] - top);
      sum += v[k][n];
    }
  sum = row_reduce<Sum>(sum);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t column = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * N;
    if (column < a.keys) put_probabilities<T, N>(a, row, column, v[k], inverse, seed);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(1024) softmax_forward_wide_kernel(SoftmaxForward a) {
  const int64_t row = blockIdx.x, step = static_cast<int64_t>(blockDim.x) * N, first = static_cast<int64_t>(threadIdx.x) * N;
  const uint64_t seed = a.dropout.threshold ? static_cast<uint64_t>(*a.dropout.seed) : 0;
  const KeyRange range = visible_keys(a.causal, row, a.keys);
  const int64_t mask = a.mask_kind == kNoMask ? 0 : mask_row(a, row);
  const T* x = static_cast<const T*>(a.x) + row * a.keys;
  float top = minus_infinity(), sum = 0.0f, v[N];
  for (int64_t column = first; column < a.keys; column += step) {
    scaled_pack<T, N>(a, x, mask, column, range, v);
    float high = top;
    for (int n = 0; n < N; ++n) high = TopScore::of(high, v[n]);
    if (high == minus_infinity()) continue;
    sum *= expf(top - high);  // 0 the first time, when top is -inf and sum is 0
    top = high;
    for (int n = 0; n < N; ++n) sum += expf(v[n] - top);
  }
  float all = row_reduce<TopScore>(top);
  if (all == minus_infinity()) all = 0.0f;
  sum = row_reduce<Sum>(sum == 0.0f ? 0.0f : sum * expf(top - all));
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int64_t column = first; column < a.keys; column += step) {
    scaled_pack<T, N>(a, x, mask, column, range, v);
    for (int n = 0; n < N; ++n) v[n] = expf(v[n] - all);
    put_probabilities<T, N>(a, row, column, v, inverse, seed);
  }
}

// Gradient behind the dropout and probabilities of one pack, zero outside the visible range.
template <class T, int N>
__device__ inline bool gradient_pack(
    const SoftmaxBackward& a, int64_t row, int64_t column, KeyRange range, uint64_t seed, float* grad, float* probs) {
  if (column + N <= range.begin || column >= range.end) return false;
  const int64_t at = row * a.keys + column;
  const Pack<T, N> g = load_pack<T, N>(static_cast<const T*>(a.grad) + at);
  const Pack<T, N> p = load_pack<T, N>(static_cast<const T*>(a.probs) + at);
  float keep[N];
  if (a.dropout.threshold) dropout_multipliers<N>(a.dropout, seed, row, column, keep);
  for (int n = 0; n < N; ++n) {
    const bool seen = column + n >= range.begin && column + n < range.end;
    grad[n] = seen ? widen(g.v[n]) * (a.dropout.threshold ? keep[n] : 1.0f) : 0.0f;
    probs[n] = seen ? widen(p.v[n]) : 0.0f;
  }
  return true;
}

// dx = scale * p * (g - sum(g * p)). K = 0: any width, grad and probs are read twice.
template <class T, int N, int K>
__global__ void __launch_bounds__(1024) softmax_backward_kernel(SoftmaxBackward a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  const uint64_t seed = a.dropout.threshold ? static_cast<uint64_t>(*a.dropout.seed) : 0;
  const KeyRange range = visible_keys(a.causal, row, a.keys);
  const int64_t step = static_cast<int64_t>(blockDim.x) * N, first = static_cast<int64_t>(threadIdx.x) * N;
  constexpr int kHeld = K > 0 ? K : 1;
  float grad[kHeld][N], probs[kHeld][N];
  bool seen[kHeld];
  float dot = 0.0f;
  if constexpr (K > 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      seen[k] = gradient_pack<T, N>(a, row, first + k * step, range, seed, grad[k], probs[k]);
      if (seen[k])
        for (int n = 0; n < N; ++n) dot += grad[k][n] * probs[k][n];
    }
  } else {
    for (int64_t column = first; column < a.keys; column += step)
      if (gradient_pack<T, N>(a, row, column, range, seed, grad[0], probs[0]))
        for (int n = 0; n < N; ++n) dot += grad[0][n] * probs[0][n];
  }
  dot = row_reduce<Sum>(dot);
  const auto put = [&](int64_t column, bool visible, const float* g, const float* p) {
    Pack<T, N> out;
    for (int n = 0; n < N; ++n) narrow(visible ? (g[n] - dot) * p[n] * a.scale : 0.0f, &out.v[n]);
    store_pack<T, N>(static_cast<T*>(a.dx) + row * a.keys + column, out);
  };
  if constexpr (K > 0) {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (first + k * step < a.keys) put(first + k * step, seen[k], grad[k], probs[k]);
  } else {
    for (int64_t column = first; column < a.keys; column += step) {
      const bool visible = gradient_pack<T, N>(a, row, column, range, seed, grad[0], probs[0]);
      put(column, visible, grad[0], probs[0]);
    }
  }
}

}  // namespace mlm::cuda
