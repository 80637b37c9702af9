// CPU operator: one token a row through a whole GPT, from ids to logits. What it saves over the layers run one by one is
// everything between the matrix products: some two hundred operator calls, and in bfloat16 the packing of weights that
// a general matrix product does at each call. Activations stay in float32 throughout.
#include <cmath>
#include <vector>

#include "launch.h"

namespace mlm {
namespace {

constexpr const char* kOp = "decode_step";
constexpr int kFixed = 5, kPerLayer = 12;
enum Fixed { kWord, kPosition, kFinalWeight, kFinalBias, kHead };
enum PerLayer { kNorm1, kNorm1Bias, kQkv, kQkvBias, kOut, kOutBias, kNorm2, kNorm2Bias, kUp, kUpBias, kDown, kDownBias };
enum Activations { kGelu = 0, kGeluErf = 1, kSwiglu = 2 };

using Weights = std::vector<Tensor>;

// What stays the same from layer to layer, and room for one row set of activations.
struct Step {
  const TypeKernels& stored;  // of weights and cache
  const TypeKernels& wide;    // of activations
  int64_t rows, hidden, heads, groups, dim;
  const int64_t* positions;
  double eps;
  bool rms;
  std::vector<float> x, normed, qkv, mixed, inner, active, weight, bias, mean, rstd;

  Step(const TypeKernels& stored, const TypeKernels& wide) : stored(stored), wide(wide) {}
};

const void* optional_pointer(const Tensor& t) { return t.numel() ? pointer(t) : nullptr; }

void norm(Step& s, const Tensor& weight, const Tensor& bias) {
  s.stored.widen(pointer(weight), s.weight.data(), s.hidden);
  if (bias.numel()) s.stored.widen(pointer(bias), s.bias.data(), s.hidden);
  NormForward a{};
  a.x = s.x.data();
  a.weight = s.weight.data();
  a.bias = bias.numel() ? s.bias.data() : nullptr;
  a.out = s.normed.data();
  a.mean = s.mean.data();
  a.rstd = s.rstd.data();
  a.width = s.hidden;
  a.eps = s.eps;
  a.rms = s.rms;
  s.wide.norm_forward(a, 0, s.rows);
}

// y [rows, outputs] (+)= x [rows, inputs] weight^T + bias
void multiply(const Step& s, const Tensor& weight, const void* bias, const float* x, float* y, int64_t outputs, bool add) {
  Product a{};
  a.weight = pointer(weight);
  a.bias = bias;
  a.x = x;
  a.y = y;
  a.vectors = s.rows;
  a.in = weight.size(1);
  a.out = outputs;
  a.add = add;
  constexpr int64_t block = 16;
  const int64_t grain = 1 + 32768 / (block * a.in);
  torch::stable::parallel_for(0, (outputs + block - 1) / block, grain, [&](int64_t begin, int64_t end) {
    s.stored.product(a, begin * block, end * block < outputs ? end * block : outputs);
  });
}

// Rotates the query and key heads of qkv by each row's position. The sines carry the sign of the rotation.
void rotate(Step& s, const float* cos, const float* sin) {
  const int64_t half = s.dim / 2;
  for (int64_t row = 0; row < s.rows; ++row) {
    const float* c = cos + s.positions[row] * s.dim;
    const float* n = sin + s.positions[row] * s.dim;
    float* head = s.qkv.data() + row * (s.heads + 2 * s.groups) * s.dim;
    for (int64_t i = 0; i < s.heads + s.groups; ++i, head += s.dim)
      for (int64_t j = 0; j < half; ++j) {
        const float a = head[j], b = head[j + half];
        head[j] = a * c[j] + b * n[j];
        head[j + half] = b * c[j + half] + a * n[j + half];
      }
  }
}

void attend(Step& s, const Tensor& keys, const Tensor& values) {
  DecodeAttention a{};
  a.qkv = s.qkv.data();
  a.keys = pointer(keys);
  a.values = pointer(values);
  a.positions = s.positions;
  a.out = s.mixed.data();
  a.heads = s.heads;
  a.groups = s.groups;
  a.dim = s.dim;
  a.capacity = keys.size(2);
  a.scale = 1.0 / std::sqrt(static_cast<double>(s.dim));
  torch::stable::parallel_for(0, s.rows * s.groups, 1, [&](int64_t begin, int64_t end) {
    s.stored.decode_attention(a, begin, end);
  });
}

void activate(Step& s, int64_t activation, int64_t width) {
  Activation a{};
  a.x = s.inner.data();
  a.out = s.active.data();
  a.rows = s.rows;
  a.width = width;
  if (activation == kSwiglu) return s.wide.swiglu_forward(a, 0, s.rows);
  if (activation == kGelu) return s.wide.gelu_forward(a, 0, s.rows);
  for (int64_t i = 0; i < s.rows * width; ++i)
    s.active[i] = 0.5f * s.inner[i] * (1.0f + std::erf(s.inner[i] * 0.70710678f));
}

void embed(Step& s, const Tensor& tokens, const Weights& weights) {
  const int64_t* ids = static_cast<const int64_t*>(pointer(tokens));
  const auto line = [&](const Tensor& table, int64_t index) {
    return static_cast<const char*>(pointer(table)) + index * s.hidden * static_cast<int64_t>(table.element_size());
  };
  for (int64_t row = 0; row < s.rows; ++row) {
    MLM_CHECK(ids[row] >= 0 && ids[row] < weights[kWord].size(0), kOp, "token ", ids[row], " is not in the vocabulary");
    float* x = s.x.data() + row * s.hidden;
    s.stored.widen(line(weights[kWord], ids[row]), x, s.hidden);
    if (!weights[kPosition].numel()) continue;
    MLM_CHECK(s.positions[row] < weights[kPosition].size(0), kOp, "position ", s.positions[row], " is past the context");
    s.stored.widen(line(weights[kPosition], s.positions[row]), s.weight.data(), s.hidden);
    for (int64_t j = 0; j < s.hidden; ++j) x[j] += s.weight[j];
  }
}

void check_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns, const Tensor& like) {
  MLM_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous() &&
                t.scalar_type() == like.scalar_type(),
            kOp, "`", name, "` must be packed, [", rows, ", ", columns, "] and ", dtype_name(like.scalar_type()));
}

