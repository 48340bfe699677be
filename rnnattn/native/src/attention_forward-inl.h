// Attention's forward pass: s, P v of each block, O and L of each set of rows.

#ifndef RNNATTN_ATTENTION_FORWARD_INL_H_
#define RNNATTN_ATTENTION_FORWARD_INL_H_

#include <math.h>
#include <cstdint>

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

// Keys of a block: of pages as many as lie in one of them at least.
static int64_t keys_of_blocks(const Attention& p, bool streamed) {
  return p.pages ? PAGE_KEYS : streamed ? STREAMED_KEYS : KEYS;
}

// What one work item does: a part of the keys, for a set of rows of one key/value head, or of
// several heads where keys are streamed. How many parts there are depends on the shapes alone; what
// they make of the softmax is joined in the end.
struct ForwardPlan {
  bool streamed;
  RowBlocks blocks;
  int64_t heads, keys, key_blocks, sets, parts;

  explicit ForwardPlan(const Attention& p)
      : streamed(is_streamed(p)), blocks(p, FORWARD_ROWS), heads(streamed ? streamed_heads(p) : 1) {
    keys = keys_of_blocks(p, streamed);
    key_blocks = ceil_div(p.S, keys);
    sets = p.B * (p.M / heads) * blocks.count();
    const int64_t most_parts = ceil_div(p.S, streamed ? keys : LEAST_KEYS_OF_A_PART);
    parts = least(most_parts, ceil_div(LEAST_ITEMS, sets));
  }
  // Rows of the first head of an item; the last queries first: with a causal mask they have the
  // most to do.
  Rows rows(const Attention& p, int64_t set) const {
    const int64_t groups = p.M / heads, group = set % (p.B * groups);
    return blocks.rows(group / groups, group % groups * heads,
                       blocks.count() - 1 - set / (p.B * groups));
  }
  Range keys_of_part(const Attention& p, int64_t part) const {
    return {key_blocks * part / parts * keys, least(key_blocks * (part + 1) / parts * keys, p.S)};
  }
  // Of a part, those that are seen: whole vectors from its first key on, so that no vector reaches
  // into the next part; of pages whole blocks, so that no block does into the next page.
  Range seen_of_part(const Attention& p, int64_t part, Range seen) const {
    const Range of_part = keys_of_part(p, part);
    const int64_t step = p.pages ? keys : W;
    const int64_t skipped = most(seen.first - of_part.first, 0) / step * step;
    return {of_part.first + skipped, least(seen.past, of_part.past)};
  }
};

// Whether so many rows meet keys in columns. To sum over the lanes of products with keys in rows
// takes as long for each row, to turn keys over grows with their width: of those that are streamed,
// the latter is the faster where rows are many beside the width, but for pairs.
template <class Number>
static bool keys_in_columns(const Attention& p, bool streamed, int64_t rows) {
  return !streamed || (!IN_PAIRS<Number> && rows * W > p.K);
}

// The softmax of all rows after each part of the keys, where there are several.
struct PartsOfSoftmax {
  Memory memory;
  float *o, *total, *peak;

  PartsOfSoftmax(const Attention& p, const ForwardPlan& plan, float* base) : memory{base} {
    const int64_t rows = plan.parts > 1 ? plan.parts * p.B * p.M * p.G * p.T : 0;
    o = memory.take(rows * p.V);
    total = memory.take(rows);
    peak = memory.take(rows);
  }
};

template <class Number>
struct ForwardMemory {
  using Operand = RNNATTN_SET::Operand<Number>;
  Memory memory;
  Operand *q, *k;
  float *scale, *v, *s, *o, *total, *peak, *shrink;
  Range* ranges;
  NarrowMemory narrow{};

