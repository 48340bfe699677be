// The logits of a block, masked, with bias and soft cap.

#ifndef RNNATTN_ATTENTION_LOGITS_INL_H_
#define RNNATTN_ATTENTION_LOGITS_INL_H_

#include <math.h>
#include <cstdint>
#include <cstring>

#include "attention_masks-inl.h"
#include "attention_packing-inl.h"
#include "instruction_set.h"
#include "kernels.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::attention {

RNNATTN_INLINE Integers count_from(int64_t first) {
  Integers lanes;
  for (int i = 0; i < W; ++i) lanes[i] = static_cast<int32_t>(first) + i;
  return lanes;
}

// W numbers from p on, of which `count` are there to read, and zeros.
template <class Number>
RNNATTN_INLINE auto load_few(const Number* p, int64_t count) {
  Number __attribute__((vector_size(W * sizeof(Number)))) x{};
  if (count >= W)
    std::memcpy(&x, p, sizeof x);
  else
    std::memcpy(&x, p, count * sizeof(Number));
  return x;
}

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
  int64_t j = row.from;
  for (; j + W <= first; j += W) store(s + j, splat(-INFINITY));
  if (j < first) store(s + j, splat(-INFINITY), static_cast<int>(first - j));
  for (j = past; j % W && j < row.to; ++j) s[j] = -INFINITY;
  for (; j < row.to; j += W) store(s + j, splat(-INFINITY));
}

// s from q kᵀ: the soft cap, the bias, −∞ where masked. `capped` is 1 − (s / c)², if asked for.
static void finish_logits(const Attention& p, const Row& row, bool segments, float* s,
                          float* uncap) {
  const float* bias = p.bias.data ? p.bias.row(row.b, row.m, row.g, row.t) : nullptr;
  const uint8_t* mask = p.mask.data ? p.mask.row(row.b, row.m, row.g, row.t) : nullptr;
  const int32_t* of_keys = segments ? p.key_segments + row.b * p.S : nullptr;
  const int32_t segment = segments ? p.query_segments[row.b * p.T + row.t] : 0;
  for (int64_t j = row.from; j < row.to; j += W) {
    const int64_t key = row.first + j, left = p.S - key;
    V x = load(s + j);
    if (p.soft_cap > 0) {
      const V y = tanh(x / p.soft_cap);
      x = p.soft_cap * y;
      if (uncap) store(uncap + j, 1.0f - y * y);
    }
    if (bias) x += p.bias.s ? load_few(bias + key, left) : splat(bias[0]);
    const Integers at = count_from(key);
    Integers sees =
        (at >= static_cast<int32_t>(row.sees.first)) & (at < static_cast<int32_t>(row.sees.past));
    if (mask) {
      if (p.mask.s)
        sees &= __builtin_convertvector(load_few(mask + key, left), Integers) != 0;
      else if (!mask[0])
        sees = Integers{};
    }
    if (of_keys) sees &= load_few(of_keys + key, left) == segment;
    store(s + j, sees ? x : splat(-INFINITY));
  }
}

// s, rows STRIDE apart, of packed queries and keys.
static void logits(const Attention& p, const Block& block, const Rows& of, const Range* ranges,
                   int64_t row, const float* q, const float* k, float* s, float* uncap) {
  product<Stored::by_row, From::zero>(block.rows, (block.to - block.from) / W, p.K, q,
                                      whole_vectors(p.K), k + block.from * p.K, TILE_COLUMNS,
                                      TILE_COLUMNS * p.K, s + block.from, STRIDE);
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
