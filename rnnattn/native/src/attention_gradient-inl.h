// Attention's backward pass: s, P, dP, dS, dv, dk, dq of each block.

#ifndef RNNATTN_ATTENTION_GRADIENT_INL_H_
#define RNNATTN_ATTENTION_GRADIENT_INL_H_

#include <math.h>
#include <cstdint>

#include "attention_forward-inl.h"
#include "attention_logits-inl.h"
#include "attention_masks-inl.h"
#include "attention_narrow-inl.h"
#include "attention_packing-inl.h"
#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "threads.h"
#include "util-inl.h"
#include "workspace-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::attention {

// What one work item does: the key blocks of a part, of all heads that share a dbias, and of
// several where keys are streamed.
//
// Every sum is made by one item, in one order, but for dq over the parts: each has a dq of its own,
// and these are added in the end. How many parts there are depends on the shapes alone.
struct BackwardPlan {
  int64_t b_shared, m_shared;  // batch rows and key/value heads of one item
  bool streamed;
  int64_t keys;  // of a block
  int64_t groups, key_blocks, parts;

  template <class Number>
  explicit BackwardPlan(const AttentionBackward<Number>& p) : streamed(is_streamed(p)) {
    b_shared = p.dbias.data && p.dbias.b == 0 ? p.B : 1;
    m_shared = p.dbias.data && p.dbias.m == 0 ? p.M : streamed ? streamed_heads(p) : 1;
    groups = p.B / b_shared * (p.M / m_shared);
    keys = streamed ? STREAMED_KEYS : KEYS;
    const bool keys_shared = p.dbias.data && p.dbias.s == 0;
    // so that there is something to divide where there is one head and sequence
    if (!keys_shared)
      while (keys > TILE_COLUMNS && groups * ceil_div(p.S, keys) < LEAST_BLOCKS) keys /= 2;
    key_blocks = ceil_div(p.S, keys);
    parts = keys_shared ? 1 : least(key_blocks, ceil_div(LEAST_ITEMS, groups));
  }
  Range keys_of_part(const Attention& p, int64_t part) const {
    return {key_blocks * part / parts * keys, least(key_blocks * (part + 1) / parts * keys, p.S)};
  }
};

template <class Number>
struct BackwardMemory {
  using Operand = RNNATTN_SET::Operand<Number>;
  Memory memory;
  float *q, *d_o;                // of products that sum over queries
  Operand *q_along, *d_o_along;  // of those along them
  float* scale;                  // of the logits, where q_along is not scaled
  Operand *k_columns, *v_columns;
  float *k, *s, *dp, *uncap, *dq, *dk, *dv, *lse, *delta;
  Range* ranges;
  NarrowMemory narrow{};

  BackwardMemory(const Attention& p, const BackwardPlan& plan, float* base) : memory{base} {
    const int64_t rows = least(ROWS, p.G * p.T), keys = least(plan.keys, whole_panels(p.S));
    const int64_t k_width = whole_vectors(p.K), v_width = whole_vectors(p.V);
    q = memory.take(rows * k_width);
    d_o = memory.take(rows * v_width);
    if constexpr (IN_PAIRS<Number>) {
      q_along = memory.take<Operand>(rows * whole_along<Operand>(p.K));
      d_o_along = memory.take<Operand>(rows * whole_along<Operand>(p.V));
      scale = memory.take(rows);
    } else {
      q_along = q;
      d_o_along = d_o;
      scale = nullptr;
    }
    k_columns = memory.take<Operand>(plan.streamed ? 0 : panel_at<Operand>(p.K, keys));
    v_columns = memory.take<Operand>(plan.streamed ? 0 : panel_at<Operand>(p.V, keys));
    k = memory.take(keys * k_width);
    s = memory.take(rows * STRIDE);
    dp = memory.take(rows * STRIDE);
    uncap = p.soft_cap > 0 ? memory.take(rows * STRIDE) : nullptr;
    dq = memory.take(rows * k_width);
    dk = memory.take(keys * k_width);
    dv = memory.take(keys * v_width);
    lse = memory.take(rows);
    delta = memory.take(rows);
    ranges = memory.take<Range>(rows);
    if (NARROWS_GRADIENT<Number> && !plan.streamed) narrow.take(memory, rows, keys, most(p.K, p.V));
  }
};

