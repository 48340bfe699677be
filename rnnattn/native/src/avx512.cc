// The kernels for x86-64 with AVX-512.

#if defined(__x86_64__)

#define RNNATTN_SET avx512
#define RNNATTN_LANES 16
#define RNNATTN_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#include "attention_forward-inl.h"
#include "attention_gradient-inl.h"
#include "gru_cell-inl.h"
#include "kernels.h"
#include "linear-inl.h"
#include "lstm_cell-inl.h"
#include "recurrent_forward-inl.h"
#include "recurrent_gradient-inl.h"
#include "rnn_cell-inl.h"

namespace rnnattn {

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels{"avx512",
                                   avx512::attention::kernels<float>,
                                   avx512::attention::kernels<Bfloat16>,
                                   avx512::attention::kernels<Float16>,
                                   avx512::recurrent::kernels<avx512::lstm::Unit, float>,
                                   avx512::recurrent::kernels<avx512::lstm::Unit, Bfloat16>,
                                   avx512::recurrent::kernels<avx512::lstm::Unit, Float16>,
                                   avx512::recurrent::kernels<avx512::gru::ResetAfter, float>,
                                   avx512::recurrent::kernels<avx512::gru::ResetAfter, Bfloat16>,
                                   avx512::recurrent::kernels<avx512::gru::ResetAfter, Float16>,
                                   avx512::recurrent::kernels<avx512::gru::ResetBefore, float>,
                                   avx512::recurrent::kernels<avx512::rnn::Unit, float>,
                                   avx512::linear::kernels<float>,
                                   avx512::linear::kernels<Bfloat16>,
                                   avx512::linear::kernels<Float16>};
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("fma");
  return runs ? &kernels : nullptr;
}

}  // namespace rnnattn

#else

#include "kernels.h"

namespace rnnattn {

const Kernels* avx512_kernels() { return nullptr; }

}  // namespace rnnattn

#endif
