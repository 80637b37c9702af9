// Launches the kernel that adds up lines of column sums.
#pragma once

#include "kernels/column_sums.cuh"
#include "launch.cuh"

namespace mlm::cuda {

// The first `count` pairs of `a`.
inline void launch_column_sums(const ColumnSums& a, int count, const OnDevice& device) {
  const dim3 grid(static_cast<unsigned>((a.width + 31) / 32), static_cast<unsigned>(count));
  MLM_LAUNCH(column_sums_kernel, grid, dim3(32, 32), 0, device.stream(), a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace mlm::cuda
