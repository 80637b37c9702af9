// All CPU kernels for one instruction set. Compiled three times: with -DMLM_ISA_AVX512, -DMLM_ISA_AVX2 and neither, each
// time with the matching -m flags. Includes no header of torch or of the C++ library's containers (see types.h).
#include "table.h"

#if defined(MLM_ISA_AVX512)
#include "vec_avx512.h"
#define MLM_ISA avx512
#define MLM_LEVEL 2
#elif defined(MLM_ISA_AVX2)
#include "vec_avx2.h"
#define MLM_ISA avx2
#define MLM_LEVEL 1
#else
#include "vec_plain.h"
#define MLM_ISA plain
#define MLM_LEVEL 0
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

template <class T, class V>
constexpr TypeKernels type_kernels(void (*adamw_kernel)(const AdamW&, int64_t, int64_t)) {
  return {
      norm_forward<T, V>,    norm_backward<T, V>,   softmax_forward<T, V>,     softmax_backward<T, V>,
      gelu_forward<T, V>,    gelu_backward<T, V>,   swiglu_forward<T, V>,      swiglu_backward<T, V>,
      cross_entropy_stats<T, V>, cross_entropy_grad<T, V>, adamw_kernel, widen<T, V>, sum_blocks<T, V>,
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
