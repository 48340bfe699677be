// The kernels of attention: the equations of rnnattn/attention/equations.py, in its letters.
//
//     forward   per block: s, P v             per query block: O, L
//     backward  per block: s, P, dP, dS, dv, dk, dq
//
// A block is of some queries of one key/value head ("rows": those of several query heads, where a
// head has few) and KEYS keys. Keys are in the lanes of a vector. Forward, a work item is a set of
// rows, and the softmax is kept as a running peak, total and weighted sum; backward, it is a range
// of keys, and the weights are computed again from the log-sum-exp.
//
// Keys and values are packed where a block of them meets many rows. Where a head has few, as in
// decoding, to read them is what takes time: they are read where they are, once, all heads of a few
// keys after one another, as they lie in memory ("streamed").
//
// This file: who sees whom, and so what blocks there are.

#ifndef RNNATTN_ATTENTION_MASKS_INL_H_
#define RNNATTN_ATTENTION_MASKS_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "threads.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::attention {

constexpr int64_t KEYS = 256;          // of a block
constexpr int64_t ROWS = 48;           // of a block
constexpr int64_t FORWARD_ROWS = 288;  // of a work item, which share a block of packed keys
// Of a row of logits: a power of two would put its columns into a few sets of a cache.
constexpr int64_t STRIDE = KEYS + LINE;
constexpr int64_t STREAMED_ROWS = 16;         // of a key/value head, at most
constexpr int64_t STREAMED_KEYS = PAGE_KEYS;  // of a block, as of one of keys in pages
constexpr int64_t LEAST_BLOCKS = 4;  // of keys, of the backward pass: else they are smaller
constexpr int64_t LEAST_ITEMS = 16;  // if there are as many key blocks
constexpr int64_t LEAST_KEYS_OF_A_PART = 256;  // forward, of packed ones
// Multiply-adds: with fewer, another thread does not pay.
constexpr int64_t WORK_OF_A_THREAD = 1 << 20;
// The same in numbers of keys and values, where they are streamed.
constexpr int64_t NUMBERS_OF_A_THREAD = 1 << 16;
// As so many multiply-adds takes what is done once for a row, however few keys there are.
constexpr int64_t WORK_OF_A_ROW = 1 << 13;

// The keys that positions and lengths leave to a query, or that it is given.
static Range keys_of(const Attention& p, int64_t b, int64_t t) {
  if (p.key_ranges) {
    const int32_t* range = p.key_ranges + (b * p.T + t) * 2;
    const int64_t first = least(most(range[0], 0), p.S);
    return {first, most(first, least(range[1], p.S))};
  }
  if (p.query_lengths && t >= p.query_lengths[b]) return {0, 0};
  const int64_t at = t + p.offset[b * p.offset_stride];
  int64_t first = 0, past = p.key_lengths ? least(p.key_lengths[b], p.S) : p.S;
  if (p.left >= 0) first = most(first, at - p.left);
  if (p.is_causal)
    past = least(past, at + 1);
  else if (p.right >= 0)
    past = least(past, at + p.right + 1);
  first = least(first, p.S);
  return {first, most(first, past)};
}

// Of the query heads of one key/value head, `heads` from g on; of each the `times` queries from t.
struct Rows {
  int64_t b, m, g, heads, t, times;

  int64_t count() const { return heads * times; }
  int64_t head(int64_t r) const { return g + r / times; }
  int64_t time(int64_t r) const { return t + r % times; }
};

// An axis in parts of about the same size, `limit` at most.
struct Parts {
  int64_t size, count;

  Parts(int64_t n, int64_t limit) : size(n), count(ceil_div(n, limit)) {}
  int64_t start(int64_t i) const { return size * i / count; }
};

// The queries of a key/value head in sets of at most `limit` rows.
struct RowBlocks {
  Parts times, heads;

