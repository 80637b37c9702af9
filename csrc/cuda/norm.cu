// CUDA operators: layer_norm, rms_norm, residual_norm and their backward.
#include "kernels/norm.cuh"
#include "launch.cuh"

namespace mlm::cuda {
namespace {

struct Normed {
  Tensor out, mean, rstd;
};

Normed run_forward(NormForward& a, const char* op, const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                   double eps, bool rms) {
  check_cuda_dtype(op, "x", x);
  const Rows shape = as_rows(op, "x", x);
  const Tensor w = packed(weight);
  const MaybeTensor b = bias ? MaybeTensor(packed(*bias)) : std::nullopt;
  const OnDevice device(x);
  Normed r{new_like(x), new_tensor({rms ? 0 : shape.rows}, ScalarType::Float, x),
           new_tensor({shape.rows}, ScalarType::Float, x)};
  if (shape.rows == 0) return r;
  a.weight = param(w);
  a.bias = param(b);
  a.out = pointer(r.out);
  a.mean = rms ? nullptr : static_cast<float*>(pointer(r.mean));
  a.rstd = static_cast<float*>(pointer(r.rstd));
  a.rows = shape.rows;
  a.width = shape.width;
  a.eps = static_cast<float>(eps);
  const bool vector = aligned(x, shape.width, a.x, a.residual, a.pre_bias.data, a.weight.data, a.bias.data, a.total, a.out);
  by_pack(x.scalar_type(), vector, [&](auto t, auto n) {
    using T = decltype(t);
    constexpr int N = decltype(n)::value, kMost = kNormForwardPacks;
    const Geometry g = row_geometry(shape.width, N, kMost, 1024);
    if (g.packs == 0) {
      MLM_LAUNCH((norm_forward_wide_kernel<T, N>), static_cast<unsigned>(shape.rows), 1024, 0, device.stream(), a);
      return;
    }
    by_packs<N, kMost>(g.packs, [&](auto k) {
      constexpr int K = decltype(k)::value;
      MLM_LAUNCH((norm_forward_kernel<T, N, K>), row_blocks(shape.rows, g.block), g.block, 0, device.stream(), a);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return r;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, Tensor weight, MaybeTensor bias, double eps) {
  check_norm("layer_norm", x, weight, bias);
  const Tensor in = packed(x);
  NormForward a{};
  a.x = pointer(in);
  const Normed r = run_forward(a, "layer_norm", in, weight, bias, eps, false);
  return {r.out, r.mean, r.rstd};
}

std::tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps) {
  check_norm("rms_norm", x, weight, std::nullopt);
  const Tensor in = packed(x);
  NormForward a{};
  a.x = pointer(in);
  const Normed r = run_forward(a, "rms_norm", in, weight, std::nullopt, eps, true);
  return {r.out, r.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm(
    Tensor x, Tensor residual, Tensor weight, MaybeTensor norm_bias, MaybeTensor bias, MaybeTensor seed, double eps,
    double dropout, bool rms) {
  const char* op = "residual_norm";
  check_norm(op, x, weight, norm_bias);
  check_like(op, "residual", residual, "x", x);
  check_device(op, "residual", residual, x);
  if (bias) {
    check_vector(op, "bias", *bias, x.size(x.dim() - 1));
    check_device(op, "bias", *bias, x);
  }
  const Tensor in = packed(x), skip = packed(residual);
  const MaybeTensor pre = bias ? MaybeTensor(packed(*bias)) : std::nullopt;
  Tensor total = new_like(in);
  NormForward a{};
  a.x = pointer(in);
  a.residual = pointer(skip);
  a.pre_bias = param(pre);
  a.total = pointer(total);
  a.dropout = dropout_of(op, dropout, seed);
  const Normed r = run_forward(a, op, in, weight, rms ? std::nullopt : norm_bias, eps, rms);
  return {r.out, total, r.mean, r.rstd};
}

// Column sums of partial [lines, width] in the dtype of `like`; zeros when there were no rows.
Tensor sum_lines(const Tensor& partial, const Tensor& like, const OnDevice& device) {
  const int64_t lines = partial.size(0), width = partial.size(1);
  Tensor out = new_tensor({width}, like.scalar_type(), like);
  if (width == 0) return out;
  by_dtype(like.scalar_type(), [&](auto t) {
    using T = decltype(t);
    MLM_LAUNCH((column_sums_kernel<T>), static_cast<unsigned>((width + 31) / 32), dim3(32, 8), 0, device.stream(),
               static_cast<const float*>(pointer(partial)), static_cast<T*>(pointer(out)), lines, width);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

struct Gradients {
  Tensor dx, dbranch, dweight, dbias, dpre_bias;
};

Gradients run_backward(NormBackward& a, const char* op, const Tensor& grad, const MaybeTensor& grad_total, const Tensor& x,
                       const Tensor& weight, const MaybeTensor& norm_bias, const MaybeTensor& bias) {
  check_cuda_dtype(op, "x", x);
  const Rows shape = as_rows(op, "x", x);
  const OnDevice device(x);
  const Tensor g = packed(grad), w = packed(weight);
  const MaybeTensor gt = grad_total ? MaybeTensor(packed(*grad_total)) : std::nullopt;
  Tensor dx = new_like(x), dbranch = a.dropout.threshold ? new_like(x) : nothing(x);
  a.grad = pointer(g);
  a.grad_total = pointer(gt);
  a.x = pointer(x);
  a.weight = param(w);
  a.dx = pointer(dx);
  a.dbranch = a.dropout.threshold ? pointer(dbranch) : nullptr;
  a.rows = shape.rows;
  a.width = shape.width;
  const bool vector = aligned(x, shape.width, a.grad, a.grad_total, a.x, a.weight.data, a.dx, a.dbranch);
  const int N = vector ? 16 / static_cast<int>(x.element_size()) : 1;
  const Geometry geometry = row_geometry(shape.width, N, norm_backward_packs(N), 512);
  const int64_t wanted = row_blocks(shape.rows, geometry.block), room = int64_t{num_processors()} * (geometry.block.y > 1 ? 4 : 2);
  const int64_t lines = wanted < room ? wanted : room;
  const auto partial = [&](bool is_wanted) { return new_tensor({lines, is_wanted ? shape.width : 0}, ScalarType::Float, x); };
  const Tensor pw = partial(true), pb = partial(norm_bias.has_value()), pp = partial(bias.has_value());
  a.dweight = static_cast<float*>(pointer(pw));
  a.dbias = norm_bias ? static_cast<float*>(pointer(pb)) : nullptr;
  a.dpre_bias = bias ? static_cast<float*>(pointer(pp)) : nullptr;
  if (shape.rows > 0) {
    by_pack(x.scalar_type(), vector, [&](auto t, auto n) {
      using T = decltype(t);
      constexpr int N = decltype(n)::value, kMost = norm_backward_packs(N);
      const unsigned grid = static_cast<unsigned>(lines);
      if (geometry.packs == 0) {
        MLM_LAUNCH((norm_backward_wide_kernel<T, N>), grid, 512, 0, device.stream(), a);
        return;
      }
      const size_t shared = geometry.block.y > 1 ? static_cast<size_t>(shape.width) * sizeof(float) : 0;
      by_packs<N, kMost>(geometry.packs, [&](auto k) {
        constexpr int K = decltype(k)::value;
        MLM_LAUNCH((norm_backward_kernel<T, N, K>), grid, geometry.block, shared, device.stream(), a);
      });
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {dx, dbranch, sum_lines(pw, weight, device), norm_bias ? sum_lines(pb, *norm_bias, device) : nothing(weight),
          bias ? sum_lines(pp, *bias, device) : nothing(weight)};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(
    Tensor grad, Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor mean, Tensor rstd) {
  const char* op = "norm_backward";
  check_norm(op, x, weight, bias);
  check_like(op, "grad", grad, "x", x);
  check_device(op, "grad", grad, x);
  const Rows shape = as_rows(op, "x", x);
  check_statistic(op, "rstd", rstd, x, shape.rows);
  if (mean) check_statistic(op, "mean", *mean, x, shape.rows);
  const Tensor in = packed(x);
  NormBackward a{};
  a.mean = static_cast<const float*>(pointer(mean));
  a.rstd = static_cast<const float*>(pointer(rstd));
  const Gradients r = run_backward(a, op, grad, std::nullopt, in, weight, bias, std::nullopt);
  return {r.dx, r.dweight, r.dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_norm_backward(
    Tensor grad, MaybeTensor grad_total, Tensor total, Tensor weight, MaybeTensor norm_bias, MaybeTensor bias,
    Tensor mean, Tensor rstd, MaybeTensor seed, double dropout, bool rms) {
  const char* op = "residual_norm_backward";
  check_norm(op, total, weight, norm_bias);
  check_like(op, "grad", grad, "total", total);
  check_device(op, "grad", grad, total);
  if (grad_total) {
    check_like(op, "grad_total", *grad_total, "total", total);
    check_device(op, "grad_total", *grad_total, total);
  }
  const Rows shape = as_rows(op, "total", total);
  check_statistic(op, "rstd", rstd, total, shape.rows);
  if (!rms) check_statistic(op, "mean", mean, total, shape.rows);
  const Tensor in = packed(total);
  NormBackward a{};
  a.mean = rms ? nullptr : static_cast<const float*>(pointer(mean));
  a.rstd = static_cast<const float*>(pointer(rstd));
  a.dropout = dropout_of(op, dropout, seed);
  const Gradients r = run_backward(a, op, grad, grad_total, in, weight, rms ? std::nullopt : norm_bias, bias);
  return {r.dx, r.dbranch, r.dweight, r.dbias, r.dpre_bias};
}

}  // namespace
}  // namespace mlm::cuda

STABLE_TORCH_LIBRARY_IMPL(mlm, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&mlm::cuda::layer_norm));
  m.impl("rms_norm", TORCH_BOX(&mlm::cuda::rms_norm));
  m.impl("norm_backward", TORCH_BOX(&mlm::cuda::norm_backward));
  m.impl("residual_norm", TORCH_BOX(&mlm::cuda::residual_norm));
  m.impl("residual_norm_backward", TORCH_BOX(&mlm::cuda::residual_norm_backward));
}
