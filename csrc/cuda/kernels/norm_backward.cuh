// Layer norm and RMS norm, backward, plain and behind a fused residual sum.
// Blocks stay for many rows and keep the sums of their columns in shared memory; rows too wide for that take two passes.
#pragma once

#include "column_sums.cuh"
#include "device.cuh"
#include "geometry.cuh"

namespace mlm::cuda {

struct NormBackward {
  const void* grad;
  const void* grad_total;  // or null
  const void* x;
  Param weight;
  const float* mean;  // null for RMS norm
  const float* rstd;
  void* dx;
  void* dbranch;     // or null
  float* dweight;    // [lines, width]
  float* dbias;      // or null
  float* dpre_bias;  // or null
  float* terms;      // [rows, 2], only where a row is too wide for one pass
  int64_t rows;
  int64_t width;
  int64_t rows_per_line;  // of the tiles of such rows
  Dropout dropout;

  __device__ int num_sums() const { return 1 + (dbias != nullptr) + (dpre_bias != nullptr); }
};

// What a row's gradient needs: dx = rstd (g w + centre + xhat slope), where xhat = (x - mean) rstd.
struct RowTerms {
  float mean, rstd, centre, slope;
};

template <class T, int N>
struct RowPack {
  Pack<T, N> x, grad, total;
};

template <class T, int N, bool kResidual>
__device__ inline RowPack<T, N> load_row_pack(const NormBackward& a, int64_t row, int column) {
  const int64_t at = row * a.width + column;
  RowPack<T, N> p;
  p.x = load_pack<T, N>(static_cast<const T*>(a.x) + at);
  p.grad = load_pack<T, N>(static_cast<const T*>(a.grad) + at);
  if (kResidual && a.grad_total) p.total = load_pack<T, N>(static_cast<const T*>(a.grad_total) + at);
  return p;
}

// Adds a pack's part of the sums over the row of g w and of g w xhat.
template <class T, int N>
__device__ inline void add_row_sums(const RowPack<T, N>& p, const float* weight, float mean, float rstd, float* sums) {
  float x[N], g[N];
  widen_pack<T, N>(p.x, x);
  widen_pack<T, N>(p.grad, g);
  for (int n = 0; n < N; ++n) {
    const float gw = g[n] * weight[n];
    sums[0] += gw;
    sums[1] += gw * ((x[n] - mean) * rstd);
  }
}

__device__ inline RowTerms row_terms(const NormBackward& a, float mean, float rstd, const float* sums) {
  const float share = 1.0f / static_cast<float>(a.width);
  return {mean, rstd, a.mean ? -sums[0] * share : 0.0f, -sums[1] * share};
}

// Gradient of one pack, written; adds to the sums of its columns: sums[0] of the weight, then bias and pre_bias, those that
// are wanted.
template <class T, int N, bool kResidual>
__device__ inline void norm_gradient(
    const NormBackward& a, int64_t row, int column, const RowPack<T, N>& p, const float* weight, const RowTerms& t,
    uint64_t seed, float (*sums)[N]) {
  const int64_t at = row * a.width + column;
  float x[N], g[N], d[N];
  widen_pack<T, N>(p.x, x);
  widen_pack<T, N>(p.grad, g);
  for (int n = 0; n < N; ++n) {
    const float xhat = (x[n] - t.mean) * t.rstd;
    d[n] = t.rstd * (g[n] * weight[n] + (xhat * t.slope + t.centre));
    sums[0][n] += g[n] * xhat;
  }
  if (a.dbias)
    for (int n = 0; n < N; ++n) sums[1][n] += g[n];
  if constexpr (kResidual) {
    if (a.grad_total) {
      widen_pack<T, N>(p.total, x);
      for (int n = 0; n < N; ++n) d[n] += x[n];
    }
  }
  store_pack<T, N>(static_cast<T*>(a.dx) + at, narrow_pack<T, N>(d));
  if constexpr (kResidual) {
    if (a.dbranch) {
      dropout_multipliers<N>(a.dropout, seed, row, column, x);
      for (int n = 0; n < N; ++n) d[n] *= x[n];
      store_pack<T, N>(static_cast<T*>(a.dbranch) + at, narrow_pack<T, N>(d));
    }
    if (a.dpre_bias)
      for (int n = 0; n < N; ++n) sums[2][n] += d[n];
  }
}

// The column sums of a block in shared memory. Every column belongs to one thread, so nothing is waited for; a pack of
// eight lies in two planes of four, where the threads of a warp meet no bank twice.
template <int N>
struct SharedSums {
  static constexpr int kQuad = N < 4 ? N : 4;
  float* base;
  int width;

