// The kernels for x86-64 with AVX2 and FMA.

#if defined(__x86_64__)

#define RNNATTN_SET avx2
#define RNNATTN_LANES 8
#define RNNATTN_TARGET "avx2,fma"
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

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels{"avx2",
                                   avx2::attention::kernels<float>,
                                   avx2::attention::kernels<Bfloat16>,
                                   avx2::attention::kernels<Float16>,
                                   avx2::recurrent::kernels<avx2::lstm::Unit, float>,
                                   avx2::recurrent::kernels<avx2::lstm::Unit, Bfloat16>,
                                   avx2::recurrent::kernels<avx2::lstm::Unit, Float16>,
                                   avx2::recurrent::kernels<avx2::gru::ResetAfter, float>,
                                   avx2::recurrent::kernels<avx2::gru::ResetAfter, Bfloat16>,
                                   avx2::recurrent::kernels<avx2::gru::ResetAfter, Float16>,
                                   avx2::recurrent::kernels<avx2::gru::ResetBefore, float>,
                                   avx2::recurrent::kernels<avx2::rnn::Unit, float>,
                                   avx2::linear::kernels<float>,
                                   avx2::linear::kernels<Bfloat16>,
                                   avx2::linear::kernels<Float16>};
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return runs ? &kernels : nullptr;
}

}  // namespace rnnattn

#else

#include "kernels.h"

namespace rnnattn {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace rnnattn

#endif
