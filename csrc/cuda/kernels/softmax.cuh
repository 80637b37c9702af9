// Softmax of attention scores with scale, mask and dropout. A row is held in registers while it fits (up to 32
// values a thread), else read twice: once with a running maximum (Milakov and Gimelshein 2018), once to write.
#pragma once

#include "device.cuh"
#include "geometry.cuh"

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

// The leanest kernel that does all that is asked for. Host code.
inline int softmax_form(const SoftmaxForward& a, int pack) {
  if (a.dropout.threshold || (a.mask_kind != kNoMask && a.causal.on)) return kAnything;
  if (a.mask_kind == kNoMask) return a.causal.on ? kCausalOnly : kPlain;
  bool whole = a.mask_kind == kBoolMask && a.mask_key_stride == 1 && reinterpret_cast<uintptr_t>(a.mask) % pack == 0;
  for (int d = 0; d < a.dims; ++d) whole = whole && a.mask_strides[d] % pack == 0;
  return whole ? kByteMask : kAnything;
}

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
  int begin, end;
};

__device__ inline KeyRange visible_keys(const Causal& c, int64_t row, int64_t keys) {
  if (!c.on) return {0, static_cast<int>(keys)};
  const int64_t next = row % c.queries + c.offset + 1;
  const int64_t end = next < 0 ? 0 : (next < keys ? next : keys);
  const int64_t begin = next > c.window ? next - c.window : 0;
  return {static_cast<int>(begin < end ? begin : end), static_cast<int>(end)};
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

template <int N>
struct alignas(N) Bytes {
  uint8_t v[N];
};

// What is read of one pack: its scores, and its part of a mask that is read a pack at a time.
template <class T, int N>
struct ScorePack {
  Pack<T, N> scores;
  Bytes<N> hidden;
};

__device__ inline bool misses(const KeyRange& range, int column, int n) {
  return column + n <= range.begin || column >= range.end;
}

// Reads nothing where the pack is outside of the visible range.
template <class T, int N, int kForm>
__device__ inline ScorePack<T, N> load_scores(
    const SoftmaxForward& a, const T* x, int64_t mask, int column, const KeyRange& range) {
  ScorePack<T, N> p;
  if (misses(range, column, N)) return p;
  p.scores = load_pack<T, N>(x + column);
  if constexpr (kForm == kByteMask)
    p.hidden = *reinterpret_cast<const Bytes<N>*>(static_cast<const uint8_t*>(a.mask) + mask + column);
  return p;
}

// Scores of one pack, scaled and masked; -inf outside of the visible range.
template <class T, int N, int kForm>
__device__ inline void scaled_scores(
    const SoftmaxForward& a, const ScorePack<T, N>& p, int64_t mask, int column, const KeyRange& range, float* out) {
  if (misses(range, column, N)) {
    for (int n = 0; n < N; ++n) out[n] = minus_infinity();
    return;
  }
  widen_pack<T, N>(p.scores, out);
  for (int n = 0; n < N; ++n) out[n] *= a.scale;
  if constexpr (kForm == kByteMask) {
    for (int n = 0; n < N; ++n) out[n] = p.hidden.v[n] ? minus_infinity() : out[n];
  }
  if constexpr (kForm == kAnything) {
    for (int n = 0; n < N && a.mask_kind != kNoMask; ++n) {
      const int64_t at = mask + (column + n) * a.mask_key_stride;
      if (a.mask_kind == kBoolMask)
        out[n] = static_cast<const uint8_t*>(a.mask)[at] ? minus_infinity() : out[n];
      else if (a.mask_kind == kFloatMask)
        out[n] += static_cast<const float*>(a.mask)[at];
      else
        out[n] += widen(static_cast<const T*>(a.mask)[at]);
    }
  }
  if constexpr (kForm == kCausalOnly || kForm == kAnything) {
    if (column < range.begin || column + N > range.end)
      for (int n = 0; n < N; ++n) out[n] = column + n < range.begin || column + n >= range.end ? minus_infinity() : out[n];
  }
}

// What is the same for all of a row.
template <int kForm>
struct RowPlan {
  KeyRange range;
  int64_t mask;
  uint64_t seed;

  __device__ RowPlan(const SoftmaxForward& a, int64_t row) : range{0, static_cast<int>(a.keys)}, mask(0), seed(0) {
    if constexpr (kForm == kCausalOnly || kForm == kAnything) range = visible_keys(a.causal, row, a.keys);
    if constexpr (kForm == kByteMask || kForm == kAnything) mask = a.mask_kind == kNoMask ? 0 : mask_row(a, row);
    if constexpr (kForm == kAnything) seed = a.dropout.threshold ? static_cast<uint64_t>(*a.dropout.seed) : 0;
  }
};

template <class T, int N, int kForm>
__device__ inline void put_probabilities(
    const SoftmaxForward& a, int64_t row, int column, const float* exps, float inverse, uint64_t seed) {
  const int64_t at = row * a.keys + column;
  float v[N];
  for (int n = 0; n < N; ++n) v[n] = exps[n] * inverse;
  if (kForm != kAnything || !a.dropout.threshold) {
    store_pack<T, N>(static_cast<T*>(a.out) + at, narrow_pack<T, N>(v));
    return;
  }
  store_pack<T, N>(static_cast<T*>(a.probs) + at, narrow_pack<T, N>(v));
  float keep[N];
  dropout_multipliers<N>(a.dropout, seed, row, column, keep);
  for (int n = 0; n < N; ++n) v[n] *= keep[n];
  store_pack<T, N>(static_cast<T*>(a.out) + at, narrow_pack<T, N>(v));
}

// A row of which nothing is visible has maximum -inf: with 0 instead, every exponential is 0, and so is the row.
__device__ inline float finite_top(float top) { return top == minus_infinity() ? 0.0f : top; }

template <class T, int N, int K, int kForm>
__global__ void __launch_bounds__(1024) softmax_forward_kernel(SoftmaxForward a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  const RowPlan<kForm> plan(a, row);
  const T* x = static_cast<const T*>(a.x) + row * a.keys;
  const int first = threadIdx.x * N, step = blockDim.x * N;
  ScorePack<T, N> p[K];
  float v[K][N];
#pragma unroll
  for (int k = 0; k < K; ++k) p[k] = load_scores<T, N, kForm>(a, x, plan.mask, first + k * step, plan.range);
  float top = minus_infinity();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    scaled_scores<T, N, kForm>(a, p[k], plan.mask, first + k * step, plan.range, v[k]);
    for (int n = 0; n < N; ++n) top = Max::of(top, v[k][n]);
  }
  top = finite_top(row_reduce<Max>(top, 0));
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k)
    for (int n = 0; n < N; ++n) {
      v[k][n] = exp_fast(v[k][n] - top);
      sum += v[k][n];
    }
  sum = row_reduce<Sum>(sum, 1);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (first + k * step < a.keys) put_probabilities<T, N, kForm>(a, row, first + k * step, v[k], inverse, plan.seed);
}

