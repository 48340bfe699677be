// The kernels for x86-64 with AVX2 and FMA.

#include "kernels.h"

namespace rnnattn {

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace avx2 {

#define RNNATTN_LANES 8
#include "vector.inc"

#include "product.inc"

#include "attention.inc"

#include "lstm.inc"

}  // namespace avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels{"avx2", avx2::attention_forward, avx2::attention_backward,
      avx2::lstm_forward, avx2::lstm_backward};
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return runs ? &kernels : nullptr;
}

#else

const Kernels* avx2_kernels() { return nullptr; }

#endif

}  // namespace rnnattn
