// The kernels for every machine: SSE2 on x86-64, NEON on aarch64.

#include "kernels.h"

namespace rnnattn {
namespace baseline {

#define RNNATTN_LANES 4
#include "vector.inc"

#include "product.inc"

#include "attention.inc"

#include "lstm.inc"

}  // namespace baseline

const Kernels* baseline_kernels() {
  static constexpr Kernels kernels{
      "baseline", baseline::attention_forward, baseline::attention_backward,
      baseline::lstm_forward, baseline::lstm_backward};
  return &kernels;
}

}  // namespace rnnattn
