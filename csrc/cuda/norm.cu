// CUDA operators: layer_norm, rms_norm, residual_norm and their backward.
#include "column_sums.cuh"
#include "kernels/norm_backward.cuh"
#include "kernels/norm_forward.cuh"
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
  check_columns(op, shape);
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
    constexpr int N = decltype(n)::value;
    constexpr Share share = norm_forward_share(N);
    const Geometry g = row_geometry(shape.width, N, share);
    by_residual(a.total != nullptr, [&](auto residual) {
      constexpr bool kResidual = decltype(residual)::value;
      if (g.packs == 0) {
        MLM_LAUNCH((norm_forward_wide_kernel<T, N, kResidual>), static_cast<unsigned>(shape.rows), 1024, 0, device.stream(), a);
        return;
      }
      by_packs<N, share.most>(g.packs, [&](auto k) {
        constexpr int K = decltype(k)::value;
        MLM_LAUNCH((norm_forward_kernel<T, N, K, kResidual>), row_blocks(shape.rows, g.block), g.block, 0, device.stream(), a);
      });
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
  a.dropout = dropout_of(op, dropout, seed, in);
  const Normed r = run_forward(a, op, in, weight, rms ? std::nullopt : norm_bias, eps, rms);
  return {r.out, total, r.mean, r.rstd};
}

// The sums of each column that a backward pass is asked for.
struct Wanted {
  Tensor weight;
  MaybeTensor bias, pre_bias;
};

struct Gradients {
  Tensor dx, dbranch, dweight, dbias, dpre_bias;
};

// Adds up the lines that a kernel left for each wanted parameter, in the parameter's dtype; zeros when there were no rows.
void sum_lines(Gradients& r, const Tensor (&partial)[3], const Wanted& wanted, const OnDevice& device) {
  ColumnSums a{};
  a.lines = partial[0].size(0);
  a.width = partial[0].size(1);
  int count = 0;
  const auto sums = [&](const Tensor& lines, const MaybeTensor& like) {
    if (!like) return nothing(wanted.weight);
    const Tensor out = new_tensor({a.width}, like->scalar_type(), *like);
    a.partial[count] = static_cast<const float*>(pointer(lines));
    a.out[count] = pointer(out);
    a.type[count++] = param(*like).type;
    return out;
  };
  r.dweight = sums(partial[0], wanted.weight);
  r.dbias = sums(partial[1], wanted.bias);
  r.dpre_bias = sums(partial[2], wanted.pre_bias);
  if (a.width > 0) launch_column_sums(a, count, device);
}

// Shared memory that a block may ask for.
int shared_limit() {
  int device = 0, bytes = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes - 2048;  // what the kernels declare themselves
}

// Blocks of a kernel that fit on the device at once, but no more than leave each some 24 rows: every block leaves a line of
// column sums to add up.
template <class Kernel>
int64_t resident_blocks(Kernel kernel, int threads, size_t shared, int64_t rows) {
  int each = 0;
  // Always the same: what a width needs might lower it under a launch of another thread, or in a captured graph.
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit()));
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared));
  const int64_t processors = num_processors(), useful = rows / (processors * 24);
  each = each > useful ? static_cast<int>(useful) : each;
  const int64_t blocks = processors * (each < 1 ? 1 : each);
  return blocks < rows ? blocks : rows;
}

