// CUDA operators: masked_softmax, causal_softmax and their backward.
#include <algorithm>

#include "kernels/softmax.cuh"
#include "launch.cuh"

namespace mlm::cuda {
namespace {

std::tuple<Tensor, Tensor> run_forward(SoftmaxForward& a, const char* op, const Tensor& scores, double scale,
                                       double dropout, const MaybeTensor& seed) {
  check_cuda_dtype(op, "scores", scores);
  const Rows shape = as_rows(op, "scores", scores);
  const Tensor x = packed(scores);
  const OnDevice device(x);
  a.dropout = dropout_of(op, dropout, seed, x);
  Tensor out = new_like(x), probs = a.dropout.threshold ? new_like(x) : nothing(x);
  if (shape.rows == 0) return {out, probs};
  check_columns(op, shape);
  a.x = pointer(x);
  a.out = pointer(out);
  a.probs = a.dropout.threshold ? pointer(probs) : nullptr;
  a.rows = shape.rows;
  a.keys = shape.width;
  a.scale = static_cast<float>(scale);
  a.causal.queries = x.dim() >= 2 ? x.size(x.dim() - 2) : 1;
  by_pack(x.scalar_type(), aligned(x, shape.width, a.x, a.out, a.probs), [&](auto t, auto n) {
    using T = decltype(t);
    constexpr int N = decltype(n)::value;
    by_form<N>(softmax_form(a, N), [&](auto f) {
      constexpr int kForm = decltype(f)::value;
      constexpr Share share = softmax_forward_share(N, kForm);
      const Geometry g = row_geometry(shape.width, N, share);
      if (g.packs == 0) {
        MLM_LAUNCH((softmax_forward_wide_kernel<T, N, kForm>), static_cast<unsigned>(shape.rows), 1024, 0, device.stream(), a);
        return;
      }
      by_packs<N, share.most>(g.packs, [&](auto k) {
        constexpr int K = decltype(k)::value;
        MLM_LAUNCH((softmax_forward_kernel<T, N, K, kForm>), row_blocks(shape.rows, g.block), g.block, 0, device.stream(), a);
      });
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, probs};
}

std::tuple<Tensor, Tensor> masked_softmax(Tensor scores, MaybeTensor mask, MaybeTensor seed, double scale, double dropout) {
  const char* op = "masked_softmax";
  check_floating(op, "scores", scores);
  as_rows(op, "scores", scores);
  SoftmaxForward a{};
  MaybeTensor m;
  if (mask) {
    MaskType type;
    m = readable_mask(op, *mask, scores, &type);
    a.mask_kind = type == MaskType::kBool ? kBoolMask : type == MaskType::kWide ? kFloatMask : kSameMask;
    const MaskLayout layout = mask_layout(op, *m, scores);
    a.dims = layout.dims;
    std::copy(layout.sizes, layout.sizes + kMaxMaskDims, a.sizes);
    std::copy(layout.strides, layout.strides + kMaxMaskDims, a.mask_strides);
    a.mask_key_stride = layout.key_stride;
    a.mask = pointer(m);
  }
  return run_forward(a, op, scores, scale, dropout, seed);
}

Causal causal_of(int64_t offset, int64_t window) { return {true, 1, offset, window > 0 ? window : kNoWindow}; }

std::tuple<Tensor, Tensor> causal_softmax(Tensor scores, MaybeTensor seed, double scale, int64_t offset, int64_t window,
                                          double dropout) {
  const char* op = "causal_softmax";
  check_floating(op, "scores", scores);
  MLM_CHECK(scores.dim() >= 2, op, "`scores` must be [..., queries, keys], got ", scores.dim(), " dimensions");
  SoftmaxForward a{};
  a.causal = causal_of(offset, window);
  return run_forward(a, op, scores, scale, dropout, seed);
}

Tensor softmax_backward(Tensor grad, Tensor probs, MaybeTensor seed, double scale, double dropout, bool causal,
                        int64_t offset, int64_t window) {
  const char* op = "softmax_backward";
  check_cuda_dtype(op, "probs", probs);
  check_like(op, "grad", grad, "probs", probs);
  check_device(op, "grad", grad, probs);
  const Rows shape = as_rows(op, "probs", probs);
  const Tensor g = packed(grad), p = packed(probs);
  const OnDevice device(p);
  Tensor dx = new_like(p);
  if (shape.rows == 0) return dx;
  check_columns(op, shape);
  SoftmaxBackward a{};
  a.grad = pointer(g);
  a.probs = pointer(p);
  a.dx = pointer(dx);
  a.rows = shape.rows;
  a.keys = shape.width;
  a.scale = static_cast<float>(scale);
  if (causal) a.causal = causal_of(offset, window);
  a.causal.queries = p.dim() >= 2 ? p.size(p.dim() - 2) : 1;
  a.dropout = dropout_of(op, dropout, seed, p);
  by_pack(p.scalar_type(), aligned(p, shape.width, a.grad, a.probs, a.dx), [&](auto t, auto n) {
    using T = decltype(t);
    constexpr int N = decltype(n)::value;
    constexpr Share share = softmax_backward_share(N);
    const Geometry geometry = row_geometry(shape.width, N, share);
    if (geometry.packs == 0) {
      MLM_LAUNCH((softmax_backward_wide_kernel<T, N>), static_cast<unsigned>(shape.rows), 1024, 0, device.stream(), a);
      return;
    }
    by_packs<N, share.most>(geometry.packs, [&](auto k) {
      constexpr int K = decltype(k)::value;
      MLM_LAUNCH((softmax_backward_kernel<T, N, K>), row_blocks(shape.rows, geometry.block), geometry.block, 0, device.stream(), a);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return dx;
}

}  // namespace
}  // namespace mlm::cuda

STABLE_TORCH_LIBRARY_IMPL(mlm, CUDA, m) {
  m.impl("masked_softmax", TORCH_BOX(&mlm::cuda::masked_softmax));
  m.impl("causal_softmax", TORCH_BOX(&mlm::cuda::causal_softmax));
  m.impl("softmax_backward", TORCH_BOX(&mlm::cuda::softmax_backward));
}
