// CPU operators: masked_softmax, causal_softmax and their backward.
#include <algorithm>

#include "launch.h"

namespace mlm {
namespace {

std::tuple<Tensor, Tensor> run_forward(SoftmaxForward& a, const char* op, const Tensor& scores, double scale,
                                       double dropout, const MaybeTensor& seed) {
  const Rows shape = as_rows(op, "scores", scores);
  const Tensor x = packed(scores);
  a.dropout = dropout_of(op, dropout, seed);
  Tensor out = new_like(x);
  Tensor probs = a.dropout.threshold ? new_like(x) : nothing(x);
  a.x = pointer(x);
  a.out = pointer(out);
  a.probs = a.dropout.threshold ? pointer(probs) : nullptr;
  a.queries = x.dim() >= 2 ? x.size(x.dim() - 2) : 1;
  a.keys = shape.width;
  a.scale = scale;
  a.stream = past_cache(out, shape.width);
  over_rows(kernels_for(x).softmax_forward, a, shape.rows, row_grain(shape.width));
  return {out, probs};
}

std::tuple<Tensor, Tensor> masked_softmax(Tensor scores, MaybeTensor mask, MaybeTensor seed, double scale, double dropout) {
  const char* op = "masked_softmax";
  check_floating(op, "scores", scores);
  as_rows(op, "scores", scores);
  SoftmaxForward a{};
  a.window = kNoWindow;
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

std::tuple<Tensor, Tensor> causal_softmax(Tensor scores, MaybeTensor seed, double scale, int64_t offset, int64_t window,
                                          double dropout) {
  const char* op = "causal_softmax";
  check_floating(op, "scores", scores);
  MLM_CHECK(scores.dim() >= 2, op, "`scores` must be [..., queries, keys], got ", scores.dim(), " dimensions");
  SoftmaxForward a{};
  a.causal = true;
  a.offset = offset;
  a.window = window > 0 ? window : kNoWindow;
  return run_forward(a, op, scores, scale, dropout, seed);
}

Tensor softmax_backward(Tensor grad, Tensor probs, MaybeTensor seed, double scale, double dropout, bool causal,
                        int64_t offset, int64_t window) {
  const char* op = "softmax_backward";
  check_floating(op, "probs", probs);
  check_like(op, "grad", grad, "probs", probs);
  const Rows shape = as_rows(op, "probs", probs);
  const Tensor g = packed(grad), p = packed(probs);
  Tensor dx = new_like(p);
  SoftmaxBackward a{};
  a.grad = pointer(g);
  a.probs = pointer(p);
  a.dx = pointer(dx);
  a.queries = p.dim() >= 2 ? p.size(p.dim() - 2) : 1;
  a.keys = shape.width;
  a.scale = scale;
  a.causal = causal;
  a.offset = offset;
  a.window = window > 0 ? window : kNoWindow;
  a.stream = past_cache(dx, shape.width);
  a.dropout = dropout_of(op, dropout, seed);
  over_rows(kernels_for(p).softmax_backward, a, shape.rows, row_grain(shape.width));
  return dx;
}

}  // namespace
}  // namespace mlm

STABLE_TORCH_LIBRARY_IMPL(mlm, CPU, m) {
  m.impl("masked_softmax", TORCH_BOX(&mlm::masked_softmax));
  m.impl("causal_softmax", TORCH_BOX(&mlm::causal_softmax));
  m.impl("softmax_backward", TORCH_BOX(&mlm::softmax_backward));
}