template <class T, int N, bool kResidual>
void launch_backward(NormBackward& a, Tensor (&partial)[3], const Wanted& wanted, const Tensor& like, const OnDevice& device) {
  const auto make_lines = [&](int64_t lines) {
    const auto make = [&](bool is_wanted) { return new_tensor({lines, is_wanted ? a.width : 0}, ScalarType::Float, like); };
    partial[0] = make(true);
    partial[1] = make(wanted.bias.has_value());
    partial[2] = make(wanted.pre_bias.has_value());
    a.dweight = static_cast<float*>(pointer(partial[0]));
    a.dbias = wanted.bias ? static_cast<float*>(pointer(partial[1])) : nullptr;
    a.dpre_bias = wanted.pre_bias ? static_cast<float*>(pointer(partial[2])) : nullptr;
  };
  if (a.rows == 0) {
    make_lines(0);
    return;
  }
  constexpr Share share = norm_backward_share(N, kResidual);
  const Geometry g = row_geometry(a.width, N, share);
  const size_t shared = sizeof(float) * static_cast<size_t>(a.width) * (1 + wanted.bias.has_value() + wanted.pre_bias.has_value());
  if (g.packs == 0 || shared > static_cast<size_t>(shared_limit())) {
    const int64_t columns = (a.width + 32 * N - 1) / (32 * N);
    const int64_t most = int64_t{num_processors()} * 16 / columns + 1;  // lines: enough blocks for the device
    a.rows_per_line = (a.rows + most - 1) / most;
    a.rows_per_line = a.rows_per_line < 32 ? 32 : a.rows_per_line;
    const int64_t lines = (a.rows + a.rows_per_line - 1) / a.rows_per_line;
    make_lines(lines);
    const Tensor terms = new_tensor({a.rows, 2}, ScalarType::Float, like);
    a.terms = static_cast<float*>(pointer(terms));
    MLM_LAUNCH((norm_terms_kernel<T, N>), static_cast<unsigned>(a.rows), 1024, 0, device.stream(), a);
    MLM_LAUNCH((norm_tiles_kernel<T, N>), dim3(static_cast<unsigned>(columns), static_cast<unsigned>(lines)), dim3(32, 8), 0,
               device.stream(), a);
    return;
  }
  by_packs<N, share.most>(g.packs, [&](auto k) {
    constexpr int K = decltype(k)::value, R = norm_backward_rows(N, K, kResidual);
    const auto kernel = norm_backward_kernel<T, N, K, R, kResidual, norm_backward_bound(N, K, kResidual)>;
    const int64_t blocks = resident_blocks(kernel, static_cast<int>(g.block.x), shared, (a.rows + R - 1) / R);
    make_lines(blocks);
    MLM_LAUNCH(kernel, static_cast<unsigned>(blocks), g.block.x, shared, device.stream(), a);
  });
}

Gradients run_backward(NormBackward& a, const char* op, const Tensor& grad, const MaybeTensor& grad_total, const Tensor& x,
                       const Wanted& wanted) {
  check_cuda_dtype(op, "x", x);
  const Rows shape = as_rows(op, "x", x);
  check_columns(op, shape);
  const OnDevice device(x);
  const Tensor g = packed(grad), w = packed(wanted.weight);
  const MaybeTensor gt = grad_total ? MaybeTensor(packed(*grad_total)) : std::nullopt;
  Gradients r{new_like(x), a.dropout.threshold ? new_like(x) : nothing(x), {}, {}, {}};
  a.grad = pointer(g);
  a.grad_total = pointer(gt);
  a.x = pointer(x);
  a.weight = param(w);
  a.dx = pointer(r.dx);
  a.dbranch = a.dropout.threshold ? pointer(r.dbranch) : nullptr;
  a.rows = shape.rows;
  a.width = shape.width;
  const bool vector = aligned(x, shape.width, a.grad, a.grad_total, a.x, a.weight.data, a.dx, a.dbranch);
  Tensor partial[3];
  by_pack(x.scalar_type(), vector, [&](auto t, auto n) {
    using T = decltype(t);
    constexpr int N = decltype(n)::value;
    by_residual(a.grad_total || a.dbranch || wanted.pre_bias, [&](auto residual) {
      launch_backward<T, N, decltype(residual)::value>(a, partial, wanted, x, device);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  sum_lines(r, partial, wanted, device);
  return r;
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
  const Gradients r = run_backward(a, op, grad, std::nullopt, in, {weight, bias, std::nullopt});
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
  a.dropout = dropout_of(op, dropout, seed, in);
  const Gradients r = run_backward(a, op, grad, grad_total, in, {weight, rms ? std::nullopt : norm_bias, bias});
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
