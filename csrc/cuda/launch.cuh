// What the CUDA wrappers share: stream and device, dtype and pack width to template arguments, geometry of rows.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../checks.h"
#include "kernels/device.cuh"
#include "kernels/geometry.cuh"

namespace mlm::cuda {

// The tensor's device becomes the current one; kernels go to its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline int num_processors() {
  int device = 0, count = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

inline void check_cuda_dtype(const char* op, const char* name, const Tensor& t) {
  check_floating(op, name, t);
  MLM_CHECK(t.scalar_type() != ScalarType::Double, op, "`", name, "` is float64, which has kernels on the CPU only");
}

// Kernels that hold a row count its columns in 32 bits.
inline void check_columns(const char* op, const Rows& shape) {
  MLM_CHECK(shape.rows < (int64_t{1} << 31), op, shape.rows, " rows; a kernel takes fewer than 2^31");  // blocks of a grid
  MLM_CHECK(shape.width < (int64_t{1} << 28), op, "rows of ", shape.width, " values; a kernel takes fewer than 2^28");
}

// f(T{}) with the storage type of a dtype.
template <class F>
void by_dtype(ScalarType type, F&& f) {
  if (type == ScalarType::Float)
    f(float{});
  else if (type == ScalarType::BFloat16)
    f(bf16{});
  else
    f(f16{});
}

// f(T{}, Int<values in a pack>{}): 16 bytes, or one value where rows or pointers are not aligned to 16 bytes.
template <class F>
void by_pack(ScalarType type, bool aligned, F&& f) {
  by_dtype(type, [&](auto t) {
    using T = decltype(t);
    if (aligned)
      f(t, Int<16 / static_cast<int>(sizeof(T))>{});
    else
      f(t, Int<1>{});
  });
}

template <class... Pointers>
bool aligned(const Tensor& x, int64_t width, Pointers... pointers) {
  const bool rows = width * static_cast<int64_t>(x.element_size()) % 16 == 0;
  return rows && ((reinterpret_cast<uintptr_t>(static_cast<const void*>(pointers)) % 16 == 0) && ...);
}

inline Param param(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  MLM_CHECK(type != ScalarType::Double, "norm", "a float64 parameter has kernels on the CPU only");
  return {pointer(t), type == ScalarType::Float ? kParamFloat : type == ScalarType::BFloat16 ? kParamBFloat16 : kParamHalf};
}
inline Param param(const MaybeTensor& t) { return t ? param(*t) : Param{nullptr, kParamFloat}; }

inline Dropout dropout_of(const char* op, double p, const MaybeTensor& seed, const Tensor& x) {
  check_probability(op, p, seed);
  if (p == 0.0) return {nullptr, 0u, 1.0f};
  check_device(op, "seed", *seed, x);
  return {static_cast<const int64_t*>(pointer(*seed)), dropout_threshold(p), static_cast<float>(1.0 / (1.0 - p))};
}

}  // namespace mlm::cuda
