// Argument checks of the operators, the same on every device: each complaint names operator, argument and value.
#pragma once

#include "tensors.h"

namespace mlm {

constexpr int kMaxMaskDims = 8;
constexpr int64_t kNoWindow = int64_t{1} << 62;

inline void check_norm(const char* op, const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  check_floating(op, "x", x);
  const Rows shape = as_rows(op, "x", x);
  check_vector(op, "weight", weight, shape.width);
  check_device(op, "weight", weight, x);
  if (!bias) return;
  check_vector(op, "bias", *bias, shape.width);
  check_device(op, "bias", *bias, x);
}

// What a forward pass kept of every row.
inline void check_statistic(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t rows) {
  MLM_CHECK(t.numel() == rows && t.scalar_type() == wide_type(x.scalar_type()) && t.is_contiguous(), op, "`", name,
            "` must be ", rows, " contiguous values of ", dtype_name(wide_type(x.scalar_type())), ", got ", t.numel(), " of ",
            dtype_name(t.scalar_type()));
  check_device(op, name, t, x);
}

inline void check_probability(const char* op, double p, const MaybeTensor& seed) {
  MLM_CHECK(p >= 0.0 && p < 1.0, op, "`dropout` must be in [0, 1), got ", p);
  MLM_CHECK(p == 0.0 || (seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1), op,
            "`seed` must be one int64 when `dropout` is above 0");
}

// Below this 32-bit random number an element is dropped.
inline uint32_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0;
  return p == 0.0 ? 0u : scaled < 1.0 ? 1u : static_cast<uint32_t>(scaled);
}

inline Rows check_swiglu(const char* op, const Tensor& x) {
  check_floating(op, "x", x);
  const Rows shape = as_rows(op, "x", x);
  MLM_CHECK(shape.width % 2 == 0, op, "the last dimension of `x` must be even ([gate | up]), got ", shape.width);
  return {shape.rows, shape.width / 2};
}

inline void check_swiglu_grad(const char* op, const Tensor& grad, const Tensor& x) {
  MLM_CHECK(grad.numel() * 2 == x.numel() && grad.scalar_type() == x.scalar_type(), op, "`grad` must be ",
            dtype_name(x.scalar_type()), " with ", x.numel() / 2, " elements, got ", dtype_name(grad.scalar_type()), " with ",
            grad.numel());
  check_device(op, "grad", grad, x);
}

// A mask as the kernels read it: leading sizes of `scores` and the mask's strides over them, 0 where it is broadcast.
struct MaskLayout {
  int dims = 0;
  int64_t sizes[kMaxMaskDims] = {};
  int64_t strides[kMaxMaskDims] = {};
  int64_t key_stride = 0;
};

inline MaskLayout mask_layout(const char* op, const Tensor& mask, const Tensor& scores) {
  const int64_t dims = scores.dim(), missing = dims - mask.dim();
  MLM_CHECK(dims - 1 <= kMaxMaskDims, op, "`scores` must have at most ", kMaxMaskDims + 1, " dimensions, got ", dims);
  MLM_CHECK(missing >= 0, op, "`mask` has ", mask.dim(), " dimensions, more than the ", dims, " of `scores`");
  check_device(op, "mask", mask, scores);
  MaskLayout layout;
  layout.dims = static_cast<int>(dims - 1);
  for (int64_t d = 0; d < dims; ++d) {
    int64_t stride = 0;
    if (d >= missing) {
      const int64_t have = mask.size(d - missing), want = scores.size(d);
      MLM_CHECK(have == want || have == 1, op, "`mask` has size ", have, " where `scores` has ", want, " (dimension ",
                d, "), which does not broadcast");
      stride = have == 1 ? 0 : mask.stride(d - missing);
    }
    if (d == dims - 1) {
      layout.key_stride = stride;
    } else {
      layout.sizes[d] = scores.size(d);
      layout.strides[d] = stride;
    }
  }
  return layout;
}

enum class MaskType { kBool, kWide, kSame };