template <class T, int N, int kForm>
__global__ void __launch_bounds__(1024) softmax_forward_wide_kernel(SoftmaxForward a) {
  const int64_t row = blockIdx.x;
  const RowPlan<kForm> plan(a, row);
  const T* x = static_cast<const T*>(a.x) + row * a.keys;
  const int step = blockDim.x * N;
  float top = minus_infinity(), sum = 0.0f, v[N];
  int column = threadIdx.x * N;
  for (; column < a.keys; column += step) {
    scaled_scores<T, N, kForm>(a, load_scores<T, N, kForm>(a, x, plan.mask, column, plan.range), plan.mask, column, plan.range, v);
    float high = top;
    for (int n = 0; n < N; ++n) high = Max::of(high, v[n]);
    const float base = finite_top(high);
    sum *= exp_fast(top - base);  // 0 the first time, when top is -inf and sum is 0
    top = high;
    for (int n = 0; n < N; ++n) sum += exp_fast(v[n] - base);
  }
  const float all = finite_top(row_reduce<Max>(top, 0));
  sum = row_reduce<Sum>(sum * exp_fast(top - all), 1);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (column -= step; column >= 0; column -= step) {  // backwards: the end of the row is still in cache
    scaled_scores<T, N, kForm>(a, load_scores<T, N, kForm>(a, x, plan.mask, column, plan.range), plan.mask, column, plan.range, v);
    for (int n = 0; n < N; ++n) v[n] = exp_fast(v[n] - all);
    put_probabilities<T, N, kForm>(a, row, column, v, inverse, plan.seed);
  }
}

