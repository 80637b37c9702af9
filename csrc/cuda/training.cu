// CUDA operators: the two passes of cross entropy, and AdamW.
#include "kernels/training.cuh"

#include <cmath>

#include "launch.cuh"

namespace mlm::cuda {
namespace {

CrossEntropy cross_entropy_arguments(const char* op, const Tensor& logits, const Tensor& labels, int64_t vocab_start,
                                     int64_t num_valid) {
  check_cross_entropy(op, logits, labels, num_valid);
  check_cuda_dtype(op, "logits", logits);
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
  const OnDevice device(logits);
  const auto vector = [&] { return new_tensor({logits.size(0)}, ScalarType::Float, logits); };
  const Tensor maximum = vector(), sum = vector(), target = vector();
  if (logits.size(0) == 0) return {maximum, sum, target};
  a.maximum = static_cast<float*>(pointer(maximum));
  a.sum = static_cast<float*>(pointer(sum));
  a.target = static_cast<float*>(pointer(target));
  by_pack(logits.scalar_type(), aligned(logits, a.stride, a.logits), [&](auto t, auto n) {
    MLM_LAUNCH((cross_entropy_stats_kernel<decltype(t), decltype(n)::value>), static_cast<unsigned>(logits.size(0)),
               256, 0, device.stream(), a);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {maximum, sum, target};
}

void cross_entropy_grad(Tensor logits, Tensor labels, Tensor lse, Tensor scale, int64_t vocab_start, int64_t num_valid) {
  const char* op = "cross_entropy_grad_";
  const Tensor ids = packed(labels), l = packed(lse), s = packed(scale);
  CrossEntropy a = cross_entropy_arguments(op, logits, ids, vocab_start, num_valid);
  check_row_values(op, "lse", l, logits);
  check_row_values(op, "scale", s, logits);
  if (logits.numel() == 0) return;
  const OnDevice device(logits);
  a.lse = static_cast<const float*>(pointer(l));
  a.scale = static_cast<const float*>(pointer(s));
  by_pack(logits.scalar_type(), aligned(logits, a.stride, a.logits), [&](auto t, auto n) {
    constexpr int N = decltype(n)::value;
    const int64_t pieces = (a.width / N + 1023) / 1024;  // some four packs a thread
    const dim3 grid(static_cast<unsigned>(logits.size(0)), static_cast<unsigned>(pieces < 1 ? 1 : pieces > 64 ? 64 : pieces));
    MLM_LAUNCH((cross_entropy_grad_kernel<decltype(t), N>), grid, 256, 0, device.stream(), a);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void adamw_(Tensor master, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, MaybeTensor model_copy, double lr, double beta1,
            double beta2, double eps, double weight_decay, int64_t step, double grad_scale) {
  check_adamw("adamw_", master, grad, exp_avg, exp_avg_sq, model_copy, step);
  if (master.numel() == 0) return;
  const Tensor g = packed(grad);
  const OnDevice device(master);
  AdamW a{};
  a.master = static_cast<float*>(pointer(master));
  a.grad = pointer(g);
  a.exp_avg = static_cast<float*>(pointer(exp_avg));
  a.exp_avg_sq = static_cast<float*>(pointer(exp_avg_sq));
  if (model_copy) {
    a.copy = pointer(model_copy);
    a.copy_type = param(*model_copy).type;
  }
  a.count = master.numel();
  a.decay = static_cast<float>(1.0 - lr * weight_decay);
  a.beta2 = static_cast<float>(beta2);
  a.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  a.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  a.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, static_cast<double>(step))));
  a.inv_sqrt_bias2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, static_cast<double>(step))));
  a.eps = static_cast<float>(eps);
  a.grad_scale = static_cast<float>(grad_scale);
  const bool vector = a.count % 4 == 0 && aligned(master, 4, a.master, a.grad, a.exp_avg, a.exp_avg_sq, a.copy);
  by_dtype(g.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const int64_t packs = vector ? a.count / 4 : a.count, wanted = (packs + 255) / 256;
    const int64_t room = int64_t{num_processors()} * 32;
    const unsigned grid = static_cast<unsigned>(wanted < room ? wanted : room);
    if (vector)
      MLM_LAUNCH((adamw_kernel<T, 4>), grid, 256, 0, device.stream(), a);
    else
      MLM_LAUNCH((adamw_kernel<T, 1>), grid, 256, 0, device.stream(), a);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace mlm::cuda

STABLE_TORCH_LIBRARY_IMPL(mlm, CUDA, m) {
  m.impl("cross_entropy_stats", TORCH_BOX(&mlm::cuda::cross_entropy_stats));
  m.impl("cross_entropy_grad_", TORCH_BOX(&mlm::cuda::cross_entropy_grad));
  m.impl("adamw_", TORCH_BOX(&mlm::cuda::adamw_));
}
