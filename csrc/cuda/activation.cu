// CUDA operators: bias_gelu, swiglu and their backward.
#include "column_sums.cuh"
#include "kernels/activation.cuh"
#include "launch.cuh"

namespace mlm::cuda {
namespace {

// Some hundred threads a block: as many on a row as it has packs, the rest on more rows.
struct Tiles {
  dim3 grid, block;
};
Tiles row_tiles(int64_t rows, int64_t width, int pack) {
  const int64_t packs = (width + pack - 1) / pack;
  int64_t x = power_of_two_above(packs);
  x = x < 32 ? 32 : x > 256 ? 256 : x;
  const dim3 block(static_cast<unsigned>(x), static_cast<unsigned>(256 / x));
  const int64_t wanted = row_blocks(rows, block), room = int64_t{num_processors()} * 256;
  return {dim3(static_cast<unsigned>(wanted < room ? wanted : room)), block};
}

Tensor bias_gelu(Tensor x, MaybeTensor bias) {
  const char* op = "bias_gelu";
  check_cuda_dtype(op, "x", x);
  const Rows shape = as_rows(op, "x", x);
  if (bias) {
    check_vector(op, "bias", *bias, shape.width);
    check_device(op, "bias", *bias, x);
  }
  const Tensor in = packed(x);
  const MaybeTensor b = bias ? MaybeTensor(packed(*bias)) : std::nullopt;
  const OnDevice device(in);
  Tensor out = new_like(in);
  if (shape.rows == 0) return out;
  Activation a{};
  a.x = pointer(in);
  a.bias = param(b);
  a.out = pointer(out);
  a.rows = shape.rows;
  a.width = shape.width;
  by_pack(in.scalar_type(), aligned(in, shape.width, a.x, a.bias.data, a.out), [&](auto t, auto n) {
    constexpr int N = decltype(n)::value;
    const Tiles tiles = row_tiles(shape.rows, shape.width, N);
    MLM_LAUNCH((gelu_forward_kernel<decltype(t), N>), tiles.grid, tiles.block, 0, device.stream(), a);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor grad, Tensor x, MaybeTensor bias) {
  const char* op = "bias_gelu_backward";
  check_cuda_dtype(op, "x", x);
  check_like(op, "grad", grad, "x", x);
  check_device(op, "grad", grad, x);
  const Rows shape = as_rows(op, "x", x);
  if (bias) {
    check_vector(op, "bias", *bias, shape.width);
    check_device(op, "bias", *bias, x);
  }
  const Tensor in = packed(x), g = packed(grad);
  const MaybeTensor b = bias ? MaybeTensor(packed(*bias)) : std::nullopt;
  const OnDevice device(in);
  Tensor dx = new_like(in);
  Activation a{};
  a.x = pointer(in);
  a.bias = param(b);
  a.grad = pointer(g);
  a.out = pointer(dx);
  a.rows = shape.rows;
  a.width = shape.width;
  a.rows_per_block = (shape.rows + 255) / 256;  // at most 256 lines of column sums
  a.rows_per_block = a.rows_per_block < 32 ? 32 : a.rows_per_block;
  const int64_t lines = (shape.rows + a.rows_per_block - 1) / a.rows_per_block;
  const Tensor partial = new_tensor({lines, bias ? shape.width : 0}, ScalarType::Float, in);
  a.dbias = bias ? static_cast<float*>(pointer(partial)) : nullptr;
  if (shape.rows > 0)
    by_pack(in.scalar_type(), aligned(in, shape.width, a.x, a.bias.data, a.grad, a.out), [&](auto t, auto n) {
      constexpr int N = decltype(n)::value;
      const dim3 grid(static_cast<unsigned>((shape.width + 32 * N - 1) / (32 * N)), static_cast<unsigned>(lines));
      MLM_LAUNCH((gelu_backward_kernel<decltype(t), N>), grid, dim3(32, 8), 0, device.stream(), a);
    });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (!bias) return {dx, nothing(in)};
  Tensor dbias = new_tensor({shape.width}, bias->scalar_type(), in);
  ColumnSums sums{{static_cast<const float*>(a.dbias)}, {pointer(dbias)}, {param(*bias).type}, lines, shape.width};
  if (shape.width > 0) launch_column_sums(sums, 1, device);
  return {dx, dbias};
}

Tensor swiglu(Tensor x) {
  const char* op = "swiglu";
  check_cuda_dtype(op, "x", x);
  const Rows shape = check_swiglu(op, x);
  const Tensor in = packed(x);
  const OnDevice device(in);
  const auto sizes = in.sizes();
  std::vector<int64_t> out_sizes(sizes.begin(), sizes.end());
  out_sizes.back() = shape.width;
  Tensor out = new_tensor(out_sizes.data(), static_cast<int64_t>(out_sizes.size()), in.scalar_type(), in);
  if (shape.rows == 0) return out;
  Activation a{};
  a.x = pointer(in);
  a.out = pointer(out);
  a.rows = shape.rows;
  a.width = shape.width;
  by_pack(in.scalar_type(), aligned(in, shape.width, a.x, a.out), [&](auto t, auto n) {
    constexpr int N = decltype(n)::value;
    const Tiles tiles = row_tiles(shape.rows, shape.width, N);
    MLM_LAUNCH((swiglu_forward_kernel<decltype(t), N>), tiles.grid, tiles.block, 0, device.stream(), a);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor swiglu_backward(Tensor grad, Tensor x) {
  const char* op = "swiglu_backward";
  check_cuda_dtype(op, "x", x);
  const Rows shape = check_swiglu(op, x);
  check_swiglu_grad(op, grad, x);
  const Tensor in = packed(x), g = packed(grad);
  const OnDevice device(in);
  Tensor dx = new_like(in);
  if (shape.rows == 0) return dx;
  Activation a{};
  a.x = pointer(in);
  a.grad = pointer(g);
  a.out = pointer(dx);
  a.rows = shape.rows;
  a.width = shape.width;
  by_pack(in.scalar_type(), aligned(in, shape.width, a.x, a.grad, a.out), [&](auto t, auto n) {
    constexpr int N = decltype(n)::value;
    const Tiles tiles = row_tiles(shape.rows, shape.width, N);
    MLM_LAUNCH((swiglu_backward_kernel<decltype(t), N>), tiles.grid, tiles.block, 0, device.stream(), a);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return dx;
}

}  // namespace
}  // namespace mlm::cuda

STABLE_TORCH_LIBRARY_IMPL(mlm, CUDA, m) {
  m.impl("bias_gelu", TORCH_BOX(&mlm::cuda::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&mlm::cuda::bias_gelu_backward));
  m.impl("swiglu", TORCH_BOX(&mlm::cuda::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&mlm::cuda::swiglu_backward));
}
