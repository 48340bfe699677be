// The kernels for every machine: SSE2 on x86-64, NEON on aarch64.

#define RNNATTN_SET baseline
#define RNNATTN_LANES 4
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

const Kernels* baseline_kernels() {
  static constexpr Kernels kernels{
      "baseline",
      baseline::attention::kernels<float>,
      baseline::attention::kernels<Bfloat16>,
      baseline::attention::kernels<Float16>,
      baseline::recurrent::kernels<baseline::lstm::Unit, float>,
      baseline::recurrent::kernels<baseline::lstm::Unit, Bfloat16>,
      baseline::recurrent::kernels<baseline::lstm::Unit, Float16>,
      baseline::recurrent::kernels<baseline::gru::ResetAfter, float>,
      baseline::recurrent::kernels<baseline::gru::ResetAfter, Bfloat16>,
      baseline::recurrent::kernels<baseline::gru::ResetAfter, Float16>,
      baseline::recurrent::kernels<baseline::gru::ResetBefore, float>,
      baseline::recurrent::kernels<baseline::rnn::Unit, float>,
      baseline::linear::kernels<float>,
      baseline::linear::kernels<Bfloat16>,
      baseline::linear::kernels<Float16>};
  return &kernels;
}

}  // namespace rnnattn
