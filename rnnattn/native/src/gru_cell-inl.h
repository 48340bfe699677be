// The equations of a step and of its gradient, G1 to G6, for W units of a row in registers. Those
// of rnnattn/recurrent/units/gru.py, in its letters: pre-activations are halved where a sigmoid
// follows, σ(a) = ½ + ½ tanh ½a.

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

// The reset after the product: the gates n, r, z and s. x has no block for the last, h₋ none for
// the first, so that those of each are neighbours. Blocks of weights are in the order r, z, n,
// those of h₋ r, z, s.
struct ResetAfter {
  using OfX = recurrent::Blocks<0, 2, 0, 1>;
  using OfH = recurrent::Blocks<1, 0, 1, 2>;
  using OfBias = recurrent::Blocks<0, 2, 0, 1, 3>;
  using OfQ = recurrent::NoBlocks;
  static constexpr int CELLS = 1;
  static constexpr float scale(int g) { return g == 1 || g == 2 ? 0.5f : 1.0f; }
  static constexpr bool CARRIES_C = false;

  template <class Number>
  RNNATTN_INLINE ResetAfter of(const Recurrent<Number>&, int64_t, int) {
    return {};
  }
};

// The reset before the product: the gates r, z and n, the last from q = r ⊙ h₋.
struct ResetBefore {
  using OfX = recurrent::Blocks<0, 0, 1, 2>;
  using OfH = recurrent::Blocks<0, 0, 1>;
  using OfBias = OfX;
  using OfQ = recurrent::Blocks<2, 2>;
  static constexpr int CELLS = 1;
  static constexpr float scale(int g) { return g == 2 ? 1.0f : 0.5f; }
  static constexpr bool CARRIES_C = false;
  static constexpr int RESET = 0;

  template <class Number>
  RNNATTN_INLINE ResetBefore of(const Recurrent<Number>&, int64_t, int) {
    return {};
  }
};

template <class Unit, int count>
RNNATTN_INLINE void see(const Unit&, V, V, V (&)[count]) {}

// G1: the gates r and z; and their slope, in what σ is taken of.
RNNATTN_INLINE V gate(V a) {
  const V half = splat(0.5f);
  return fma(half, tanh(a), half);
}
RNNATTN_INLINE V gate_slope(V g) { return g * (splat(1.0f) - g); }

// G2 with the reset after: what h moves to.
RNNATTN_INLINE V candidate(V a, V r, V s) { return tanh(fma(r, s, a)); }

// G3.
RNNATTN_INLINE V interpolated(V z, V n, V h_prev) { return fma(z, h_prev, (splat(1.0f) - z) * n); }

// G4: d_n and d_z, and of G6 what comes back past the products.
RNNATTN_INLINE void interpolated_gradient(V z, V n, V h_prev, V dh, V& d_n, V& d_z, V& dh_prev) {
  const V one = splat(1.0f);
  d_n = dh * ((one - z) * (one - n * n));
  d_z = dh * ((h_prev - n) * gate_slope(z));
  dh_prev = z * dh;
}

// G1 to G3.
RNNATTN_INLINE void cell(const ResetAfter&, const V (&a)[4], V h_prev, V&, V& h) {
  h = interpolated(gate(a[2]), candidate(a[0], gate(a[1]), a[3]), h_prev);
}
RNNATTN_INLINE void cell(const ResetBefore&, const V (&a)[3], V h_prev, V&, V& h) {
  h = interpolated(gate(a[1]), tanh(a[2]), h_prev);
}

// G4, G5; nothing is projected, and so no m.
RNNATTN_INLINE V cell_gradient(const ResetAfter&, const V (&a)[4], V h_prev, V, V dh, V& dh_prev,
                               V (&dz)[4]) {
  const V r = gate(a[1]), s = a[3];
  interpolated_gradient(gate(a[2]), candidate(a[0], r, s), h_prev, dh, dz[0], dz[2], dh_prev);
  dz[1] = dz[0] * (s * gate_slope(r));
  dz[3] = r * dz[0];
  return splat(0);
}
RNNATTN_INLINE V cell_gradient(const ResetBefore&, const V (&a)[3], V h_prev, V, V dh, V& dh_prev,
                               V (&dz)[3]) {
  interpolated_gradient(gate(a[1]), tanh(a[2]), h_prev, dh, dz[2], dz[1], dh_prev);
  return splat(0);
}

// q = r ⊙ h₋; and of G5 and G6 what comes back through it.
RNNATTN_INLINE V reset(const ResetBefore&, V a, V h_prev) { return gate(a) * h_prev; }
RNNATTN_INLINE V reset_gradient(const ResetBefore&, V a, V h_prev, V dq, V& dh_prev) {
  const V r = gate(a);
  dh_prev = fma(r, dq, dh_prev);
  return dq * (h_prev * gate_slope(r));
}

}  // namespace rnnattn::RNNATTN_SET::gru
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_GRU_CELL_INL_H_
