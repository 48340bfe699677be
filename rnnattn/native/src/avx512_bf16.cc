// The kernels for x86-64 with AVX-512 and its products of bfloat16 and of integers: those of
// AVX-512, but for bfloat16.

#if defined(__x86_64__)

#define RNNATTN_SET avx512_bf16
#define RNNATTN_LANES 16
#define RNNATTN_PAIRS
#define RNNATTN_FIXED
#define RNNATTN_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma"
#include "attention_forward-inl.h"
#include "attention_gradient-inl.h"
#include "gru_cell-inl.h"
#include "kernels.h"
#include "lstm_cell-inl.h"
#include "recurrent_forward-inl.h"
#include "recurrent_gradient-inl.h"

namespace rnnattn {

const Kernels* avx512_bf16_kernels() {
  static const Kernels* const others = avx512_kernels();
  const bool runs =
      others && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (!runs) return nullptr;
  static const Kernels kernels =
      with_bfloat16(*others, "avx512_bf16", avx512_bf16::attention::kernels<Bfloat16>,
                    avx512_bf16::recurrent::kernels<avx512_bf16::lstm::Unit, Bfloat16>,
                    avx512_bf16::recurrent::kernels<avx512_bf16::gru::ResetAfter, Bfloat16>);
  return &kernels;
}

}  // namespace rnnattn

#else

#include "kernels.h"

namespace rnnattn {

const Kernels* avx512_bf16_kernels() { return nullptr; }

}  // namespace rnnattn

#endif
