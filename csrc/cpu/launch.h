// What the CPU wrappers share: dtype to kernel row, parameters in the accumulation type, threading, store policy.
#pragma once

#include "../checks.h"
#include "table.h"

namespace mlm {

inline DType dtype_index(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return kFloat;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kHalf;
    default: return kDouble;
  }
}

inline const TypeKernels& kernels_for(const Tensor& t) { return active().types[dtype_index(t.scalar_type())]; }

// A parameter vector in the accumulation type of x; the same memory when it already is.
inline Tensor widened(const Tensor& parameter, const Tensor& x) {
  const ScalarType wide = wide_type(x.scalar_type());
  const Tensor p = packed(parameter);
  if (p.scalar_type() == wide) return p;
  if (wide == ScalarType::Double) return torch::stable::to(p, wide);
  Tensor out = new_tensor({p.numel()}, wide, p);
  kernels_for(p).widen(pointer(p), pointer(out), p.numel());
  return out;
}
inline MaybeTensor widened(const MaybeTensor& parameter, const Tensor& x) {
  return parameter ? MaybeTensor(widened(*parameter, x)) : std::nullopt;
}

// Rows a thread should at least have: as torch, threads start at some tens of thousands of elements.
inline int64_t row_grain(int64_t width) {
  const int64_t rows = 16384 / (width > 0 ? width : 1);
  return rows > 0 ? rows : 1;
}

template <class Args>
inline void over_rows(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t rows, int64_t grain) {
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Column sums (of dweight and the like) go over fixed blocks of rows, then over the blocks in order: the same bits
// whatever the number of threads.
struct Blocks {
  int64_t count;
  int64_t rows_per_block;
};
inline Blocks row_blocks(int64_t rows) {
  constexpr int64_t smallest = 32, most = 128;
  int64_t per_block = (rows + most - 1) / most;
  per_block = per_block < smallest ? smallest : (per_block + 3) / 4 * 4;
  return {(rows + per_block - 1) / per_block, per_block};
}

// Sums partial [blocks, width] in the accumulation type into a new vector of the given dtype.
inline Tensor sum_blocks(const Tensor& partial, const Tensor& like) {
  const int64_t blocks = partial.size(0), width = partial.size(1);
  const bool wide_double = partial.scalar_type() == ScalarType::Double;
  Tensor out = new_tensor({width}, wide_double ? ScalarType::Double : like.scalar_type(), like);
  const auto kernel = kernels_for(out).sum_blocks;
  const void* from = pointer(partial);
  void* to = pointer(out);
  const int64_t step = 64;
  const int64_t grain = 1 + 16384 / (step * (blocks > 0 ? blocks : 1));
  torch::stable::parallel_for(0, (width + step - 1) / step, grain, [&](int64_t begin, int64_t end) {
    kernel(from, to, blocks, width, begin * step, end * step < width ? end * step : width);
  });
  return wide_double ? torch::stable::to(out, like.scalar_type()) : out;
}

// Non-temporal stores pay when the result is too big to be found in the cache by whoever reads it next. They need whole
// aligned cache lines, so rows must be a multiple of 64 bytes.
inline bool past_cache(const Tensor& out, int64_t width) {
  const int64_t bytes = out.numel() * static_cast<int64_t>(out.element_size());
  return bytes >= (int64_t{32} << 20) && width * static_cast<int64_t>(out.element_size()) % 64 == 0 &&
         reinterpret_cast<uintptr_t>(pointer(out)) % 64 == 0;
}

inline Dropout dropout_of(const char* op, double p, const MaybeTensor& seed) {
  check_probability(op, p, seed);
  Dropout d;
  if (p == 0.0) return d;
  d.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(pointer(*seed)));
  d.threshold = dropout_threshold(p);
  d.scale = 1.0 / (1.0 - p);
  return d;
}

}  // namespace mlm
