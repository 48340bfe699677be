// The kernels for x86-64 with AVX-512.

#include "kernels.h"

namespace rnnattn {

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

namespace avx512 {

#define RNNATTN_LANES 16
#include "vector.inc"

#include "product.inc"

#include "attention.inc"

#include "lstm.inc"

}  // namespace avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels{
      "avx512", avx512::attention_forward, avx512::attention_backward,
      avx512::lstm_forward, avx512::lstm_backward};
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("fma");
  return runs ? &kernels : nullptr;
}

#else

const Kernels* avx512_kernels() { return nullptr; }

#endif

}  // namespace rnnattn
