// CPU operators: one token a row through a whole GPT, from ids to logits. What this saves over the layers run one by one
// is everything between the matrix products: some two hundred operator calls, and in bfloat16 the packing of weights that
// a general matrix product does at each call. Activations stay in float32 throughout.
//
// `decode_plan` checks every tensor once and writes down where they are; `decode_step` runs from those notes. The plan
// does not keep the tensors alive: its owner does (mlm_cli/ops/decode.py, the only caller).
#include <cmath>
#include <cstring>
#include <vector>

#include "launch.h"

namespace mlm {
namespace {

constexpr int64_t kMagic = 0x6d6c6d0d5e9a0001;
constexpr int kFixed = 5, kPerLayer = 12, kScales = 4;
enum Fixed { kWord, kPosition, kFinal, kFinalBias, kHead };
enum PerLayer { kNorm1, kNorm1Bias, kQkv, kQkvBias, kOut, kOutBias, kNorm2, kNorm2Bias, kUp, kUpBias, kDown, kDownBias };
enum Scales { kQkvScale, kOutScale, kUpScale, kDownScale };
enum Activations { kGelu = 0, kGeluErf = 1, kSwiglu = 2 };

using Tensors = std::vector<Tensor>;

struct Shape {
  int64_t heads, groups, dim, vocab_size, activation, rms;
  double eps;
};

struct Layer {
  const void* weights[kPerLayer];  // null where there is none
  const float* scales[kScales];    // of int8 matrices, null where a matrix is of the model's type
  void* keys;
  void* values;
};

// Every field has 8 bytes: the plan travels as an int64 tensor, its layers behind it.
struct Plan {
  int64_t magic, dtype, element_size, layers, hidden, inner, words, places, slots, capacity;
  Shape shape;
  const void* fixed[kFixed];
  const float* cos;  // [capacity or more, dim / 2], null without rotary positions
  const float* sin;

  int64_t qkv_width() const { return (shape.heads + 2 * shape.groups) * shape.dim; }
  int64_t mixed_width() const { return shape.heads * shape.dim; }
  int64_t active_width() const { return shape.activation == kSwiglu ? inner / 2 : inner; }
};
static_assert(sizeof(Plan) % sizeof(int64_t) == 0 && sizeof(Layer) % sizeof(int64_t) == 0, "written to an int64 tensor");

// ---------------------------------------------------------------------------------------------------------- the plan

constexpr const char* kPlan = "decode_plan";

void check_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns, const Tensor& like) {
  MLM_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous() &&
                t.scalar_type() == like.scalar_type(),
            kPlan, "`", name, "` must be packed, [", rows, ", ", columns, "] and ", dtype_name(like.scalar_type()));
}

// A matrix of the model's type, or int8 with a scale a row.
void check_scaled(const char* name, const Tensor& t, const Tensor& scale, int64_t rows, int64_t columns, const Tensor& like) {
  if (!scale.numel()) return check_matrix(name, t, rows, columns, like);
  MLM_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous() &&
                t.scalar_type() == ScalarType::Char,
            kPlan, "`", name, "` with scales must be packed, [", rows, ", ", columns, "] and int8");
  MLM_CHECK(scale.dim() == 1 && scale.numel() == rows && scale.is_contiguous() && scale.scalar_type() == ScalarType::Float,
            kPlan, "the scales of `", name, "` must be ", rows, " packed float32");
}

void check_optional(const char* name, const Tensor& t, int64_t size, const Tensor& like) {
  MLM_CHECK(t.numel() == 0 || (t.numel() == size && t.is_contiguous() && t.scalar_type() == like.scalar_type()), kPlan,
            "`", name, "` must have ", size, " elements of ", dtype_name(like.scalar_type()), " or none, got ", t.numel());
}

void check_layer(const Plan& p, const Tensor* w, const Tensor* scales, const Tensor& like) {
  check_scaled("qkv", w[kQkv], scales[kQkvScale], p.qkv_width(), p.hidden, like);
  check_scaled("out", w[kOut], scales[kOutScale], p.hidden, p.mixed_width(), like);
  check_scaled("up", w[kUp], scales[kUpScale], p.inner, p.hidden, like);
  check_scaled("down", w[kDown], scales[kDownScale], p.hidden, p.active_width(), like);
  MLM_CHECK(w[kNorm1].numel() && w[kNorm2].numel(), kPlan, "a norm without a weight");
  for (int i : {kNorm1, kNorm1Bias, kOutBias, kNorm2, kNorm2Bias, kDownBias})
    check_optional("a vector of a layer", w[i], p.hidden, like);
  check_optional("qkv bias", w[kQkvBias], p.qkv_width(), like);
  check_optional("up bias", w[kUpBias], p.inner, like);
}

