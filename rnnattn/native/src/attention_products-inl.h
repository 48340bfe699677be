// Products with keys and values of attention: of rows where they lie, and of pairs of bfloat16.

#ifndef RNNATTN_ATTENTION_PRODUCTS_INL_H_
#define RNNATTN_ATTENTION_PRODUCTS_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::attention {

// Whether q kᵀ and dO vᵀ are products of pairs: of the numbers as they were given, exactly. The
// scale of the logits then comes after the product; folded into q, it would be rounded.
template <class Number>
constexpr bool IN_PAIRS = TOGETHER<Operand<Number>> == 2;

// Numbers along a row that a vector of an operand holds, and so many made whole.
template <class Operand>
constexpr int64_t ALONG = W * TOGETHER<Operand>;
template <class Operand>
RNNATTN_INLINE int64_t whole_along(int64_t n) {
  return ceil_div(n, ALONG<Operand>) * ALONG<Operand>;
}

// The first n of them: widened, or pairs as they lie in memory.
template <class Operand, class Number>
RNNATTN_INLINE V load_along(const Number* p, int64_t n) {
#if defined(RNNATTN_PAIRS)
  if constexpr (TOGETHER<Operand> == 2) {
    V pairs{};
    if (n == ALONG<Operand>)
      __builtin_memcpy(&pairs, p, sizeof pairs);
    else
      pairs = reinterpret_cast<V>(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
    return pairs;
  }
#endif
  return load_units(p, static_cast<int>(n));
}

// sums + x y; of pairs, that of both.
template <class Operand>
RNNATTN_INLINE V add_products(V x, V y, V sums) {
#if defined(RNNATTN_PAIRS)
  if constexpr (TOGETHER<Operand> == 2)
    return dot(sums, reinterpret_cast<Pairs>(x), reinterpret_cast<Pairs>(y));
#endif
  return fma(x, y, sums);
}

// The products of a row with `columns` rows of B, W at most: of both `width` numbers, and zeros
// behind them in the row. Where there are fewer than W, those of the last stand for the others, as
// many quarters of W as there are. If `ahead`, the W rows behind are asked for meanwhile: W at once
// are more than a core would see coming.
template <int quarters, bool ahead, class Operand>
RNNATTN_INLINE V dots_with(int64_t columns, int64_t width, const Operand* row, const Operand* b,
                           int64_t b_stride) {
  // Four pointers, and numbers of strides that an address can hold, in place of W pointers.
  constexpr int rows = quarters * (W / 4);
  constexpr int64_t along = ALONG<Operand>;
  const Operand* quarter[4];
  if constexpr (ahead)
    for (int i = 0; i < 4; ++i) quarter[i] = b + i * (W / 4) * b_stride;
  const auto at = [&](auto i) RNNATTN_LAMBDA {
    if constexpr (ahead) return quarter[i / (W / 4)] + i % (W / 4) * b_stride;
    return b + least(i, columns - 1) * b_stride;
  };
  V sums[W]{};
  int64_t k = 0;
  for (; k + along <= width; k += along) {
    const V x = load_along<Operand>(row + k, along);
    unrolled<rows>([&](auto i) RNNATTN_LAMBDA {
      sums[i] = add_products<Operand>(x, load_along<Operand>(at(i) + k, along), sums[i]);
      if constexpr (ahead) __builtin_prefetch(at(i) + k + W * b_stride);
    });
  }
  if (k < width) {
    const V x = load_along<Operand>(row + k, along);
    const int64_t rest = width - k;
    unrolled<rows>([&](auto i) RNNATTN_LAMBDA {
      sums[i] = add_products<Operand>(x, load_along<Operand>(at(i) + k, rest), sums[i]);
    });
  }
  return sum_of_each(sums);
}

// C = A Bᵀ, with B in rows that are not packed, and row r of C times scale[r], if that is given.
// Rows of A are whole vectors, with zeros behind what they hold; C has whole vectors of columns.
template <class Operand>
static void product_of_rows(int64_t rows, int64_t columns, int64_t width, const Operand* a,
                            int64_t a_stride, const Operand* b, int64_t b_stride, float* c,
                            int64_t c_stride, const float* scale) {
  for (int64_t j = 0; j < columns; j += W, b += W * b_stride)
    for (int64_t r = 0; r < rows; ++r) {
      const Operand* row = a + r * a_stride;
      const auto put = [&](V dots) RNNATTN_LAMBDA {
        store(c + r * c_stride + j, scale ? dots * scale[r] : dots);
      };
      if (columns - j >= W)
        put(dots_with<4, true>(W, width, row, b, b_stride));
      else
        as_constant<4>(ceil_div(4 * (columns - j), W), [&](auto quarters) RNNATTN_LAMBDA {
          put(dots_with<quarters, false>(columns - j, width, row, b, b_stride));
        });
    }
}

#if defined(RNNATTN_PAIRS)

// A tile of `product_of_pairs`: N vectors of a panel of B.
template <int N>
struct PairsTile {
  int64_t steps;
  const Bfloat16* a;
  int64_t a_stride;
  const Bfloat16* b;
  float* c;
  int64_t c_stride;
  const float* scale;

  template <int R>
  void run(int64_t first) const {
    V sums[R][N]{};
    accumulate(sums, steps, a + first * a_stride, a_stride, b, TILE_COLUMNS);
    unrolled<R>([&](auto r) RNNATTN_LAMBDA {
      const V factor = splat(scale ? scale[first + r] : 1.0f);
      float* row = c + (first + r) * c_stride;
      unrolled<N>([&](auto n) RNNATTN_LAMBDA { store(row + n * W, sums[r][n] * factor); });
    });
  }
};

// C = A B of `columns` vectors, with B in panels of TILE_COLUMNS, both in pairs along the steps,
// and row r of C times scale[r], if that is given.
static void product_of_pairs(int64_t rows, int64_t columns, int64_t steps, const Bfloat16* a,
                             int64_t a_stride, const Bfloat16* b, float* c, int64_t c_stride,
                             const float* scale) {
  for (; columns > 0; columns -= TILE_VECTORS, b += TILE_COLUMNS * steps, c += TILE_COLUMNS)
    as_constant<TILE_VECTORS>(columns, [&](auto N) RNNATTN_LAMBDA {
      over_tiles<PAIR_ROWS>(0, rows, PairsTile<N>{steps, a, a_stride, b, c, c_stride, scale});
    });
}

#endif

}  // namespace rnnattn::RNNATTN_SET::attention
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_ATTENTION_PRODUCTS_INL_H_
