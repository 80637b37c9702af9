// Schemas of the operators (namespace mlm). Python gives each its fake-tensor and autograd rule in mlm_cli/ops; results
// that were not asked for (no bias, no dropout) come back as tensors of size [0].
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mlm, m) {
  m.def("schema_id() -> int");
  m.def("cpu_level() -> int");  // 0 plain, 1 AVX2, 2 AVX-512, 3 with BF16
  // -> normed, mean, rstd
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)");
  // -> normed, rstd
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  // mean None = RMS norm; -> dx, dweight, dbias
  m.def(
      "norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor rstd)"
      " -> (Tensor, Tensor, Tensor)");
  // -> normed, total = dropout(x + bias) + residual, mean, rstd
  m.def(
      "residual_norm(Tensor x, Tensor residual, Tensor weight, Tensor? norm_bias, Tensor? bias, Tensor? seed,"
      " float eps, float dropout, bool rms) -> (Tensor, Tensor, Tensor, Tensor)");
  // -> dtotal (= dresidual), dx (only with dropout, else dtotal serves), dweight, dnorm_bias, dbias
  m.def(
      "residual_norm_backward(Tensor grad, Tensor? grad_total, Tensor total, Tensor weight, Tensor? norm_bias,"
      " Tensor? bias, Tensor mean, Tensor rstd, Tensor? seed, float dropout, bool rms)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // -> out, probabilities before dropout (only with dropout)
  m.def(
      "masked_softmax(Tensor scores, Tensor? mask, Tensor? seed, float scale, float dropout) -> (Tensor, Tensor)");
  m.def(
      "causal_softmax(Tensor scores, Tensor? seed, float scale, SymInt offset, SymInt window, float dropout)"
      " -> (Tensor, Tensor)");
  m.def(
      "softmax_backward(Tensor grad, Tensor probs, Tensor? seed, float scale, float dropout, bool causal,"
      " SymInt offset, SymInt window) -> Tensor");
  // Query i of a sample sees keys begin[i]..end[i], neither of which ever moves back -> out, log of the sum of exponentials
  m.def(
      "interval_attention(Tensor query, Tensor key, Tensor value, Tensor begin, Tensor end, float scale)"
      " -> (Tensor, Tensor)");
  m.def(
      "interval_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor lse, Tensor begin,"
      " Tensor end, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("bias_gelu(Tensor x, Tensor? bias) -> Tensor");
  m.def("bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias) -> (Tensor, Tensor)");
  m.def("swiglu(Tensor x) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor x) -> Tensor");
  // -> maximum, sum of exp(logit - maximum), the label's logit
  m.def(
      "cross_entropy_stats(Tensor logits, Tensor labels, SymInt vocab_start, SymInt num_valid)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_grad_(Tensor(a!) logits, Tensor labels, Tensor lse, Tensor scale, SymInt vocab_start,"
      " SymInt num_valid) -> ()");
  m.def(
      "adamw_(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? model_copy,"
      " float lr, float beta1, float beta2, float eps, float weight_decay, int step, float grad_scale) -> ()");
  // Sums x over the processes that have `segment` in common, in rank order; zero the segment before its first use.
  m.def("shared_all_reduce_(Tensor(a!) x, Tensor(b!) segment, int rank, int size, float timeout) -> ()");
  // out = the tensors x of all ranks, in their order; x may be this rank's part of out.
  m.def(
      "shared_all_gather_(Tensor(a!) out, Tensor x, Tensor(b!) segment, int rank, int size, float timeout) -> ()");
  // One token a row through a whole GPT; inference only. weights: word, position, final norm (2), head, then per layer
  // norm1 (2), qkv (2), out (2), norm2 (2), up (2), down (2), each weight and bias, empty where there is none. scales: per
  // layer those of qkv, out, up, down, float32 [out], of a matrix that is int8, else empty. cache: keys and values per
  // layer, [slots, groups, capacity, dim], written to by each step. activation: 0 gelu, 1 gelu_erf,
  // 2 swiglu. The plan is int64 notes of where all these are: whoever holds it must hold them too.
  m.def(
      "decode_plan(Tensor[] weights, Tensor[] scales, Tensor[] cache, Tensor? cos, Tensor? sin, int heads, int groups,"
      " int dim, int vocab_size, int activation, bool rms, float eps) -> Tensor");
  // -> float32 logits [b, vocab_size]
  m.def("decode_step(Tensor(a!) plan, Tensor tokens, Tensor positions) -> Tensor");
}

#ifndef MLM_SCHEMA_ID
#define MLM_SCHEMA_ID 0
#endif

namespace {
// What this file hashed to when it was compiled: Python refuses a library left over from other schemas.
int64_t schema_id() {
  return MLM_SCHEMA_ID;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mlm, CompositeExplicitAutograd, m) {
  m.impl("schema_id", TORCH_BOX(&schema_id));
}