// Δ − dL, (B, M, G, T), of one head.
template <class Number>
static void row_sums(const AttentionBackward<Number>& p, int64_t b, int64_t head, float* delta) {
  const int64_t first = (b * p.M * p.G + head) * p.T;
  for (int64_t t = 0; t < p.T; ++t) {
    const int64_t at = ((b * p.T + t) * p.M * p.G + head) * p.V;
    V sums{};
    int64_t i = 0;
    for (; i + W <= p.V; i += W)
      sums = fma(load_units(p.d_o + at + i, W), load(p.o + at + i), sums);
    if (i < p.V) {
      const int rest = static_cast<int>(p.V - i);
      sums = fma(load_units(p.d_o + at + i, rest), load(p.o + at + i, rest), sums);
    }
    delta[first + t] = sum(sums) - p.dlse[first + t];
  }
}

// P in place of s, dS before the soft cap in place of dP, and dbias and d_by_distance grown by dS.
static void logits_gradient(const Block& block, float lse, float delta, bool finite,
                            const float* uncap, float* s, float* dp, float* dbias,
                            int64_t dbias_stride, float* d_by_distance, int64_t keys) {
  V shared{};
  for (int64_t j = block.from; j < block.to; j += W) {
    const V weight = exp(load(s + j) - lse);
    V ds = weight * (load(dp + j) - delta);
    if (!finite) ds = weight == 0 ? V{} : ds;
    const int width = static_cast<int>(least(W, keys - j));
    if (dbias && dbias_stride) store(dbias + j, load(dbias + j, width) + ds, width);
    if (d_by_distance) store(d_by_distance + j, load(d_by_distance + j, width) + ds, width);
    if (dbias) shared += ds;
    // of a key that is not seen it may be NaN
    if (uncap) ds = weight == 0 ? V{} : ds * load(uncap + j);
    store(s + j, weight);
    store(dp + j, ds);
  }
  if (dbias && !dbias_stride) *dbias += sum(shared);
}

// Of d_by_distance.
static int64_t distances_size(const Attention& p) { return p.B * p.M * p.G * (p.T + p.S - 1); }

// Of a head, what `distances` has of it, (B, M, G, T + S − 1); null as these are.
static float* distances_of(const Attention& p, float* distances, int64_t b, int64_t m, int64_t g) {
  return distances ? distances + ((b * p.M + m) * p.G + g) * (p.T + p.S - 1) : nullptr;
}

// Of a row, that of the key 0.
static float* distances_of_row(const Attention& p, float* distances, const Rows& rows, int64_t r) {
  float* of_head = distances_of(p, distances, rows.b, rows.m, rows.head(r));
  return of_head ? of_head + (p.T - 1 - rows.time(r)) : nullptr;
}

// Whether a row of logits sees no key of its block.
static bool sees_nothing(const Block& block, const float* s) {
  for (int64_t j = block.from; j < block.to; ++j)
    if (s[j] != -INFINITY) return false;
  return true;
}

// Zero the query, do and Δ of rows that see no key of the block, where NaN or ∞ is among them.
// Whether none is left.
template <class Number>
static bool hide_unseeing(const AttentionBackward<Number>& p, const Block& block,
                          const BackwardMemory<Number>& my) {
  const int64_t k_width = whole_vectors(p.K), v_width = whole_vectors(p.V);
  const int64_t q_along = whole_along<Operand<Number>>(p.K);
  const int64_t d_o_along = whole_along<Operand<Number>>(p.V);
  bool finite = true;
  for (int64_t r = 0; r < block.rows; ++r) {
    float *q = my.q + r * k_width, *d_o = my.d_o + r * v_width;
    if (is_finite(q, k_width) && is_finite(d_o, v_width) && 0.0f * my.delta[r] == 0) continue;
    if (!sees_nothing(block, my.s + r * STRIDE)) {
      finite = false;
      continue;
    }
    zero(q, k_width);
    zero(d_o, v_width);
    if constexpr (IN_PAIRS<Number>) {
      zero(my.q_along + r * q_along, q_along);
      zero(my.d_o_along + r * d_o_along, d_o_along);
    }
    my.delta[r] = 0;
  }
  return finite;
}

