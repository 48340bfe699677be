// Recurrent units: forward, backward, and a few steps of few rows. The equations are those of
// lstm_cell-inl.h and the like, see recurrent_unit-inl.h; arrays are time-major.
//
// A register tile holds all gates of W hidden units for a few rows of the batch, so that the
// cell is computed where the product ends, and x w_x + h₋ w_h is one product. In the last tile, of
// W / 2 units or fewer, two or four gates share a vector while they are multiplied. Rows of the
// batch are split over the threads, and each runs all steps of its rows: nobody waits in between.
// Where there are too few of them the hidden units are split, and a step waits for all of the one
// before. A projection of h is another product of the same rows; where units are split, it waits
// for all m.
//
// The gradient goes chunk by chunk of steps against the direction of running:
//
//     for each row        the steps: dz, then dh₋ = dz w_hᵀ
//     for each block      of dw_x, dw_h, db (a product of dz with [x h₋ 1]), and of dx = dz w_xᵀ
//
// No row's result depends on which rows stand beside it, and no sum is split over threads. A few
// steps of a few rows read the weights where they lie, see recurrent_few_steps-inl.h: in another
// order, in the gradient and in 16 bits.
//
// This file: tiles of registers, how gates and weights lie in memory, and products of these.

#ifndef RNNATTN_RECURRENT_TILES_INL_H_
#define RNNATTN_RECURRENT_TILES_INL_H_

#include <cstdint>

#include "fixed_point-inl.h"
#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "product-inl.h"
#include "recurrent_unit-inl.h"
#include "simd-inl.h"
#include "threads.h"
#include "util-inl.h"
#include "workspace-inl.h"

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

// Of a product of numbers of that type.
template <class Operand>
constexpr int GATE_ROWS = GATE_TILE_ROWS;
#if defined(RNNATTN_PAIRS)
template <>
constexpr int GATE_ROWS<Bfloat16> = PAIR_ROWS;
#endif

constexpr int PANEL = TILE_WIDTH * W;

constexpr int64_t GROUP_ROWS = 2;   // fewer for a thread do not pay
constexpr int64_t FEW_ROWS = 3;     // take as long as a row alone, the weights being read for these
constexpr int64_t ENOUGH_ROWS = 4;  // with fewer for each, the units are shared out instead
constexpr int64_t SHARE = 1 << 16;  // products of a step that pay for waiting for another
constexpr int64_t WEIGHTS_OF_A_ROW = 3 << 14;  // with more for each row of a thread, likewise
constexpr int64_t NARROW_X = 8;         // columns for a row of a step: its x w_x is soon computed
constexpr int64_t PROJECTED_ROWS = 96;  // of the batch and time, of an item of the projection
constexpr int64_t CACHED = 1 << 17;     // weights of a step that may be packed all at once
constexpr int64_t BLOCKWISE_STEPS = 2;  // up to so many, others are packed in each, block by block
constexpr int64_t PACKED_TILES = 16;    // of units, at once,
constexpr int64_t PACKED_ROWS = 32;     // so many rows of the weights at a time
constexpr int64_t CHUNK_ROWS = 2048;    // of the batch and time, of a chunk of the gradient
constexpr int64_t CHUNK_FLOATS = 1 << 20;  // of its dz
constexpr int64_t DEPTH = 1024;  // rows of dz that a block of the weight gradient sums at once
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

// How the gates of many rows lie: vector v of tile u of row r is at r `row` + v `vector` + u
// `tile`. In panels, gates of the last tile are brought together, see `Columns::together`.
struct Gates {
  float* data;
  int64_t row, vector, tile;
  bool padded;        // units behind the last have a place, too
  int64_t last = -1;  // the tile of the last units, and the lanes of each of its gates
  int lanes = W;

  // (rows, GATES H), as in the arguments.
  template <class Unit>
  static Gates in_rows(float* data, int64_t H) {
    return {data, GATES<Unit> * H, Unit::CELLS == 1 ? H : W, Unit::CELLS * W, false};
  }

  // Panels of a tile each, (rows, TILE_WIDTH, W), with a cache line between them: otherwise the
  // same row of all panels may fall into a few sets of a cache.
  template <class Unit>
  static Gates in_panels(float* data, int64_t H, int64_t rows) {
    const int64_t last = tiles_across<Unit>(H) - 1;
    return {data, PANEL, W, panel(rows), true, last, lanes_of_gate<Unit>(last, H)};
  }
  static int64_t panel(int64_t rows) { return rows * PANEL + LINE; }

