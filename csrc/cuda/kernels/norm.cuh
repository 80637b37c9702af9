// Layer norm and RMS norm, forward and backward, plain and behind a fused residual sum.
// One row per warp or block, held in registers between the passes; rows too wide for that are read again.
#pragma once

#include "device.cuh"

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
template <class T, int N>
__device__ inline Pack<T, N> norm_input(const NormForward& a, int64_t row, int64_t column, uint64_t seed) {
  const int64_t at = row * a.width + column;
  Pack<T, N> x = load_pack<T, N>(static_cast<const T*>(a.x) + at);
  if (!a.total) return x;
  const Pack<T, N> residual = load_pack<T, N>(static_cast<const T*>(a.residual) + at);
  float bias[N], keep[N];
  if (a.pre_bias) a.pre_bias.load<N>(column, bias);
  if (a.dropout.threshold) dropout_multipliers<N>(a.dropout, seed, row, column, keep);
  for (int n = 0; n < N; ++n) {
    float v = widen(x.v[n]);
    if (a.pre_bias) v += bias[n];
    if (a.dropout.threshold) v *= keep[n];
    narrow(v + widen(residual.v[n]), &x.v[n]);
  }
  store_pack<T, N>(static_cast<T*>(a.total) + at, x);
  return x;
}

template <class T, int N>
__device__ inline void norm_output(
    const NormForward& a, int64_t row, int64_t column, const Pack<T, N>& x, float mean, float rstd) {
  float weight[N], bias[N];
  a.weight.load<N>(column, weight);
  if (a.bias) a.bias.load<N>(column, bias);
  Pack<T, N> out;
  for (int n = 0; n < N; ++n)
    narrow((widen(x.v[n]) - mean) * rstd * weight[n] + (a.bias ? bias[n] : 0.0f), &out.v[n]);
  store_pack<T, N>(static_cast<T*>(a.out) + row * a.width + column, out);
}

// K packs a thread hold the row: one read, one write.
template <class T, int N, int K>
__global__ void __launch_bounds__(1024) norm_forward_kernel(NormForward a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;  // whole warps only: see device.cuh
  const uint64_t seed = a.dropout.threshold ? static_cast<uint64_t>(*a.dropout.seed) : 0;
  const float share = 1.0f / static_cast<float>(a.width);
  Pack<T, N> x[K];
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t column = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * N;
    if (column >= a.width) continue;
    x[k] = norm_input<T, N>(a, row, column, seed);
    for (int n = 0; n < N; ++n) sum += widen(x[k].v[n]);
  }
  const float mean = a.mean ? row_reduce<Sum>(sum) * share : 0.0f;
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if ((static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * N >= a.width) continue;
    for (int n = 0; n < N; ++n) {
      const float centred = widen(x[k].v[n]) - mean;
      squares += centred * centred;
    }
  }
  const float rstd = 1.0f / sqrtf(row_reduce<Sum>(squares) * share + a.eps);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t column = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * N;
    if (column < a.width) norm_output<T, N>(a, row, column, x[k], mean, rstd);
  }
  if (threadIdx.x == 0) {
    a.rstd[row] = rstd;
    if (a.mean) a.mean[row] = mean;
  }
}

// Any width: the row is read again for each pass (from the L2 cache, where a row of 65,536 fits many times).
template <class T, int N>
__global__ void __launch_bounds__(1024) norm_forward_wide_kernel(NormForward a) {
  const int64_t row = blockIdx.x, step = static_cast<int64_t>(blockDim.x) * N, first = static_cast<int64_t>(threadIdx.x) * N;
  const uint64_t seed = a.dropout.threshold ? static_cast<uint64_t>(*a.dropout.seed) : 0;
  const float share = 1.0f / static_cast<float>(a.width);
  float sum = 0.0f;
  for (int64_t column = first; column < a.width; column += step) {
    const Pack<T, N> x = norm_input<T, N>(a, row, column, seed);
    for (int n = 0; n < N; ++n) sum += widen(x.v[n]);
  }
  const float mean = a.mean ? row_reduce<Sum>(sum) * share : 0.0f;
  // A thread reads back only what it wrote itself.
  const T* x = static_cast<const T*>(a.total ? a.total : a.x) + row * a.width;
  float squares = 0.0f;
  for (int64_t column = first; column < a.width; column += step) {
    const Pack<T, N> pack = load_pack<T, N>(x + column);
    for (int n = 0; n < N; ++n) {
      const float centred = widen(pack.v[n]) - mean;
      squares += centred * centred;
    }
  }
  const float rstd = 1.0f / sqrtf(row_reduce<Sum>(squares) * share + a.eps);
  for (int64_t column = first; column < a.width; column += step)
    norm_output<T, N>(a, row, column, load_pack<T, N>(x + column), mean, rstd);
  if (threadIdx.x == 0) {
    a.rstd[row] = rstd;
    if (a.mean) a.mean[row] = mean;
  }
}