void check_optional(const char* name, const Tensor& t, int64_t size, const Tensor& like) {
  MLM_CHECK(t.numel() == 0 || (t.numel() == size && t.is_contiguous() && t.scalar_type() == like.scalar_type()), kOp, "`",
            name, "` must have ", size, " elements of ", dtype_name(like.scalar_type()), " or none, got ", t.numel());
}

void check_layer(const Step& s, const Tensor* w, const Tensor& keys, const Tensor& values, bool swiglu, const Tensor& like) {
  MLM_CHECK(w[kUp].dim() == 2, kOp, "`up` must be a matrix");
  const int64_t mixed = s.heads * s.dim, qkv = (s.heads + 2 * s.groups) * s.dim, inner = w[kUp].size(0);
  check_matrix("qkv", w[kQkv], qkv, s.hidden, like);
  check_matrix("out", w[kOut], s.hidden, mixed, like);
  check_matrix("up", w[kUp], inner, s.hidden, like);
  check_matrix("down", w[kDown], s.hidden, swiglu ? inner / 2 : inner, like);
  const int64_t sizes[kPerLayer] = {s.hidden, s.hidden, 0, qkv, 0, s.hidden, s.hidden, s.hidden, 0, inner, 0, s.hidden};
  for (int i = 0; i < kPerLayer; ++i)
    if (sizes[i]) check_optional("a vector of a layer", w[i], sizes[i], like);
  MLM_CHECK(w[kNorm1].numel() && w[kNorm2].numel(), kOp, "a norm without a weight");
  for (const Tensor* cache : {&keys, &values}) {
    MLM_CHECK(cache->dim() == 4 && cache->is_contiguous() && cache->scalar_type() == like.scalar_type() &&
                  cache->size(0) >= s.rows && cache->size(1) == s.groups && cache->size(3) == s.dim &&
                  cache->size(2) == keys.size(2),
              kOp, "a cache must be packed [slots, ", s.groups, ", capacity, ", s.dim, "] with ", s.rows, " slots or more");
    for (int64_t row = 0; row < s.rows; ++row)
      MLM_CHECK(s.positions[row] >= 0 && s.positions[row] < cache->size(2), kOp, "position ", s.positions[row],
                " in a cache of ", cache->size(2));
  }
}

void run_layer(Step& s, const Tensor* w, const Tensor& keys, const Tensor& values, const float* cos, const float* sin,
               int64_t activation) {
  norm(s, w[kNorm1], w[kNorm1Bias]);
  multiply(s, w[kQkv], optional_pointer(w[kQkvBias]), s.normed.data(), s.qkv.data(), w[kQkv].size(0), false);
  if (cos) rotate(s, cos, sin);
  attend(s, keys, values);
  multiply(s, w[kOut], optional_pointer(w[kOutBias]), s.mixed.data(), s.x.data(), s.hidden, true);
  norm(s, w[kNorm2], w[kNorm2Bias]);
  const int64_t inner = w[kUp].size(0);
  multiply(s, w[kUp], optional_pointer(w[kUpBias]), s.normed.data(), s.inner.data(), inner, false);
  activate(s, activation, activation == kSwiglu ? inner / 2 : inner);
  multiply(s, w[kDown], optional_pointer(w[kDownBias]), s.active.data(), s.x.data(), s.hidden, true);
}

struct Shape {
  int64_t heads, groups, dim, vocab_size, activation;
  bool rms;
  double eps;
};

