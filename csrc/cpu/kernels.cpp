// All CPU kernels for one instruction set. Compiled once for each: with -DMLM_ISA_AVX512 (with and without AVX512_BF16),
// with -DMLM_ISA_AVX2 and with neither, each time with the matching -m flags. Includes no header of torch or of the C++ library's containers (see types.h).
#include "table.h"

#if defined(MLM_ISA_AVX512)
#include "vec_avx512.h"
#elif defined(MLM_ISA_AVX2)
#include "vec_avx2.h"
#else
#include "vec_plain.h"
#endif

namespace mlm::MLM_ISA {
namespace {

#include "vec_double.h"
// Each uses what the ones before it define.
#include "kernels/loops.h"
#include "kernels/dropout.h"
#include "kernels/params.h"
#include "kernels/norm.h"
#include "kernels/softmax.h"
#include "kernels/activation.h"
#include "kernels/cross_entropy.h"
#include "kernels/adamw.h"
#include "kernels/decode.h"
#include "kernels/sum_parts.h"
#include "kernels/interval_attention.h"

template <class T, class V>
constexpr TypeKernels type_kernels(void (*adamw_kernel)(const AdamW&, int64_t, int64_t)) {
  // Sixteen-bit attention is left to the matrix units behind torch's own products.
  using Attention = void (*)(const IntervalAttention&, int64_t, int64_t);
  Attention attention_forward = nullptr, attention_backward = nullptr;
  void (*product_int8)(const Product&, int64_t, int64_t) = nullptr;
  if constexpr (sizeof(T) < sizeof(double)) product_int8 = product<int8_t, T, V>;
  if constexpr (sizeof(T) == sizeof(typename V::scalar)) {
    attention_forward = interval_attention_forward<T, V>;
    attention_backward = interval_attention_backward<T, V>;
  }
  return {
      norm_forward<T, V>,    norm_backward<T, V>,   softmax_forward<T, V>,     softmax_backward<T, V>,
      gelu_forward<T, V>,    gelu_backward<T, V>,   swiglu_forward<T, V>,      swiglu_backward<T, V>,
      cross_entropy_stats<T, V>, cross_entropy_grad<T, V>, adamw_kernel, widen<T, V>, sum_blocks<T, V>,
      product<T, T, V>, product_int8, decode_attention<T, V>, sum_parts<T, V>,
      attention_forward, attention_backward,
  };
}

}  // namespace

const Kernels& kernels() {
  static constexpr Kernels table = {
      MLM_LEVEL,
      {type_kernels<float, Floats>(adamw<float>), type_kernels<bf16, Floats>(adamw<bf16>),
       type_kernels<f16, Floats>(adamw<f16>), type_kernels<double, Doubles>(nullptr)},
  };
  return table;
}

}  // namespace mlm::MLM_ISA
