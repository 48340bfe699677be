// The equations of a step and of its gradient, R1 and R2, for W units of a row in registers. Those
// of rnnattn/recurrent/units/rnn.py, in its letters.

#ifndef RNNATTN_RNN_CELL_INL_H_
#define RNNATTN_RNN_CELL_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "recurrent_unit-inl.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::rnn {

// One gate: a tile of registers is of four times as many units.
struct Unit {
  using OfX = recurrent::Blocks<0, 0>;
  using OfH = OfX;
  using OfBias = OfX;
  using OfQ = recurrent::NoBlocks;
  static constexpr int CELLS = recurrent::TILE_WIDTH;
  static constexpr float scale(int) { return 1.0f; }
  static constexpr bool CARRIES_C = false;

  bool relu;  // φ is relu, or tanh

  template <class Number>
  RNNATTN_INLINE Unit of(const Recurrent<Number>& s, int64_t, int) {
    return {s.relu};
  }
};

RNNATTN_INLINE void see(const Unit&, V, V, V (&)[1]) {}

// R1; a NaN stays one.
RNNATTN_INLINE void cell(const Unit& unit, const V (&a)[1], V, V&, V& h) {
  h = unit.relu ? max(splat(0), a[0]) : tanh(a[0]);
}

// R2; h₋ is read by the product alone, and nothing is projected.
RNNATTN_INLINE V cell_gradient(const Unit& unit, const V (&a)[1], V, V, V dh, V& dh_prev,
                               V (&dz)[1]) {
  dh_prev = splat(0);
  if (unit.relu) {
    dz[0] = of_bits(bits_of(dh) & where(a[0] > splat(0)));
  } else {
    const V h = tanh(a[0]);
    dz[0] = dh * (splat(1.0f) - h * h);
  }
  return splat(0);
}

}  // namespace rnnattn::RNNATTN_SET::rnn
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_RNN_CELL_INL_H_