// Sums of one part of the keys; of distances null where nobody asked.
struct PartSums {
  float *dq, *d_by_distance;
};

// P in place of s, dS in place of dP, of a block of rows and keys; what they add to dbias and
// d_by_distance. Whether the rows that see a key are without NaN and ∞.
template <class Number>
static bool weights_and_gradient(const AttentionBackward<Number>& p, const Block& block,
                                 const Rows& rows, const Against<Operand<Number>>& k,
                                 const Against<Operand<Number>>& v, const float* delta, bool finite,
                                 const PartSums& sums, const BackwardMemory<Number>& my) {
  using Operand = RNNATTN_SET::Operand<Number>;
  const int64_t k_width = whole_vectors(p.K), v_width = whole_vectors(p.V);
  for (int64_t r = 0; r < block.rows; ++r) {
    const Number* d_o = p.d_o + query_at(p, p.V, rows, r);
    pack_query(p, p.query, rows, r, my.q + r * k_width);
    pack_row(d_o, p.V, my.d_o + r * v_width);
    if constexpr (IN_PAIRS<Number>) {
      pack_row(p.query + query_at(p, p.K, rows, r), p.K,
               my.q_along + r * whole_along<Operand>(p.K));
      pack_row(d_o, p.V, my.d_o_along + r * whole_along<Operand>(p.V));
      my.scale[r] = scale_of(p, rows, r);
    }
    const int64_t row = row_at(p, rows, r);
    my.lse[r] = p.lse[row] == -INFINITY ? INFINITY : p.lse[row];
    my.delta[r] = delta[row];
  }
  const QueryRows<Operand> q{my.q_along, my.scale}, d_o{my.d_o_along, nullptr};
  logits(p, block, rows, my.ranges, 0, q, k, my.s, my.uncap);
  if (!finite) hide_unseen(block, my.s, my.k, k_width);
  const bool finite_rows = hide_unseeing(p, block, my);
  product_against(block, p.V, d_o, v, my.dp);
  for (int64_t r = 0; r < block.rows; ++r) {
    float* dbias = p.dbias.data ? p.dbias.row(rows.b, rows.m, rows.head(r), rows.time(r)) : nullptr;
    if (dbias && p.dbias.s) dbias += block.first;
    float* d_by_distance = distances_of_row(p, sums.d_by_distance, rows, r);
    if (d_by_distance) d_by_distance += block.first;
    logits_gradient(block, my.lse[r], my.delta[r], finite,
                    my.uncap ? my.uncap + r * STRIDE : nullptr, my.s + r * STRIDE,
                    my.dp + r * STRIDE, dbias, p.dbias.s, d_by_distance, block.count);
  }
  return finite_rows;
}

// What a block of keys, as rows of whole vectors, adds to dq.
template <class Number>
static void add_to_dq(const AttentionBackward<Number>& p, const Block& block, const Rows& rows,
                      KeyRows<float> k, float* dq, const BackwardMemory<Number>& my) {
  const int64_t k_width = whole_vectors(p.K);
  product<Stored::by_row, From::zero>(block.rows, k_width / W, block.seen(), my.dp + block.from,
                                      STRIDE, k.data + block.from * k.stride, k.stride,
                                      TILE_COLUMNS, my.dq, k_width);
  for (int64_t r = 0; r < block.rows; ++r)
    add_row(my.dq + r * k_width, scale_of(p, rows, r), p.K, dq + query_at(p, p.K, rows, r));
}

// What the rows of queries of a block add to dq, and to dk and dv of its keys, once P and dS are
// known; keys as rows of float32.
template <class Number>
struct BlockGradient {
  const AttentionBackward<Number>& p;
  const BackwardMemory<Number>& my;
  int64_t b, m;
  Range keys;

