// The kernels for x86-64 with AMX: those of AVX-512, but that products of bfloat16 are of tiles.

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RNNATTN_SET avx512_amx
#define RNNATTN_LANES 16
#define RNNATTN_PAIRS
#define RNNATTN_TILES
#define RNNATTN_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"
#include "attention_forward-inl.h"
#include "attention_gradient-inl.h"
#include "gru_cell-inl.h"
#include "kernels.h"
#include "lstm_cell-inl.h"
#include "recurrent_forward-inl.h"
#include "recurrent_gradient-inl.h"

namespace rnnattn {

// Whether the machine has tiles and products of bfloat16 in them, and Linux lets this process use
// them: it does not before it is asked, as it must keep 8 KB more of each thread.
static bool has_tiles() {
#if defined(RNNATTN_EMULATED_TILES)
  return true;
#else
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (bf16 | tile))) return false;
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#endif
}

const Kernels* avx512_amx_kernels() {
  static const Kernels* const others = avx512_bf16_kernels();
  static const bool runs = others && has_tiles();
  if (!runs) return nullptr;
  static const Kernels kernels =
      with_bfloat16(*others, "avx512_amx", avx512_amx::attention::kernels<Bfloat16>,
                    avx512_amx::recurrent::kernels<avx512_amx::lstm::Unit, Bfloat16>,
                    avx512_amx::recurrent::kernels<avx512_amx::gru::ResetAfter, Bfloat16>);
  return &kernels;
}

}  // namespace rnnattn

#else

#include "kernels.h"

namespace rnnattn {

const Kernels* avx512_amx_kernels() { return nullptr; }

}  // namespace rnnattn

#endif
