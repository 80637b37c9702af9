// CPU operators: layer_norm, rms_norm, residual_norm and their backward.
#include "launch.h"

namespace mlm {
namespace {

struct Normed {
  Tensor out, mean, rstd;
};

// Fills in what all three forwards share and runs the kernel.
Normed run_forward(NormForward& a, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, double eps, bool rms) {
  const Rows shape{x.size(x.dim() - 1) ? x.numel() / x.size(x.dim() - 1) : 0, x.size(x.dim() - 1)};
  const ScalarType wide = wide_type(x.scalar_type());
  const Tensor w = widened(weight, x);
  const MaybeTensor b = widened(bias, x);
  Normed r{new_like(x), new_tensor({rms ? 0 : shape.rows}, wide, x), new_tensor({shape.rows}, wide, x)};
  a.weight = pointer(w);
  a.bias = pointer(b);
  a.out = pointer(r.out);
  a.mean = rms ? nullptr : pointer(r.mean);
  a.rstd = pointer(r.rstd);
  a.width = shape.width;
  a.eps = eps;
  a.rms = rms;
  a.stream = past_cache(r.out, shape.width);
  over_rows(kernels_for(x).norm_forward, a, shape.rows, row_grain(shape.width));
  return r;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, Tensor weight, MaybeTensor bias, double eps) {
  check_norm("layer_norm", x, weight, bias);
  const Tensor in = packed(x);
  NormForward a{};
  a.x = pointer(in);
  const Normed r = run_forward(a, in, weight, bias, eps, false);
  return {r.out, r.mean, r.rstd};
}

std::tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps) {
  check_norm("rms_norm", x, weight, std::nullopt);
  const Tensor in = packed(x);
  NormForward a{};
  a.x = pointer(in);
  const Normed r = run_forward(a, in, weight, std::nullopt, eps, true);
  return {r.out, r.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm(
    Tensor x, Tensor residual, Tensor weight, MaybeTensor norm_bias, MaybeTensor bias, MaybeTensor seed, double eps,
    double dropout, bool rms) {
  const char* op = "residual_norm";
  check_norm(op, x, weight, norm_bias);
  check_like(op, "residual", residual, "x", x);
  if (bias) check_vector(op, "bias", *bias, x.size(x.dim() - 1));
  const Tensor in = packed(x), skip = packed(residual);
  const MaybeTensor pre = widened(bias, in);
  Tensor total = new_like(in);
  NormForward a{};
  a.x = pointer(in);
  a.residual = pointer(skip);
  a.pre_bias = pointer(pre);
  a.total = pointer(total);
  a.dropout = dropout_of(op, dropout, seed);
  const Normed r = run_forward(a, in, weight, rms ? std::nullopt : norm_bias, eps, rms);
  return {r.out, total, r.mean, r.rstd};
}

struct Gradients {
  Tensor dx, dbranch, dweight, dbias, dpre_bias;
};

Gradients run_backward(NormBackward& a, const Tensor& grad, const MaybeTensor& grad_total, const Tensor& x,
                       const Tensor& weight, const MaybeTensor& norm_bias, const MaybeTensor& bias) {
  const ScalarType wide = wide_type(x.scalar_type());
  const Tensor g = packed(grad);
  const MaybeTensor gt = grad_total ? MaybeTensor(packed(*grad_total)) : std::nullopt;
  const Tensor w = widened(weight, x);
  const int64_t width = x.size(x.dim() - 1);
  a.rows = width ? x.numel() / width : 0;
  a.width = width;
  const Blocks blocks = row_blocks(a.rows);
  const auto partial = [&](bool wanted) { return new_tensor({blocks.count, wanted ? width : 0}, wide, x); };
  const Tensor pw = partial(true), pb = partial(norm_bias.has_value()), pp = partial(bias.has_value());
  Gradients r{new_like(x), a.dropout.threshold ? new_like(x) : nothing(x), Tensor(), Tensor(), Tensor()};
  a.grad = pointer(g);
  a.grad_total = pointer(gt);
  a.x = pointer(x);
  a.weight = pointer(w);
  a.dx = pointer(r.dx);
  a.dbranch = a.dropout.threshold ? pointer(r.dbranch) : nullptr;
  a.dweight = pointer(pw);
  a.dbias = norm_bias ? pointer(pb) : nullptr;
  a.dpre_bias = bias ? pointer(pp) : nullptr;
  a.rows_per_block = blocks.rows_per_block;
  a.stream = past_cache(r.dx, width);
  over_rows(kernels_for(x).norm_backward, a, blocks.count, 1 + row_grain(width) / blocks.rows_per_block);
  r.dweight = sum_blocks(pw, weight);
  r.dbias = norm_bias ? sum_blocks(pb, *norm_bias) : nothing(weight);
  r.dpre_bias = bias ? sum_blocks(pp, *bias) : nothing(weight);
  return r;
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(
    Tensor grad, Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor mean, Tensor rstd) {
  check_norm("norm_backward", x, weight, bias);
  check_like("norm_backward", "grad", grad, "x", x);
  const Rows shape = as_rows("norm_backward", "x", x);
  check_statistic("norm_backward", "rstd", rstd, x, shape.rows);
  if (mean) check_statistic("norm_backward", "mean", *mean, x, shape.rows);
  const Tensor in = packed(x);
  NormBackward a{};
  a.rms = !mean;
  a.mean = pointer(mean);
  a.rstd = pointer(rstd);
  const Gradients r = run_backward(a, grad, std::nullopt, in, weight, bias, std::nullopt);
  return {r.dx, r.dweight, r.dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_norm_backward(
    Tensor grad, MaybeTensor grad_total, Tensor total, Tensor weight, MaybeTensor norm_bias, MaybeTensor bias,
    Tensor mean, Tensor rstd, MaybeTensor seed, double dropout, bool rms) {
  const char* op = "residual_norm_backward";
  check_norm(op, total, weight, norm_bias);
  check_like(op, "grad", grad, "total", total);
  if (grad_total) check_like(op, "grad_total", *grad_total, "total", total);
  const Rows shape = as_rows(op, "total", total);
  check_statistic(op, "rstd", rstd, total, shape.rows);
  if (!rms) check_statistic(op, "mean", mean, total, shape.rows);
  const Tensor in = packed(total);
  NormBackward a{};
  a.rms = rms;
  a.mean = rms ? nullptr : pointer(mean);
  a.rstd = pointer(rstd);
  a.dropout = dropout_of(op, dropout, seed);
  const Gradients r = run_backward(a, grad, grad_total, in, weight, rms ? std::nullopt : norm_bias, bias);
  return {r.dx, r.dbranch, r.dweight, r.dbias, r.dpre_bias};
}

}  // namespace
}  // namespace mlm

STABLE_TORCH_LIBRARY_IMPL(mlm, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&mlm::layer_norm));
  m.impl("rms_norm", TORCH_BOX(&mlm::rms_norm));
  m.impl("norm_backward", TORCH_BOX(&mlm::norm_backward));
  m.impl("residual_norm", TORCH_BOX(&mlm::residual_norm));
  m.impl("residual_norm_backward", TORCH_BOX(&mlm::residual_norm_backward));
}