void check_inputs(const Tensor& tokens, const Tensor& positions, const Weights& weights, const Weights& cache,
                  const Shape& shape) {
  const int64_t count = static_cast<int64_t>(weights.size()), layers = (count - kFixed) / kPerLayer;
  MLM_CHECK(layers > 0 && count == kFixed + kPerLayer * layers && static_cast<int64_t>(cache.size()) == 2 * layers, kOp,
            count, " weights and ", cache.size(), " caches");
  const Tensor& word = weights[kWord];
  check_floating(kOp, "word embedding", word);
  MLM_CHECK(word.scalar_type() != ScalarType::Double && word.dim() == 2, kOp, "the word embedding must be a matrix, not float64");
  for (const Tensor* ids : {&tokens, &positions})
    MLM_CHECK(ids->dim() == 1 && ids->scalar_type() == ScalarType::Long && ids->is_contiguous() && same_sizes(*ids, tokens),
              kOp, "`tokens` and `positions` must be packed int64 of one size");
  MLM_CHECK(shape.heads > 0 && shape.groups > 0 && shape.dim > 0 && shape.heads % shape.groups == 0, kOp, shape.heads,
            " heads in ", shape.groups, " groups");
  const int64_t hidden = word.size(1);
  check_matrix("word embedding", word, word.size(0), hidden, word);
  check_matrix("head", weights[kHead], weights[kHead].size(0), hidden, word);
  MLM_CHECK(shape.vocab_size <= weights[kHead].size(0) && shape.vocab_size <= word.size(0), kOp, "a vocabulary of ",
            shape.vocab_size);
  if (weights[kPosition].numel())
    check_matrix("position embedding", weights[kPosition], weights[kPosition].size(0), hidden, word);
  MLM_CHECK(weights[kFinalWeight].numel() == hidden, kOp, "the final norm must have ", hidden, " weights");
  check_optional("final norm", weights[kFinalWeight], hidden, word);
  check_optional("final norm bias", weights[kFinalBias], hidden, word);
}

void check_rotary(const MaybeTensor& cos, const MaybeTensor& sin, int64_t capacity, int64_t dim) {
  MLM_CHECK(!cos == !sin, kOp, "`cos` and `sin` come together");
  for (const MaybeTensor* table : {&cos, &sin})
    MLM_CHECK(!*table || ((*table)->scalar_type() == ScalarType::Float && (*table)->is_contiguous() && (*table)->dim() == 2 &&
                          (*table)->size(0) >= capacity && (*table)->size(1) == dim && dim % 2 == 0),
              kOp, "`cos` and `sin` must be packed float32 [", capacity, " or more, ", dim, "]");
}

// Room for the activations of one layer. Only the largest layer counts.
void make_room(Step& s, int64_t widest) {
  for (auto* row : {&s.x, &s.normed}) row->resize(s.rows * s.hidden);
  s.qkv.resize(s.rows * (s.heads + 2 * s.groups) * s.dim);
  s.mixed.resize(s.rows * s.heads * s.dim);
  for (auto* row : {&s.inner, &s.active}) row->resize(s.rows * widest);
  for (auto* row : {&s.weight, &s.bias}) row->resize(s.hidden);
  for (auto* row : {&s.mean, &s.rstd}) row->resize(s.rows);
}

Tensor decode_step(Tensor tokens, Tensor positions, Weights weights, Weights cache, MaybeTensor cos, MaybeTensor sin,
                   int64_t heads, int64_t groups, int64_t dim, int64_t vocab_size, int64_t activation, bool rms, double eps) {
  check_inputs(tokens, positions, weights, cache, {heads, groups, dim, vocab_size, activation, rms, eps});
  const Tensor& word = weights[kWord];
  Step s(kernels_for(word), active().types[kFloat]);
  s.rows = tokens.numel();
  s.hidden = word.size(1);
  s.heads = heads;
  s.groups = groups;
  s.dim = dim;
  s.positions = static_cast<const int64_t*>(pointer(positions));
  s.eps = eps;
  s.rms = rms;
  int64_t widest = 0, capacity = 0;
  for (size_t layer = 0; layer < cache.size() / 2; ++layer) {
    const Tensor* w = &weights[kFixed + kPerLayer * layer];
    check_layer(s, w, cache[2 * layer], cache[2 * layer + 1], activation == kSwiglu, word);
    widest = w[kUp].size(0) > widest ? w[kUp].size(0) : widest;
    capacity = cache[2 * layer].size(2) > capacity ? cache[2 * layer].size(2) : capacity;
  }
  check_rotary(cos, sin, capacity, dim);
  make_room(s, widest);

  embed(s, tokens, weights);
  for (size_t layer = 0; layer < cache.size() / 2; ++layer)
    run_layer(s, &weights[kFixed + kPerLayer * layer], cache[2 * layer], cache[2 * layer + 1],
              static_cast<const float*>(pointer(cos)), static_cast<const float*>(pointer(sin)), activation);
  norm(s, weights[kFinalWeight], weights[kFinalBias]);
  Tensor logits = new_tensor({s.rows, vocab_size}, ScalarType::Float, word);
  multiply(s, weights[kHead], nullptr, s.normed.data(), static_cast<float*>(pointer(logits)), vocab_size, false);
  return logits;
}

}  // namespace
}  // namespace mlm

STABLE_TORCH_LIBRARY_IMPL(mlm, CPU, m) {
  m.impl("decode_step", TORCH_BOX(&mlm::decode_step));
}
