// The kernels for every machine: SSE2 on x86-64, NEON on aarch64.

#define RNNATTN_SET baseline
#define RNNATTN_LANES 4
#include "attention_forward-inl.h"
#include "attention_gradient-inl.h"
#include "kernels.h"
#include "linear-inl.h"
#include "lstm_forward-inl.h"
#include "lstm_gradient-inl.h"

namespace rnnattn {

const Kernels* baseline_kernels() {
  static constexpr Kernels kernels{"baseline",
                                   baseline::attention::kernels<float>,
                                   baseline::attention::kernels<Bfloat16>,
                                   baseline::attention::kernels<Float16>,
                                   baseline::lstm::kernels<float>,
                                   baseline::lstm::kernels<Bfloat16>,
                                   baseline::lstm::kernels<Float16>,
                                   baseline::linear::kernels<float>,
                                   baseline::linear::kernels<Bfloat16>,
                                   baseline::linear::kernels<Float16>};
  return &kernels;
}

}  // namespace rnnattn
