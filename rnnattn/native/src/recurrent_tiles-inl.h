// Recurrent units: forward, backward, and a single step of few rows. The equations are those of
// lstm_cell-inl.h and gru_cell-inl.h, see recurrent_unit-inl.h; arrays are time-major.
//
// A register tile holds all four gates of W hidden units for a few rows of the batch, so that the
// cell is computed where the product ends, and x w_x + h₋ w_h is one product. Rows of the batch
// are split over the threads, and each runs all steps of its rows: nobody waits in between. Where
// there are too few of them the hidden units are split, and a step waits for all of the one before.
// A projection of h is another product of the same rows; where units are split, it waits for all m.
//
// The gradient goes chunk by chunk of steps against the direction of running:
//
//     for each row        the steps: dz, then dh₋ = dz w_hᵀ
//     for each block      of dw_x, dw_h, db (a product of dz with [x h₋ 1]), and of dx = dz w_xᵀ
//
// No row's result depends on which rows stand beside it, and no sum is split over threads.
//
// This file: tiles of registers, how gates and weights lie in memory, and products of these.

#ifndef RNNATTN_RECURRENT_TILES_INL_H_
#define RNNATTN_RECURRENT_TILES_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "product-inl.h"
#include "recurrent_unit-inl.h"
#include "simd-inl.h"
#include "threads.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::recurrent {

// Rows of a register tile that is 4 vectors wide. It holds a number of each row, which is less than
// the 4 vectors where registers are few: 3 × 4 sums, 3 numbers and a vector are 16 of AVX2. Those
// of aarch64 are 32 and would hold more, which nobody has measured.
#if RNNATTN_LANES == 16
constexpr int GATE_TILE_ROWS = 6;
#elif RNNATTN_LANES == 8
constexpr int GATE_TILE_ROWS = 3;
#else
constexpr int GATE_TILE_ROWS = 2;
#endif

constexpr int PANEL = GATES * W;  // the width of a tile

constexpr int64_t FEW_ROWS = 3;          // fewer for a thread do not pay
constexpr int64_t ENOUGH_ROWS = 4;       // with fewer for each, the units are shared out instead
constexpr int64_t SHARE = 1 << 15;       // products of a step that pay for waiting for another
constexpr int64_t PROJECTED_ROWS = 96;   // of the batch and time, of an item of the projection
constexpr int64_t STEP_ROWS = 4;         // up to so many, few steps pack no weights
constexpr int64_t STEP_UNITS = 256;      // of a work item of such a step
constexpr int64_t CACHED = 1 << 17;      // weights of a step that may be packed all at once
constexpr int64_t SMALL_STEP = 1 << 20;  // with fewer weights: one thread, and the third step packs
constexpr int64_t CHUNK_ROWS = 2048;     // of the batch and time, of a chunk of the gradient
constexpr int64_t CHUNK_FLOATS = 1 << 20;  // of its dz
constexpr int64_t DEPTH = 512;  // rows of dz that a block of the weight gradient sums at once
constexpr int64_t BLOCK = 32 * GATE_TILE_ROWS;  // rows of such a block
constexpr int64_t ITEMS_OF_A_THREAD = 4;        // at least, so that all end at about the same time
constexpr int64_t ITEM_ROWS = 128;              // of the batch and time, of one item of a product

// [from, to) in either direction.
template <class F>
RNNATTN_INLINE void over_steps(bool backwards, int64_t from, int64_t to, F f) {
  if (backwards)
    for (int64_t t = to - 1; t >= from; --t) f(t);
  else
    for (int64_t t = from; t < to; ++t) f(t);
}

// How the four gates of many rows lie: W units of gate g of row r, the u-th such, are at
// r `row` + g `gate` + u `unit`.
struct Gates {
  float* data;
  int64_t row, gate, unit;
  bool padded;  // the last units take a whole vector, too