void check_cache(const Plan& p, const Tensor& cache, const Tensor& like) {
  MLM_CHECK(cache.dim() == 4 && cache.is_contiguous() && cache.scalar_type() == like.scalar_type() &&
                cache.size(0) == p.slots && cache.size(1) == p.shape.groups && cache.size(2) == p.capacity &&
                cache.size(3) == p.shape.dim,
            kPlan, "a cache must be packed [", p.slots, ", ", p.shape.groups, ", ", p.capacity, ", ", p.shape.dim, "]");
}

void check_rotary(const Plan& p, const MaybeTensor& cos, const MaybeTensor& sin) {
  MLM_CHECK(!cos == !sin, kPlan, "`cos` and `sin` come together");
  for (const MaybeTensor* table : {&cos, &sin}) {
    if (!*table) continue;
    const Tensor& t = **table;
    MLM_CHECK(p.shape.dim % 2 == 0 && t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.dim() == 2 &&
                  t.size(0) >= p.capacity && t.size(1) == p.shape.dim / 2,
              kPlan, "`cos` and `sin` must be packed float32 [", p.capacity, " or more, ", p.shape.dim / 2, "]");
  }
}

Plan measure(const Tensors& weights, const Tensors& scales, const Tensors& cache, const Shape& shape) {
  const int64_t count = static_cast<int64_t>(weights.size()), layers = (count - kFixed) / kPerLayer;
  MLM_CHECK(layers > 0 && count == kFixed + kPerLayer * layers && static_cast<int64_t>(cache.size()) == 2 * layers, kPlan,
            count, " weights and ", cache.size(), " caches");
  MLM_CHECK(static_cast<int64_t>(scales.size()) == kScales * layers, kPlan, scales.size(), " scales for ", layers, " layers");
  MLM_CHECK(shape.heads > 0 && shape.groups > 0 && shape.dim > 0 && shape.heads % shape.groups == 0, kPlan, shape.heads,
            " heads in ", shape.groups, " groups");
  const Tensor &word = weights[kWord], &up = weights[kFixed + kUp];
  check_floating(kPlan, "word embedding", word);
  MLM_CHECK(word.scalar_type() != ScalarType::Double, kPlan, "float64 is not served");
  MLM_CHECK(word.dim() == 2 && up.dim() == 2 && cache[0].dim() == 4, kPlan, "embedding, `up` or cache of another kind");
  Plan p{};
  p.magic = kMagic;
  p.dtype = dtype_index(word.scalar_type());
  p.element_size = static_cast<int64_t>(word.element_size());
  p.layers = layers;
  p.hidden = word.size(1);
  p.inner = up.size(0);
  p.words = word.size(0);
  p.places = weights[kPosition].numel() / p.hidden;
  p.slots = cache[0].size(0);
  p.capacity = cache[0].size(2);
  p.shape = shape;
  return p;
}

const void* optional_pointer(const Tensor& t) { return t.numel() ? pointer(t) : nullptr; }

Tensor decode_plan(Tensors weights, Tensors scales, Tensors cache, MaybeTensor cos, MaybeTensor sin, int64_t heads,
                   int64_t groups, int64_t dim, int64_t vocab_size, int64_t activation, bool rms, double eps) {
  Plan p = measure(weights, scales, cache, {heads, groups, dim, vocab_size, activation, rms, eps});
  const Tensor& word = weights[kWord];
  check_matrix("word embedding", word, p.words, p.hidden, word);
  if (p.places) check_matrix("position embedding", weights[kPosition], p.places, p.hidden, word);
  MLM_CHECK(weights[kFinal].numel(), kPlan, "the final norm has no weight");
  check_optional("final norm", weights[kFinal], p.hidden, word);
  check_optional("final norm bias", weights[kFinalBias], p.hidden, word);
  check_matrix("head", weights[kHead], p.words, p.hidden, word);
  MLM_CHECK(vocab_size > 0 && vocab_size <= p.words, kPlan, "a vocabulary of ", vocab_size, " in ", p.words, " rows");
  check_rotary(p, cos, sin);
  p.cos = static_cast<const float*>(pointer(cos));
  p.sin = static_cast<const float*>(pointer(sin));
  for (int i = 0; i < kFixed; ++i) p.fixed[i] = optional_pointer(weights[i]);
  std::vector<Layer> notes(p.layers);
  for (int64_t i = 0; i < p.layers; ++i) {
    const Tensor* w = &weights[kFixed + kPerLayer * i];
    check_layer(p, w, &scales[kScales * i], word);
    for (int j = 0; j < kScales; ++j)
      notes[i].scales[j] = static_cast<const float*>(optional_pointer(scales[kScales * i + j]));
    for (int j = 0; j < kPerLayer; ++j) notes[i].weights[j] = optional_pointer(w[j]);
    for (int j : {0, 1}) check_cache(p, cache[2 * i + j], word);
    notes[i].keys = pointer(cache[2 * i]);
    notes[i].values = pointer(cache[2 * i + 1]);
  }
  const int64_t bytes = static_cast<int64_t>(sizeof(Plan) + notes.size() * sizeof(Layer));
  Tensor plan = new_tensor({bytes / static_cast<int64_t>(sizeof(int64_t))}, ScalarType::Long, word);
  std::memcpy(pointer(plan), &p, sizeof(Plan));
  std::memcpy(static_cast<char*>(pointer(plan)) + sizeof(Plan), notes.data(), notes.size() * sizeof(Layer));
  return plan;
}