  // The keys, before the first block of rows, and after one whose unseen keys were hidden.
  void pack_keys(bool) const { pack_rows(p, p.key, p.K, b, m, keys, my.k); }
  void add(const Block& block, const Rows& rows, bool, bool, float* dq) const {
    const int64_t k_width = whole_vectors(p.K), v_width = whole_vectors(p.V);
    const int64_t from = block.from, met = block.seen();
    product<Stored::by_step, From::c>(met, v_width / W, block.rows, my.s + from, STRIDE, my.d_o,
                                      v_width, TILE_COLUMNS, my.dv + from * v_width, v_width);
    product<Stored::by_step, From::c>(met, k_width / W, block.rows, my.dp + from, STRIDE, my.q,
                                      k_width, TILE_COLUMNS, my.dk + from * k_width, k_width);
    add_to_dq(p, block, rows, KeyRows<float>{my.k, k_width}, dq, my);
  }
};

#if defined(RNNATTN_TILES) || defined(RNNATTN_FIXED)
// The same by narrow products, where all is finite; the scale goes into dS.
struct NarrowGradient {
  const AttentionBackward<Bfloat16>& p;
  const BackwardMemory<Bfloat16>& my;
  int64_t b, m;
  Range keys;
  BlockGradient<Bfloat16> wide{p, my, b, m, keys};
  NarrowRows k = my.narrow.along_s, met = my.narrow.along_t;

  void pack_keys(bool finite) {
    if (!finite) return wide.pack_keys(finite);
    pair_rows(rows_in_place(p, p.key, p.K, b, m, keys), keys.past - keys.first, p.K, k);
  }
  void add(const Block& block, const Rows& rows, bool finite_keys, bool finite_rows, float* dq) {
    if (!finite_keys || !finite_rows) {
      if (finite_keys) wide.pack_keys(finite_keys);
      return wide.add(block, rows, finite_keys, finite_rows, dq);
    }
    const int64_t k_width = whole_vectors(p.K);
    add_columns(block, my.s, nullptr, my.d_o_along, p.V, my.dv);
    add_columns(block, my.dp, my.scale, my.q_along, p.K, my.dk);
    narrow_rows(my.narrow.weights, block, my.dp, my.scale, k);
    product_of_narrow<From::zero>(block.rows, p.K, block.seen(),
                                  NarrowWeights::of_rows(my.narrow.weights, block.from), k,
                                  block.from, my.dq, k_width);
    for (int64_t r = 0; r < block.rows; ++r)
      add_row(my.dq + r * k_width, 1, p.K, dq + query_at(p, p.K, rows, r));
  }

 private:
  // Of the keys of a block, Σ over its rows of P or dS, times `scale`, and x.
  void add_columns(const Block& block, const float* s, const float* scale, const Bfloat16* x,
                   int64_t width, float* to) {
    const int64_t stride = whole_vectors(width);
    pair_rows({x, whole_along<Bfloat16>(width)}, block.rows, width, met);
    narrow_columns(my.narrow.turned, block, s, scale, met);
    product_of_narrow<From::c>(block.seen(), width, block.rows,
                               NarrowWeights::of_columns(my.narrow.turned, block.rows, block.from),
                               met, 0, to + block.from * stride, stride);
  }
};
#endif

