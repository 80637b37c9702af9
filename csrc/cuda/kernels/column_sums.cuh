// Sums of columns: the line that a tile of a backward pass leaves, and the adding up of lines.
#pragma once

#include "device.cuh"

namespace mlm::cuda {

// Writes to `line` the sums of the 8 threads of each of the 32 packs of columns of a block (32, 8). All threads come here.
template <int N>
__device__ inline void write_tile_sums(const float (&sums)[N], float* line, int64_t column, int64_t width) {
  __shared__ float shared[8][32 * N + 1];
  for (int n = 0; n < N; ++n) shared[threadIdx.y][threadIdx.x * N + n] = sums[n];
  __syncthreads();
  if (threadIdx.y == 0 && column < width)
    for (int n = 0; n < N; ++n) {
      float sum = 0.0f;
      for (int y = 0; y < 8; ++y) sum += shared[y][threadIdx.x * N + n];
      line[column + n] = sum;
    }
  __syncthreads();  // the next ones may come
}

// out[j] = sum over lines of partial[line, j], for up to three pairs of them.
struct ColumnSums {
  const float* partial[3];
  void* out[3];
  int type[3];  // ParamType
  int64_t lines;
  int64_t width;
};

// 32 columns by 32 threads, in a fixed order; four lines at a time, since each waits for memory. Block (32, 32), grid
// (columns, pairs).
inline __global__ void __launch_bounds__(1024) column_sums_kernel(ColumnSums a) {
  __shared__ float shared[32][33];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  const float* partial = a.partial[blockIdx.y];
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (column < a.width)
    for (int64_t line = threadIdx.y; line < a.lines; line += 128) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (line + 32 * i < a.lines) sums[i] += partial[(line + 32 * i) * a.width + column];
    }
  shared[threadIdx.y][threadIdx.x] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  __syncthreads();
  // A warp for each column: its 32 values, turned over.
  const float sum = warp_reduce<Sum>(shared[threadIdx.x][threadIdx.y]);
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.y;
  if (threadIdx.x != 0 || mine >= a.width) return;
  void* out = a.out[blockIdx.y];
  if (a.type[blockIdx.y] == kParamFloat)
    static_cast<float*>(out)[mine] = sum;
  else if (a.type[blockIdx.y] == kParamBFloat16)
    narrow(sum, static_cast<bf16*>(out) + mine);
  else
    narrow(sum, static_cast<f16*>(out) + mine);
}

}  // namespace mlm::cuda
