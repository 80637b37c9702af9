// CPU operators: the two passes of cross entropy, and AdamW.
#include <cmath>

#include "launch.h"

namespace mlm {
namespace {

CrossEntropy cross_entropy_arguments(const char* op, const Tensor& logits, const Tensor& labels, int64_t vocab_start,
                                     int64_t num_valid) {
  check_floating(op, "logits", logits);
  MLM_CHECK(logits.dim() == 2, op, "`logits` must be [t, v], got ", logits.dim(), " dimensions");
  MLM_CHECK(logits.size(1) <= 1 || logits.stride(1) == 1, op, "`logits` must have its columns next to each other, got stride ",
            logits.stride(1));
  MLM_CHECK(labels.dim() == 1 && labels.size(0) == logits.size(0), op, "`labels` must be [", logits.size(0), "], got ",
            labels.numel(), " elements in ", labels.dim(), " dimensions");
  MLM_CHECK(labels.scalar_type() == ScalarType::Long, op, "`labels` must be int64, got ", dtype_name(labels.scalar_type()));
  MLM_CHECK(num_valid >= 0 && num_valid <= logits.size(1), op, "`num_valid` must be between 0 and ", logits.size(1), ", got ",
            num_valid);
  CrossEntropy a{};
  a.logits = pointer(logits);
  a.labels = static_cast<const int64_t*>(pointer(labels));
  a.stride = logits.size(0) > 1 ? logits.stride(0) : logits.size(1);
  a.width = logits.size(1);
  a.num_valid = num_valid;
  a.vocab_start = vocab_start;
  return a;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_stats(Tensor logits, Tensor labels, int64_t vocab_start, int64_t num_valid) {
  const Tensor ids = packed(labels);
  CrossEntropy a = cross_entropy_arguments("cross_entropy_stats", logits, ids, vocab_start, num_valid);
  const auto vector = [&] { return new_tensor({logits.size(0)}, ScalarType::Float, logits); };
  const Tensor maximum = vector(), sum = vector(), target = vector();
  a.maximum = static_cast<float*>(pointer(maximum));
  a.sum = static_cast<float*>(pointer(sum));
  a.target = static_cast<float*>(pointer(target));
  over_rows(kernels_for(logits).cross_entropy_stats, a, logits.size(0), row_grain(a.width));
  return {maximum, sum, target};
}

void cross_entropy_grad(Tensor logits, Tensor labels, Tensor lse, Tensor scale, int64_t vocab_start, int64_t num_valid) {
  const char* op = "cross_entropy_grad_";
  const Tensor ids = packed(labels), l = packed(lse), s = packed(scale);
  CrossEntropy a = cross_entropy_arguments(op, logits, ids, vocab_start, num_valid);
  for (const auto& [name, t] : {std::make_pair("lse", &l), std::make_pair("scale", &s)}) {
    check_vector(op, name, *t, logits.size(0));
    MLM_CHECK(t->scalar_type() == ScalarType::Float, op, "`", name, "` must be float32, got ", dtype_name(t->scalar_type()));
  }
  a.lse = static_cast<const float*>(pointer(l));
  a.scale = static_cast<const float*>(pointer(s));
  over_rows(kernels_for(logits).cross_entropy_grad, a, logits.size(0), row_grain(a.width));
}

void check_state(const char* op, const char* name, const Tensor& t, const Tensor& master) {
  MLM_CHECK(t.scalar_type() == ScalarType::Float, op, "`", name, "` must be float32, got ", dtype_name(t.scalar_type()));
  MLM_CHECK(t.is_contiguous(), op, "`", name, "` is updated in place and must be contiguous");
  MLM_CHECK(t.numel() == master.numel(), op, "`", name, "` must have the ", master.numel(), " elements of `master`, got ",
            t.numel());
}

void adamw(Tensor master, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, MaybeTensor model_copy, double lr, double beta1,
           double beta2, double eps, double weight_decay, int64_t step, double grad_scale) {
  const char* op = "adamw_";
  check_state(op, "master", master, master);
  check_state(op, "exp_avg", exp_avg, master);
  check_state(op, "exp_avg_sq", exp_avg_sq, master);
  const ScalarType grad_type = grad.scalar_type();
  MLM_CHECK(is_floating(grad_type) && grad_type != ScalarType::Double, op,
            "`grad` must be float32, bfloat16 or float16, got ", dtype_name(grad_type));
  MLM_CHECK(grad.numel() == master.numel(), op, "`grad` must have the ", master.numel(), " elements of `master`, got ",
            grad.numel());
  MLM_CHECK(step >= 1, op, "`step` counts from 1, got ", step);
  const Tensor g = packed(grad);
  AdamW a{};
  if (model_copy) {
    const ScalarType type = model_copy->scalar_type();
    MLM_CHECK(is_floating(type) && type != ScalarType::Double, op,
              "`model_copy` must be float32, bfloat16 or float16, got ", dtype_name(type));
    MLM_CHECK(model_copy->is_contiguous() && model_copy->numel() == master.numel(), op,
              "`model_copy` must be contiguous with the ", master.numel(), " elements of `master`, got ", model_copy->numel());
    a.copy = pointer(model_copy);
    a.copy_dtype = dtype_index(type);
  }
  a.master = static_cast<float*>(pointer(master));
  a.grad = pointer(g);
  a.exp_avg = static_cast<float*>(pointer(exp_avg));
  a.exp_avg_sq = static_cast<float*>(pointer(exp_avg_sq));
  a.decay = static_cast<float>(1.0 - lr * weight_decay);
  a.beta2 = static_cast<float>(beta2);
  a.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  a.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  a.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, static_cast<double>(step))));
  a.inv_sqrt_bias2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, static_cast<double>(step))));
  a.eps = static_cast<float>(eps);
  a.grad_scale = static_cast<float>(grad_scale);
  over_rows(kernels_for(g).adamw, a, master.numel(), 8192);
}

int64_t cpu_level() { return active().level; }

}  // namespace
}  // namespace mlm

STABLE_TORCH_LIBRARY_IMPL(mlm, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&mlm::cpu_level));
}

STABLE_TORCH_LIBRARY_IMPL(mlm, CPU, m) {
  m.impl("cross_entropy_stats", TORCH_BOX(&mlm::cross_entropy_stats));
  m.impl("cross_entropy_grad_", TORCH_BOX(&mlm::cross_entropy_grad));
  m.impl("adamw_", TORCH_BOX(&mlm::adamw));
}