  Gates from(int64_t r) const {
    Gates gates = *this;
    if (data) gates.data += r * row;
    return gates;
  }
  explicit operator bool() const { return data != nullptr; }

  // n lanes; in panels what is behind these belongs to no unit.
  V get(int64_t r, int v, int64_t u, int n) const {
    return load_units(at(r, v, u), padded ? lanes_of(u) : n);
  }
  void put(int64_t r, int v, int64_t u, V x, int n) const {
    store_units(at(r, v, u), x, padded ? lanes_of(u) : n);
  }

 private:
  int lanes_of(int64_t u) const { return u == last ? lanes : W; }
  float* at(int64_t r, int v, int64_t u) const {
    return data + r * row + u * tile + v * (u == last ? lanes : vector);
  }
};

// Panels of so many rows of H units, in memory of their own.
template <class Unit>
RNNATTN_INLINE Gates take_panels(Memory& memory, int64_t H, int64_t rows) {
  return Gates::in_panels<Unit>(memory.take(tiles_across<Unit>(H) * Gates::panel(rows)), H, rows);
}

// The gates of a tile in fewer vectors, see `Columns::together`; and apart again, zeros behind
// each.
template <class Together, int N>
RNNATTN_INLINE void bring_together(const V (&gates)[N], V (&vectors)[Together::VECTORS]) {
  constexpr int LANES = Together::LANES;
  unrolled<N>([&](auto v) RNNATTN_LAMBDA {
    constexpr int n = v * LANES / W, at = v * LANES % W;
    if constexpr (n < Together::VECTORS)
      vectors[n] = at == 0 ? gates[v]
                           : put_lanes<at, LANES>(vectors[n], gates[v],
                                                  std::make_integer_sequence<int, W>{});
  });
}
template <class Together, int N>
RNNATTN_INLINE void take_apart(const V (&vectors)[Together::VECTORS], V (&gates)[N]) {
  constexpr int LANES = Together::LANES;
  unrolled<N>([&](auto v) RNNATTN_LAMBDA {
    constexpr int n = v * LANES / W, at = v * LANES % W;
    if constexpr (n < Together::VECTORS)
      gates[v] = LANES == W
                     ? vectors[n]
                     : get_lanes<at, LANES>(vectors[n], std::make_integer_sequence<int, W>{});
  });
}

// sums += a w of those of the vectors that have columns in w, of tile u; see `accumulate`.
template <class Columns, int R, int ALL, class Operand>
RNNATTN_INLINE void accumulate_gates(V (&sums)[R][ALL], int64_t steps, const Operand* a,
                                     int64_t a_row, const Operand* w, int64_t u, int64_t H) {
  constexpr int FIRST = Columns::FIRST, COUNT = Columns::COUNT;
  Columns::together(u, H, [&](auto together) RNNATTN_LAMBDA {
    using Together = decltype(together);
    constexpr int N = Together::VECTORS;
    if constexpr (N == ALL) {
      accumulate(sums, steps, a, a_row, w, ALL * W);
    } else {
      V gates[R][COUNT], some[R][N];
      unrolled<R>([&](auto i) RNNATTN_LAMBDA {
        unrolled<COUNT>([&](auto v) RNNATTN_LAMBDA { gates[i][v] = sums[i][FIRST + v]; });
        bring_together<Together>(gates[i], some[i]);
      });
      accumulate(some, steps, a, a_row, w, N * W);
      unrolled<R>([&](auto i) RNNATTN_LAMBDA {
        take_apart<Together>(some[i], gates[i]);
        unrolled<COUNT>([&](auto v) RNNATTN_LAMBDA { sums[i][FIRST + v] = gates[i][v]; });
      });
    }
  });
}

// ---- packed weights ---------------------------------------------------------------------------

// For each tile of hidden units: the biases, the rows of w_x, those of w_h that are multiplied by
// h₋ and by q, each of the gates that have a block there, times `Unit::scale`; zero beyond H, and
// to whole steps of a product. The biases are float32.
template <class Unit, class Operand>
struct Cells {
  const Operand* packed;
  int64_t D, H, R;
  int64_t first = 0;  // the tile that `packed` begins with

