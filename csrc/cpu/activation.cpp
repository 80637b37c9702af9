// CPU operators: bias_gelu, swiglu and their backward.
#include "launch.h"

namespace mlm {
namespace {

// Without a bias rows mean nothing: equal pieces of the flat tensor keep short rows off the slow path.
Rows gelu_rows(const char* op, const Tensor& x, const MaybeTensor& bias) {
  const Rows shape = as_rows(op, "x", x);
  constexpr int64_t piece = 4096;
  if (bias || shape.width >= piece || x.numel() % piece) return shape;
  return {x.numel() / piece, piece};
}

Tensor bias_gelu(Tensor x, MaybeTensor bias) {
  const char* op = "bias_gelu";
  check_floating(op, "x", x);
  const Rows shape = gelu_rows(op, x, bias);
  if (bias) check_vector(op, "bias", *bias, shape.width);
  const Tensor in = packed(x);
  const MaybeTensor b = widened(bias, in);
  Tensor out = new_like(in);
  Activation a{};
  a.x = pointer(in);
  a.bias = pointer(b);
  a.out = pointer(out);
  a.rows = shape.rows;
  a.width = shape.width;
  a.stream = past_cache(out, shape.width);
  over_rows(kernels_for(in).gelu_forward, a, shape.rows, row_grain(shape.width));
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor grad, Tensor x, MaybeTensor bias) {
  const char* op = "bias_gelu_backward";
  check_floating(op, "x", x);
  check_like(op, "grad", grad, "x", x);
  const Rows shape = gelu_rows(op, x, bias);
  if (bias) check_vector(op, "bias", *bias, shape.width);
  const Tensor in = packed(x), g = packed(grad);
  const MaybeTensor b = widened(bias, in);
  Tensor dx = new_like(in);
  const Blocks blocks = row_blocks(shape.rows);
  const Tensor partial = new_tensor({blocks.count, bias ? shape.width : 0}, wide_type(in.scalar_type()), in);
  Activation a{};
  a.x = pointer(in);
  a.bias = pointer(b);
  a.grad = pointer(g);
  a.out = pointer(dx);
  a.dbias = bias ? pointer(partial) : nullptr;
  a.rows = shape.rows;
  a.width = shape.width;
  a.rows_per_block = blocks.rows_per_block;
  a.stream = past_cache(dx, shape.width);
  over_rows(kernels_for(in).gelu_backward, a, blocks.count, 1 + row_grain(shape.width) / blocks.rows_per_block);
  return {dx, bias ? sum_blocks(partial, *bias) : nothing(in)};
}

Tensor swiglu(Tensor x) {
  const Rows shape = check_swiglu("swiglu", x);
  const Tensor in = packed(x);
  const auto sizes = in.sizes();
  std::vector<int64_t> out_sizes(sizes.begin(), sizes.end());
  out_sizes.back() = shape.width;
  Tensor out = new_tensor(out_sizes.data(), static_cast<int64_t>(out_sizes.size()), in.scalar_type(), in);
  Activation a{};
  a.x = pointer(in);
  a.out = pointer(out);
  a.width = shape.width;
  a.stream = past_cache(out, shape.width);
  over_rows(kernels_for(in).swiglu_forward, a, shape.rows, row_grain(shape.width));
  return out;
}

Tensor swiglu_backward(Tensor grad, Tensor x) {
  const char* op = "swiglu_backward";
  const Rows shape = check_swiglu(op, x);
  check_swiglu_grad(op, grad, x);
  const Tensor in = packed(x), g = packed(grad);
  Tensor dx = new_like(in);
  Activation a{};
  a.x = pointer(in);
  a.grad = pointer(g);
  a.out = pointer(dx);
  a.width = shape.width;
  a.stream = past_cache(dx, shape.width);
  over_rows(kernels_for(in).swiglu_backward, a, shape.rows, row_grain(shape.width));
  return dx;
}

}  // namespace
}  // namespace mlm

STABLE_TORCH_LIBRARY_IMPL(mlm, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&mlm::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&mlm::bias_gelu_backward));
  m.impl("swiglu", TORCH_BOX(&mlm::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&mlm::swiglu_backward));
}