// ---------------------------------------------------------------------------------------------------------- the step

constexpr const char* kStep = "decode_step";

struct Step {
  const Plan& p;
  const TypeKernels& stored;  // of weights and cache
  const TypeKernels& wide;    // of activations
  int64_t rows;
  const int64_t* positions;
  std::vector<float> x, normed, qkv, mixed, inner, active, weight, bias, mean, rstd;

  Step(const Plan& p, int64_t rows, const int64_t* positions)
      : p(p), stored(mlm::active().types[p.dtype]), wide(mlm::active().types[kFloat]), rows(rows), positions(positions),
        x(rows * p.hidden), normed(rows * p.hidden), qkv(rows * p.qkv_width()), mixed(rows * p.mixed_width()),
        inner(rows * p.inner), active(rows * p.active_width()), weight(p.hidden), bias(p.hidden), mean(rows), rstd(rows) {}
};

// x -> normed
void norm(Step& s, const void* weight, const void* bias) {
  s.stored.widen(weight, s.weight.data(), s.p.hidden);
  if (bias) s.stored.widen(bias, s.bias.data(), s.p.hidden);
  NormForward a{};
  a.x = s.x.data();
  a.weight = s.weight.data();
  a.bias = bias ? s.bias.data() : nullptr;
  a.out = s.normed.data();
  a.mean = s.mean.data();
  a.rstd = s.rstd.data();
  a.width = s.p.hidden;
  a.eps = s.p.shape.eps;
  a.rms = s.p.shape.rms;
  s.wide.norm_forward(a, 0, s.rows);
}

// y [rows, out] (+)= x [rows, in] weight^T + bias; with a scale weight is int8
void multiply(const Step& s, const void* weight, const float* scale, const void* bias, const float* x, int64_t in, float* y,
              int64_t out, bool add) {
  Product a{};
  a.weight = weight;
  a.scale = scale;
  a.bias = bias;
  a.x = x;
  a.y = y;
  a.vectors = s.rows;
  a.in = in;
  a.out = out;
  a.add = add;
  constexpr int64_t block = 16;
  torch::stable::parallel_for(0, (out + block - 1) / block, 1 + 32768 / (block * in), [&](int64_t begin, int64_t end) {
    const auto product = scale ? s.stored.product_int8 : s.stored.product;
    product(a, begin * block, end * block < out ? end * block : out);
  });
}

// Rotates the query and key heads of qkv by each row's position.
void rotate(Step& s) {
  const int64_t dim = s.p.shape.dim, half = dim / 2;
  for (int64_t row = 0; row < s.rows; ++row) {
    const float* cos = s.p.cos + s.positions[row] * half;
    const float* sin = s.p.sin + s.positions[row] * half;
    float* head = s.qkv.data() + row * s.p.qkv_width();
    for (int64_t i = 0; i < s.p.shape.heads + s.p.shape.groups; ++i, head += dim)
      for (int64_t j = 0; j < half; ++j) {
        const float first = head[j], second = head[j + half];
        head[j] = first * cos[j] - second * sin[j];
        head[j + half] = second * cos[j] + first * sin[j];
      }
  }
}

void attend(Step& s, const Layer& layer) {
  DecodeAttention a{};
  a.qkv = s.qkv.data();
  a.keys = layer.keys;
  a.values = layer.values;
  a.positions = s.positions;
  a.out = s.mixed.data();
  a.heads = s.p.shape.heads;
  a.groups = s.p.shape.groups;
  a.dim = s.p.shape.dim;
  a.capacity = s.p.capacity;
  a.scale = 1.0 / std::sqrt(static_cast<double>(a.dim));
  torch::stable::parallel_for(0, s.rows * a.groups, 1, [&](int64_t begin, int64_t end) {
    s.stored.decode_attention(a, begin, end);
  });
}