// dk and dv of a block of keys of a key/value head, and what they add to dbias and the sums; `seen`
// are the keys that each block of queries sees.
template <class Gradient, class Number>
static void backward_keys(const AttentionBackward<Number>& p, const RowBlocks& blocks,
                          const Range* seen, int64_t b, int64_t m, Range keys, const float* delta,
                          const PartSums& sums, const BackwardMemory<Number>& my) {
  const int64_t k_width = whole_vectors(p.K), v_width = whole_vectors(p.V);
  const int64_t count = keys.past - keys.first;
  bool packed = false, finite = true;
  const Against<Operand<Number>> k_columns{my.k_columns, {}}, v_columns{my.v_columns, {}};
  Gradient gradient{p, my, b, m, keys};
  for (int64_t i = 0; i < blocks.count(); ++i) {
    if (!meet(seen[i % blocks.times.count], keys)) continue;
    Rows rows = blocks.rows(b, m, i);
    if (rows.heads == 1) {
      const Range times = rows_seeing({rows.t, rows.t + rows.times}, keys,
                                      [&](int64_t t) { return keys_of(p, b, t); });
      rows.t = times.first;
      rows.times = times.past - times.first;
    }
    for (int64_t r = 0; r < rows.count(); ++r) my.ranges[r] = keys_of(p, b, rows.time(r));
    const Block block = block_of(p, rows, keys, my.ranges, 0, rows.count());
    if (block.empty()) continue;
    if (!packed) {
      packed = true;
      pack_columns(p, p.key, p.K, b, m, keys, my.k_columns);
      pack_columns(p, p.value, p.V, b, m, keys, my.v_columns);
      finite = are_finite(rows_in_place(p, p.value, p.V, b, m, keys), count, p.V) &&
               are_finite(rows_in_place(p, p.key, p.K, b, m, keys), count, p.K);
      gradient.pack_keys(finite);
      zero(my.dk, count * k_width);
      zero(my.dv, count * v_width);
    }
    const bool finite_rows =
        weights_and_gradient(p, block, rows, k_columns, v_columns, delta, finite, sums, my);
    gradient.add(block, rows, finite, finite_rows, sums.dq);
    if (!finite) gradient.pack_keys(finite);
  }
  if (!packed) {
    zero(my.dk, count * k_width);
    zero(my.dv, count * v_width);
  }
  for (int64_t s = 0; s < count; ++s) {
    unpack_row(my.dk + s * k_width, 1, p.K, p.dk + key_at(p, p.K, b, m, keys.first + s));
    unpack_row(my.dv + s * v_width, 1, p.V, p.dv + key_at(p, p.V, b, m, keys.first + s));
  }
}

template <class Number>
static void backward_keys(const AttentionBackward<Number>& p, const RowBlocks& blocks,
                          const Range* seen, int64_t b, int64_t m, Range keys, const float* delta,
                          const PartSums& sums, const BackwardMemory<Number>& my) {
#if defined(RNNATTN_TILES) || defined(RNNATTN_FIXED)
  if constexpr (NARROWS_GRADIENT<Number>)
    if (least(p.K, p.V) >= LEAST_NARROW_WIDTH)
      return backward_keys<NarrowGradient>(p, blocks, seen, b, m, keys, delta, sums, my);
#endif
  backward_keys<BlockGradient<Number>>(p, blocks, seen, b, m, keys, delta, sums, my);
}

// aᵀ x to rows of the gradient of keys or values: where these are, if they are whole vectors of
// float32, and by way of `packed` otherwise. Rows that are not seen get zeros.
template <class Number>
static void stream_gradient(const Attention& p, const Block& block, const float* a, const float* x,
                            int64_t width, Number* to, float* packed) {
  const int64_t stride = p.M * width, padded = whole_vectors(width), seen = block.seen();
  const bool in_place = IS_WIDE<Number> && padded == width;
  float* rows = packed;
  if constexpr (IS_WIDE<Number>)
    if (in_place) rows = to + block.from * stride;
  if (seen > 0)
    product<Stored::by_step, From::zero>(seen, padded / W, block.rows, a + block.from, STRIDE, x,
                                         padded, TILE_COLUMNS, rows, in_place ? stride : padded);
  for (int64_t s = 0; s < block.count; ++s) {
    const int64_t row = s - block.from;
    if (row < 0 || row >= seen)
      zero(to + s * stride, width);
    else if (!in_place)
      unpack_row(packed + row * padded, 1, width, to + s * stride);
  }
}

