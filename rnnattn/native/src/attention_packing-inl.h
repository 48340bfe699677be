// Rows and columns of attention's operands, packed for products.

#ifndef RNNATTN_ATTENTION_PACKING_INL_H_
#define RNNATTN_ATTENTION_PACKING_INL_H_

#include <cstdint>
#include <cstring>

#include "attention_masks-inl.h"
#include "attention_products-inl.h"
#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "util-inl.h"
#include "workspace-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::attention {

// Where a query, and a key, of a given width begin. The keys of a block lie behind one another.
static int64_t query_at(const Attention& p, int64_t width, const Rows& rows, int64_t r) {
  const int64_t head = rows.m * p.G + rows.head(r);
  return ((rows.b * p.T + rows.time(r)) * p.M * p.G + head) * width;
}
static int64_t key_at(const Attention& p, int64_t width, int64_t b, int64_t m, int64_t s) {
  int64_t at = b * p.S + s;
  if (p.pages) at = p.pages[b * p.pages_of_row + s / p.page_size] * p.page_size + s % p.page_size;
  return (at * p.M + m) * width;
}
// The same of L.
static int64_t row_at(const Attention& p, const Rows& rows, int64_t r) {
  return ((rows.b * p.M + rows.m) * p.G + rows.head(r)) * p.T + rows.time(r);
}

// Rows of packed arrays are whole vectors, with zeros behind what they hold.
template <class Number>
static void pack_row(const Number* from, int64_t width, float* to) {
  int64_t i = 0;
  for (; i + W <= width; i += W) store(to + i, load_units(from + i, W));
  if (i < width) store(to + i, load_units(from + i, static_cast<int>(width - i)));
}
#if defined(RNNATTN_PAIRS)
static void pack_row(const Bfloat16* from, int64_t width, Bfloat16* to) {
  std::memcpy(to, from, sizeof(Bfloat16) * static_cast<size_t>(width));
  zero(to + width, whole_along<Bfloat16>(width) - width);
}
#endif
static float scale_of(const Attention& p, const Rows& rows, int64_t r) {
  return *p.scale.row(rows.b, rows.m, rows.head(r), 0);
}
// A query, scaled.
template <class Number>
static void pack_query(const Attention& p, const Number* from, const Rows& rows, int64_t r,
                       float* to) {
  const float scale = scale_of(p, rows, r);
  from += query_at(p, p.K, rows, r);
  int64_t i = 0;
  for (; i + W <= p.K; i += W) store(to + i, load_units(from + i, W) * scale);
  if (i < p.K) store(to + i, load_units(from + i, static_cast<int>(p.K - i)) * scale);
}
// Whether a packed row holds no NaN and no ∞.
static bool is_finite(const float* row, int64_t padded) {
  V products{};
  for (int64_t i = 0; i < padded; i += W) products += 0.0f * load(row + i);
  return sum(products) == 0;
}
// Back again, times a factor.
template <class Number>
static void unpack_row(const float* from, float factor, int64_t width, Number* to) {
  int64_t i = 0;
  for (; i + W <= width; i += W) store_units(to + i, load(from + i) * factor, W);
  if (i < width) store_units(to + i, load(from + i) * factor, static_cast<int>(width - i));
}
static void add_row(const float* from, float factor, int64_t width, float* to) {
  int64_t i = 0;
  for (; i + W <= width; i += W) store(to + i, fma(load(from + i), splat(factor), load(to + i)));
  if (i == width) return;
  const int rest = static_cast<int>(width - i);
  store(to + i, fma(load(from + i), splat(factor), load(to + i, rest)), rest);
}

// Where the panel of column s begins, in columns of `width` numbers, and what so many take.
template <class Operand>
static int64_t panel_at(int64_t width, int64_t s) {
  return s / TILE_COLUMNS * TILE_COLUMNS * whole_steps<Operand>(width);
}

// Keys [first, past) as columns, in panels of TILE_COLUMNS keys: of these first the numbers 0, then
// the numbers 1, and so on, or pairs of them. Zeros up to a whole number of vectors of keys.
template <class Number>
static void pack_columns(const Attention& p, const Number* x, int64_t width, int64_t b, int64_t m,
                         Range keys, Operand<Number>* to) {
  using Operand = RNNATTN_SET::Operand<Number>;
  constexpr int64_t along = ALONG<Operand>;
  const int64_t count = keys.past - keys.first, stride = p.M * width;
  for (int64_t s = 0; s < count; s += W) {
    const Number* from = x + key_at(p, width, b, m, keys.first + s);
    // a column is W floats, whatever they stand for
    float* panel = reinterpret_cast<float*>(to + panel_at<Operand>(width, s)) + s % TILE_COLUMNS;
    for (int64_t k = 0; k < width; k += along, from += along, panel += W * TILE_COLUMNS) {
      V block[W];
      if (count - s >= W && width - k >= along) {
        unrolled<W>([&](auto i) RNNATTN_LAMBDA {
          block[i] = load_along<Operand>(from + i * stride, along);
        });
        transpose(block);
        unrolled<W>([&](auto i) RNNATTN_LAMBDA { store(panel + i * TILE_COLUMNS, block[i]); });
      } else {
        const int64_t wide = least(along, width - k);
        for (int i = 0; i < W; ++i)
          block[i] = s + i < count ? load_along<Operand>(from + i * stride, wide) : V{};
        transpose(block);
        for (int i = 0; i < ceil_div(wide, TOGETHER<Operand>); ++i)
          store(panel + i * TILE_COLUMNS, block[i]);
      }
    }
  }
}

