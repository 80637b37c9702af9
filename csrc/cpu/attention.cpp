// CPU operators: interval_attention and its backward.
#include <algorithm>
#include <cstring>
#include <vector>

#include "launch.h"

namespace mlm {
namespace {

// Queries of an item. Keys and values are packed once an item, so it should be long beside a window.
constexpr int64_t kSegment = 1024;

// Runs of keys by query, cut to the keys there are; an empty run ends where it begins.
struct Intervals {
  std::vector<int64_t> begin, end;
  int64_t stride;
};

Intervals read_intervals(const char* op, const Tensor& begin, const Tensor& end, int64_t samples, int64_t queries,
                         int64_t keys) {
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"begin", begin}, {"end", end}})
    MLM_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 2 && (t.size(0) == 1 || t.size(0) == samples) &&
                  t.size(1) == queries && t.size(0) == begin.size(0),
              op, "`", name, "` must be int64 [1 or ", samples, ", ", queries, "], got ", dtype_name(t.scalar_type()),
              " in ", t.dim(), " dimensions of ", t.numel(), " elements");
  const Tensor b = packed(begin), e = packed(end);
  const int64_t* from = static_cast<const int64_t*>(pointer(b));
  const int64_t* to = static_cast<const int64_t*>(pointer(e));
  Intervals found{std::vector<int64_t>(from, from + b.numel()), std::vector<int64_t>(to, to + e.numel()),
                  b.size(0) == 1 ? 0 : queries};
  for (int64_t row = 0; row < b.size(0); ++row) {
    int64_t *lo = found.begin.data() + row * queries, *hi = found.end.data() + row * queries;
    for (int64_t i = 0; i < queries; ++i) {
      lo[i] = std::clamp<int64_t>(lo[i], 0, keys);
      hi[i] = std::max(lo[i], std::clamp<int64_t>(hi[i], 0, keys));
      MLM_CHECK(i == 0 || (lo[i] >= lo[i - 1] && hi[i] >= hi[i - 1]), op,
                "`begin` and `end` must not move back from a query to the next, and do at query ", i);
    }
  }
  return found;
}

Strided strided(const Tensor& t) { return {pointer(t), t.stride(0), t.stride(1), t.stride(2)}; }

// As it is where the last dimension is packed.
Tensor rows_packed(const Tensor& t) { return t.stride(3) == 1 ? t : torch::stable::contiguous(t); }

IntervalAttention describe(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                           const Intervals& intervals) {
  IntervalAttention a{};
  a.query = strided(query);
  a.key = strided(key);
  a.value = strided(value);
  a.begin = intervals.begin.data();
  a.end = intervals.end.data();
  a.interval_stride = intervals.stride;
  a.samples = query.size(0);
  a.heads = query.size(1);
  a.groups = key.size(1);
  a.queries = query.size(2);
  a.keys = key.size(2);
  a.dim = query.size(3);
  a.scale = scale;
  a.segment = kSegment;
  return a;
}

void check_inputs(const char* op, const Tensor& query, const Tensor& key, const Tensor& value) {
  MLM_CHECK(query.scalar_type() == ScalarType::Float || query.scalar_type() == ScalarType::Double, op,
            "`query` must be float32 or float64, got ", dtype_name(query.scalar_type()));
  MLM_CHECK(query.dim() == 4 && key.dim() == 4, op, "`query` and `key` must be [b, heads, tokens, d], got ", query.dim(),
            " and ", key.dim(), " dimensions");
  check_like(op, "value", value, "key", key);
  MLM_CHECK(key.scalar_type() == query.scalar_type(), op, "`key` must be ", dtype_name(query.scalar_type()),
            " as `query`, got ", dtype_name(key.scalar_type()));
  MLM_CHECK(key.size(0) == query.size(0) && key.size(3) == query.size(3) && key.size(1) > 0 &&
                query.size(1) % key.size(1) == 0,
            op, "`key` must have the samples and the width of `query` and a divisor of its ", query.size(1),
            " heads, got ", key.size(0), ", ", key.size(3), " and ", key.size(1));
  MLM_CHECK(query.size(3) > 0 && query.size(3) % 16 == 0, op, "`query` must be a multiple of 16 wide, got ", query.size(3));
}