// The same as backward_keys, of keys and values that are read where they are: the head has one
// block of rows, which writes dk and dv at once.
template <class Number>
static void stream_backward_keys(const AttentionBackward<Number>& p, const Rows& rows, Range keys,
                                 const float* delta, const PartSums& sums,
                                 const BackwardMemory<Number>& my) {
  const int64_t k_width = whole_vectors(p.K), m = rows.m;
  for (int64_t r = 0; r < rows.count(); ++r) my.ranges[r] = keys_of(p, rows.b, rows.time(r));
  const Block block = block_of(p, rows, keys, my.ranges, 0, rows.count());
  if (!block.empty()) {
    const KeyRows<Number> k = rows_in_place(p, p.key, p.K, rows.b, m, keys);
    const KeyRows<Number> v = rows_in_place(p, p.value, p.V, rows.b, m, keys);
    // NaN and ∞ matter only where something is hidden
    const bool finite =
        block.shows_all() || (are_finite(k, block.count, p.K) && are_finite(v, block.count, p.V));
    const bool in_place = IS_WIDE<Number> && finite && vectors_in_place(p, p.K, rows.b, m, keys);
    if (!in_place) pack_rows(p, p.key, p.K, rows.b, m, keys, my.k);
    KeyRows<float> packed_k{my.k, k_width};
    if constexpr (ALIKE<Number>) {
      weights_and_gradient(p, block, rows, {nullptr, k}, {nullptr, v}, delta, finite, sums, my);
    } else {
      // in the memory of dv, which is not begun yet
      pack_rows(p, p.value, p.V, rows.b, m, keys, my.dv);
      const KeyRows<float> packed_v{my.dv, whole_vectors(p.V)};
      weights_and_gradient(p, block, rows, {nullptr, packed_k}, {nullptr, packed_v}, delta, finite,
                           sums, my);
    }
    if constexpr (IS_WIDE<Number>)
      if (in_place) packed_k = k;
    add_to_dq(p, block, rows, packed_k, sums.dq, my);
  }
  stream_gradient(p, block, my.s, my.d_o, p.V, p.dv + key_at(p, p.V, rows.b, m, keys.first), my.dv);
  stream_gradient(p, block, my.dp, my.q, p.K, p.dk + key_at(p, p.K, rows.b, m, keys.first), my.dk);
}

// What work items share.
struct SharedMemory {
  Memory memory;
  float *delta, *parts_of_dq;  // null where there is one part, in float32
  float* parts_of_distances;   // null where there is one part, or nobody asked
  Range* seen;                 // the keys that some query of a block sees, (B, blocks of times)

  template <class Number>
  SharedMemory(const AttentionBackward<Number>& p, const BackwardPlan& plan,
               const RowBlocks& blocks, float* base)
      : memory{base} {
    const int64_t rows = p.B * p.M * p.G * p.T;
    delta = memory.take(rows);
    const bool apart = plan.parts > 1 || !IS_WIDE<Number>;
    parts_of_dq = apart ? memory.take(plan.parts * rows * p.K) : nullptr;
    const bool distances = p.d_by_distance && plan.parts > 1;
    parts_of_distances = distances ? memory.take(plan.parts * distances_size(p)) : nullptr;
    seen = memory.take<Range>(p.B * blocks.times.count);
  }
  // Where a part of the keys has its d_by_distance.
  float* distances_of_part(float* whole, int64_t part, int64_t size) const {
    return parts_of_distances ? parts_of_distances + part * size : whole;
  }
};