struct NormBackward {
  const void* grad;
  const void* grad_total;  // or null
  const void* x;
  Param weight;
  const float* mean;  // null for RMS norm
  const float* rstd;
  void* dx;
  void* dbranch;     // or null
  float* dweight;    // [gridDim.x, width]
  float* dbias;      // or null
  float* dpre_bias;  // or null
  int64_t rows;
  int64_t width;
  Dropout dropout;
};

// The two means a row's gradient needs.
struct RowTerms {
  float mean, rstd, k1, k2;
};

__device__ inline RowTerms row_terms(const NormBackward& a, int64_t row, float s1, float s2) {
  const float share = 1.0f / static_cast<float>(a.width);
  const float rstd = a.rstd[row];
  s2 = row_reduce<Sum>(s2);
  if (a.mean) s1 = row_reduce<Sum>(s1);
  return {a.mean ? a.mean[row] : 0.0f, rstd, a.mean ? -rstd * s1 * share : 0.0f, -rstd * rstd * s2 * share};
}

// Gradient of one pack, written; adds to the column sums of this thread.
template <class T, int N>
__device__ inline void norm_gradient(
    const NormBackward& a, int64_t row, int64_t column, const Pack<T, N>& x, const Pack<T, N>& grad, const RowTerms& t,
    uint64_t seed, float* dweight, float* dbias, float* dpre) {
  const int64_t at = row * a.width + column;
  float weight[N], keep[N];
  a.weight.load<N>(column, weight);
  Pack<T, N> total, dx, dbranch;
  if (a.grad_total) total = load_pack<T, N>(static_cast<const T*>(a.grad_total) + at);
  if (a.dbranch) dropout_multipliers<N>(a.dropout, seed, row, column, keep);
  for (int n = 0; n < N; ++n) {
    const float g = widen(grad.v[n]), xhat = (widen(x.v[n]) - t.mean) * t.rstd;
    float d = g * weight[n] * t.rstd + t.k1 + xhat * t.k2;
    if (a.grad_total) d += widen(total.v[n]);
    narrow(d, &dx.v[n]);
    const float branch = a.dbranch ? d * keep[n] : d;
    if (a.dbranch) narrow(branch, &dbranch.v[n]);
    dweight[n] += g * xhat;
    if (a.dbias) dbias[n] += g;
    if (a.dpre_bias) dpre[n] += branch;
  }
  store_pack<T, N>(static_cast<T*>(a.dx) + at, dx);
  if (a.dbranch) store_pack<T, N>(static_cast<T*>(a.dbranch) + at, dbranch);
}

// Adds the sums of the rows of a block in the order of threadIdx.y and writes them as this block's line.
template <int N, int K>
__device__ inline void write_column_sums(const float (*sums)[N], float* out, int64_t width, float* shared) {
  for (int turn = 0; turn < static_cast<int>(blockDim.y); ++turn) {
    if (static_cast<int>(threadIdx.y) == turn) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int64_t column = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * N;
        if (column >= width) continue;
        for (int n = 0; n < N; ++n) {
          const float before = turn > 0 ? shared[column + n] : 0.0f;
          if (turn + 1 < static_cast<int>(blockDim.y))
            shared[column + n] = before + sums[k][n];
          else
            out[static_cast<int64_t>(blockIdx.x) * width + column + n] = before + sums[k][n];
        }
      }
    }
    __syncthreads();
  }
}

