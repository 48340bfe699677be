// Numbers in memory, 32 or 16 bits wide, to vectors of float32 and back.

#ifndef RNNATTN_NUMBERS_INL_H_
#define RNNATTN_NUMBERS_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET {

using Words = uint32_t __attribute__((vector_size(4 * W)));
using Halves = uint16_t __attribute__((vector_size(2 * W)));

RNNATTN_INLINE Words bits_of(V v) { return reinterpret_cast<Words>(v); }
RNNATTN_INLINE V of_bits(Words bits) { return reinterpret_cast<V>(bits); }
RNNATTN_INLINE Words choose(Words where, Words a, Words b) { return (a & where) | (b & ~where); }
RNNATTN_INLINE Words where(Integers condition) { return reinterpret_cast<Words>(condition); }
// As signed numbers, which every instruction set compares: those here are below 2³¹.
RNNATTN_INLINE Integers signs_of(Words bits) { return reinterpret_cast<Integers>(bits); }

// ---- bfloat16: the upper half of a float32 ----------------------------------------------------

RNNATTN_INLINE V widened(Bfloat16, Words bits) { return of_bits(bits << 16); }

// The nearest, of two the even one; NaN stays NaN.
RNNATTN_INLINE Words narrowed(Bfloat16, V v) {
  const Words bits = bits_of(v);
  const Words is_nan = where(signs_of(bits & 0x7fffffffu) > 0x7f800000);
  return choose(is_nan, bits | 0x400000u, bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// ---- float16: 5 bits of exponent, 10 of fraction ----------------------------------------------

RNNATTN_INLINE V widened(Float16, Words bits) {
  const Words sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  // 2⁻¹⁴ is subtracted again from what has no leading one; ∞ and NaN have the largest exponent
  const V small = of_bits(rest + 0x38800000u) - of_bits(Words{} + 0x38800000u);
  const Words large = rest + 0x38000000u, no_number = rest + 0x70000000u;
  const Words exponent = rest & 0xf800000u;
  Words wide = choose(where(signs_of(exponent) == 0), bits_of(small), large);
  wide = choose(where(signs_of(exponent) == 0xf800000), no_number, wide);
  return of_bits(wide | sign);
}

RNNATTN_INLINE Words narrowed(Float16, V v) {
  const Words bits = bits_of(v), size = bits & 0x7fffffffu, sign = (bits & 0x80000000u) >> 16;
  // a number of that size in the last place of ½ is rounded as a subnormal one is
  const Words small = bits_of(of_bits(size) + splat(0.5f)) - 0x3f000000u;
  const Words usual = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  Words narrow = choose(where(signs_of(size) < 0x38800000), small, usual);
  narrow = choose(where(signs_of(size) >= 0x47800000), Words{} + 0x7c00u, narrow);
  narrow = choose(where(signs_of(size) > 0x7f800000), Words{} + 0x7e00u, narrow);
  return narrow | sign;
}

// ---- in memory --------------------------------------------------------------------------------

RNNATTN_INLINE V load_units(const float* p, int n) { return n == W ? load(p) : load(p, n); }
RNNATTN_INLINE void store_units(float* p, V v, int n) {
  if (n == W)
    store(p, v);
  else
    store(p, v, n);
}

template <class Number>
RNNATTN_INLINE V load_units(const Number* p, int n) {
  Halves halves{};
  if (n == W)
    __builtin_memcpy(&halves, p, sizeof halves);
  else
    __builtin_memcpy(&halves, p, sizeof(Number) * static_cast<size_t>(n));
  return widened(Number{}, __builtin_convertvector(halves, Words));
}
template <class Number>
RNNATTN_INLINE void store_units(Number* p, V v, int n) {
  const Halves halves = __builtin_convertvector(narrowed(Number{}, v), Halves);
  if (n == W)
    __builtin_memcpy(p, &halves, sizeof halves);
  else
    __builtin_memcpy(p, &halves, sizeof(Number) * static_cast<size_t>(n));
}

// What is left of v in memory of that type.
RNNATTN_INLINE V rounded(float, V v) { return v; }
template <class Number>
RNNATTN_INLINE V rounded(Number number, V v) {
  return widened(number, narrowed(number, v));
}

// Copies `width` numbers from one type to another; `padded`, whole vectors of them, zero behind.
template <class From, class To>
RNNATTN_INLINE void copy_numbers(const From* from, int64_t width, To* to, bool padded = false) {
  for (int64_t j = 0; j < width; j += W) {
    const int n = static_cast<int>(least(W, width - j));
    store_units(to + j, load_units(from + j, n), padded ? W : n);
  }
}

// ---- products ---------------------------------------------------------------------------------

// What products of an instruction set read: float32, or pairs of bfloat16 where one instruction
// multiplies two and adds both.
template <class Number>
struct OperandOf {
  using Type = float;
};
#if defined(RNNATTN_PAIRS)
template <>
struct OperandOf<Bfloat16> {
  using Type = Bfloat16;
};
#endif
template <class Number>
using Operand = typename OperandOf<Number>::Type;

// Steps of a product that one number of 32 bits stands for, and so many steps made whole.
template <class Operand>
constexpr int64_t TOGETHER = 4 / sizeof(Operand);
template <class Operand>
RNNATTN_INLINE int64_t whole_steps(int64_t steps) {
  return ceil_div(steps, TOGETHER<Operand>) * TOGETHER<Operand>;
}

// A row of an operand of B, or two rows to pairs; `out` moves on.
RNNATTN_INLINE void put_steps(float*& out, V v) {
  store(out, v);
  out += W;
}

// sums += A B: rows of A are `a_row` apart, those of B `width`.
template <int R, int N>
RNNATTN_INLINE void accumulate(V (&sums)[R][N], int64_t steps, const float* a, int64_t a_row,
                               const float* b, int64_t width) {
  multiply<Held::a>(sums, steps, a, a_row, 1, b, width);
}

#if defined(RNNATTN_PAIRS)
// W pairs of bfloat16; `dot` adds the products of both numbers of each to a sum.
#if defined(__aarch64__)
using Pairs = bfloat16x8_t;
RNNATTN_INLINE V dot(V sum, Pairs x, Pairs y) {
  return reinterpret_cast<V>(vbfdotq_f32(reinterpret_cast<float32x4_t>(sum), x, y));
}
#else
using Pairs = __m512bh;
RNNATTN_INLINE V dot(V sum, Pairs x, Pairs y) { return _mm512_dpbf16_ps(sum, x, y); }
#endif

RNNATTN_INLINE void put_pairs(Bfloat16*& out, V first, V second) {
  const Words pairs = narrowed(Bfloat16{}, first) | (narrowed(Bfloat16{}, second) << 16);
  __builtin_memcpy(out, &pairs, sizeof pairs);
  out += 2 * W;
}

// `multiply` of pairs along the steps: rows of A and of B hold two steps in each 32 bits.
template <int R, int N>
RNNATTN_INLINE void accumulate(V (&sums)[R][N], int64_t steps, const Bfloat16* a, int64_t a_row,
                               const Bfloat16* b, int64_t width) {
  for (int64_t step = 0; step < steps; step += 2, a += 2, b += 2 * width) {
    Pairs column[R];
    unrolled<R>([&](auto r) RNNATTN_LAMBDA {
      uint32_t pair;
      __builtin_memcpy(&pair, a + r * a_row, sizeof pair);
      column[r] = reinterpret_cast<Pairs>(Words{} + pair);
    });
    unrolled<N>([&](auto n) RNNATTN_LAMBDA {
      Pairs y;
      __builtin_memcpy(&y, b + 2 * n * W, sizeof y);
      unrolled<R>([&](auto r) RNNATTN_LAMBDA { sums[r][n] = dot(sums[r][n], column[r], y); });
    });
  }
}
#endif

}  // namespace rnnattn::RNNATTN_SET
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_NUMBERS_INL_H_
