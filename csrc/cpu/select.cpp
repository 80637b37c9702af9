// Chooses the instruction set at run time.
#include <cstdlib>

#include "table.h"

namespace mlm {
namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* asked = std::getenv("MLM_CPU_ISA");
  const auto wants = [&](const char* isa) { return asked && !std::strcmp(asked, isa); };
  const bool no_avx2 = wants("plain"), no_avx512 = no_avx2 || wants("avx2"), no_bf16 = no_avx512 || wants("avx512");
  __builtin_cpu_init();
  if (!no_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return !no_bf16 && __builtin_cpu_supports("avx512bf16") ? avx512bf16::kernels() : avx512::kernels();
  if (!no_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return avx2::kernels();
#endif
  return plain::kernels();
}

}  // namespace

const Kernels& active() {
  static const Kernels& table = choose();
  return table;
}

}  // namespace mlm
