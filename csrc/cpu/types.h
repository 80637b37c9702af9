// Storage types of the CPU kernels, apart from torch's headers: kernel sources are compiled once per instruction set, and
// an inline function of a shared header compiled for AVX-512 must never be the copy the linker keeps for every machine.
#pragma once

#include <cstdint>
#include <cstring>

namespace mlm {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Index into the kernel tables.
enum DType : int { kFloat = 0, kBFloat16 = 1, kHalf = 2, kDouble = 3, kNumDTypes = 4 };

}  // namespace mlm
