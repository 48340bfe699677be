// The equations of a step and of its gradient, L1 to L4 and L8, for W units of a row in registers.
// Those of rnnattn/recurrent/units/lstm.py, in its letters: pre-activations a are halved where a
// sigmoid follows, σ(z) = ½ + ½ tanh ½z.

#ifndef RNNATTN_LSTM_CELL_INL_H_
#define RNNATTN_LSTM_CELL_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::lstm {

// How the cell of W units differs from the plain one. All rows of a call take the same branches.
struct Variant {
  float clip;  // 0: none
  bool coupled;
  bool has_peepholes;
  V p_i, p_f, p_o;
};

template <class Number>
RNNATTN_INLINE Variant variant_of(const Lstm<Number>& s, int64_t j, int n) {
  Variant variant{s.clip, s.coupled, s.peephole != nullptr, {}, {}, {}};
  if (variant.has_peepholes) {
    variant.p_i = load_units(s.peephole + j, n);
    variant.p_f = load_units(s.peephole + s.H + j, n);
    variant.p_o = load_units(s.peephole + 2 * s.H + j, n);
  }
  return variant;
}

// What the input and the forget gate see of c₋, and the output gate of c.
RNNATTN_INLINE void see_before(const Variant& variant, V c_prev, V (&a)[4]) {
  if (!variant.has_peepholes) return;
  const V half = splat(0.5f);
  a[0] = fma(half * variant.p_i, c_prev, a[0]);
  a[1] = fma(half * variant.p_f, c_prev, a[1]);
}
RNNATTN_INLINE void see_after(const Variant& variant, V c, V (&a)[4]) {
  if (!variant.has_peepholes) return;
  const V half = splat(0.5f);
  a[3] = fma(half * variant.p_o, c, a[3]);
}

// Within the clip; NaN stays NaN.
RNNATTN_INLINE V clipped(V a, float clip) {
  if (clip == 0) return a;
  return min(splat(clip), max(splat(-clip), a));
}

// L1: the gates i and o, the forget gate, and the candidate g.
RNNATTN_INLINE V gate(const Variant& variant, V a) {
  const V half = splat(0.5f);
  return fma(half, tanh(clipped(a, 0.5f * variant.clip)), half);
}
RNNATTN_INLINE V forget_gate(const Variant& variant, V a, V i) {
  return variant.coupled ? splat(1.0f) - i : gate(variant, a);
}
RNNATTN_INLINE V candidate(const Variant& variant, V a) { return tanh(clipped(a, variant.clip)); }

// L1, L2: from a to c and m = o ⊙ tanh c, which is h where nothing is projected; and a with its
// peepholes.
RNNATTN_INLINE void cell(const Variant& variant, V (&a)[4], V c_prev, V& c, V& m) {
  see_before(variant, c_prev, a);
  const V i = gate(variant, a[0]), f = forget_gate(variant, a[1], i);
  const V g = candidate(variant, a[2]);
  c = fma(f, c_prev, i * g);
  see_after(variant, c, a);
  const V o = gate(variant, a[3]);
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
RNNATTN_INLINE V cell_gradient(const Variant& variant, const V (&a)[4], V c_prev, V c, V dm, V& dc,
                               V (&dz)[4]) {
  const V one = splat(1.0f);
  const V i = gate(variant, a[0]), f = forget_gate(variant, a[1], i);
  const V g = candidate(variant, a[2]), o = gate(variant, a[3]);
  const V tanh_c = tanh(c);
  const V of_input = variant.coupled ? g - c_prev : g;
  const V of_forget = variant.coupled ? splat(0) : c_prev;
  dz[3] = dm * within(tanh_c * (o * (one - o)), a[3], 0.5f * variant.clip);
  V d = fma(dm * o, one - tanh_c * tanh_c, dc);
  if (variant.has_peepholes) d = fma(dz[3], variant.p_o, d);
  dz[0] = d * within(of_input * (i * (one - i)), a[0], 0.5f * variant.clip);
  dz[1] = d * within(of_forget * (f * (one - f)), a[1], 0.5f * variant.clip);
  dz[2] = d * within(i * (one - g * g), a[2], variant.clip);
  dc = d * f;
  if (variant.has_peepholes) dc = fma(dz[0], variant.p_i, fma(dz[1], variant.p_f, dc));
  return o * tanh_c;
}

}  // namespace rnnattn::RNNATTN_SET::lstm
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_LSTM_CELL_INL_H_
