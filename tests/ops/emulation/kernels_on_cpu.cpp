// The CUDA kernels of csrc/cuda/kernels behind C functions, run by the emulation; called from test_cuda_kernels.py.
// Pointers are CPU memory; dtype: 0 float32, 1 bfloat16, 2 float16; parameters (weight, bias) are float32.
#include "cuda_on_cpu.h"

#include "cuda/kernels/device.cuh"

namespace mlm::cuda {
float widen(float a) { return a; }
float widen(bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
float widen(f16 a) {
  _Float16 h;
  std::memcpy(&h, &a, 2);
  return static_cast<float>(h);
}
void narrow(float a, float* p) { *p = a; }
void narrow(float a, bf16* p) {
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  p->bits = a != a ? 0x7fc0 : static_cast<uint16_t>((bits + ((bits >> 16) & 1) + 0x7fff) >> 16);
}
void narrow(float a, f16* p) {
  const _Float16 h = static_cast<_Float16>(a);
  std::memcpy(p, &h, 2);
}
float exp2_fast(float a) { return std::exp2(a); }
float divide_fast(float a, float b) { return a / b; }
}  // namespace mlm::cuda

#include "cuda/kernels/activation.cuh"
#include "cuda/kernels/column_sums.cuh"
#include "cuda/kernels/geometry.cuh"
#include "cuda/kernels/norm_backward.cuh"
#include "cuda/kernels/norm_forward.cuh"
#include "cuda/kernels/softmax.cuh"
#include "cuda/kernels/training.cuh"

using namespace mlm::cuda;

namespace {

template <class F>
void by_type(int dtype, bool aligned, F&& f) {
  if (dtype == 0)
    aligned ? f(float{}, Int<4>{}) : f(float{}, Int<1>{});
  else if (dtype == 1)
    aligned ? f(bf16{}, Int<8>{}) : f(bf16{}, Int<1>{});
  else
    aligned ? f(f16{}, Int<8>{}) : f(f16{}, Int<1>{});
}

Param parameter(const float* p) { return {p, kParamFloat}; }
Dropout drop(const int64_t* seed, double p) {
  return {seed, p > 0 ? static_cast<uint32_t>(p * 4294967296.0) : 0u, static_cast<float>(1.0 / (1.0 - p))};
}

}  // namespace

extern "C" {

void norm_forward(int dtype, int aligned, const void* x, const void* residual, const float* pre_bias, const float* weight,
                  const float* bias, void* total, void* out, float* mean, float* rstd, int64_t rows, int64_t width,
                  const int64_t* seed, double p) {
  NormForward a{x, residual, parameter(pre_bias), parameter(weight), parameter(bias), total, out, mean, rstd, rows, width,
                1e-5f, drop(seed, p)};
  by_type(dtype, aligned, [&](auto t, auto n) {
    using T = decltype(t);
    constexpr int N = decltype(n)::value;
    constexpr Share share = norm_forward_share(N);
    const Geometry g = row_geometry(width, N, share);
    by_residual(total != nullptr, [&](auto residual) {
      constexpr bool kResidual = decltype(residual)::value;
      if (g.packs == 0) {
        MLM_LAUNCH((norm_forward_wide_kernel<T, N, kResidual>), static_cast<unsigned>(rows), 1024, 0, 0, a);
        return;
      }
      by_packs<N, share.most>(g.packs, [&](auto k) {
        MLM_LAUNCH((norm_forward_kernel<T, N, decltype(k)::value, kResidual>), row_blocks(rows, g.block), g.block, 0, 0, a);
      });
    });
  });
}

// partials: [lines, width] each; terms: [rows, 2]
void norm_backward(int dtype, int aligned, const void* grad, const void* grad_total, const void* x, const float* weight,
                   const float* mean, const float* rstd, void* dx, void* dbranch, float* dweight, float* dbias,
                   float* dpre_bias, float* terms, int64_t rows, int64_t width, int64_t lines, const int64_t* seed,
                   double p) {
  NormBackward a{grad, grad_total, x, parameter(weight), mean, rstd, dx, dbranch, dweight, dbias, dpre_bias, terms, rows,
                 width, (rows + lines - 1) / lines, drop(seed, p)};
  by_type(dtype, aligned, [&](auto t, auto n) {
    using T = decltype(t);
    constexpr int N = decltype(n)::value;
    const unsigned grid = static_cast<unsigned>(lines);
    by_residual(grad_total || dbranch || dpre_bias, [&](auto residual) {
      constexpr bool kResidual = decltype(residual)::value;
      constexpr Share share = norm_backward_share(N, kResidual);
      const Geometry g = row_geometry(width, N, share);
      if (g.packs == 0) {
        const unsigned columns = static_cast<unsigned>((width + 32 * N - 1) / (32 * N));
        MLM_LAUNCH((norm_terms_kernel<T, N>), static_cast<unsigned>(rows), 1024, 0, 0, a);
        MLM_LAUNCH((norm_tiles_kernel<T, N>), dim3(columns, grid), dim3(32, 8), 0, 0, a);
        return;
      }
      by_packs<N, share.most>(g.packs, [&](auto k) {
        constexpr int K = decltype(k)::value, R = norm_backward_rows(N, K, kResidual);
        const size_t shared = 3 * static_cast<size_t>(width) * sizeof(float);
        MLM_LAUNCH((norm_backward_kernel<T, N, K, R, kResidual, norm_backward_bound(N, K, kResidual)>), grid, g.block.x,
                   shared, 0, a);
      });
    });
  });
}

void column_sums(const float* partial, float* out, int64_t lines, int64_t width) {
  ColumnSums a{{partial}, {out}, {kParamFloat}, lines, width};
  MLM_LAUNCH(column_sums_kernel, static_cast<unsigned>((width + 31) / 32), dim3(32, 32), 0, 0, a);
}

void softmax_forward(int dtype, int aligned, const void* x, void* out, void* probs, const void* mask, int mask_kind,
                     const int64_t* sizes, const int64_t* strides, int dims, int64_t key_stride, int64_t rows, int64_t keys,
                     float scale, int causal, int64_t queries, int64_t offset, int64_t window, const int64_t* seed, double p) {
  SoftmaxForward a{};
  a.x = x, a.out = out, a.probs = probs, a.mask = mask, a.mask_kind = mask_kind, a.dims = dims;
  for (int d = 0; d < dims; ++d) a.sizes[d] = sizes[d], a.mask_strides[d] = strides[d];
  a.mask_key_stride = key_stride, a.rows = rows, a.keys = keys, a.scale = scale;
  a.causal = {causal != 0, queries, offset, window};
  a.dropout = drop(seed, p);
  by_type(dtype, aligned, [&](auto t, auto n) {
    using T = decltype(t);
    constexpr int N = decltype(n)::value;
    by_form<N>(softmax_form(a, N), [&](auto f) {
      constexpr int kForm = decltype(f)::value;
      constexpr Share share = softmax_forward_share(N, kForm);
      const Geometry g = row_geometry(keys, N, share);
      if (g.packs == 0) {
        MLM_LAUNCH((softmax_forward_wide_kernel<T, N, kForm>), static_cast<unsigned>(rows), 1024, 0, 0, a);
        return;
      }
      by_packs<N, share.most>(g.packs, [&](auto k) {
        MLM_LAUNCH((softmax_forward_kernel<T, N, decltype(k)::value, kForm>), row_blocks(rows, g.block), g.block, 0, 0, a);
      });
    });
  });
}

void softmax_backward(int dtype, int aligned, const void* grad, const void* probs, void* dx, int64_t rows, int64_t keys,
                      float scale, int causal, int64_t queries, int64_t offset, int64_t window, const int64_t* seed, double p) {
  SoftmaxBackward a{grad, probs, dx, rows, keys, scale, {causal != 0, queries, offset, window}, drop(seed, p)};
  by_type(dtype, aligned, [&](auto t, auto n) {
    using T = decltype(t);
    constexpr int N = decltype(n)::value;
    constexpr Share share = softmax_backward_share(N);
    const Geometry g = row_geometry(keys, N, share);
    if (g.packs == 0) {
      MLM_LAUNCH((softmax_backward_wide_kernel<T, N>), static_cast<unsigned>(rows), 1024, 0, 0, a);
      return;
    }
    by_packs<N, share.most>(g.packs, [&](auto k) {
      MLM_LAUNCH((softmax_backward_kernel<T, N, decltype(k)::value>), row_blocks(rows, g.block), g.block, 0, 0, a);
    });
  });
}

// kind: 0 gelu, 1 swiglu
void activation_forward(int kind, int dtype, int aligned, const void* x, const float* bias, void* out, int64_t rows,
                        int64_t width) {
  Activation a{x, parameter(bias), nullptr, out, nullptr, rows, width, 0};
  by_type(dtype, aligned, [&](auto t, auto n) {
    using T = decltype(t);
    constexpr int N = decltype(n)::value;
    if (kind == 0)
      MLM_LAUNCH((gelu_forward_kernel<T, N>), 3, dim3(32, 8), 0, 0, a);
    else
      MLM_LAUNCH((swiglu_forward_kernel<T, N>), 3, dim3(64, 4), 0, 0, a);
  });
}

// dbias: [ceil(rows / rows_per_block), width] or null
void activation_backward(int kind, int dtype, int aligned, const void* grad, const void* x, const float* bias, void* dx,
                         float* dbias, int64_t rows, int64_t width, int64_t rows_per_block) {
  Activation a{x, parameter(bias), grad, dx, dbias, rows, width, rows_per_block};
  by_type(dtype, aligned, [&](auto t, auto n) {
    using T = decltype(t);
    constexpr int N = decltype(n)::value;
    const dim3 grid(static_cast<unsigned>((width + 32 * N - 1) / (32 * N)),
                    static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block));
    if (kind == 0)
      MLM_LAUNCH((gelu_backward_kernel<T, N>), grid, dim3(32, 8), 0, 0, a);
    else
      MLM_LAUNCH((swiglu_backward_kernel<T, N>), 3, dim3(64, 4), 0, 0, a);
  });
}

void cross_entropy(int dtype, int aligned, void* logits, const int64_t* labels, float* maximum, float* sum, float* target,
                   const float* lse, const float* scale, int64_t rows, int64_t stride, int64_t width, int64_t num_valid,
                   int64_t vocab_start) {
  CrossEntropy a{logits, labels, maximum, sum, target, lse, scale, stride, width, num_valid, vocab_start};
  by_type(dtype, aligned, [&](auto t, auto n) {
    using T = decltype(t);
    constexpr int N = decltype(n)::value;
    if (lse)
      MLM_LAUNCH((cross_entropy_grad_kernel<T, N>), dim3(static_cast<unsigned>(rows), 2), 256, 0, 0, a);
    else
      MLM_LAUNCH((cross_entropy_stats_kernel<T, N>), static_cast<unsigned>(rows), 256, 0, 0, a);
  });
}

void adamw(int dtype, int aligned, float* master, const void* grad, float* exp_avg, float* exp_avg_sq, void* copy,
           int copy_type, int64_t count, const float* settings) {
  AdamW a{master, grad, exp_avg, exp_avg_sq, copy, copy_type, count, settings[0], settings[1], settings[2], settings[3],
          settings[4], settings[5], settings[6], settings[7]};
  by_type(dtype, false, [&](auto t, auto) {
    using T = decltype(t);
    if (aligned)
      MLM_LAUNCH((adamw_kernel<T, 4>), 3, 64, 0, 0, a);
    else
      MLM_LAUNCH((adamw_kernel<T, 1>), 3, 64, 0, 0, a);
  });
}
}