  __device__ float* at(int sum, int pack, int n) const { return base + sum * width + (n / kQuad * (width / N) + pack) * kQuad; }
  __device__ void add(int sum, int pack, const float* v) const {
#pragma unroll
    for (int n = 0; n < N; n += kQuad) {
      auto* place = reinterpret_cast<Pack<float, kQuad>*>(at(sum, pack, n));
      Pack<float, kQuad> now = *place;
      for (int i = 0; i < kQuad; ++i) now.v[i] += v[n + i];
      *place = now;
    }
  }
  __device__ void move(int sum, int pack, float* out) const {
#pragma unroll
    for (int n = 0; n < N; n += kQuad) store_pack<float, kQuad>(out + pack * N + n, *reinterpret_cast<Pack<float, kQuad>*>(at(sum, pack, n)));
  }
};

// Blocks stay for many rows, R at a time, and keep the column sums of theirs in shared memory: width * num_sums() floats.
// A thread holds K packs of each of the R rows.
template <class T, int N, int K, int R, bool kResidual, int kThreads>
__global__ void __launch_bounds__(kThreads) norm_backward_kernel(NormBackward a) {
  MLM_DYNAMIC_SHARED(shared);
  const uint64_t seed = kResidual && a.dropout.threshold ? static_cast<uint64_t>(*a.dropout.seed) : 0;
  const int width = static_cast<int>(a.width), first = threadIdx.x * N, step = blockDim.x * N;
  const SharedSums<N> kept{shared, width};
  for (int s = 0; s < a.num_sums(); ++s)
    for (int column = first; column < width; column += step)
      for (int n = 0; n < N; ++n) *(kept.at(s, column / N, n) + n % SharedSums<N>::kQuad) = 0.0f;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * R;
  int turn = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * R; row < a.rows; row += stride, turn ^= 1) {
    RowPack<T, N> p[R][K];
    float mean[R], rstd[R], sums[2 * R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      sums[2 * r] = sums[2 * r + 1] = 0.0f;
      const int64_t mine = row + r < a.rows ? row + r : row;  // a row that is not there is read, and not used
      mean[r] = a.mean ? a.mean[mine] : 0.0f;
      rstd[r] = a.rstd[mine];
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (first + k * step < width) p[r][k] = load_row_pack<T, N, kResidual>(a, mine, first + k * step);
    }
    float weight[N];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (first + k * step >= width) continue;
      a.weight.load<N>(first + k * step, weight);
#pragma unroll
      for (int r = 0; r < R; ++r) add_row_sums<T, N>(p[r][k], weight, mean[r], rstd[r], sums + 2 * r);
    }
    row_reduce<Sum>(sums, turn);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int column = first + k * step;
      if (column >= width) continue;
      a.weight.load<N>(column, weight);
      float columns[3][N];
      for (int n = 0; n < N; ++n) columns[0][n] = columns[1][n] = columns[2][n] = 0.0f;
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (row + r < a.rows)
          norm_gradient<T, N, kResidual>(a, row + r, column, p[r][k], weight, row_terms(a, mean[r], rstd[r], sums + 2 * r),
                                         seed, columns);
      kept.add(0, column / N, columns[0]);
      if (a.dbias) kept.add(1, column / N, columns[1]);
      if (kResidual && a.dpre_bias) kept.add(a.dbias ? 2 : 1, column / N, columns[2]);
    }
  }
  const int64_t line = static_cast<int64_t>(blockIdx.x) * a.width;
  for (int column = first; column < width; column += step) {
    kept.move(0, column / N, a.dweight + line);
    if (a.dbias) kept.move(1, column / N, a.dbias + line);
    if (a.dpre_bias) kept.move(a.dbias ? 2 : 1, column / N, a.dpre_bias + line);
  }
}

// Rows whose column sums do not fit into shared memory, first pass: the terms of every row.
template <class T, int N>
__global__ void __launch_bounds__(1024) norm_terms_kernel(NormBackward a) {
  const int64_t row = blockIdx.x;
  const float mean = a.mean ? a.mean[row] : 0.0f, rstd = a.rstd[row];
  float sums[2] = {0.0f, 0.0f}, weight[N];
  for (int column = threadIdx.x * N; column < a.width; column += blockDim.x * N) {
    a.weight.load<N>(column, weight);
    add_row_sums<T, N>(load_row_pack<T, N, false>(a, row, column), weight, mean, rstd, sums);
  }
  row_reduce<Sum>(sums, 0);
  if (threadIdx.x != 0) return;
  const RowTerms t = row_terms(a, mean, rstd, sums);
  a.terms[2 * row] = t.centre;
  a.terms[2 * row + 1] = t.slope;
}

// Second pass: tiles of 32 packs of columns by rows_per_line rows. Block (32, 8), grid (columns, lines).
template <class T, int N>
__global__ void __launch_bounds__(256) norm_tiles_kernel(NormBackward a) {
  const uint64_t seed = a.dropout.threshold ? static_cast<uint64_t>(*a.dropout.seed) : 0;
  const int column = (static_cast<int>(blockIdx.x) * 32 + threadIdx.x) * N;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * a.rows_per_line;
  const int64_t last = first + a.rows_per_line < a.rows ? first + a.rows_per_line : a.rows;
  float sums[3][N], weight[N];
  for (int n = 0; n < N; ++n) sums[0][n] = sums[1][n] = sums[2][n] = 0.0f;
  if (column < a.width) {
    a.weight.load<N>(column, weight);
    for (int64_t row = first + threadIdx.y; row < last; row += blockDim.y) {
      const RowTerms t{a.mean ? a.mean[row] : 0.0f, a.rstd[row], a.terms[2 * row], a.terms[2 * row + 1]};
      norm_gradient<T, N, true>(a, row, column, load_row_pack<T, N, true>(a, row, column), weight, t, seed, sums);
    }
  }
  float* const lines[3] = {a.dweight, a.dbias, a.dpre_bias};
#pragma unroll
  for (int i = 0; i < 3; ++i)
    if (lines[i]) write_tile_sums<N>(sums[i], lines[i] + static_cast<int64_t>(blockIdx.y) * a.width, column, a.width);
}

}  // namespace mlm::cuda
