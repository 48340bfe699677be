// Products of numbers in fixed point, in blocks with a scale of their own.
//
// One instruction multiplies two pairs of integers of 16 bits and adds both products to a sum of 32
// bits, as fast as another does pairs of bfloat16. In each block of steps of a product the numbers
// of a row of A, and of a column of B, are whole multiples of a scale, a ≈ ⌊a / s⌉ s,
//
//     of A    s = max |a| / n                             n = 2¹⁴ − 1
//     of B    s = max(max |b| / (2¹⁵ − 1), Σ |b| / m)     m < 2³¹ / n
//
// so that a multiple has 16 bits, and no sum of a block, nor a part of it, leaves 32: it is at most
// n Σ |b| / s ≤ n m. It is exact, and is multiplied by both scales and added to those of other
// blocks in float32. What is left out of a number is half a scale at most: of A 2⁻¹⁵ of the largest
// of the block; of B 2⁻¹⁶ of it, or 2⁻¹³ of the mean of 32, if that is more. bfloat16 leaves out
// 2⁻⁹ of the number itself. (Das and others, "Mixed Precision Training of Convolutional Neural
// Networks using Integer Operations", 2018, do so with one scale for an array.)
//
// Or B has a scale for each step, and not for its columns in a block: a power of two, of which its
// numbers are multiples up to 2¹⁴. Then the power goes into A, whose scale is joint,
//
//     s = max(max |a| / (2¹⁵ − 1), Σ |a| / m)             m < 2³¹ / 2¹⁴
//
// A block lies in memory as pairs of steps, and its scale in the place of one more pair. The scale
// of a block with NaN or ∞ in it is NaN or ∞, and its products are NaN.

#ifndef RNNATTN_FIXED_POINT_INL_H_
#define RNNATTN_FIXED_POINT_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "numbers-inl.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET {

struct Fixed {
  int16_t multiple;
};

// What a block of so many steps takes in memory.
constexpr int64_t with_scale(int64_t steps) { return steps + 2; }

// Rows of A: how far a row, a pair of steps and a block are from the next.
struct FixedRows {
  const Fixed* first;
  int64_t row, pair, block;
};

#if defined(RNNATTN_FIXED)

constexpr float LARGEST_OF_A = 16383, LARGEST_OF_B = 32767;
// Below 2³¹ over LARGEST_OF_A by more than rounding can add, ½ for each of 48 steps at most.
constexpr float LARGEST_SUM_OF_B = 131040;
// The multiple that the power of two of a row of B is: its numbers are below twice that.
constexpr float MULTIPLES_OF_POWER = 8192;

RNNATTN_INLINE V size_of(V v) { return of_bits(bits_of(v) & 0x7fffffffu); }

// The larger of a size and of |v|, as bits: in the order of the numbers, ∞ behind all of them and
// NaN behind it.
RNNATTN_INLINE Words larger(Words size, V v) {
  return reinterpret_cast<Words>(_mm512_maskz_max_epu32(
      0xffff, reinterpret_cast<__m512i>(size), reinterpret_cast<__m512i>(bits_of(size_of(v)))));
}
template <int half = W / 2>
RNNATTN_INLINE Words largest_of_all(Words sizes) {
  const V others = swapped<half>(of_bits(sizes), std::make_integer_sequence<int, W>{});
  sizes = larger(sizes, others);
  if constexpr (half > 1) return largest_of_all<half / 2>(sizes);
  return sizes;
}

// 2¹⁵ of A's scale are kept in B's: a sum of 31 bits times the one is then as large as a sum of
// numbers of A, and leaves float32 as that would.
constexpr float OF_B = 32768;

// The scales of W blocks, as they are kept, from the sizes of their largest numbers. A block of
// numbers below 10⁻²⁸, whose scale or its inverse might leave float32, is taken for 0.
struct Scales {
  V kept, inverse;

  Scales(Words sizes, V scale, float factor) : kept(scale * factor) {
    inverse = of_bits(bits_of(splat(1.0f) / scale) & where(of_bits(sizes) > 1e-28f));
  }
};
RNNATTN_INLINE Words multiples(V v, V inverse) {
  return reinterpret_cast<Words>(_mm512_maskz_cvtps_epi32(0xffff, v * inverse));
}
RNNATTN_INLINE Scales scales_of_a(Words sizes) {
  return {sizes, of_bits(sizes) * (1 / LARGEST_OF_A), 1 / OF_B};
}
// `sums` is Σ |b| / m, in which no number overflows that did not before.
RNNATTN_INLINE Scales scales_of_b(Words sizes, V sums) {
  const V scale = max(of_bits(sizes) * (1 / LARGEST_OF_B), sums);  // NaN if sums are
  return {sizes, scale, OF_B};
}

// N vectors of a row of A as a block.
template <int N>
RNNATTN_INLINE void put_row(Fixed* to, const V (&row)[N]) {
  Words sizes{};
  unrolled<N>([&](auto n) RNNATTN_LAMBDA { sizes = larger(sizes, row[n]); });
  const Scales block = scales_of_a(largest_of_all(sizes));
  unrolled<N>([&](auto n) RNNATTN_LAMBDA {
    store_halves(to + n * W, halves_of(multiples(row[n], block.inverse)), W);
  });
  const float scale = block.kept[0];
  __builtin_memcpy(to + N * W, &scale, sizeof scale);
}