  using OfX = Columns<Unit, typename Unit::OfX>;
  using OfH = Columns<Unit, typename Unit::OfH>;
  using OfQ = Columns<Unit, typename Unit::OfQ>;
  static constexpr int64_t BIAS = PANEL * TOGETHER<Operand>;
  template <class Columns>
  static int64_t rows(int64_t K) {
    return whole_steps<Operand>(K) * Columns::COUNT * W;
  }
  static int64_t stride(int64_t D, int64_t R) {
    return BIAS + rows<OfX>(D) + rows<OfH>(R) + rows<OfQ>(R);
  }
  static int64_t size(int64_t D, int64_t H, int64_t R) {
    return tiles_across<Unit>(H) * stride(D, R);
  }
  V bias(int64_t u, int v) const { return load(reinterpret_cast<const float*>(at(u)) + v * W); }
  const Operand* x(int64_t u) const { return at(u) + BIAS; }
  const Operand* h(int64_t u) const { return x(u) + rows<OfX>(D); }
  const Operand* q(int64_t u) const { return h(u) + rows<OfH>(R); }

 private:
  const Operand* at(int64_t u) const { return packed + (u - first) * stride(D, R); }
};

// Block k of the biases, which are one behind the other [b b_n]; null if there is none.
template <class Number>
RNNATTN_INLINE const Number* bias_block(const Recurrent<Number>& s, int k) {
  return k < s.G ? s.b + k * s.H : s.b_n;
}

// Rows of the gates of a tile, as many as a product takes together.
template <class Together, class Operand, int N>
RNNATTN_INLINE void put_rows(Operand*& out, const V (&rows)[TOGETHER<Operand>][N]) {
  V vectors[TOGETHER<Operand>][Together::VECTORS];
  unrolled<TOGETHER<Operand>>(
      [&](auto k) RNNATTN_LAMBDA { bring_together<Together>(rows[k], vectors[k]); });
  unrolled<Together::VECTORS>([&](auto n) RNNATTN_LAMBDA {
    if constexpr (TOGETHER<Operand> == 2)
      put_pairs(out, vectors[0][n], vectors[1][n]);
    else
      put_steps(out, vectors[0][n]);
  });
}