void activate(Step& s) {
  Activation a{};
  a.x = s.inner.data();
  a.out = s.active.data();
  a.rows = s.rows;
  a.width = s.p.active_width();
  if (s.p.shape.activation == kSwiglu) return s.wide.swiglu_forward(a, 0, s.rows);
  if (s.p.shape.activation == kGelu) return s.wide.gelu_forward(a, 0, s.rows);
  for (size_t i = 0; i < s.active.size(); ++i) s.active[i] = 0.5f * s.inner[i] * (1.0f + std::erf(s.inner[i] * 0.70710678f));
}

void embed(Step& s, const int64_t* tokens) {
  const auto line = [&](Fixed table, int64_t index) {
    return static_cast<const char*>(s.p.fixed[table]) + index * s.p.hidden * s.p.element_size;
  };
  for (int64_t row = 0; row < s.rows; ++row) {
    float* x = s.x.data() + row * s.p.hidden;
    s.stored.widen(line(kWord, tokens[row]), x, s.p.hidden);
    if (!s.p.places) continue;
    s.stored.widen(line(kPosition, s.positions[row]), s.weight.data(), s.p.hidden);
    for (int64_t j = 0; j < s.p.hidden; ++j) x[j] += s.weight[j];
  }
}

void run_layer(Step& s, const Layer& layer) {
  const void* const* w = layer.weights;
  norm(s, w[kNorm1], w[kNorm1Bias]);
  multiply(s, w[kQkv], layer.scales[kQkvScale], w[kQkvBias], s.normed.data(), s.p.hidden, s.qkv.data(), s.p.qkv_width(), false);
  if (s.p.cos) rotate(s);
  attend(s, layer);
  multiply(s, w[kOut], layer.scales[kOutScale], w[kOutBias], s.mixed.data(), s.p.mixed_width(), s.x.data(), s.p.hidden, true);
  norm(s, w[kNorm2], w[kNorm2Bias]);
  multiply(s, w[kUp], layer.scales[kUpScale], w[kUpBias], s.normed.data(), s.p.hidden, s.inner.data(), s.p.inner, false);
  activate(s);
  multiply(s, w[kDown], layer.scales[kDownScale], w[kDownBias], s.active.data(), s.p.active_width(), s.x.data(),
           s.p.hidden, true);
}

Tensor decode_step(Tensor plan, Tensor tokens, Tensor positions) {
  const int64_t words = static_cast<int64_t>(sizeof(Plan) / sizeof(int64_t));
  MLM_CHECK(plan.scalar_type() == ScalarType::Long && plan.is_contiguous() && plan.numel() >= words, kStep, "no plan");
  const Plan& p = *static_cast<const Plan*>(pointer(plan));
  MLM_CHECK(p.magic == kMagic, kStep, "not a plan that `decode_plan` made");
  for (const Tensor* ids : {&tokens, &positions})
    MLM_CHECK(ids->dim() == 1 && ids->scalar_type() == ScalarType::Long && ids->is_contiguous() && same_sizes(*ids, tokens),
              kStep, "`tokens` and `positions` must be packed int64 of one size");
  const int64_t rows = tokens.numel();
  const int64_t* ids = static_cast<const int64_t*>(pointer(tokens));
  Step s(p, rows, static_cast<const int64_t*>(pointer(positions)));
  MLM_CHECK(rows <= p.slots, kStep, rows, " rows in ", p.slots, " slots");
  for (int64_t row = 0; row < rows; ++row) {
    MLM_CHECK(ids[row] >= 0 && ids[row] < p.shape.vocab_size, kStep, "token ", ids[row], " is not in the vocabulary");
    MLM_CHECK(s.positions[row] >= 0 && s.positions[row] < p.capacity && (!p.places || s.positions[row] < p.places), kStep,
              "position ", s.positions[row], " is past the context");
  }
  embed(s, ids);
  const Layer* layers = reinterpret_cast<const Layer*>(&p + 1);
  for (int64_t i = 0; i < p.layers; ++i) run_layer(s, layers[i]);
  norm(s, p.fixed[kFinal], p.fixed[kFinalBias]);
  Tensor logits = new_tensor({rows, p.shape.vocab_size}, ScalarType::Float, plan);
  float* out = static_cast<float*>(pointer(logits));
  multiply(s, p.fixed[kHead], nullptr, nullptr, s.normed.data(), p.hidden, out, p.shape.vocab_size, false);
  return logits;
}

}  // namespace
}  // namespace mlm

STABLE_TORCH_LIBRARY_IMPL(mlm, CPU, m) {
  m.impl("decode_plan", TORCH_BOX(&mlm::decode_plan));
  m.impl("decode_step", TORCH_BOX(&mlm::decode_step));
}