// `sums` is Σ |a| / m.
RNNATTN_INLINE Scales scales_of_joint(Words sizes, V sums) {
  return {sizes, max(of_bits(sizes) * (1 / LARGEST_OF_B), sums), 1 / MULTIPLES_OF_POWER};
}

// The vectors row(0), …, row(steps − 1) as blocks, one for each column, in rows of `across` pairs.
enum class Factor { a, b, joint };
template <Factor factor, class Row>
RNNATTN_INLINE void put_columns(Fixed* to, int64_t across, int64_t steps, Row row) {
  Words sizes{};
  V sums{};
  for (int64_t step = 0; step < steps; ++step) {
    const V v = row(step);
    sizes = larger(sizes, v);
    if constexpr (factor != Factor::a) sums = fma(size_of(v), splat(1 / LARGEST_SUM_OF_B), sums);
  }
  const Scales block = factor == Factor::a   ? scales_of_a(sizes)
                       : factor == Factor::b ? scales_of_b(sizes, sums)
                                             : scales_of_joint(sizes, sums);
  for (int64_t step = 0; step < steps; step += 2, to += 2 * across) {
    const Words first = multiples(row(step), block.inverse);
    const Words second = multiples(row(step + 1), block.inverse);
    const Words pairs = (first & 0xffffu) | (second << 16);
    __builtin_memcpy(to, &pairs, sizeof pairs);
  }
  __builtin_memcpy(to, &block.kept, sizeof block.kept);
}

// Adds both products of each pair to a sum. Of the intrinsic GCC 12 makes a sum that it keeps twice
// and stores at every step.
RNNATTN_INLINE void add_products(__m512i& sum, __m512i x, __m512i y) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
}

// The sums of a block, of so many steps; rows of pairs of B are `width` wide.
template <int R, int N>
RNNATTN_INLINE void multiply(__m512i (&sums)[R][N], int64_t steps, const FixedRows& a,
                             const Fixed* b, int64_t width) {
  const Fixed* pair = a.first;
  for (int64_t step = 0; step < steps; step += 2, pair += a.pair, b += 2 * width) {
    __m512i y[N];
    unrolled<N>([&](auto n)
                    RNNATTN_LAMBDA { __builtin_memcpy(&y[n], b + 2 * n * W, sizeof y[n]); });
    unrolled<R>([&](auto r) RNNATTN_LAMBDA {
      uint32_t both;
      __builtin_memcpy(&both, pair + r * a.row, sizeof both);
      const __m512i x = reinterpret_cast<__m512i>(Words{} + both);
      unrolled<N>([&](auto n) RNNATTN_LAMBDA { add_products(sums[r][n], x, y[n]); });
    });
  }
}
RNNATTN_INLINE V converted(__m512i sums) {
  return __builtin_convertvector(reinterpret_cast<Integers>(sums), V);
}
// The scale of a row's block of so many steps.
RNNATTN_INLINE float scale_of_row(const FixedRows& a, int64_t r, int64_t steps) {
  float scale;
  __builtin_memcpy(&scale, a.first + r * a.row + steps / 2 * a.pair, sizeof scale);
  return scale;
}

// sums += A B, the first steps of a block.
template <int R, int N>
RNNATTN_INLINE void accumulate_block(V (&sums)[R][N], int64_t steps, int64_t block,
                                     const FixedRows& a, const Fixed* b, int64_t width) {
  __m512i whole[R][N] = {};
  multiply(whole, steps, a, b, width);
  unrolled<R>([&](auto r) RNNATTN_LAMBDA {
    const float of_row = scale_of_row(a, r, block);
    unrolled<N>([&](auto n) RNNATTN_LAMBDA {
      V of_columns;
      __builtin_memcpy(&of_columns, b + block * width + 2 * n * W, sizeof of_columns);
      sums[r][n] = fma(converted(whole[r][n]) * of_row, of_columns, sums[r][n]);
    });
  });
}

// sums += A B of so many steps, in blocks. The loop over the steps of a whole one has a constant
// length, with which it is faster than one that ends where a block does.
template <int block, int R, int N>
RNNATTN_INLINE void accumulate_blocks(V (&sums)[R][N], int64_t steps, FixedRows a, const Fixed* b,
                                      int64_t width) {
  for (; steps >= block; steps -= block, a.first += a.block, b += with_scale(block) * width)
    accumulate_block(sums, block, block, a, b, width);
  if (steps > 0) accumulate_block(sums, steps, block, a, b, width);
}

// The same, in blocks of `block`, with the scales of both in A.
template <int R, int N>
RNNATTN_INLINE void accumulate_joint(V (&sums)[R][N], int64_t steps, int64_t block, FixedRows a,
                                     const Fixed* b, int64_t width) {
  for (; steps > 0; steps -= block, a.first += a.block, b += block * width) {
    __m512i whole[R][N] = {};
    multiply(whole, least(steps, block), a, b, width);
    unrolled<R>([&](auto r) RNNATTN_LAMBDA {
      const V of_row = splat(scale_of_row(a, r, block));
      unrolled<N>([&](auto n) RNNATTN_LAMBDA {
        sums[r][n] = fma(converted(whole[r][n]), of_row, sums[r][n]);
      });
    });
  }
}

#endif

}  // namespace rnnattn::RNNATTN_SET
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_FIXED_POINT_INL_H_
