// Attention's forward pass: s, P v of each block, O and L of each set of rows.

#ifndef RNNATTN_ATTENTION_FORWARD_INL_H_
#define RNNATTN_ATTENTION_FORWARD_INL_H_

#include <math.h>
#include <cstdint>

#include "attention_logits-inl.h"
#include "attention_masks-inl.h"
#include "attention_packing-inl.h"
#include "instruction_set.h"
#include "kernels.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "threads.h"
#include "util-inl.h"
#include "workspace-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::attention {

struct ForwardMemory {
  Memory memory;
  float *q, *k, *v, *s, *o, *total, *peak, *shrink;
  Range* ranges;

  ForwardMemory(const Attention& p, float* base) : memory{base} {
    // No more than is used: to touch new pages would cost more than a small problem does.
    const int64_t rows = least(FORWARD_ROWS, p.G * p.T), keys = least(KEYS, whole_panels(p.S));
    q = memory.take(rows * whole_vectors(p.K));
    k = memory.take(keys * p.K);
    v = memory.take(keys * whole_vectors(p.V));
    s = memory.take(least(ROWS, rows) * STRIDE);
    o = memory.take(rows * whole_vectors(p.V));
    total = memory.take(rows * W);
    peak = memory.take(rows + W);
    shrink = memory.take(ROWS + W);
    ranges = memory.take<Range>(rows);
  }
};

// P of up to W rows, without its denominator, in place of s: peak and total grow by these keys, and
// `shrink` is what they make of sums over earlier ones. All W numbers of the last two are there.
static void weigh(const Block& block, int64_t rows, float* s, float* peak, float* total,
                  float* shrink) {
  V highest[W];
  for (int64_t r = 0; r < W; ++r) highest[r] = splat(-INFINITY);
  for (int64_t r = 0; r < rows; ++r) {
    V largest = highest[r];
    for (int64_t j = block.from; j < block.to; j += W)
      largest = max(load(s + r * STRIDE + j), largest);
    highest[r] = largest;
  }
  const V before = load(peak), after = max(max_of_each(highest), before);
  const V finite = after == -INFINITY ? V{} : after, factors = exp(before - finite);
  float subtract[W];
  store(subtract, finite);
  store(peak, after);
  store(shrink, factors);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = s + r * STRIDE;
    V sums = load(total + r * W) * shrink[r];
    for (int64_t j = block.from; j < block.to; j += W) {
      const V e = exp(load(row + j) - subtract[r]);
      store(row + j, e);
      sums += e;
    }
    store(total + r * W, sums);
  }
}

static void forward_rows(const AttentionForward& p, const Rows& rows, float* base) {
  const ForwardMemory my(p, base);
  const int64_t count = rows.count(), k_width = whole_vectors(p.K), v_width = whole_vectors(p.V);
  for (int64_t r = 0; r < count; ++r) {
    my.ranges[r] = keys_of(p, rows.b, rows.time(r));
    if (p.query_lengths && rows.time(r) >= p.query_lengths[rows.b])
      zero(my.q + r * k_width, k_width);
    else
      pack_row(p.query + query_at(p, p.K, rows, r), p.K, my.q + r * k_width);
    // A sink counts as a key without a value.
    const float sink = p.sinks ? p.sinks[rows.m * p.G + rows.head(r)] : -INFINITY;
    my.peak[r] = sink;
    zero(my.total + r * W, W);
    my.total[r * W] = sink == -INFINITY ? 0 : expf(sink - sink);
  }
  zero(my.o, count * v_width);
  const Range all = seen_by(my.ranges, count).any;
  for (int64_t first = all.first; first < all.past; first += KEYS) {
    const Range keys{first, least(first + KEYS, all.past)};
    bool finite = true, packed = false;
    for (int64_t r = 0; r < count; r += ROWS) {
      const Block block = block_of(p, rows, keys, my.ranges + r, least(ROWS, count - r));
      if (block.empty()) continue;
      if (!packed) {
        pack_columns(p, p.key, p.K, rows.b, rows.m, keys, my.k);
        finite = pack_rows(p, p.value, p.V, rows.b, rows.m, keys, my.v);
        packed = true;
      }
      logits(p, block, rows, my.ranges + r, r, my.q + r * k_width, my.k, my.s, nullptr);
      if (!finite) hide_unseen(block, my.s, my.v, v_width);
      for (int64_t i = 0; i < block.rows; i += W)
        weigh(block, least(W, block.rows - i), my.s + i * STRIDE, my.peak + r + i,
              my.total + (r + i) * W, my.shrink + i);
      const int64_t seen = least(block.to, keys.past - keys.first) - block.from;
      product<Stored::by_row, From::scaled>(block.rows, v_width / W, seen, my.s + block.from,
                                            STRIDE, my.v + block.from * v_width, v_width,
                                            TILE_COLUMNS, my.o + r * v_width, v_width, my.shrink);
      if (!finite) pack_rows(p, p.value, p.V, rows.b, rows.m, keys, my.v);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const float total = sum(load(my.total + r * W)), peak = my.peak[r];
    const bool empty = total == 0;
    unpack_row(my.o + r * v_width, empty ? 0 : 1 / total, p.V, p.o + query_at(p, p.V, rows, r));
    p.lse[row_at(p, rows, r)] = empty ? -INFINITY : (peak == -INFINITY ? 0 : peak) + logf(total);
  }
}

static bool forward(Threads& threads, const AttentionForward& p) {
  const RowBlocks blocks(p, FORWARD_ROWS);
  const int64_t heads = p.B * p.M, items = heads * blocks.count();
  const int64_t work = p.B * p.M * p.G * p.T * p.S * (p.K + p.V);
  // The last queries first: with a causal mask they have the most to do.
  const auto forward_item = [&](int64_t item, float* memory) {
    const int64_t head = item % heads, i = blocks.count() - 1 - item / heads;
    forward_rows(p, blocks.rows(head / p.M, head % p.M, i), memory);
  };
  return parallel_for(threads, items, work / WORK_OF_A_THREAD + 1,
                      ForwardMemory(p, nullptr).memory.used, forward_item);
}

}  // namespace rnnattn::RNNATTN_SET::attention
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_ATTENTION_FORWARD_INL_H_
