// The logits of a block, masked, with bias and soft cap.

#ifndef RNNATTN_ATTENTION_LOGITS_INL_H_
#define RNNATTN_ATTENTION_LOGITS_INL_H_

#include <math.h>
#include <cstdint>

#include "attention_masks-inl.h"
#include "attention_packing-inl.h"
#include "attention_products-inl.h"
#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::attention {

// One row of logits: the columns [from, to) of a block whose first key is `first`, multiples of W.
struct Row {
  int64_t b, m, g, t;
  Range sees;
  int64_t first, from, to;
};

// −∞ where position or length masks.
static void mask_outside(const Row& row, float* s) {
  const int64_t first = least(most(row.sees.first - row.first, row.from), row.to);
  const int64_t past = most(least(row.sees.past - row.first, row.to), first);
  const V hidden = splat(-INFINITY);
  int64_t j = row.from;
  for (; j + W <= first; j += W) store(s + j, hidden);
  if (j < first) store(s + j, where(first_lanes(first - j), hidden, load(s + j)));
  j = past / W * W;
  if (j < past) {
    store(s + j, where(first_lanes(past - j), load(s + j), hidden));
    j += W;
  }
  for (; j < row.to; j += W) store(s + j, hidden);
}

// s from q kᵀ: the soft cap, the biases, −∞ where masked. `uncap` is 1 − (s / c)², if asked for.
static void finish_logits(const Attention& p, const Row& row, bool segments, float* s,
                          float* uncap) {
  const V hidden = splat(-INFINITY);
  const float* bias = p.bias.data ? p.bias.row(row.b, row.m, row.g, row.t) : nullptr;
  const float* by_distance =
      p.by_distance.data ? p.by_distance.row(row.b, row.m, row.g, row.t) : nullptr;
  const uint8_t* mask = p.mask.data ? p.mask.row(row.b, row.m, row.g, row.t) : nullptr;
  const int32_t* of_keys = segments ? p.key_segments + row.b * p.S : nullptr;
  const int32_t segment = segments ? p.query_segments[row.b * p.T + row.t] : 0;
  const bool all_hidden = mask && p.mask.s == 0 && mask[0] == 0;
  for (int64_t j = row.from; j < row.to; j += W) {
    const int64_t key = row.first + j;
    const int count = static_cast<int>(least(W, p.S - key));
    V x = load(s + j);
    if (p.soft_cap > 0) {
      const V y = tanh(x / p.soft_cap);
      x = p.soft_cap * y;
      if (uncap) store(uncap + j, 1.0f - y * y);
    }
    if (bias) x += p.bias.s ? load(bias + key, count) : splat(bias[0]);
    if (by_distance) x += load(by_distance + key, count);
    if (mask && p.mask.s) x = where(nonzero(mask + key, count), x, hidden);
    if (of_keys) x = where(equal(of_keys + key, count, segment), x, hidden);
    store(s + j, all_hidden ? hidden : x);
  }
  mask_outside(row, s);
}

// Rows of queries or of dO, whole vectors of what products along them read. What they make is times
// scale[r], if that is given.
template <class Operand>
struct QueryRows {
  const Operand* data;
  const float* scale;
};

// Keys or values of a head, as what a product sums over: in columns, packed, or in rows.
template <class Operand>
struct Against {
  const Operand* columns;
  KeyRows<Operand> rows;
};

// a xᵀ for the columns of a block, rows STRIDE apart.
template <class Operand>
static void product_against(const Block& block, int64_t width, QueryRows<Operand> a,
                            const Against<Operand>& x, float* c) {
  const int64_t from = block.from, vectors = (block.to - from) / W;
  const int64_t a_stride = whole_along<Operand>(width);
  if (!x.columns)
    return product_of_rows(block.rows, block.seen(), width, a.data, a_stride,
                           x.rows.data + from * x.rows.stride, x.rows.stride, c + from, STRIDE,
                           a.scale);
  const Operand* columns = x.columns + panel_at<Operand>(width, from);
  if constexpr (TOGETHER<Operand> == 2)
    product_of_pairs(block.rows, vectors, whole_steps<Operand>(width), a.data, a_stride, columns,
                     c + from, STRIDE, a.scale);
  else
    product<Stored::by_row, From::zero>(block.rows, vectors, width, a.data, a_stride, columns,
                                        TILE_COLUMNS, TILE_COLUMNS * width, c + from, STRIDE);
}

// s, rows STRIDE apart, of packed queries and keys.
template <class Operand>
static void logits(const Attention& p, const Block& block, const Rows& of, const Range* ranges,
                   int64_t row, QueryRows<Operand> q, const Against<Operand>& k, float* s,
                   float* uncap) {
  product_against(block, p.K, q, k, s);
  if (block.bare && block.in_range) return;
  for (int64_t r = 0; r < block.rows; ++r) {
    const Row at{of.b,      of.m,        of.head(row + r), of.time(row + r),
                 ranges[r], block.first, block.from,       block.to};
    if (block.bare)
      mask_outside(at, s + r * STRIDE);
    else
      finish_logits(p, at, block.segments, s + r * STRIDE, uncap ? uncap + r * STRIDE : nullptr);
  }
}

// Whether no row of a block sees a key: what it holds may be NaN, and must not meet a weight of 0.
static bool unseen(const Block& block, const float* s, int64_t column) {
  for (int64_t r = 0; r < block.rows; ++r)
    if (s[r * STRIDE + column] != -INFINITY) return false;
  return true;
}

// Zero the rows of x, NaN or ∞ in some of them, whose keys no row of the block sees.
static void hide_unseen(const Block& block, const float* s, float* x, int64_t width) {
  for (int64_t i = block.from; i < block.to; ++i)
    if (unseen(block, s, i)) zero(x + i * width, width);
}

}  // namespace rnnattn::RNNATTN_SET::attention
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_ATTENTION_LOGITS_INL_H_