  ForwardMemory(const Attention& p, const ForwardPlan& plan, float* base) : memory{base} {
    // No more than is used: to touch new pages would cost more than a small problem does.
    const int64_t rows = least(FORWARD_ROWS, p.G * p.T), all = rows * plan.heads;
    const int64_t keys = least(plan.keys, whole_panels(p.S));
    q = memory.take<Operand>(all * whole_along<Operand>(p.K));
    const bool in_rows = ALIKE<Number> && !keys_in_columns<Number>(p, plan.streamed, rows);
    k = memory.take<Operand>(in_rows ? 0 : keys * whole_along<Operand>(p.K));
    scale = IN_PAIRS<Number> ? memory.take(all) : nullptr;
    v = memory.take(keys * whole_vectors(p.V));
    s = memory.take(least(ROWS, rows) * STRIDE);
    o = memory.take(all * whole_vectors(p.V));
    total = memory.take(all * W);
    peak = memory.take(all + W);
    shrink = memory.take(ROWS + W);
    ranges = memory.take<Range>(rows);
    if (NARROWS_VALUES<Number> && !plan.streamed) narrow.take(memory, least(ROWS, rows), keys, p.V);
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

// Nothing seen yet: of a head, its queries packed, and the softmax. A sink counts as a key without
// a value, in the first part.
template <class Number>
static void begin_rows(const AttentionForward<Number>& p, const Rows& rows, bool first_part,
                       const ForwardMemory<Number>& my) {
  const int64_t count = rows.count(), q_width = whole_along<Operand<Number>>(p.K);
  for (int64_t r = 0; r < count; ++r) {
    if (p.query_lengths && rows.time(r) >= p.query_lengths[rows.b])
      zero(my.q + r * q_width, q_width);
    else if constexpr (IN_PAIRS<Number>)
      pack_row(p.query + query_at(p, p.K, rows, r), p.K, my.q + r * q_width);
    else
      pack_query(p, p.query, rows, r, my.q + r * q_width);
    if constexpr (IN_PAIRS<Number>) my.scale[r] = scale_of(p, rows, r);
    const float sink = p.sinks && first_part ? p.sinks[rows.m * p.G + rows.head(r)] : -INFINITY;
    my.peak[r] = sink;
    zero(my.total + r * W, W);
    my.total[r * W] = sink == -INFINITY ? 0 : expf(sink - sink);
  }
  zero(my.o, count * whole_vectors(p.V));
}

// What is hidden has weight 0, which NaN and ∞ among the values pass through. They are rare: a set
// of rows is computed as if there were none, and once more, with what is hidden zeroed, if there is
// NaN or ∞ among what comes.
enum class Values { finite, any };

// The values of a block of keys as what P is multiplied by: in rows, where they are or packed.
template <class Number>
class ValueRows {
 public:
  ValueRows(const AttentionForward<Number>& p, const Rows& rows, Range keys, bool streamed,
            Values values, const ForwardMemory<Number>& my)
      : p_(p),
        rows_(rows),
        keys_(keys),
        my_(my),
        v_(rows_in_place(p, p.value, p.V, rows.b, rows.m, keys)),
        finite_(values == Values::finite),
        in_place_(streamed && ALIKE<Number> && finite_ &&
                  vectors_in_place(p, p.V, rows.b, rows.m, keys)) {}

  // Before the first block of rows.
  void pack() {
    if (!in_place_) pack_packed();
  }
  // Of keys that no row of a block sees, after its logits are known.
  void hide(const Block& block) {
    if (!finite_) hide_unseen(block, my_.s, my_.v, whole_vectors(p_.V));
  }
  // Rows from r on of O, times `shrink`, and P v.
  void add(const Block& block, int64_t r) {
    if constexpr (ALIKE<Number>)
      in_place_ ? add_products_with(v_, block, r) : add_products_with(packed(), block, r);
    else
      add_products_with(packed(), block, r);
    if (!finite_) pack_packed();
  }

 private:
  KeyRows<float> packed() const { return {my_.v, whole_vectors(p_.V)}; }
  void pack_packed() { pack_rows(p_, p_.value, p_.V, rows_.b, rows_.m, keys_, my_.v); }
  template <class Value>
  void add_products_with(const KeyRows<Value>& v, const Block& block, int64_t r) {
    const int64_t width = whole_vectors(p_.V);
    product<Stored::by_row, From::scaled>(block.rows, width / W, block.seen(), my_.s + block.from,
                                          STRIDE, v.data + block.from * v.stride, v.stride,
                                          TILE_COLUMNS, my_.o + r * width, width, my_.shrink);
  }

  const AttentionForward<Number>& p_;
  const Rows& rows_;
  Range keys_;
  const ForwardMemory<Number>& my_;
  KeyRows<Number> v_;
  bool finite_, in_place_;
};

#if defined(RNNATTN_TILES)
// The same for narrow products, of values without NaN and ∞.
class NarrowValues {
 public:
  NarrowValues(const AttentionForward<Bfloat16>& p, const Rows& rows, Range keys, bool, Values,
               const ForwardMemory<Bfloat16>& my)
      : p_(p), my_(my), keys_(keys), rows_(rows_in_place(p, p.value, p.V, rows.b, rows.m, keys)) {}

  void pack() { pair_rows(rows_, keys_.past - keys_.first, p_.V, v_); }
  void hide(const Block&) {}
  void add(const Block& block, int64_t r) {
    const int64_t width = whole_vectors(p_.V);
    narrow_rows(my_.narrow.weights, block, my_.s, nullptr, v_);
    product_of_narrow<From::scaled>(block.rows, p_.V, block.seen(),
                                    NarrowWeights::of_rows(my_.narrow.weights, block.from), v_,
                                    block.from, my_.o + r * width, width, my_.shrink);
  }

 private:
  const AttentionForward<Bfloat16>& p_;
  const ForwardMemory<Bfloat16>& my_;
  Range keys_;
  KeyRows<Bfloat16> rows_;
  NarrowRows v_ = my_.narrow.along_s;
};
#endif

// The softmax of rows of a head after a block of keys more.
template <class Packed, class Number>
static void see_keys(const AttentionForward<Number>& p, const Rows& rows, Range keys, bool streamed,
                     Values values, const ForwardMemory<Number>& my) {
  const int64_t count = rows.count(), q_width = whole_along<Operand<Number>>(p.K);
  const bool columns = keys_in_columns<Number>(p, streamed, count);
  Against<Operand<Number>> k{columns ? my.k : nullptr, {my.k, q_width}};
  if constexpr (ALIKE<Number>) k.rows = rows_in_place(p, p.key, p.K, rows.b, rows.m, keys);
  Packed v(p, rows, keys, streamed, values, my);
  bool packed = false;
  if (streamed) {
    prefetch_share(p, p.key, p.K, rows.b, rows.m, keys.past, keys.past - keys.first);
    prefetch_share(p, p.value, p.V, rows.b, rows.m, keys.past, keys.past - keys.first);
  }
  for (int64_t first = 0; first < count; first += ROWS) {
    const Range seeing = rows_seeing({first, least(first + ROWS, count)}, keys,
                                     [&](int64_t r) { return my.ranges[r]; });
    const int64_t r = seeing.first;
    const Block block = block_of(p, rows, keys, my.ranges + r, r, seeing.past - r);
    if (block.empty()) continue;
    if (!packed) {
      packed = true;
      if (columns)
        pack_columns(p, p.key, p.K, rows.b, rows.m, keys, my.k);
      else if constexpr (!ALIKE<Number>)
        pack_rows(p, p.key, p.K, rows.b, rows.m, keys, my.k);
      v.pack();
    }
    const QueryRows<Operand<Number>> q{my.q + r * q_width,
                                       IN_PAIRS<Number> ? my.scale + r : nullptr};
    logits(p, block, rows, my.ranges + r, r, q, k, my.s, nullptr);
    v.hide(block);
    for (int64_t i = 0; i < block.rows; i += W)
      weigh(block, least(W, block.rows - i), my.s + i * STRIDE, my.peak + r + i,
            my.total + (r + i) * W, my.shrink + i);
    v.add(block, r);
  }
}
template <class Number>
static void see_keys(const AttentionForward<Number>& p, const Rows& rows, Range keys, bool streamed,
                     Values values, const ForwardMemory<Number>& my) {
#if defined(RNNATTN_TILES)
  if constexpr (NARROWS_VALUES<Number>)
    if (!streamed && values == Values::finite)
      return see_keys<NarrowValues>(p, rows, keys, streamed, values, my);
#endif
  see_keys<ValueRows<Number>>(p, rows, keys, streamed, values, my);
}

// O and L of a row, from the weighted sum, the total and the peak of all its keys.
template <class Number>
static void finish_row(const AttentionForward<Number>& p, const float* weighted, float total,
                       float peak, const Rows& rows, int64_t r) {
  const bool empty = total == 0;
  const float factor = empty ? 0 : 1 / total;
  const int64_t at = query_at(p, p.V, rows, r);
  if (p.o)
    unpack_row(weighted, factor, p.V, p.o + at);
  else
    unpack_row(weighted, factor, p.V, p.narrow_o + at);
  p.lse[row_at(p, rows, r)] = empty ? -INFINITY : (peak == -INFINITY ? 0 : peak) + logf(total);
}

template <class Number>
static void forward_part(const AttentionForward<Number>& p, const ForwardPlan& plan,
                         const Rows& first, int64_t part, const PartsOfSoftmax& parts,
                         float* base) {
  const ForwardMemory<Number> all(p, plan, base);
  const int64_t count = first.count(), v_width = whole_vectors(p.V);
  // The rows of another head of the item, and its share of the memory.
  const auto of_head = [&](int64_t head, auto f) {
    Rows rows = first;
    ForwardMemory<Number> my = all;
    rows.m += head;
    my.q += head * count * whole_along<Operand<Number>>(p.K);
    if constexpr (IN_PAIRS<Number>) my.scale += head * count;
    my.o += head * count * v_width;
    my.total += head * count * W;
    my.peak += head * count;
    f(rows, my);
  };
  for (int64_t r = 0; r < count; ++r) all.ranges[r] = keys_of(p, first.b, first.time(r));
  const Range keys = plan.seen_of_part(p, part, seen_by(all.ranges, count).any);
  constexpr Values ATTEMPTS[] = {Values::finite, Values::any};
  for (const Values values : ATTEMPTS) {
    for (int64_t head = 0; head < plan.heads; ++head)
      of_head(head, [&](const Rows& rows, const ForwardMemory<Number>& my) {
        begin_rows(p, rows, part == 0, my);
      });
    for (int64_t key = keys.first; key < keys.past; key += plan.keys)
      for (int64_t head = 0; head < plan.heads; ++head)
        of_head(head, [&](const Rows& rows, const ForwardMemory<Number>& my) {
          see_keys(p, rows, {key, least(key + plan.keys, keys.past)}, plan.streamed, values, my);
        });
    if (are_finite(KeyRows<float>{all.o, v_width}, plan.heads * count, p.V)) break;
  }
  const int64_t size = p.B * p.M * p.G * p.T;
  for (int64_t head = 0; head < plan.heads; ++head)
    of_head(head, [&](const Rows& rows, const ForwardMemory<Number>& my) {
      for (int64_t r = 0; r < count; ++r) {
        const float total = sum(load(my.total + r * W)), peak = my.peak[r];
        if (plan.parts == 1) {
          finish_row(p, my.o + r * v_width, total, peak, rows, r);
          continue;
        }
        const int64_t row = part * size + row_at(p, rows, r);
        unpack_row(my.o + r * v_width, 1, p.V, parts.o + row * p.V);
        parts.total[row] = total;
        parts.peak[row] = peak;
      }
    });
}

// O and L of a set of rows of one head, from all parts of the keys; those of the first are lost.
template <class Number>
static void join_parts(const AttentionForward<Number>& p, const ForwardPlan& plan, const Rows& rows,
                       const PartsOfSoftmax& parts) {
  const int64_t size = p.B * p.M * p.G * p.T;
  for (int64_t r = 0; r < rows.count(); ++r) {
    const int64_t row = row_at(p, rows, r);
    float peak = -INFINITY, total = 0;
    for (int64_t i = 0; i < plan.parts; ++i) {
      const float other = parts.peak[i * size + row];
      peak = other > peak ? other : peak;
    }
    float* weighted = parts.o + row * p.V;
    for (int64_t i = 0; i < plan.parts; ++i) {
      const int64_t at = i * size + row;
      const float shrink = expf(parts.peak[at] - (peak == -INFINITY ? 0 : peak));
      total += shrink * parts.total[at];
      for (int64_t v = 0; v < p.V; v += W) {
        const int width = static_cast<int>(least(W, p.V - v));
        const V seen = shrink * load(parts.o + at * p.V + v, width);
        store(weighted + v, i == 0 ? seen : load(weighted + v, width) + seen, width);
      }
    }
    finish_row(p, weighted, total, peak, rows, r);
  }
}

template <class Number>
static bool forward(Threads& threads, const AttentionForward<Number>& p) {
  const ForwardPlan plan(p);
  const int64_t rows = p.B * p.M * p.G * p.T, multiply_adds = rows * p.S * (p.K + p.V);
  advise_huge_pages(p.o, rows * p.V);
  advise_huge_pages(p.narrow_o, rows * p.V);
  const PartsOfSoftmax size(p, plan, nullptr);
  const Allocation allocation(size.memory.used);
  if (!allocation.data() && size.memory.used > 0) return false;
  const PartsOfSoftmax parts(p, plan, allocation.data());
  const auto of_part = [&](int64_t item, float* memory) {
    forward_part(p, plan, plan.rows(p, item / plan.parts), item % plan.parts, parts, memory);
  };
  const bool done = parallel_for(threads, plan.sets * plan.parts, threads_for(p, multiply_adds),
                                 ForwardMemory<Number>(p, plan, nullptr).memory.used, of_part);
  if (plan.parts == 1) return done;
  return done &&
         parallel_for(threads, p.B * p.M * plan.blocks.count(),
                      rows * p.V * plan.parts / WORK_OF_A_THREAD + 1, 0, [&](int64_t item, float*) {
                        const int64_t head = item / plan.blocks.count();
                        join_parts(
                            p, plan,
                            plan.blocks.rows(head / p.M, head % p.M, item % plan.blocks.count()),
                            parts);
                      });
}

}  // namespace rnnattn::RNNATTN_SET::attention
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_ATTENTION_FORWARD_INL_H_
