// Numbers in memory, 32 or 16 bits wide, to vectors of float32 and back.

#ifndef RNNATTN_NUMBERS_INL_H_
#define RNNATTN_NUMBERS_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
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
// Of the lower half of each, and back. Compilers would make two of what is one instruction.
RNNATTN_INLINE Halves halves_of(Words words) {
#if RNNATTN_LANES == 16
  return reinterpret_cast<Halves>(
      _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(words)));
#else
  return __builtin_convertvector(words, Halves);
#endif
}
RNNATTN_INLINE Words words_of(Halves halves) {
#if RNNATTN_LANES == 16
  return reinterpret_cast<Words>(
      _mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(halves)));
#else
  return __builtin_convertvector(halves, Words);
#endif
}
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
#if RNNATTN_LANES == 16
  return _mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(halves_of(bits)));
#else
  const Words sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  // 2⁻¹⁴ is subtracted again from what has no leading one; ∞ and NaN have the largest exponent
  const V small = of_bits(rest + 0x38800000u) - of_bits(Words{} + 0x38800000u);
  const Words large = rest + 0x38000000u, no_number = rest + 0x70000000u;
  const Words exponent = rest & 0xf800000u;
  Words wide = choose(where(signs_of(exponent) == 0), bits_of(small), large);
  wide = choose(where(signs_of(exponent) == 0xf800000), no_number, wide);
  return of_bits(wide | sign);
#endif
}

RNNATTN_INLINE Words narrowed(Float16, V v) {
#if RNNATTN_LANES == 16
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m256i halves = _mm512_maskz_cvtps_ph(0xffff, v, nearest);
  return words_of(reinterpret_cast<Halves>(halves));
#else
  const Words bits = bits_of(v), size = bits & 0x7fffffffu, sign = (bits & 0x80000000u) >> 16;
  // a number of that size in the last place of ½ is rounded as a subnormal one is
  const Words small = bits_of(of_bits(size) + splat(0.5f)) - 0x3f000000u;
  const Words usual = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  Words narrow = choose(where(signs_of(size) < 0x38800000), small, usual);
  narrow = choose(where(signs_of(size) >= 0x47800000), Words{} + 0x7c00u, narrow);
  narrow = choose(where(signs_of(size) > 0x7f800000), Words{} + 0x7e00u, narrow);
  return narrow | sign;
#endif
}

// ---- in memory --------------------------------------------------------------------------------

RNNATTN_INLINE V load_units(const float* p, int n) { return n == W ? load(p) : load(p, n); }
RNNATTN_INLINE void store_units(float* p, V v, int n) {
  if (n == W)
    store(p, v);
  else
    store(p, v, n);
}

// n numbers of 16 bits, zeros behind them; and back.
#if RNNATTN_LANES == 16
template <class Number>
RNNATTN_INLINE Halves load_halves(const Number* p, int n) {
  return reinterpret_cast<Halves>(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
template <class Number>
RNNATTN_INLINE void store_halves(Number* p, Halves halves, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), reinterpret_cast<__m256i>(halves));
}
#else
template <class Number>
RNNATTN_INLINE Halves load_halves(const Number* p, int n) {
  Halves halves{};
  if (n == W)
    __builtin_memcpy(&halves, p, sizeof halves);
  else
    __builtin_memcpy(&halves, p, sizeof(Number) * static_cast<size_t>(n));
  return halves;
}
template <class Number>
RNNATTN_INLINE void store_halves(Number* p, Halves halves, int n) {
  if (n == W)
    __builtin_memcpy(p, &halves, sizeof halves);
  else
    __builtin_memcpy(p, &halves, sizeof(Number) * static_cast<size_t>(n));
}
#endif

template <class Number>
RNNATTN_INLINE V load_units(const Number* p, int n) {
  return widened(Number{}, words_of(load_halves(p, n)));
}
template <class Number>
RNNATTN_INLINE void store_units(Number* p, V v, int n) {
  store_halves(p, halves_of(narrowed(Number{}, v)), n);
}

// Whether the rows of a result can be sums of products at once.
template <class Number>
constexpr bool IS_WIDE = sizeof(Number) == sizeof(float);

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

}  // namespace rnnattn::RNNATTN_SET
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_NUMBERS_INL_H_
