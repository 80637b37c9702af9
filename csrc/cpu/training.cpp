// CPU operators: the two passes of cross entropy, and AdamW.
#include <cmath>

#include "launch.h"

namespace mlm {
namespace {

CrossEntropy cross_entropy_arguments(const char* op, const Tensor& logits, const Tensor& labels, int64_t vocab_start,
                                     int64_t num_valid) {
  check_cross_entropy(op, logits, labels, num_valid);
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
  check_row_values(op, "lse", l, logits);
  check_row_values(op, "scale", s, logits);
  a.lse = static_cast<const float*>(pointer(l));
  a.scale = static_cast<const float*>(pointer(s));
  over_rows(kernels_for(logits).cross_entropy_grad, a, logits.size(0), row_grain(a.width));
}

void adamw(Tensor master, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, MaybeTensor model_copy, double lr, double beta1,
           double beta2, double eps, double weight_decay, int64_t step, double grad_scale) {
  check_adamw("adamw_", master, grad, exp_avg, exp_avg_sq, model_copy, step);
  const Tensor g = packed(grad);
  AdamW a{};
  if (model_copy) {
    a.copy = pointer(model_copy);
    a.copy_dtype = dtype_index(model_copy->scalar_type());
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