template <class T, int N>
struct GradientPack {
  Pack<T, N> grad, probs;
};

template <class T, int N>
__device__ inline GradientPack<T, N> load_gradients(const SoftmaxBackward& a, int64_t row, int column, const KeyRange& range) {
  GradientPack<T, N> p;
  if (misses(range, column, N)) return p;
  const int64_t at = row * a.keys + column;
  p.grad = load_pack<T, N>(static_cast<const T*>(a.grad) + at);
  p.probs = load_pack<T, N>(static_cast<const T*>(a.probs) + at);
  return p;
}

// Gradient behind the dropout, and probabilities, of one pack; zeros outside of the visible range.
template <class T, int N>
__device__ inline void wide_gradients(
    const SoftmaxBackward& a, const GradientPack<T, N>& p, int64_t row, int column, const KeyRange& range, uint64_t seed,
    float* grad, float* probs) {
  if (misses(range, column, N)) {
    for (int n = 0; n < N; ++n) grad[n] = probs[n] = 0.0f;
    return;
  }
  widen_pack<T, N>(p.grad, grad);
  widen_pack<T, N>(p.probs, probs);
  if (a.dropout.threshold) {
    float keep[N];
    dropout_multipliers<N>(a.dropout, seed, row, column, keep);
    for (int n = 0; n < N; ++n) grad[n] *= keep[n];
  }
  if (column < range.begin || column + N > range.end)
    for (int n = 0; n < N; ++n)
      if (column + n < range.begin || column + n >= range.end) grad[n] = probs[n] = 0.0f;
}

template <class T, int N>
__device__ inline void put_gradients(
    const SoftmaxBackward& a, int64_t row, int column, float dot, float* grad, const float* probs) {
  for (int n = 0; n < N; ++n) grad[n] = (grad[n] - dot) * probs[n] * a.scale;
  store_pack<T, N>(static_cast<T*>(a.dx) + row * a.keys + column, narrow_pack<T, N>(grad));
}

// dx = scale * p * (g - sum(g * p)).
template <class T, int N, int K>
__global__ void __launch_bounds__(1024) softmax_backward_kernel(SoftmaxBackward a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  const uint64_t seed = a.dropout.threshold ? static_cast<uint64_t>(*a.dropout.seed) : 0;
  const KeyRange range = visible_keys(a.causal, row, a.keys);
  const int first = threadIdx.x * N, step = blockDim.x * N;
  GradientPack<T, N> p[K];
  float grad[N], probs[N], dot = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) p[k] = load_gradients<T, N>(a, row, first + k * step, range);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    wide_gradients<T, N>(a, p[k], row, first + k * step, range, seed, grad, probs);
    for (int n = 0; n < N; ++n) dot += grad[n] * probs[n];
  }
  dot = row_reduce<Sum>(dot, 0);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (first + k * step >= a.keys) continue;
    wide_gradients<T, N>(a, p[k], row, first + k * step, range, seed, grad, probs);
    put_gradients<T, N>(a, row, first + k * step, dot, grad, probs);
  }
}

// Any width: grad and probs are read twice.
template <class T, int N>
__global__ void __launch_bounds__(1024) softmax_backward_wide_kernel(SoftmaxBackward a) {
  const int64_t row = blockIdx.x;
  const uint64_t seed = a.dropout.threshold ? static_cast<uint64_t>(*a.dropout.seed) : 0;
  const KeyRange range = visible_keys(a.causal, row, a.keys);
  const int step = blockDim.x * N;
  float grad[N], probs[N], dot = 0.0f;
  int column = threadIdx.x * N;
  for (; column < a.keys; column += step) {
    wide_gradients<T, N>(a, load_gradients<T, N>(a, row, column, range), row, column, range, seed, grad, probs);
    for (int n = 0; n < N; ++n) dot += grad[n] * probs[n];
  }
  dot = row_reduce<Sum>(dot, 0);
  for (column -= step; column >= 0; column -= step) {  // backwards, as in the forward pass
    wide_gradients<T, N>(a, load_gradients<T, N>(a, row, column, range), row, column, range, seed, grad, probs);
    put_gradients<T, N>(a, row, column, dot, grad, probs);
  }
}

}  // namespace mlm::cuda
