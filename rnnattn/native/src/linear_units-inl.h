// The units whose state is a linear recurrence, R2 to R8, for W channels in registers. The
// equations are those of rnnattn/linear/equations.py, in its letters.
//
// A unit reads p, its blocks, and w, its weights. `coefficients` makes a and b of them; `gradient`
// those of p and w of dh, where h₋ is 0 in a fresh step, and gives a.

#ifndef RNNATTN_LINEAR_UNITS_INL_H_
#define RNNATTN_LINEAR_UNITS_INL_H_

#include "instruction_set.h"
#include "numbers-inl.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::linear {

// σ(x) and σ(−x), each precise where it is small: of a gate that is all but closed, or open, little
// remains over thousands of steps, and that counts.
struct Gate {
  V open, closed;
};
RNNATTN_INLINE Gate gate(V x) {
  const V one = splat(1.0f), e = exp(min(x, -x));
  const V larger = one / (one + e), smaller = e * larger;
  return {x > V{} ? larger : smaller, x > V{} ? smaller : larger};
}

struct Linear {
  static constexpr int BLOCKS = 2, WEIGHTS = 0;

  RNNATTN_INLINE void coefficients(const V* p, const V*, bool, V& a, V& b) { a = p[0], b = p[1]; }
  RNNATTN_INLINE V gradient(const V* p, const V*, bool, V h_prev, V dh, V* dp, V*) {
    dp[0] = dh * h_prev;
    dp[1] = dh;
    return p[0];
  }
};

struct MinGru {
  static constexpr int BLOCKS = 2, WEIGHTS = 2;

  RNNATTN_INLINE void coefficients(const V* p, const V* w, bool, V& a, V& b) {
    const Gate z = gate(p[0] + w[0]);
    a = z.closed;
    b = z.open * (p[1] + w[1]);
  }
  RNNATTN_INLINE V gradient(const V* p, const V* w, bool, V h_prev, V dh, V* dp, V* dw) {
    const Gate z = gate(p[0] + w[0]);
    const V p_h = p[1] + w[1];
    dw[0] = dp[0] = dh * (z.open * z.closed) * (p_h - h_prev);
    dw[1] = dp[1] = dh * z.open;
    return z.closed;
  }
};

struct MinLstm {
  static constexpr int BLOCKS = 3, WEIGHTS = 3;

  // f / (f + i) and i / (f + i); of a product with a(1 − a), what 1 − f and 1 − i leave of it.
  struct Shares {
    V a, of_input, slope_f, slope_i;
  };
  // All of 1/f = 1 + e^−p_f and 1/i, scaled by the largest number in them, so that none is too
  // large.
  RNNATTN_INLINE Shares shares(V p_f, V p_i) {
    const V largest = max(max(-p_f, -p_i), V{});
    const V one = exp(-largest), e_f = exp(-p_f - largest), e_i = exp(-p_i - largest);
    const V scale = splat(1.0f) / ((one + e_f) + (one + e_i));
    const V a = (one + e_i) * scale, of_input = (one + e_f) * scale;
    return {a, of_input, a * (e_f * scale), of_input * (e_i * scale)};
  }

  RNNATTN_INLINE void coefficients(const V* p, const V* w, bool, V& a, V& b) {
    const Shares s = shares(p[0] + w[0], p[1] + w[1]);
    a = s.a;
    b = s.of_input * (p[2] + w[2]);
  }
  RNNATTN_INLINE V gradient(const V* p, const V* w, bool, V h_prev, V dh, V* dp, V* dw) {
    const Shares s = shares(p[0] + w[0], p[1] + w[1]);
    const V p_h = p[2] + w[2];
    dw[0] = dp[0] = dh * s.slope_f * (h_prev - p_h);
    dw[1] = dp[1] = dh * s.slope_i * (p_h - h_prev);
    dw[2] = dp[2] = dh * s.of_input;
    return s.a;
  }
};

struct RgLru {
  static constexpr int BLOCKS = 3, WEIGHTS = 3;

  // a, and β = √(1 − a²) with 1/β, or 0 where that has no slope: 1 − a² = −(1 + a²) tanh log a.
  struct Decay {
    V a, beta, inverse;
  };
  RNNATTN_INLINE Decay decay(V r, V lambda, bool fresh) {
    const V one = splat(1.0f), log_a = -lambda * r, a = exp(log_a);
    if (fresh) return {a, one, V{}};
    const V beta = sqrt(fma(a, a, one) * tanh(-log_a));
    return {a, beta, beta > V{} ? one / beta : V{}};
  }

  RNNATTN_INLINE void coefficients(const V* p, const V* w, bool fresh, V& a, V& b) {
    const Decay d = decay(gate(p[0] + w[0]).open, w[2], fresh);
    a = d.a;
    b = d.beta * gate(p[1] + w[1]).open * p[2];
  }
  RNNATTN_INLINE V gradient(const V* p, const V* w, bool fresh, V h_prev, V dh, V* dp, V* dw) {
    const Gate r = gate(p[0] + w[0]), i = gate(p[1] + w[1]);
    const Decay d = decay(r.open, w[2], fresh);
    const V x = p[2], slope = d.a * d.a * (r.open * d.inverse);
    const V q = dh * (i.open * x * slope - d.a * h_prev * r.open);
    dw[0] = dp[0] = w[2] * r.closed * q;
    dw[1] = dp[1] = dh * d.beta * x * (i.open * i.closed);
    dw[2] = q;
    dp[2] = dh * d.beta * i.open;
    return d.a;
  }
};

}  // namespace rnnattn::RNNATTN_SET::linear
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_LINEAR_UNITS_INL_H_