// Keys [first, past) as rows.
template <class Number>
static void pack_rows(const Attention& p, const Number* x, int64_t width, int64_t b, int64_t m,
                      Range keys, float* to) {
  const int64_t padded = whole_vectors(width), count = keys.past - keys.first;
  const Number* from = x + key_at(p, width, b, m, keys.first);
  for (int64_t i = 0; i < count; ++i) pack_row(from + i * p.M * width, width, to + i * padded);
}

// Rows of keys or values of a head: where they are, or packed.
template <class Number>
struct KeyRows {
  const Number* data;
  int64_t stride;
};
template <class Number>
static KeyRows<Number> rows_in_place(const Attention& p, const Number* x, int64_t width, int64_t b,
                                     int64_t m, Range keys) {
  return {x + key_at(p, width, b, m, keys.first), p.M * width};
}
// Whether products along keys and values read these as they lie.
template <class Number>
constexpr bool ALIKE = sizeof(Number) == sizeof(Operand<Number>);
// Whether whole vectors can be read of all of them, with whatever stands behind a row in its last:
// not where the array ends before.
static bool vectors_in_place(const Attention& p, int64_t width, int64_t b, int64_t m, Range keys) {
  const int64_t size = (p.pages ? p.P * p.page_size : p.B * p.S) * p.M * width;
  return key_at(p, width, b, m, keys.past - 1) + whole_vectors(width) <= size;
}
// Whether some rows hold no NaN and no ∞. Of every fourth there is a sum of its own: one sum would
// wait at each row for the row before.
template <class Number>
static bool are_finite(KeyRows<Number> rows, int64_t count, int64_t width) {
  constexpr int TOGETHER_ROWS = 4;
  V products[TOGETHER_ROWS]{};
  const auto add = [&](V& sum, int64_t i) {
    const Number* row = rows.data + i * rows.stride;
    for (int64_t k = 0; k < width; k += W)
      sum += 0.0f * load_units(row + k, static_cast<int>(least(W, width - k)));
  };
  int64_t i = 0;
  for (; i + TOGETHER_ROWS <= count; i += TOGETHER_ROWS)
    unrolled<TOGETHER_ROWS>([&](auto j) RNNATTN_LAMBDA { add(products[j], i + j); });
  for (; i < count; ++i) add(products[0], i);
  return sum((products[0] + products[1]) + (products[2] + products[3])) == 0;
}

// Ask for the share of a head in the next `count` keys or values of all heads, which lie one after
// another, if heads are narrow: a core sees long rows coming, but not a line out of each key.
template <class Number>
static void prefetch_share(const Attention& p, const Number* x, int64_t width, int64_t b, int64_t m,
                           int64_t next, int64_t count) {
  constexpr int64_t line = LINE_BYTES / sizeof(Number);
  if (width >= 4 * line) return;
  count = least(count, p.S - next);
  if (count <= 0) return;
  const Number* share = x + key_at(p, width, b, 0, next) + m * count * width;
  for (int64_t i = 0; i < count * width; i += line) __builtin_prefetch(share + i, 0, 2);
}

static int64_t whole_panels(int64_t n) { return ceil_div(n, TILE_COLUMNS) * TILE_COLUMNS; }

// Rows as pairs, zeros beyond them to a whole pair, in panels of TILE_COLUMNS: what a product sums
// over.
template <class Operand>
struct PairedRows {
  Operand* data;
  int64_t panel;  // so many numbers is one

  void take(Memory& memory, int64_t rows, int64_t width) {
    data = memory.take<Operand>(whole_steps<Operand>(rows) * whole_panels(width));
  }
  void begin(int64_t rows) { panel = whole_steps<Operand>(rows) * TILE_COLUMNS; }
  Operand* pair(int64_t row, int64_t column) const {
    return data + column / TILE_COLUMNS * panel + row * TILE_COLUMNS + 2 * (column % TILE_COLUMNS);
  }
};

}  // namespace rnnattn::RNNATTN_SET::attention
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_ATTENTION_PACKING_INL_H_