// The mask in a type the kernels read (bool, the accumulation type, or that of the scores), keys next to each other.
inline Tensor readable_mask(const char* op, const Tensor& mask, const Tensor& scores, MaskType* type) {
  const ScalarType have = mask.scalar_type(), wide = wide_type(scores.scalar_type());
  MLM_CHECK(have == ScalarType::Bool || is_floating(have), op, "`mask` must be bool or floating, got ", dtype_name(have));
  Tensor m = mask;
  *type = have == ScalarType::Bool ? MaskType::kBool : MaskType::kWide;
  if (have == scores.scalar_type() && have != wide)
    *type = MaskType::kSame;
  else if (have != ScalarType::Bool && have != wide)
    m = torch::stable::to(m, wide);
  const int64_t last = m.dim() - 1;
  return last >= 0 && m.size(last) > 1 && m.stride(last) != 1 ? torch::stable::contiguous(m) : m;
}

inline void check_cross_entropy(const char* op, const Tensor& logits, const Tensor& labels, int64_t num_valid) {
  check_floating(op, "logits", logits);
  MLM_CHECK(logits.dim() == 2, op, "`logits` must be [t, v], got ", logits.dim(), " dimensions");
  MLM_CHECK(logits.size(1) <= 1 || logits.stride(1) == 1, op, "`logits` must have its columns next to each other, got stride ",
            logits.stride(1));
  MLM_CHECK(labels.dim() == 1 && labels.size(0) == logits.size(0), op, "`labels` must be [", logits.size(0), "], got ",
            labels.numel(), " elements in ", labels.dim(), " dimensions");
  MLM_CHECK(labels.scalar_type() == ScalarType::Long, op, "`labels` must be int64, got ", dtype_name(labels.scalar_type()));
  check_device(op, "labels", labels, logits);
  MLM_CHECK(num_valid >= 0 && num_valid <= logits.size(1), op, "`num_valid` must be between 0 and ", logits.size(1), ", got ",
            num_valid);
}

inline void check_row_values(const char* op, const char* name, const Tensor& t, const Tensor& logits) {
  check_vector(op, name, t, logits.size(0));
  MLM_CHECK(t.scalar_type() == ScalarType::Float, op, "`", name, "` must be float32, got ", dtype_name(t.scalar_type()));
  check_device(op, name, t, logits);
}

inline void check_state(const char* op, const char* name, const Tensor& t, const Tensor& master) {
  MLM_CHECK(t.scalar_type() == ScalarType::Float, op, "`", name, "` must be float32, got ", dtype_name(t.scalar_type()));
  MLM_CHECK(t.is_contiguous(), op, "`", name, "` is updated in place and must be contiguous");
  MLM_CHECK(t.numel() == master.numel(), op, "`", name, "` must have the ", master.numel(), " elements of `master`, got ",
            t.numel());
  check_device(op, name, t, master);
}

inline void check_adamw(const char* op, const Tensor& master, const Tensor& grad, const Tensor& exp_avg,
                        const Tensor& exp_avg_sq, const MaybeTensor& model_copy, int64_t step) {
  check_state(op, "master", master, master);
  check_state(op, "exp_avg", exp_avg, master);
  check_state(op, "exp_avg_sq", exp_avg_sq, master);
  const ScalarType grad_type = grad.scalar_type();
  MLM_CHECK(is_floating(grad_type) && grad_type != ScalarType::Double, op,
            "`grad` must be float32, bfloat16 or float16, got ", dtype_name(grad_type));
  MLM_CHECK(grad.numel() == master.numel(), op, "`grad` must have the ", master.numel(), " elements of `master`, got ",
            grad.numel());
  check_device(op, "grad", grad, master);
  MLM_CHECK(step >= 1, op, "`step` counts from 1, got ", step);
  if (!model_copy) return;
  const ScalarType type = model_copy->scalar_type();
  MLM_CHECK(is_floating(type) && type != ScalarType::Double, op, "`model_copy` must be float32, bfloat16 or float16, got ",
            dtype_name(type));
  MLM_CHECK(model_copy->is_contiguous() && model_copy->numel() == master.numel(), op,
            "`model_copy` must be contiguous with the ", master.numel(), " elements of `master`, got ", model_copy->numel());
  check_device(op, "model_copy", *model_copy, master);
}

}  // namespace mlm