  // (rows, GATES H), as in the arguments.
  static Gates in_rows(float* data, int64_t H) { return {data, GATES * H, H, W, false}; }

  // Panels of W units each, (rows, GATES, W), with a cache line between them: otherwise the same
  // row of all panels may fall into a few sets of a cache.
  static Gates in_panels(float* data, int64_t rows) { return {data, PANEL, W, panel(rows), true}; }
  static int64_t panel(int64_t rows) { return rows * PANEL + LINE; }

  Gates from(int64_t r) const { return {data ? data + r * row : nullptr, row, gate, unit, padded}; }
  explicit operator bool() const { return data != nullptr; }

  V get(int64_t r, int g, int64_t u, int n) const {
    return load_units(data + r * row + g * gate + u * unit, padded ? W : n);
  }
  void put(int64_t r, int g, int64_t u, V v, int n) const {
    store_units(data + r * row + g * gate + u * unit, v, padded ? W : n);
  }
};

// sums += a w of those of the gates that have a block in w; see `accumulate`.
template <class Blocks, int R, class Operand>
RNNATTN_INLINE void accumulate_gates(V (&sums)[R][GATES], int64_t steps, const Operand* a,
                                     int64_t a_row, const Operand* w) {
  constexpr int FIRST = Blocks::FIRST, COUNT = Blocks::COUNT;
  if constexpr (COUNT == GATES) {
    accumulate(sums, steps, a, a_row, w, PANEL);
  } else {
    V some[R][COUNT];
    unrolled<R>([&](auto i) RNNATTN_LAMBDA {
      unrolled<COUNT>([&](auto g) RNNATTN_LAMBDA { some[i][g] = sums[i][FIRST + g]; });
    });
    accumulate(some, steps, a, a_row, w, COUNT * W);
    unrolled<R>([&](auto i) RNNATTN_LAMBDA {
      unrolled<COUNT>([&](auto g) RNNATTN_LAMBDA { sums[i][FIRST + g] = some[i][g]; });
    });
  }
}

// ---- packed weights ---------------------------------------------------------------------------

// For each W hidden units: the biases, the rows of w_x, those of w_h, each of the gates that have a
// block there, times `Unit::scale`; zero beyond H, and to whole steps of a product. The biases are
// float32.
template <class Unit, class Operand>
struct Cells {
  const Operand* packed;
  int64_t D, H, R;
  int64_t first = 0;  // the block of units that `packed` begins with

  static constexpr int64_t BIAS = PANEL * TOGETHER<Operand>;
  template <class Blocks>
  static int64_t rows(int64_t K) {
    return whole_steps<Operand>(K) * Blocks::COUNT * W;
  }
  static int64_t stride(int64_t D, int64_t R) {
    return BIAS + rows<typename Unit::OfX>(D) + rows<typename Unit::OfH>(R);
  }
  static int64_t size(int64_t D, int64_t H, int64_t R) { return ceil_div(H, W) * stride(D, R); }
  V bias(int64_t u, int g) const { return load(reinterpret_cast<const float*>(at(u)) + g * W); }
  const Operand* x(int64_t u) const { return at(u) + BIAS; }
  const Operand* h(int64_t u) const { return x(u) + rows<typename Unit::OfX>(D); }

 private:
  const Operand* at(int64_t u) const { return packed + (u - first) * stride(D, R); }
};

// Block k of the biases, which are one behind the other [b b_n]; null if there is none.
template <class Number>
RNNATTN_INLINE const Number* bias_block(const Recurrent<Number>& s, int k) {
  return k < s.G ? s.b + k * s.H : s.b_n;
}

