// Narrow products by tiles of pairs: P and dS are the sum of two bfloat16, their terms.

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

using Narrow = Bfloat16;

constexpr int64_t LEAST_NARROW_WIDTH = 1;

// Of a block's P or dS the two terms, in rows of queries, or of keys where it is turned over.
constexpr int64_t TERM = STRIDE, TERMS = 2 * TERM;
constexpr int64_t TURNED_TERM = ROWS, TURNED_TERMS = 2 * TURNED_TERM;
static int64_t weights_size(int64_t rows) { return rows * TERMS; }
static int64_t turned_size(int64_t, int64_t keys) { return keys * TURNED_TERMS; }

// What P or dS meet.
using NarrowRows = PairedRows<Bfloat16>;

// Rows of W numbers to two of 16 bits; the second, what the first leaves, is `second` behind it. It
// is 0 where the first is ∞.
RNNATTN_INLINE void put_terms(Bfloat16* to, int64_t second, V v) {
  const __m256bh first = _mm512_cvtneps_pbh(v);
  const V rest = v - widened(Bfloat16{}, words_of(reinterpret_cast<Halves>(first)));
  const __m256bh left = _mm512_cvtneps_pbh(rest == rest ? rest : V{});
  __builtin_memcpy(to, &first, sizeof first);
  __builtin_memcpy(to + second, &left, sizeof left);
}

// P or dS of a block, row r times scale[r], if that is given; and turned over.
static void narrow_rows(Bfloat16* to, const Block& block, const float* s, const float* scale,
                        const NarrowRows&) {
  for (int64_t r = 0; r < block.rows; ++r)
    for (int64_t j = block.from; j < block.to; j += W) {
      const V x = load(s + r * STRIDE + j);
      put_terms(to + r * TERMS + j, TERM, scale ? x * scale[r] : x);
    }
}
static void narrow_columns(Bfloat16* to, const Block& block, const float* s, const float* scale,
                           const NarrowRows&) {
  for (int64_t r = 0; r < block.rows; r += W)
    for (int64_t j = block.from; j < block.to; j += W) {
      V x[W];
      for (int64_t i = 0; i < W; ++i) {
        x[i] = r + i < block.rows ? load(s + (r + i) * STRIDE + j) : V{};
        if (scale && r + i < block.rows) x[i] *= scale[r + i];
      }
      transpose(x);
      for (int64_t i = 0; i < W; ++i) put_terms(to + (j + i) * TURNED_TERMS + r, TURNED_TERM, x[i]);
    }
}

// A row as pairs with the next.
static void pair_rows(KeyRows<Bfloat16> rows, int64_t count, int64_t width, NarrowRows& to) {
  to.begin(count);
  for (int64_t i = 0; i < count; i += 2) {
    const Bfloat16 *first = rows.data + i * rows.stride, *second = first + rows.stride;
    for (int64_t j = 0; j < width; j += W) {
      const int n = static_cast<int>(least(W, width - j));
      Words pairs = words_of(load_halves(first + j, n));
      if (i + 1 < count) pairs |= words_of(load_halves(second + j, n)) << 16;
      __builtin_memcpy(to.pair(i, j), &pairs, sizeof pairs);
    }
  }
}

// Rows of A in two terms: the second is `second` behind the first.
struct NarrowWeights {
  const Bfloat16* data;
  int64_t stride, second;

  static NarrowWeights of_rows(const Bfloat16* terms, int64_t key) {
    return {terms + key, TERMS, TERM};
  }
  static NarrowWeights of_columns(const Bfloat16* terms, int64_t, int64_t key) {
    return {terms + key * TURNED_TERMS, TURNED_TERMS, TURNED_TERM};
  }
};
template <int R, int N>
RNNATTN_INLINE void accumulate_narrow(V (&sums)[R][N], int64_t steps, const NarrowWeights& a,
                                      int64_t row, const Bfloat16* b) {
  accumulate_blocks(sums, 1, whole_steps<Bfloat16>(steps), a.data + row * a.stride, a.stride, 0,
                    a.second, b, TILE_COLUMNS);
}
// Of a register tile.
constexpr int NARROW_ROWS = PAIR_ROWS, NARROW_VECTORS = TILE_VECTORS;

}  // namespace rnnattn::RNNATTN_SET::attention
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_ATTENTION_TERMS_INL_H_
