// The kernels for AArch64 with products of bfloat16 (BFDOT, which Armv8.6 has and Armv8.2 may
// have): those of every such machine, but for an LSTM of such numbers.

#if defined(__linux__) && defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16)

#define RNNATTN_SET neon_bf16
#define RNNATTN_LANES 4
#define RNNATTN_PAIRS
#define RNNATTN_TARGET "arch=armv8.2-a+bf16"
#include <sys/auxv.h>

#include "gru_cell-inl.h"
#include "kernels.h"
#include "lstm_cell-inl.h"
#include "recurrent_forward-inl.h"
#include "recurrent_gradient-inl.h"

namespace rnnattn {

const Kernels* neon_bf16_kernels() {
  constexpr unsigned long BF16 = 1 << 14;  // HWCAP2_BF16, which older headers do not name
  if (!(getauxval(AT_HWCAP2) & BF16)) return nullptr;
  static const Kernels* const others = baseline_kernels();
  static const Kernels kernels =
      with_bfloat16(*others, "neon_bf16", others->attention_bf16,
                    neon_bf16::recurrent::kernels<neon_bf16::lstm::Unit, Bfloat16>,
                    neon_bf16::recurrent::kernels<neon_bf16::gru::ResetAfter, Bfloat16>);
  return &kernels;
}

}  // namespace rnnattn

#else

#include "kernels.h"

namespace rnnattn {

const Kernels* neon_bf16_kernels() { return nullptr; }

}  // namespace rnnattn

#endif