// Blocks stay for many rows and keep the column sums in registers. Shared memory: width floats when blockDim.y > 1.
template <class T, int N, int K>
__global__ void __launch_bounds__(512) norm_backward_kernel(NormBackward a) {
  MLM_DYNAMIC_SHARED(shared);
  const uint64_t seed = a.dropout.threshold ? static_cast<uint64_t>(*a.dropout.seed) : 0;
  float dweight[K][N], dbias[K][N], dpre[K][N];
#pragma unroll
  for (int k = 0; k < K; ++k)
    for (int n = 0; n < N; ++n) dweight[k][n] = dbias[k][n] = dpre[k][n] = 0.0f;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows; row += step) {
    const T* xr = static_cast<const T*>(a.x) + row * a.width;
    const T* gr = static_cast<const T*>(a.grad) + row * a.width;
    const float mean = a.mean ? a.mean[row] : 0.0f;
    Pack<T, N> x[K], grad[K];
    float s1 = 0.0f, s2 = 0.0f;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t column = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * N;
      if (column >= a.width) continue;
      x[k] = load_pack<T, N>(xr + column);
      grad[k] = load_pack<T, N>(gr + column);
      float weight[N];
      a.weight.load<N>(column, weight);
      for (int n = 0; n < N; ++n) {
        const float gw = widen(grad[k].v[n]) * weight[n];
        s1 += gw;
        s2 += gw * (widen(x[k].v[n]) - mean);
      }
    }
    const RowTerms t = row_terms(a, row, s1, s2);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t column = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * N;
      if (column < a.width)
        norm_gradient<T, N>(a, row, column, x[k], grad[k], t, seed, dweight[k], dbias[k], dpre[k]);
    }
  }
  write_column_sums<N, K>(dweight, a.dweight, a.width, shared);
  if (a.dbias) write_column_sums<N, K>(dbias, a.dbias, a.width, shared);
  if (a.dpre_bias) write_column_sums<N, K>(dpre, a.dpre_bias, a.width, shared);
}

// Any width: x and grad are read twice, the column sums of a block live in its line of memory.
template <class T, int N>
__global__ void __launch_bounds__(512) norm_backward_wide_kernel(NormBackward a) {
  const uint64_t seed = a.dropout.threshold ? static_cast<uint64_t>(*a.dropout.seed) : 0;
  const int64_t step = static_cast<int64_t>(blockDim.x) * N, first = static_cast<int64_t>(threadIdx.x) * N;
  const int64_t line = static_cast<int64_t>(blockIdx.x) * a.width;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* xr = static_cast<const T*>(a.x) + row * a.width;
    const T* gr = static_cast<const T*>(a.grad) + row * a.width;
    const float mean = a.mean ? a.mean[row] : 0.0f;
    float s1 = 0.0f, s2 = 0.0f;
    for (int64_t column = first; column < a.width; column += step) {
      const Pack<T, N> x = load_pack<T, N>(xr + column), grad = load_pack<T, N>(gr + column);
      float weight[N];
      a.weight.load<N>(column, weight);
      for (int n = 0; n < N; ++n) {
        const float gw = widen(grad.v[n]) * weight[n];
        s1 += gw;
        s2 += gw * (widen(x.v[n]) - mean);
      }
    }
    const RowTerms t = row_terms(a, row, s1, s2);
    const bool fresh = row == static_cast<int64_t>(blockIdx.x);
    for (int64_t column = first; column < a.width; column += step) {
      float dweight[N], dbias[N], dpre[N];
      for (int n = 0; n < N; ++n) {
        dweight[n] = fresh ? 0.0f : a.dweight[line + column + n];
        dbias[n] = fresh || !a.dbias ? 0.0f : a.dbias[line + column + n];
        dpre[n] = fresh || !a.dpre_bias ? 0.0f : a.dpre_bias[line + column + n];
      }
      norm_gradient<T, N>(a, row, column, load_pack<T, N>(xr + column), load_pack<T, N>(gr + column), t, seed, dweight,
                          dbias, dpre);
      for (int n = 0; n < N; ++n) {
        a.dweight[line + column + n] = dweight[n];
        if (a.dbias) a.dbias[line + column + n] = dbias[n];
        if (a.dpre_bias) a.dpre_bias[line + column + n] = dpre[n];
      }
    }
  }
}

// out[j] = sum over lines of partial[line, j]: 32 columns by blockDim.y threads, in a fixed order. Block (32, <= 32).
template <class T>
__global__ void column_sums_kernel(const float* partial, T* out, int64_t lines, int64_t width) {
  __shared__ float shared[32][33];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float sum = 0.0f;
  if (column < width)
    for (int64_t line = threadIdx.y; line < lines; line += blockDim.y) sum += partial[line * width + column];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  for (int y = 1; y < static_cast<int>(blockDim.y); ++y) sum += shared[y][threadIdx.x];
  narrow(sum, out + column);
}

}  // namespace mlm::cuda
