// Attention's products with float32, P and dS, where products of bfloat16 are so fast that two are
// faster than one of float32: each such number is the sum of two of 16 bits, and what it meets, q,
// k, v or dO, is of 16 bits as it was given.

#ifndef RNNATTN_ATTENTION_TERMS_INL_H_
#define RNNATTN_ATTENTION_TERMS_INL_H_

#include <cstdint>

#include "attention_masks-inl.h"
#include "attention_packing-inl.h"
#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::attention {

template <class Number>
constexpr bool IN_TERMS = false;

// Of a block's P or dS the two terms, in rows of queries, or of keys where it is turned over.
constexpr int64_t TERM = STRIDE, TERMS = 2 * TERM;
constexpr int64_t TURNED_TERM = ROWS, TURNED_TERMS = 2 * TURNED_TERM;

// What rows in pairs take, as what a product sums over: panels of TILE_COLUMNS.
static int64_t paired_size(int64_t rows, int64_t width) {
  return ceil_div(rows, 2) * 2 * whole_panels(width);
}

#if defined(RNNATTN_TILES)

template <>
constexpr bool IN_TERMS<Bfloat16> = true;

// Rows of W numbers to two of 16 bits; the second, what the first leaves, is `second` behind it. It
// is 0 where the first is ∞.
RNNATTN_INLINE void put_terms(Bfloat16* to, int64_t second, V v) {
  const auto put = [](Bfloat16* at, V x) RNNATTN_LAMBDA {
    const __m256bh halves = _mm512_cvtneps_pbh(x);
    __builtin_memcpy(at, &halves, sizeof halves);
    return widened(Bfloat16{}, words_of(reinterpret_cast<Halves>(halves)));
  };
  const V rest = v - put(to, v);
  put(to + second, rest == rest ? rest : V{});
}

// Row r times factor[r], if that is given.
static void split_rows(const Block& block, const float* s, const float* factor, Bfloat16* to) {
  for (int64_t r = 0; r < block.rows; ++r)
    for (int64_t j = block.from; j < block.to; j += W) {
      const V x = load(s + r * STRIDE + j);
      put_terms(to + r * TERMS + j, TERM, factor ? x * factor[r] : x);
    }
}
static void split_columns(const Block& block, const float* s, const float* factor, Bfloat16* to) {
  for (int64_t r = 0; r < block.rows; r += W)
    for (int64_t j = block.from; j < block.to; j += W) {
      V x[W];
      for (int64_t i = 0; i < W; ++i) {
        x[i] = r + i < block.rows ? load(s + (r + i) * STRIDE + j) : V{};
        if (factor && r + i < block.rows) x[i] *= factor[r + i];
      }
      transpose(x);
      for (int64_t i = 0; i < W; ++i) put_terms(to + (j + i) * TURNED_TERMS + r, TURNED_TERM, x[i]);
    }
}

RNNATTN_INLINE Words narrow_bits(const Bfloat16* p, int n) {
  return bits_of(load_units(p, n)) >> 16;
}
RNNATTN_INLINE Words narrow_bits(const float* p, int n) {
  return narrowed(Bfloat16{}, load_units(p, n));
}

// Rows in pairs, zeros beyond them to a whole pair; a panel is so many numbers.
struct PairedRows {
  const Bfloat16* data;
  int64_t panel;
};
template <class Number>
static PairedRows pair_rows(KeyRows<Number> rows, int64_t count, int64_t width, Bfloat16* to) {
  const int64_t panel = whole_steps<Bfloat16>(count) * TILE_COLUMNS;
  for (int64_t i = 0; i < count; i += 2) {
    const Number *first = rows.data + i * rows.stride, *second = first + rows.stride;
    for (int64_t j = 0; j < width; j += W) {
      const int n = static_cast<int>(least(W, width - j));
      Words pairs = narrow_bits(first + j, n);
      if (i + 1 < count) pairs |= narrow_bits(second + j, n) << 16;
      const int64_t at = j / TILE_COLUMNS * panel + i * TILE_COLUMNS + 2 * (j % TILE_COLUMNS);
      __builtin_memcpy(to + at, &pairs, sizeof pairs);
    }
  }
  return {to, panel};
}

// Rows of A in two terms: the second is `second` behind the first.
struct Terms {
  const Bfloat16* data;
  int64_t stride, second;
};
static Terms terms_of_rows(const Bfloat16* terms, int64_t key) {
  return {terms + key, TERMS, TERM};
}
static Terms terms_of_columns(const Bfloat16* terms, int64_t key) {
  return {terms + key * TURNED_TERMS, TURNED_TERMS, TURNED_TERM};
}

template <int N, From from>
struct TermsTile {
  int64_t steps;
  Terms a;
  const Bfloat16* b;
  float* c;
  int64_t c_stride;
  const float* scale;

  template <int R>
  void run(int64_t first) const {
    V sums[R][N];
    float* rows = c + first * c_stride;
    begin_sums<from>(sums, rows, c_stride, scale ? scale + first : nullptr);
    accumulate_blocks(sums, 1, steps, a.data + first * a.stride, a.stride, 0, a.second, b,
                      TILE_COLUMNS);
    end_sums(sums, rows, c_stride);
  }
};

// `product` of A in two terms and of `steps` rows of B, from `first` on.
template <From from>
static void product_of_terms(int64_t rows, int64_t width, int64_t steps, const Terms& a,
                             const PairedRows& b, int64_t first, float* c, int64_t c_stride,
                             const float* scale = nullptr) {
  const Bfloat16* panel = b.data + first * TILE_COLUMNS;
  for (int64_t columns = ceil_div(width, W); columns > 0;
       columns -= TILE_VECTORS, panel += b.panel, c += TILE_COLUMNS)
    as_constant<TILE_VECTORS>(columns, [&](auto N) RNNATTN_LAMBDA {
      over_tiles<PAIR_ROWS>(
          0, rows, TermsTile<N, from>{whole_steps<Bfloat16>(steps), a, panel, c, c_stride, scale});
    });
}

#endif

}  // namespace rnnattn::RNNATTN_SET::attention
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_ATTENTION_TERMS_INL_H_