template <class Number>
static bool backward(Threads& threads, const AttentionBackward<Number>& p) {
  const BackwardPlan plan(p);
  const RowBlocks blocks(p, ROWS);
  const int64_t heads = p.B * p.M * p.G, dq_size = heads * p.T * p.K;
  advise_huge_pages(p.dq, dq_size);
  advise_huge_pages(p.dk, p.B * p.S * p.M * p.K);
  advise_huge_pages(p.dv, p.B * p.S * p.M * p.V);
  advise_huge_pages(p.dbias.data, p.dbias_size);
  const SharedMemory size(p, plan, blocks, nullptr);
  const Allocation allocation(size.memory.used);
  if (!allocation.data()) return false;
  advise_huge_pages(allocation.data(), size.memory.used);
  const SharedMemory shared(p, plan, blocks, allocation.data());

  bool done = parallel_for(
      threads, heads, heads * p.T * p.V / WORK_OF_A_THREAD + 1, 0,
      [&](int64_t i, float*) { row_sums(p, i / (p.M * p.G), i % (p.M * p.G), shared.delta); });
  if (p.dbias.data) zero(p.dbias.data, p.dbias_size);
  for (int64_t i = 0; i < p.B * blocks.times.count; ++i)
    shared.seen[i] = keys_of_block(p, blocks, i / blocks.times.count, i % blocks.times.count);

  const auto gradient_of_part = [&](int64_t item, float* memory) {
    const BackwardMemory<Number> my(p, plan, memory);
    const int64_t group = item % plan.groups, part = item / plan.groups;
    const int64_t m_groups = p.M / plan.m_shared;
    const int64_t m_first = group % m_groups * plan.m_shared, m_past = m_first + plan.m_shared;
    const Range of_part = plan.keys_of_part(p, part);
    float* dq = shared.parts_of_dq + part * dq_size;
    if constexpr (IS_WIDE<Number>)
      if (plan.parts == 1) dq = p.dq;
    float* distances = shared.distances_of_part(p.d_by_distance, part, distances_size(p));
    for (int64_t ib = 0; ib < plan.b_shared; ++ib) {
      const int64_t b = group / m_groups * plan.b_shared + ib;
      const Range* seen = shared.seen + b * blocks.times.count;
      Range begun{0, blocks.times.count};
      if (plan.parts > 1) begun = rows_seeing(begun, of_part, [&](int64_t i) { return seen[i]; });
      const int64_t past_t = blocks.times.start(begun.past);
      for (int64_t t = blocks.times.start(begun.first); t < past_t; ++t)
        zero(dq + ((b * p.T + t) * p.M + m_first) * p.G * p.K, plan.m_shared * p.G * p.K);
      for (int64_t m = m_first; distances && m < m_past; ++m)
        zero(distances_of(p, distances, b, m, 0), p.G * (p.T + p.S - 1));
      for (int64_t key = of_part.first; key < of_part.past; key += plan.keys) {
        const Range keys{key, least(key + plan.keys, p.S)};
        for (int64_t m = m_first; m < m_past; ++m)
          if (plan.streamed)
            stream_backward_keys(p, blocks.rows(b, m, 0), keys, shared.delta, {dq, distances}, my);
          else
            backward_keys(p, blocks, seen, b, m, keys, shared.delta, {dq, distances}, my);
      }
    }
  };
  done =
      done && parallel_for(threads, plan.groups * plan.parts,
                           threads_for(p, heads * p.T * p.S * (3 * p.K + 2 * p.V)),
                           BackwardMemory<Number>(p, plan, nullptr).memory.used, gradient_of_part);
  if (shared.parts_of_distances) {
    const int64_t of_part = distances_size(p), of_head = p.T + p.S - 1;
    const auto sum_of_distances = [&](int64_t head, float*) {
      for (int64_t i = head * of_head; i < (head + 1) * of_head; i += W) {
        const int lanes = static_cast<int>(least(W, (head + 1) * of_head - i));
        V sums{};
        for (int64_t n = 0; n < plan.parts; ++n)
          sums += load(shared.parts_of_distances + n * of_part + i, lanes);
        store(p.d_by_distance + i, sums, lanes);
      }
    };
    done = done && parallel_for(threads, heads, of_part * plan.parts / WORK_OF_A_THREAD + 1, 0,
                                sum_of_distances);
  }
  if (IS_WIDE<Number> && plan.parts == 1) return done;

  // Of a block of queries, the parts whose keys it sees.
  const auto sum_of_parts = [&](int64_t item, float*) {
    const int64_t b = item / blocks.times.count, i = item % blocks.times.count;
    const int64_t width = p.M * p.G * p.K;
    const int64_t first = (b * p.T + blocks.times.start(i)) * width;
    const int64_t past = (b * p.T + blocks.times.start(i + 1)) * width;
    const float* parts[LEAST_ITEMS];
    int64_t count = 0;
    for (int64_t part = 0; part < plan.parts; ++part)
      if (meet(shared.seen[item], plan.keys_of_part(p, part)))
        parts[count++] = shared.parts_of_dq + part * dq_size;
    for (int64_t at = first; at < past; at += W) {
      const int lanes = static_cast<int>(least(W, past - at));
      V sums{};
      for (int64_t n = 0; n < count; ++n) sums += load(parts[n] + at, lanes);
      store_units(p.dq + at, sums, lanes);
    }
  };
  return done && parallel_for(threads, p.B * blocks.times.count,
                              dq_size * plan.parts / WORK_OF_A_THREAD + 1, 0, sum_of_parts);
}

template <class Number>
static constexpr AttentionKernels<Number> kernels{forward<Number>, backward<Number>};

}  // namespace rnnattn::RNNATTN_SET::attention
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_ATTENTION_GRADIENT_INL_H_