template <class Unit, class Number>
static void pack_cells(const Recurrent<Number>& s, int64_t u, Operand<Number>* out) {
  const int64_t H = s.H, j = u * W;
  const int n = static_cast<int>(least(W, H - j));
  const auto scaled = [&](const Number* block, int g) RNNATTN_LAMBDA {
    return load_units(block + j, n) * splat(Unit::scale(g));
  };
  float* biases = reinterpret_cast<float*>(out);
  for (int g = 0; g < GATES; ++g) {
    const Number* block = bias_block(s, Unit::OfBias::of(g));
    put_steps(biases, block ? scaled(block, g) : V{});
  }
  out += Cells<Unit, Operand<Number>>::BIAS;
  const auto put = [&](auto blocks, const Number* w, int64_t K) RNNATTN_LAMBDA {
    using Blocks = decltype(blocks);
    const int64_t width = Blocks::COUNT * H;
    for (int64_t k = 0; k < K;
         k += TOGETHER<Operand<Number>>, w += TOGETHER<Operand<Number>> * width)
      unrolled<Blocks::COUNT>([&](auto i) RNNATTN_LAMBDA {
        constexpr int g = Blocks::FIRST + i;
        const Number* block = w + Blocks::of(g) * H;
        const V row = scaled(block, g);
        if constexpr (TOGETHER<Operand<Number>> == 2)
          put_pairs(out, row, k + 1 < K ? scaled(block + width, g) : V{});
        else
          put_steps(out, row);
      });
  };
  put(typename Unit::OfX{}, s.w_x, s.D);
  put(typename Unit::OfH{}, s.w_h, s.R);
}

// P (H, R), or its transpose, as it is read by products: float32, in rows a cache line longer than
// they are wide, as those of one column would fall into a few sets of a cache.
RNNATTN_INLINE int64_t padded(int64_t width) { return whole_vectors(width) + LINE; }

// Rows [j, j + W) of P, and columns [j, j + W) of Pᵀ.
template <class Number>
static void pack_projection(const Recurrent<Number>& s, int64_t j, float* packed) {
  for (int64_t i = j; i < least(j + W, s.H); ++i)
    copy_numbers(s.projection + i * s.R, s.R, packed + i * padded(s.R), true);
}
template <class Number>
static void pack_transposed_projection(const Recurrent<Number>& s, int64_t j, float* packed) {
  for (int64_t k = 0; k < s.R; k += W) {
    const int n = static_cast<int>(least(W, s.R - k));
    V block[W];
    for (int64_t i = 0; i < W; ++i)
      block[i] = j + i < s.H ? load_units(s.projection + (j + i) * s.R + k, n) : V{};
    transpose(block);
    for (int i = 0; i < n; ++i) store(packed + (k + i) * padded(s.H) + j, block[i]);
  }
}

// wᵀ of a weight w of N rows in panels of TRANSPOSED_COLUMNS; the last may have 1 or 2 vectors. Its
// rows are in the order of `Gates::in_panels`: for each W units their gates in w, zero beyond H.
constexpr int TRANSPOSED_COLUMNS = 4 * W;

template <class Blocks, class Operand>
struct Transposed {
  const Operand* packed;
  int64_t N, H;

  static int64_t panels(int64_t N) { return ceil_div(N, TRANSPOSED_COLUMNS); }
  static int64_t depth(int64_t H) { return ceil_div(H, W) * Blocks::COUNT * W; }
  static int64_t size(int64_t N, int64_t H) { return panels(N) * TRANSPOSED_COLUMNS * depth(H); }
  static int vectors(int64_t N, int64_t p) {
    const int64_t n = ceil_div(N - p * TRANSPOSED_COLUMNS, W);
    return n > 2 ? 4 : static_cast<int>(n);
  }
  const Operand* panel(int64_t p) const { return packed + p * TRANSPOSED_COLUMNS * depth(H); }
};

