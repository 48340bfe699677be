// Narrow products in fixed point, see fixed_point-inl.h.
//
// A row of what P and dS meet is of whole multiples of a power of two, exact but for numbers below
// 2⁻⁷ of the largest of the row. The power goes into P and dS, which are of whole multiples in
// turn, of a scale for each block of a row. So where P is 0, as behind a mask, what it meets
// changes no bit.

#ifndef RNNATTN_ATTENTION_FIXED_INL_H_
#define RNNATTN_ATTENTION_FIXED_INL_H_

#include <cstdint>

#include "attention_masks-inl.h"
#include "attention_packing-inl.h"
#include "fixed_point-inl.h"
#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "util-inl.h"
#include "workspace-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::attention {

using Narrow = Fixed;

// With fewer numbers in a row of keys or values, to narrow P and dS takes longer than to multiply.
constexpr int64_t LEAST_NARROW_WIDTH = 32;

// A block's P or dS, in blocks of keys; and turned over, in one of all its rows, STRIDE pairs
// apart.
constexpr int64_t STEPS = 32, FIXED_ROW = KEYS / STEPS * with_scale(STEPS);
static int64_t weights_size(int64_t rows) { return rows * FIXED_ROW; }
static int64_t turned_size(int64_t rows, int64_t) {
  return with_scale(whole_steps<Fixed>(rows)) * STRIDE;
}

// What P or dS meet, and what each row of it is to be multiplied by.
struct NarrowRows : PairedRows<Fixed> {
  float* factors;

  void take(Memory& memory, int64_t rows, int64_t width) {
    PairedRows::take(memory, rows, width);
    factors = memory.take(whole_vectors(rows));
  }
};

// P or dS of a block, row r times scale[r], if that is given, for a product with `met`; and turned
// over.
static void narrow_rows(Fixed* to, const Block& block, const float* s, const float* scale,
                        const NarrowRows& met) {
  for (int64_t r = 0; r < block.rows; r += W) {
    const int64_t rows = least(W, block.rows - r);
    for (int64_t j = block.from; j < block.to; j += STEPS) {
      const bool both = j + W < block.to;
      const auto at = [&](int64_t i, V(&x)[2]) RNNATTN_LAMBDA {
        const float* row = s + (r + i) * STRIDE + j;
        x[0] = load(row) * load(met.factors + j);
        x[1] = both ? load(row + W) * load(met.factors + j + W) : V{};
      };
      V largest[W]{}, sums[W]{};
      for (int64_t i = 0; i < rows; ++i) {
        V x[2];
        at(i, x);
        const V sizes[2] = {size_of(x[0]), size_of(x[1])};
        largest[i] = max(sizes[0], sizes[1]);
        sums[i] = fma(sizes[1], splat(1 / LARGEST_SUM_OF_B), sizes[0] * (1 / LARGEST_SUM_OF_B));
      }
      const Scales scales = scales_of_joint(bits_of(max_of_each(largest)), sum_of_each(sums));
      float kept[W], inverse[W];
      store(kept, scales.kept);
      store(inverse, scales.inverse);
      for (int64_t i = 0; i < rows; ++i) {
        V x[2];
        at(i, x);
        Fixed* block_of_row = to + (r + i) * FIXED_ROW + j / STEPS * with_scale(STEPS);
        for (int n = 0; n < 2; ++n)
          store_halves(block_of_row + n * W, halves_of(multiples(x[n], splat(inverse[i]))), W);
        const float of_row = scale ? kept[i] * scale[r + i] : kept[i];
        __builtin_memcpy(block_of_row + STEPS, &of_row, sizeof of_row);
      }
    }
  }
}
static void narrow_columns(Fixed* to, const Block& block, const float* s, const float* scale,
                           const NarrowRows& met) {
  for (int64_t j = block.from; j < block.to; j += W)
    put_columns<Factor::joint>(
        to + 2 * j, STRIDE, whole_steps<Fixed>(block.rows), [&](int64_t r) RNNATTN_LAMBDA {
          if (r >= block.rows) return V{};
          const float factor = scale ? met.factors[r] * scale[r] : met.factors[r];
          return load(s + r * STRIDE + j) * factor;
        });
}

// A row as pairs with the next, both in fixed point. The factor is the largest power of two that is
// not above the largest number; a row of numbers below 10⁻²⁸ is taken for 0.
static void pair_rows(KeyRows<Bfloat16> rows, int64_t count, int64_t width, NarrowRows& to) {
  to.begin(count);
  const auto numbers = [&](int64_t i, int64_t j) RNNATTN_LAMBDA {
    return load_units(rows.data + i * rows.stride + j, static_cast<int>(least(W, width - j)));
  };
  for (int64_t first = 0; first < count; first += W) {
    const int64_t past = least(first + W, count);
    V sizes[W]{};
    for (int64_t i = first; i < past; ++i) {
      Words largest{};
      for (int64_t j = 0; j < width; j += W) largest = larger(largest, numbers(i, j));
      sizes[i - first] = of_bits(largest);
    }
    const V largest =
        of_each(sizes, [](V& x, const V& y) RNNATTN_LAMBDA { x = of_bits(larger(bits_of(x), y)); });
    const Words power = bits_of(largest) & 0x7f800000u;
    store(to.factors + first, of_bits(power));
    const V multiple = splat(MULTIPLES_OF_POWER) / of_bits(power);
    float inverse[W];
    store(inverse, of_bits(bits_of(multiple) & where(of_bits(power) > 1e-28f)));
    for (int64_t i = first; i < past; i += 2)
      for (int64_t j = 0; j < width; j += W) {
        Words pairs = multiples(numbers(i, j), splat(inverse[i - first])) & 0xffffu;
        if (i + 1 < past)
          pairs |= multiples(numbers(i + 1, j), splat(inverse[i + 1 - first])) << 16;
        __builtin_memcpy(to.pair(i, j), &pairs, sizeof pairs);
      }
  }
}

// Rows of A in blocks of so many steps.
struct NarrowWeights {
  FixedRows rows;
  int64_t block;

  static NarrowWeights of_rows(const Fixed* weights, int64_t key) {
    constexpr int64_t size = with_scale(STEPS);
    return {{weights + key / STEPS * size, FIXED_ROW, 2, size}, STEPS};
  }
  static NarrowWeights of_columns(const Fixed* weights, int64_t rows, int64_t key) {
    return {{weights + 2 * key, 2, 2 * STRIDE, 0}, whole_steps<Fixed>(rows)};
  }
};
template <int R, int N>
RNNATTN_INLINE void accumulate_narrow(V (&sums)[R][N], int64_t steps, const NarrowWeights& a,
                                      int64_t row, const Fixed* b) {
  FixedRows rows = a.rows;
  rows.first += row * rows.row;
  accumulate_joint(sums, whole_steps<Fixed>(steps), a.block, rows, b, TILE_COLUMNS);
}
// Of a register tile, in which the sums of a block stand beside those of all before it.
constexpr int NARROW_ROWS = TILE_ROWS, NARROW_VECTORS = 2;

}  // namespace rnnattn::RNNATTN_SET::attention
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_ATTENTION_FIXED_INL_H_
