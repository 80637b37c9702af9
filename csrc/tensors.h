// Arguments and results of operators over the stable ABI, shared by the CPU and the CUDA wrappers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <initializer_list>
#include <optional>
#include <tuple>

namespace mlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Every complaint names the operator, the argument and the offending value.
#define MLM_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, "mlm::", op, ": ", __VA_ARGS__)

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    default: return "an unsupported dtype";
  }
}

inline bool is_floating(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half || t == ScalarType::Double;
}

// float64 accumulates in float64, everything else in float32.
inline ScalarType wide_type(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  const auto x = a.sizes(), y = b.sizes();
  for (size_t d = 0; d < x.size(); ++d)
    if (x[d] != y[d]) return false;
  return true;
}

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  MLM_CHECK(is_floating(t.scalar_type()), op, "`", name, "` must be float32, bfloat16, float16 or float64, got ",
            dtype_name(t.scalar_type()));
}

inline void check_like(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  MLM_CHECK(same_sizes(t, other), op, "`", name, "` must have the shape of `", other_name, "` (", other.numel(),
            " elements in ", other.dim(), " dimensions), got ", t.numel(), " elements in ", t.dim(), " dimensions");
  MLM_CHECK(t.scalar_type() == other.scalar_type(), op, "`", name, "` must be ", dtype_name(other.scalar_type()),
            " as `", other_name, "`, got ", dtype_name(t.scalar_type()));
}

inline void check_vector(const char* op, const char* name, const Tensor& t, int64_t size) {
  check_floating(op, name, t);
  MLM_CHECK(t.dim() == 1 && t.size(0) == size, op, "`", name, "` must have shape [", size, "], got ", t.dim(),
            " dimensions of ", t.numel(), " elements");
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  MLM_CHECK(t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index(), op, "`", name,
            "` is on another device than the first argument");
}

inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A big result on the CPU is fresh memory from the kernel in most programs, and touching it page by page takes longer than
// writing it: huge pages are asked for where the system leaves that to us.
inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096, huge = uintptr_t{2} << 20;
  if (bytes < int64_t{32} << 20) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / huge * huge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline Tensor new_tensor(const int64_t* sizes, int64_t dims, ScalarType dtype, const Tensor& like) {
  int64_t strides[64];
  int64_t step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &handle));
  Tensor result(handle);
  if (device_type == aoti_torch_device_type_cpu())
    ask_for_huge_pages(result.mutable_data_ptr(), step * static_cast<int64_t>(result.element_size()));
  return result;
}
inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return new_tensor(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, like);
}
inline Tensor new_like(const Tensor& like) {
  const auto sizes = like.sizes();
  return new_tensor(sizes.data(), static_cast<int64_t>(sizes.size()), like.scalar_type(), like);
}
// Stands for a result that was not asked for.
inline Tensor nothing(const Tensor& like) { return new_tensor({0}, like.scalar_type(), like); }

inline void* pointer(const Tensor& t) { return t.mutable_data_ptr(); }
inline void* pointer(const MaybeTensor& t) { return t ? t->mutable_data_ptr() : nullptr; }

// [..., width] seen as rows.
struct Rows {
  int64_t rows;
  int64_t width;
};
inline Rows as_rows(const char* op, const char* name, const Tensor& t) {
  MLM_CHECK(t.dim() >= 1, op, "`", name, "` must have at least one dimension");
  const int64_t width = t.size(t.dim() - 1);
  return {width ? t.numel() / width : 0, width};
}

}  // namespace mlm
