// The equations of a step and of its gradient, L1 to L4 and L8, for W units of a row in registers.
// Those of rnnattn/recurrent/units/lstm.py, in its letters: pre-activations a are halved where a
// sigmoid follows, σ(z) = ½ + ½ tanh ½z.

#ifndef RNNATTN_LSTM_CELL_INL_H_
#define RNNATTN_LSTM_CELL_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "recurrent_unit-inl.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::lstm {

// W units, and how their cell differs from the plain one; all rows of a call take the same
// branches. Each of the gates i, f, g, o has a block of all weights.
struct Unit {
  using OfX = recurrent::Blocks<0, 0, 1, 2, 3>;
  using OfH = OfX;
  using OfBias = OfX;
  using OfQ = recurrent::NoBlocks;
  static constexpr int CELLS = 1;
  static constexpr float scale(int g) { return g == 2 ? 1.0f : 0.5f; }
  static constexpr bool CARRIES_C = true;

  float clip;  // 0: none
  bool coupled;
  bool has_peepholes;
  V p_i, p_f, p_o;

  template <class Number>
  RNNATTN_INLINE Unit of(const Recurrent<Number>& s, int64_t j, int n) {
    Unit unit{s.clip, s.coupled, s.peephole != nullptr, {}, {}, {}};
    if (unit.has_peepholes) {
      unit.p_i = load_units(s.peephole + j, n);
      unit.p_f = load_units(s.peephole + s.H + j, n);
      unit.p_o = load_units(s.peephole + 2 * s.H + j, n);
    }
    return unit;
  }
};

// What the input and the forget gate see of c₋, and the output gate of c.
RNNATTN_INLINE void see_before(const Unit& unit, V c_prev, V (&a)[4]) {
  if (!unit.has_peepholes) return;
  const V half = splat(0.5f);
  a[0] = fma(half * unit.p_i, c_prev, a[0]);
  a[1] = fma(half * unit.p_f, c_prev, a[1]);
}
RNNATTN_INLINE void see_after(const Unit& unit, V c, V (&a)[4]) {
  if (!unit.has_peepholes) return;
  const V half = splat(0.5f);
  a[3] = fma(half * unit.p_o, c, a[3]);
}
RNNATTN_INLINE void see(const Unit& unit, V c_prev, V c, V (&a)[4]) {
  see_before(unit, c_prev, a);
  see_after(unit, c, a);
}

// Within the clip; NaN stays NaN.
RNNATTN_INLINE V clipped(V a, float clip) {
  if (clip == 0) return a;
  return min(splat(clip), max(splat(-clip), a));
}

// L1: the gates i and o, the forget gate, and the candidate g.
RNNATTN_INLINE V gate(const Unit& unit, V a) {
  const V half = splat(0.5f);
  return fma(half, tanh(clipped(a, 0.5f * unit.clip)), half);
}
RNNATTN_INLINE V forget_gate(const Unit& unit, V a, V i) {
  return unit.coupled ? splat(1.0f) - i : gate(unit, a);
}
RNNATTN_INLINE V candidate(const Unit& unit, V a) { return tanh(clipped(a, unit.clip)); }

// L1, L2: from a to c and m = o ⊙ tanh c, which is h where nothing is projected; and a with its
// peepholes.
RNNATTN_INLINE void cell(const Unit& unit, V (&a)[4], V c_prev, V& c, V& m) {
  see_before(unit, c_prev, a);
  const V i = gate(unit, a[0]), f = forget_gate(unit, a[1], i);
  const V g = candidate(unit, a[2]);
  c = fma(f, c_prev, i * g);
  see_after(unit, c, a);
  const V o = gate(unit, a[3]);
  m = o * tanh(c);
}

// A slope, where the pre-activation is within the clip: beyond it, it moves nothing.
RNNATTN_INLINE V within(V slope, V a, float clip) {
  if (clip == 0) return slope;
  const Words beyond = where((a > splat(clip)) | (a < splat(-clip)));
  return of_bits(bits_of(slope) & ~beyond);
}

// L3, L4, L8: dz from the cotangents of m and c, and that of c₋ in the place of c's; m, which the
// gradient of a projection needs. `a` with its peepholes.
RNNATTN_INLINE V cell_gradient(const Unit& unit, const V (&a)[4], V c_prev, V c, V dm, V& dc,
                               V (&dz)[4]) {
  const V one = splat(1.0f);
  const V i = gate(unit, a[0]), f = forget_gate(unit, a[1], i);
  const V g = candidate(unit, a[2]), o = gate(unit, a[3]);
  const V tanh_c = tanh(c);
  const V of_input = unit.coupled ? g - c_prev : g;
  const V of_forget = unit.coupled ? splat(0) : c_prev;
  dz[3] = dm * within(tanh_c * (o * (one - o)), a[3], 0.5f * unit.clip);
  V d = fma(dm * o, one - tanh_c * tanh_c, dc);
  if (unit.has_peepholes) d = fma(dz[3], unit.p_o, d);
  dz[0] = d * within(of_input * (i * (one - i)), a[0], 0.5f * unit.clip);
  dz[1] = d * within(of_forget * (f * (one - f)), a[1], 0.5f * unit.clip);
  dz[2] = d * within(i * (one - g * g), a[2], unit.clip);
  dc = d * f;
  if (unit.has_peepholes) dc = fma(dz[0], unit.p_i, fma(dz[1], unit.p_f, dc));
  return o * tanh_c;
}

}  // namespace rnnattn::RNNATTN_SET::lstm
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_LSTM_CELL_INL_H_