// Tiles of units [u, past), of which `packed` is the first. A few rows of the weights at a time for
// all of them: along a row memory is fetched ahead, and no two rows of large weights share a page.
template <class Unit, class Number>
static void pack_cells(const Recurrent<Number>& s, int64_t u, int64_t past,
                       Operand<Number>* packed) {
  using Cells = recurrent::Cells<Unit, Operand<Number>>;
  constexpr int64_t STEP = TOGETHER<Operand<Number>>;
  const int64_t H = s.H, width = s.G * H, stride = Cells::stride(s.D, s.R);
  for (int64_t i = u; i < past; ++i) {
    float* biases = reinterpret_cast<float*>(packed + (i - u) * stride);
    for (int k = 0; k < Unit::CELLS; ++k)
      for (int g = 0; g < GATES<Unit>; ++g) {
        const Number* block = bias_block(s, Unit::OfBias::of(g));
        const int n = units_of<Unit>(i, k, H);
        put_steps(
            biases,
            block ? load_units(block + first_unit<Unit>(i, k), n) * splat(Unit::scale(g)) : V{});
      }
  }
  Operand<Number>* first = packed + Cells::BIAS;
  const auto put = [&](auto columns, const Number* w, int64_t K) RNNATTN_LAMBDA {
    using Columns = decltype(columns);
    for (int64_t row = 0; row < K; row += PACKED_ROWS)
      for (int64_t i = u; i < past; ++i)
        Columns::together(i, H, [&](auto together) RNNATTN_LAMBDA {
          using Together = decltype(together);
          Operand<Number>* out = first + (i - u) * stride + row * Together::VECTORS * W;
          for (int64_t k = row; k < least(row + PACKED_ROWS, K); k += STEP) {
            V rows[STEP][Columns::COUNT];
            unrolled<Columns::COUNT>([&](auto c) RNNATTN_LAMBDA {
              constexpr int v = Columns::FIRST + c;
              const Number* block = w + k * width + Columns::at(v, i, H);
              const int n = Columns::lanes(v, i, H);
              const V scale = splat(Unit::scale(Columns::gate(v)));
              rows[0][c] = load_units(block, n) * scale;
              if constexpr (STEP == 2)
                rows[1][c] = k + 1 < K ? load_units(block + width, n) * scale : V{};
            });
            put_rows<Together>(out, rows);
          }
        });
    first += Cells::template rows<Columns>(K);
  };
  put(typename Cells::OfX{}, s.w_x, s.D);
  put(typename Cells::OfH{}, s.w_h, s.R);
  if constexpr (HAS_Q<Unit>) put(typename Cells::OfQ{}, s.w_h, s.R);
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

// In fixed point the gates of a tile that meet a weight are blocks of two; three are one.
template <class Columns>
struct FixedTile {
  static constexpr int VECTORS = Columns::COUNT % 2 ? Columns::COUNT : 2;
  static constexpr int BLOCKS = Columns::COUNT / VECTORS;
  static constexpr int64_t STEPS = VECTORS * W, BLOCK = with_scale(STEPS);
  static constexpr int64_t SIZE = BLOCKS * BLOCK;
};

// What the gates of a tile that meet a weight take in memory, of each row or column.
template <class Operand, class Columns>
constexpr int64_t TILE_SIZE = Columns::COUNT * W;
template <class Columns>
constexpr int64_t TILE_SIZE<Fixed, Columns> = FixedTile<Columns>::SIZE;

// wᵀ of a weight w of N rows in panels of TRANSPOSED_COLUMNS; the last may have 1 or 2 vectors. Its
// rows are in the order of `Gates::in_panels`: for each tile its gates in w, zero beyond H; of
// other operands than float32 whole vectors of each.
constexpr int TRANSPOSED_COLUMNS = 4 * W;

template <class Unit, class Of, class Operand_>
struct Transposed {
  using Columns = recurrent::Columns<Unit, Of>;
  using Operand = Operand_;
  const Operand* packed;
  int64_t N, H;

  static int64_t tiles(int64_t H) { return tiles_across<Unit>(H); }
  static int64_t panels(int64_t N) { return ceil_div(N, TRANSPOSED_COLUMNS); }
  static int lanes(int64_t u, int64_t H) {
    return std::is_same_v<Operand, float> ? lanes_of_gate<Unit>(u, H) : W;
  }
  static int64_t steps(int64_t u, int64_t H) {
    return Unit::CELLS > 1 ? least(Columns::COUNT, ceil_div(H - first_unit<Unit>(u, 0), W)) * W
                           : Columns::COUNT * lanes(u, H);
  }
  static int64_t depth(int64_t H) { return tiles(H) * TILE_SIZE<Operand, Columns>; }
  static int64_t size(int64_t N, int64_t H) { return panels(N) * TRANSPOSED_COLUMNS * depth(H); }
  static int vectors(int64_t N, int64_t p) {
    const int64_t n = ceil_div(N - p * TRANSPOSED_COLUMNS, W);
    return n > 2 ? 4 : static_cast<int>(n);
  }
  const Operand* panel(int64_t p) const { return packed + p * TRANSPOSED_COLUMNS * depth(H); }
};

// W columns of a tile of it, in rows that are `across` wide: `lanes` of each gate, in float32.
template <class Columns>
RNNATTN_INLINE void put_tile(float* to, int64_t across, const V (&gates)[Columns::COUNT][W],
                             int lanes) {
  for (int64_t v = 0; v < Columns::COUNT; ++v)
    for (int64_t k = 0; k < lanes; ++k, to += across) store(to, gates[v][k]);
}
#if defined(RNNATTN_PAIRS)
template <class Columns>
RNNATTN_INLINE void put_tile(Bfloat16* to, int64_t across, const V (&gates)[Columns::COUNT][W],
                             int) {
  for (int64_t k = 0; k < Columns::COUNT * W; k += 2) {
    Bfloat16* out = to + k * across;
    put_pairs(out, gates[k / W][k % W], gates[k / W][k % W + 1]);
  }
}
#endif
#if defined(RNNATTN_FIXED)
template <class Columns>
RNNATTN_INLINE void put_tile(Fixed* to, int64_t across, const V (&gates)[Columns::COUNT][W], int) {
  using Tile = FixedTile<Columns>;
  for (int64_t block = 0; block < Tile::BLOCKS; ++block)
    put_columns<Factor::b>(
        to + block * Tile::BLOCK * across, across, Tile::STEPS,
        [&](int64_t k) RNNATTN_LAMBDA { return gates[block * Tile::VECTORS + k / W][k % W]; });
}
#endif

// Panel p of it; rows of w are `width` wide.
template <class Packed, class Number>
static void pack_transposed(const Number* w, int64_t width, int64_t N, int64_t H, int64_t p,
                            typename Packed::Operand* packed) {
  using Columns = typename Packed::Columns;
  using Operand = typename Packed::Operand;
  const int64_t across = Packed::vectors(N, p) * W, first = p * TRANSPOSED_COLUMNS;
  Operand* out = packed + first * Packed::depth(H);
  for (int64_t u = 0; u < Packed::tiles(H); ++u) {
    for (int64_t column = 0; column < across; column += W) {
      V gates[Columns::COUNT][W];
      unrolled<Columns::COUNT>([&](auto i) RNNATTN_LAMBDA {
        constexpr int v = Columns::FIRST + i;
        const Number* of_gate = w + Columns::at(v, u, H);
        const int n = Columns::lanes(v, u, H);
        for (int64_t k = 0; k < W; ++k) {
          const int64_t row = first + column + k;
          gates[i][k] = row < N ? load_units(of_gate + row * width, n) : V{};
        }
        transpose(gates[i]);
      });
      put_tile<Columns>(out + column * TOGETHER<Operand>, across, gates, Packed::lanes(u, H));
    }
    out += TILE_SIZE<Operand, Columns> * across;
  }
}

// Rows of dz in panels of PANEL numbers, in the order of `Gates::in_panels`. As pairs a number is
// the sum of two, the second `rest` behind the first: one alone would leave 2⁻⁹ of dz out of every
// step. In fixed point a panel is a `FixedTile`, of the gates that meet one weight.
template <class Operand>
struct Panels {
  const Operand* data;
  int64_t row, tile, rest;
};

// out = dz wᵀ for N vectors of a panel `width` wide, or out += dz wᵀ. Rows that are not `written`
// stay as they are; if that is null, all are written.
template <class Packed, int N, class Number>
struct TransposedTile {
  using Columns = typename Packed::Columns;
  using Operand = typename Packed::Operand;
  Panels<Operand> dz;
  const Operand* w;
  int64_t width;
  int64_t H;
  Number* out;
  bool adds;
  const uint8_t* written;
  int64_t stride, columns;

  template <int R>
  void run(int64_t r) const {
    const Operand* a = dz.data + r * dz.row;
    const int64_t tiles = Packed::tiles(H), last = tiles - 1;
    V sum[R][N] = {};
    if constexpr (std::is_same_v<Operand, Fixed>) {
      using Tile = FixedTile<Columns>;
      const FixedRows rows{a, dz.row, 2, Tile::BLOCK};
      accumulate_blocks<Tile::STEPS>(sum, tiles * Tile::BLOCKS * Tile::STEPS, rows, w, width);
    } else if constexpr (std::is_same_v<Operand, float>) {
      constexpr int64_t STEPS = Columns::COUNT * W;
      accumulate_blocks(sum, last, STEPS, a + Columns::FIRST * W, dz.row, dz.tile, 0, w, width);
      accumulate(sum, Packed::steps(last, H),
                 a + last * dz.tile + Columns::FIRST * Packed::lanes(last, H), dz.row,
                 w + last * STEPS * width, width);
    } else {
      accumulate_blocks(sum, tiles, Columns::COUNT * W, a + Columns::FIRST * W, dz.row, dz.tile,
                        dz.rest, w, width);
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
template <class Unit, class Of, class Operand, class Number>
static void times_transposed(const Panels<Operand>& dz, const Transposed<Unit, Of, Operand>& w,
                             Number* out, bool adds, int64_t stride, const uint8_t* written,
                             int64_t first, int64_t past, int64_t lo, int64_t hi) {
  while (first < past) {
    const int64_t p = first / 4, within = first % 4;
    const int64_t width = w.vectors(w.N, p) * W;
    as_constant<4>(least(4 - within, past - first), [&](auto N) {
      const Operand* panel = w.panel(p) + within * W * TOGETHER<Operand>;
      over_tiles<GATE_ROWS<Operand>>(
          lo, hi,
          TransposedTile<Transposed<Unit, Of, Operand>, N, Number>{
              dz, panel, width, w.H, out + first * W, adds, written, stride, w.N - first * W});
      first += N;
    });
  }
}

}  // namespace rnnattn::RNNATTN_SET::recurrent
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_RECURRENT_TILES_INL_H_
