// The equations of a step and of its gradient, G1 to G6, for W units of a row in registers. Those
// of rnnattn/recurrent/units/gru.py with the reset after the product, in its letters:
// pre-activations are halved where a sigmoid follows, σ(a) = ½ + ½ tanh ½a.

#ifndef RNNATTN_GRU_CELL_INL_H_
#define RNNATTN_GRU_CELL_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "recurrent_unit-inl.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::gru {

// The gates n, r, z and s: x has no block for the last, h₋ none for the first, so that those of
// each are neighbours. Blocks of weights are in the order r, z, n, those of h₋ r, z, s.
struct Unit {
  using OfX = recurrent::Blocks<0, 2, 0, 1>;
  using OfH = recurrent::Blocks<1, 0, 1, 2>;
  using OfBias = recurrent::Blocks<0, 2, 0, 1, 3>;
  static constexpr float scale(int g) { return g == 1 || g == 2 ? 0.5f : 1.0f; }
  static constexpr bool CARRIES_C = false;

  template <class Number>
  RNNATTN_INLINE Unit of(const Recurrent<Number>&, int64_t, int) {
    return {};
  }
};

RNNATTN_INLINE void see(const Unit&, V, V, V (&)[4]) {}

// G1: the gates r and z; and their slope, in what σ is taken of.
RNNATTN_INLINE V gate(V a) {
  const V half = splat(0.5f);
  return fma(half, tanh(a), half);
}
RNNATTN_INLINE V gate_slope(V g) { return g * (splat(1.0f) - g); }

// G2: what h moves to.
RNNATTN_INLINE V candidate(V a, V r, V s) { return tanh(fma(r, s, a)); }

// G1 to G3.
RNNATTN_INLINE void cell(const Unit&, const V (&a)[4], V h_prev, V&, V& h) {
  const V r = gate(a[1]), z = gate(a[2]), n = candidate(a[0], r, a[3]);
  h = fma(z, h_prev, (splat(1.0f) - z) * n);
}

// G4, G5, and of G6 what comes back past the products; nothing is projected, and so no m.
RNNATTN_INLINE V cell_gradient(const Unit&, const V (&a)[4], V h_prev, V, V dh, V& dh_prev,
                               V (&dz)[4]) {
  const V one = splat(1.0f);
  const V r = gate(a[1]), z = gate(a[2]), s = a[3], n = candidate(a[0], r, s);
  dz[0] = dh * ((one - z) * (one - n * n));
  dz[1] = dz[0] * (s * gate_slope(r));
  dz[2] = dh * ((h_prev - n) * gate_slope(z));
  dz[3] = r * dz[0];
  dh_prev = z * dh;
  return splat(0);
}

}  // namespace rnnattn::RNNATTN_SET::gru
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_GRU_CELL_INL_H_