  RowBlocks(const Attention& p, int64_t limit)
      : times(p.T, limit), heads(p.G, most(1, limit / p.T)) {}
  int64_t count() const { return times.count * heads.count; }
  Rows rows(int64_t b, int64_t m, int64_t i) const {
    const int64_t t = i % times.count, g = i / times.count;
    return {b,
            m,
            heads.start(g),
            heads.start(g + 1) - heads.start(g),
            times.start(t),
            times.start(t + 1) - times.start(t)};
  }
};

// Whether keys and values are read where they are.
static bool is_streamed(const Attention& p) { return p.G * p.T <= STREAMED_ROWS; }

// Heads of a work item where keys are streamed: all, unless there were too few items then.
static int64_t streamed_heads(const Attention& p) {
  int64_t heads = p.M;
  const int64_t of_heads = p.B * ceil_div(p.S, STREAMED_KEYS);
  while (of_heads * (p.M / heads) < LEAST_ITEMS && heads % 2 == 0) heads /= 2;
  return heads;
}

// How many threads pay.
static int64_t threads_for(const Attention& p, int64_t multiply_adds) {
  const int64_t numbers = is_streamed(p) ? p.B * p.S * p.M * (p.K + p.V) : 0;
  const int64_t of_rows = p.B * p.M * p.G * p.T * WORK_OF_A_ROW;
  return most((multiply_adds + of_rows) / WORK_OF_A_THREAD, numbers / NUMBERS_OF_A_THREAD) + 1;
}

// What some row sees, and what all do.
struct Seen {
  Range any, all;
};

static Seen seen_by(const Range* ranges, int64_t rows) {
  Seen seen{{INT64_MAX, 0}, {0, INT64_MAX}};
  for (int64_t r = 0; r < rows; ++r) {
    const Range range = ranges[r];
    seen.all = {most(seen.all.first, range.first), least(seen.all.past, range.past)};
    if (range.first < range.past)
      seen.any = {least(seen.any.first, range.first), most(seen.any.past, range.past)};
  }
  return seen;
}

// The keys that some query of a block sees.
static Range keys_of_block(const Attention& p, const RowBlocks& blocks, int64_t b, int64_t i) {
  Range any{INT64_MAX, 0};
  for (int64_t t = blocks.times.start(i); t < blocks.times.start(i + 1); ++t) {
    const Range keys = keys_of(p, b, t);
    if (keys.first < keys.past) any = {least(any.first, keys.first), most(any.past, keys.past)};
  }
  return any;
}

// Whether any of the keys of a row are among these.
static bool meet(Range of_row, Range keys) {
  return most(of_row.first, keys.first) < least(of_row.past, keys.past);
}

// Of the rows [first, past), those from the first to the last that see any of these keys.
template <class KeysOfRow>
static Range rows_seeing(Range rows, Range keys, const KeysOfRow& keys_of_row) {
  while (rows.first < rows.past && !meet(keys_of_row(rows.first), keys)) ++rows.first;
  while (rows.first < rows.past && !meet(keys_of_row(rows.past - 1), keys)) --rows.past;
  return rows;
}

// Whether segments leave any of the keys [first, past) to some row; `same`: if all to every row.
static bool segments_meet(const Attention& p, const Rows& rows, Range keys, bool* same) {
  if (!p.query_segments) return *same = true;
  const int32_t* of_query = p.query_segments + rows.b * p.T + rows.t;
  const int32_t* of_key = p.key_segments + rows.b * p.S + keys.first;
  int32_t query_least = of_query[0], query_most = of_query[0];
  int32_t key_least = of_key[0], key_most = of_key[0];
  for (int64_t i = 1; i < rows.times; ++i) {
    query_least = of_query[i] < query_least ? of_query[i] : query_least;
    query_most = of_query[i] > query_most ? of_query[i] : query_most;
  }
  for (int64_t i = 1; i < keys.past - keys.first; ++i) {
    key_least = of_key[i] < key_least ? of_key[i] : key_least;
    key_most = of_key[i] > key_most ? of_key[i] : key_most;
  }
  *same = query_least == query_most && key_least == key_most && query_least == key_least;
  return query_least <= key_most && key_least <= query_most;
}