// Items whose keys do not overlap run side by side; which they are depends on the intervals alone, so that sums over
// queries have one order whatever the number of threads.
int64_t phases_of(const IntervalAttention& a, int64_t segments, int64_t rows_of_intervals) {
  const auto separate = [&](int64_t apart) {
    for (int64_t row = 0; row < rows_of_intervals; ++row)
      for (int64_t s = 0; s + apart < segments; ++s) {
        const int64_t last = row * a.queries + std::min((s + 1) * a.segment, a.queries) - 1;
        const int64_t stop = (a.end[last] + kPanel - 1) / kPanel;
        if (a.begin[row * a.queries + (s + apart) * a.segment] / kPanel < stop) return false;
      }
    return true;
  };
  int64_t phases = 1;
  while (!separate(phases)) ++phases;
  return phases;
}

void run(void (*kernel)(const IntervalAttention&, int64_t, int64_t), IntervalAttention& a, int64_t heads, int64_t phases) {
  const int64_t segments = (a.queries + a.segment - 1) / a.segment;
  a.phases = phases;
  a.heads_a_sample = heads;
  for (a.phase = 0; a.phase < std::min(phases, segments); ++a.phase) {
    a.items_a_head = (segments - a.phase + phases - 1) / phases;
    over_rows(kernel, a, a.samples * heads * a.items_a_head, 1);
  }
}

std::tuple<Tensor, Tensor> interval_attention(Tensor query, Tensor key, Tensor value, Tensor begin, Tensor end,
                                              double scale) {
  const char* op = "interval_attention";
  check_inputs(op, query, key, value);
  const Intervals intervals = read_intervals(op, begin, end, query.size(0), query.size(2), key.size(2));
  const Tensor q = rows_packed(query), k = rows_packed(key), v = rows_packed(value);
  Tensor out = new_like(query);
  Tensor lse = new_tensor({query.size(0), query.size(1), query.size(2)}, query.scalar_type(), query);
  IntervalAttention a = describe(q, k, v, scale, intervals);
  a.out = pointer(out);
  a.lse = pointer(lse);
  run(kernels_for(query).interval_attention_forward, a, a.heads, 1);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> interval_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value,
                                                               Tensor lse, Tensor begin, Tensor end, double scale) {
  const char* op = "interval_attention_backward";
  check_inputs(op, query, key, value);
  check_like(op, "grad", grad, "query", query);
  MLM_CHECK(lse.scalar_type() == query.scalar_type() && lse.numel() * query.size(3) == query.numel(), op,
            "`lse` must be ", dtype_name(query.scalar_type()), " with one element a query, got ",
            dtype_name(lse.scalar_type()), " with ", lse.numel());
  const Intervals intervals = read_intervals(op, begin, end, query.size(0), query.size(2), key.size(2));
  const Tensor q = rows_packed(query), k = rows_packed(key), v = rows_packed(value), g = rows_packed(grad),
               sums = packed(lse);
  Tensor dquery = new_like(query), dkey = new_like(key), dvalue = new_like(value);
  const int64_t width = key.size(2) * key.size(3) * static_cast<int64_t>(key.element_size());
  torch::stable::parallel_for(0, key.size(0) * key.size(1), 1, [&](int64_t from, int64_t to) {
    for (const Tensor* sum : {&dkey, &dvalue})
      std::memset(static_cast<char*>(pointer(*sum)) + from * width, 0, static_cast<size_t>((to - from) * width));
  });
  IntervalAttention a = describe(q, k, v, scale, intervals);
  a.grad = strided(g);
  a.lse = pointer(sums);
  a.out = pointer(dquery);
  a.dkey = pointer(dkey);
  a.dvalue = pointer(dvalue);
  if (a.queries > 0)
    run(kernels_for(query).interval_attention_backward, a, a.groups,
        phases_of(a, (a.queries + a.segment - 1) / a.segment, intervals.stride ? a.samples : 1));
  return {dquery, dkey, dvalue};
}

}  // namespace
}  // namespace mlm

STABLE_TORCH_LIBRARY_IMPL(mlm, CPU, m) {
  m.impl("interval_attention", TORCH_BOX(&mlm::interval_attention));
  m.impl("interval_attention_backward", TORCH_BOX(&mlm::interval_attention_backward));
}