template <class Blocks, class Number, class Operand>
static void pack_transposed(const Number* w, int64_t N, int64_t H, int64_t p, Operand* packed) {
  using Packed = Transposed<Blocks, Operand>;
  const int64_t width = Packed::vectors(N, p) * W, first = p * TRANSPOSED_COLUMNS;
  Operand* out = packed + first * Packed::depth(H);
  for (int64_t j = 0; j < H; j += W) {
    const int n = static_cast<int>(least(W, H - j));
    unrolled<Blocks::COUNT>([&](auto g) RNNATTN_LAMBDA {
      const Number* of_gate = w + Blocks::of(Blocks::FIRST + g) * H + j;
      for (int64_t column = 0; column < width; column += W) {
        V block[W];
        for (int64_t i = 0; i < W; ++i) {
          const int64_t row = first + column + i;
          block[i] = row < N ? load_units(of_gate + row * Blocks::COUNT * H, n) : V{};
        }
        transpose(block);
        unrolled<W / TOGETHER<Operand>>([&](auto i) RNNATTN_LAMBDA {
          Operand* to = out + (i * width + column) * TOGETHER<Operand>;
          if constexpr (TOGETHER<Operand> == 2)
            put_pairs(to, block[2 * i], block[2 * i + 1]);
          else
            put_steps(to, block[i]);
        });
      }
      out += W * width;
    });
  }
}

// Rows of dz in panels of PANEL numbers, in the order of `Gates::in_panels`. As pairs a number is
// the sum of two, the second `rest` behind the first: one alone would leave 2⁻⁹ of dz out of every
// step.
template <class Operand>
struct Panels {
  const Operand* data;
  int64_t row, unit, rest;
};

// out = dz wᵀ for N vectors of a panel `width` wide, or out += dz wᵀ. Rows that are not `written`
// stay as they are; if that is null, all are written.
template <class Blocks, int N, class Operand, class Number>
struct TransposedTile {
  Panels<Operand> dz;
  const Operand* w;
  int64_t width;
  int64_t panels;  // of dz
  Number* out;
  bool adds;
  const uint8_t* written;
  int64_t stride, columns;

  template <int R>
  void run(int64_t r) const {
    V sum[R][N] = {};
    constexpr int64_t steps = Blocks::COUNT * W;
    const Operand *a = dz.data + r * dz.row + Blocks::FIRST * W, *b = w;
    for (int64_t u = 0; u < panels; ++u, a += dz.unit, b += steps * width) {
      accumulate(sum, steps, a, dz.row, b, width);
      if constexpr (TOGETHER<Operand> == 2) accumulate(sum, steps, a + dz.rest, dz.row, b, width);
    }
    unrolled<R>([&](auto i) RNNATTN_LAMBDA {
      if (written && !written[r + i]) return;
      Number* row = out + (r + i) * stride;
      unrolled<N>([&](auto n) RNNATTN_LAMBDA {
        const int count = static_cast<int>(least(W, columns - n * W));
        if (count <= 0) return;
        V v = sum[i][n];
        if (adds) v += load_units(row + n * W, count);
        store_units(row + n * W, v, count);
      });
    });
  }
};

// Columns [first, past) of dz wᵀ, in vectors, and rows [lo, hi).
template <class Blocks, class Operand, class Number>
static void times_transposed(const Panels<Operand>& dz, const Transposed<Blocks, Operand>& w,
                             Number* out, bool adds, int64_t stride, const uint8_t* written,
                             int64_t first, int64_t past, int64_t lo, int64_t hi) {
  while (first < past) {
    const int64_t p = first / 4, within = first % 4;
    const int64_t width = w.vectors(w.N, p) * W;
    as_constant<4>(least(4 - within, past - first), [&](auto N) {
      const Operand* panel = w.panel(p) + within * W * TOGETHER<Operand>;
      over_tiles<GATE_TILE_ROWS>(lo, hi,
                                 TransposedTile<Blocks, N, Operand, Number>{
                                     dz, panel, width, ceil_div(w.H, W), out + first * W, adds,
                                     written, stride, w.N - first * W});
      first += N;
    });
  }
}

}  // namespace rnnattn::RNNATTN_SET::recurrent
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_RECURRENT_TILES_INL_H_