// The columns [from, to) of a block of `count` keys that some row of a block of rows sees, and how;
// of those that the mask shows to some from the first to the last.
struct Block {
  int64_t rows, first, count, from, to;
  bool bare = false;      // its logits are q kᵀ, but for what positions and lengths mask
  bool in_range = false;  // positions and lengths mask nothing of it, nor is a column without key
  bool all_seen = false;  // positions and lengths mask none of its keys, and it has all columns
  bool segments = false;  // segments may mask some of it

  bool empty() const { return from >= to; }
  bool shows_all() const { return bare && all_seen; }
  // Of [from, to), the keys that there are.
  int64_t seen() const { return least(to, count) - from; }
};

// Which columns of a block of keys the mask shows to some of its rows, and which to all.
struct Shown {
  uint8_t some[KEYS], all[KEYS];

  Shown(const Attention& p, const Rows& of, int64_t row, int64_t rows, Range keys) {
    const int64_t count = keys.past - keys.first;
    for (int64_t j = 0; j < count; ++j) some[j] = 0, all[j] = 1;
    for (int64_t r = row; r < row + rows; ++r) {
      const uint8_t* mask = p.mask.row(of.b, of.m, of.head(r), of.time(r));
      if (p.mask.s)
        add(mask + keys.first, count);
      else if (mask[0])
        for (int64_t j = 0; j < count; ++j) some[j] = 1;
      else
        for (int64_t j = 0; j < count; ++j) all[j] = 0;
    }
  }
  // Of these columns, from the first to the last that some row sees.
  Range seen_of(Range columns) const {
    while (columns.first < columns.past && !some[columns.first]) ++columns.first;
    while (columns.first < columns.past && !some[columns.past - 1]) --columns.past;
    return columns;
  }
  bool to_all(Range columns) const {
    while (columns.first < columns.past && all[columns.first]) ++columns.first;
    return columns.first >= columns.past;
  }

 private:
  void add(const uint8_t* mask, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      const uint8_t shows = mask[j] != 0;
      some[j] |= shows;
      all[j] &= shows;
    }
  }
};

// Of a block of keys and the rows from `row` on, which see these ranges.
static Block block_of(const Attention& p, const Rows& of, Range keys, const Range* ranges,
                      int64_t row, int64_t rows) {
  const Seen seen = seen_by(ranges, rows);
  const int64_t count = keys.past - keys.first;
  const Block nothing{rows, keys.first, count, 0, 0};
  bool one_segment;
  if (!segments_meet(p, of, keys, &one_segment)) return nothing;
  const Range in_range{most(seen.any.first, keys.first) - keys.first,
                       least(seen.any.past, keys.past) - keys.first};
  if (in_range.first >= in_range.past) return nothing;
  const auto of_columns = [&](Range columns) {
    const int64_t from = columns.first / TILE_COLUMNS * TILE_COLUMNS;
    return Block{rows, keys.first, count, from, whole_vectors(columns.past)};
  };
  Block block = of_columns(in_range);
  bool unmasked = true;
  if (p.mask.data) {
    const Shown shown(p, of, row, rows, keys);
    const Range columns = shown.seen_of(in_range);
    if (columns.first >= columns.past) return nothing;
    block = of_columns(columns);
    unmasked = shown.to_all({block.from, least(block.to, count)});
  }
  block.bare = one_segment && p.soft_cap == 0 && !p.bias.data && !p.by_distance.data && unmasked;
  block.in_range =
      seen.all.first <= keys.first + block.from && seen.all.past >= keys.first + block.to;
  block.all_seen = seen.all.first <= keys.first && seen.all.past >= keys.past && block.from == 0 &&
                   block.to >= count;
  block.segments = !one_segment;
  return block;
}

}  // namespace rnnattn::RNNATTN_SET::attention
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_ATTENTION_MASKS_INL_H_
