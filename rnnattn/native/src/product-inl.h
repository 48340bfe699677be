// Products of small matrices in tiles of registers: the loops of both kernels, and the product of
// two matrices that are in a cache.

#ifndef RNNATTN_PRODUCT_INL_H_
#define RNNATTN_PRODUCT_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "simd-inl.h"
#if defined(RNNATTN_TILES)
#include "tiles-inl.h"
#endif
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET {

// A step of a product takes R numbers of A and N vectors of B. One of the two is held in registers
// through the step, beside the R × N sums, and the other passes through a single one: which it is
// decides what tiles fit. The bits are the same. Steps of A are a moving pointer in one case and an
// index in the other, whichever GCC makes the better loop of.
enum class Held { a, b };

// sums += A B. Number (r, step) of A is a[r * a_row + step * a_step]; rows of B are b_step apart.
template <Held held, int R, int N, class Number>
RNNATTN_INLINE void multiply(V (&sums)[R][N], int64_t steps, const float* a, int64_t a_row,
                             int64_t a_step, const Number* b, int64_t b_step) {
  for (int64_t step = 0; step < steps; ++step, b += b_step) {
    if constexpr (held == Held::a) {
      V column[R];
      unrolled<R>([&](auto r) RNNATTN_LAMBDA { column[r] = splat(a[r * a_row]); });
      unrolled<N>([&](auto n) RNNATTN_LAMBDA {
        V y = load_units(b + n * W, W);
        if constexpr (R > 1) keep_in_register(y);
        unrolled<R>([&](auto r) RNNATTN_LAMBDA { sums[r][n] = fma(column[r], y, sums[r][n]); });
      });
      a += a_step;
    } else {
      V row[N];
      unrolled<N>([&](auto n) RNNATTN_LAMBDA {
        row[n] = load_units(b + n * W, W);
        if constexpr (R > 1) keep_in_register(row[n]);
      });
      unrolled<R>([&](auto r) RNNATTN_LAMBDA {
        const V x = splat(a[r * a_row + step * a_step]);
        unrolled<N>([&](auto n) RNNATTN_LAMBDA { sums[r][n] = fma(x, row[n], sums[r][n]); });
      });
    }
  }
}

// What products of an instruction set read: float32, or pairs of bfloat16 where one instruction
// multiplies two and adds both.
template <class Number>
struct OperandOf {
  using Type = float;
};
#if defined(RNNATTN_PAIRS)
template <>
struct OperandOf<Bfloat16> {
  using Type = Bfloat16;
};
#endif
template <class Number>
using Operand = typename OperandOf<Number>::Type;

// Steps of a product that one number of 32 bits stands for, and so many steps made whole.
template <class Operand>
constexpr int64_t TOGETHER = 4 / sizeof(Operand);
template <class Operand>
RNNATTN_INLINE int64_t whole_steps(int64_t steps) {
  return ceil_div(steps, TOGETHER<Operand>) * TOGETHER<Operand>;
}

// A row of an operand of B, or two rows to pairs; `out` moves on.
RNNATTN_INLINE void put_steps(float*& out, V v) {
  store(out, v);
  out += W;
}

// sums += A B: rows of A are `a_row` apart, those of B `width`.
template <int R, int N>
RNNATTN_INLINE void accumulate(V (&sums)[R][N], int64_t steps, const float* a, int64_t a_row,
                               const float* b, int64_t width) {
  multiply<Held::a>(sums, steps, a, a_row, 1, b, width);
}

// The same of blocks of A, `a_block` apart, of so many steps each; those of B lie behind one
// another. As pairs, A is the sum of two, the second `second` numbers behind the first: one alone
// would leave 2⁻⁹ of it out.
template <int R, int N>
RNNATTN_INLINE void accumulate_blocks(V (&sums)[R][N], int64_t blocks, int64_t steps,
                                      const float* a, int64_t a_row, int64_t a_block, int64_t,
                                      const float* b, int64_t width) {
  for (; blocks > 0; --blocks, a += a_block, b += steps * width)
    accumulate(sums, steps, a, a_row, b, width);
}

// A tile of `product`, which holds vectors of B: 6 × 2 sums, 2 vectors and a number are 15 of AVX2.
constexpr int TILE_ROWS = 6;
#if RNNATTN_LANES == 16 || defined(__aarch64__)
constexpr int TILE_VECTORS = 4;  // of 32 registers
#else
constexpr int TILE_VECTORS = 2;  // of 16
#endif
constexpr int TILE_COLUMNS = TILE_VECTORS * W;
// Sums that a core can be at together: four steps of two a cycle.
constexpr int LEAST_SUMS = 8;

#if defined(RNNATTN_PAIRS)
// W pairs of bfloat16; `dot` adds the products of both numbers of each to a sum.
#if defined(__aarch64__)
using Pairs = bfloat16x8_t;
RNNATTN_INLINE V dot(V sum, Pairs x, Pairs y) {
  return reinterpret_cast<V>(vbfdotq_f32(reinterpret_cast<float32x4_t>(sum), x, y));
}
#else
using Pairs = __m512bh;
RNNATTN_INLINE V dot(V sum, Pairs x, Pairs y) { return _mm512_dpbf16_ps(sum, x, y); }
#endif

RNNATTN_INLINE void put_pairs(Bfloat16*& out, V first, V second) {
  const Words pairs = narrowed(Bfloat16{}, first) | (narrowed(Bfloat16{}, second) << 16);
  __builtin_memcpy(out, &pairs, sizeof pairs);
  out += 2 * W;
}

#if !defined(RNNATTN_TILES)

constexpr int PAIR_ROWS = TILE_ROWS;  // of a product of pairs at once

// `multiply` of pairs along the steps: rows of A and of B hold two steps in each 32 bits.
template <int R, int N>
RNNATTN_INLINE void accumulate(V (&sums)[R][N], int64_t steps, const Bfloat16* a, int64_t a_row,
                               const Bfloat16* b, int64_t width) {
  for (int64_t step = 0; step < steps; step += 2, a += 2, b += 2 * width) {
    Pairs column[R];
    unrolled<R>([&](auto r) RNNATTN_LAMBDA {
      uint32_t pair;
      __builtin_memcpy(&pair, a + r * a_row, sizeof pair);
      column[r] = reinterpret_cast<Pairs>(Words{} + pair);
    });
    unrolled<N>([&](auto n) RNNATTN_LAMBDA {
      Pairs y;
      __builtin_memcpy(&y, b + 2 * n * W, sizeof y);
      if constexpr (R > 1) keep_in_register(y);
      unrolled<R>([&](auto r) RNNATTN_LAMBDA { sums[r][n] = dot(sums[r][n], column[r], y); });
    });
  }
}

template <int R, int N>
RNNATTN_INLINE void accumulate_blocks(V (&sums)[R][N], int64_t blocks, int64_t steps,
                                      const Bfloat16* a, int64_t a_row, int64_t a_block,
                                      int64_t second, const Bfloat16* b, int64_t width) {
  for (; blocks > 0; --blocks, a += a_block, b += steps * width) {
    accumulate(sums, steps, a, a_row, b, width);
    accumulate(sums, steps, a + second, a_row, b, width);
  }
}

#else

// ---- AMX: products of whole tiles ---------------------------------------------------------------

// The sums of a row are the same whichever rows are beside it.
template <int R, int N>
RNNATTN_INLINE void begin_tiles(V (&sums)[R][N], int64_t rest) {
  begin_tiles(TileShapes(R, rest));
  unrolled<N>([&](auto n)
                  RNNATTN_LAMBDA { load_tile<TILE_OF_C + n>(&sums[0][n], sizeof sums[0]); });
}
template <int R, int N>
RNNATTN_INLINE void end_tiles(V (&sums)[R][N]) {
  unrolled<N>([&](auto n)
                  RNNATTN_LAMBDA { store_tile<TILE_OF_C + n>(&sums[0][n], sizeof sums[0]); });
  end_tiles();
}

template <int N>
RNNATTN_INLINE void add_tiles(int64_t steps, const Bfloat16* a, int64_t a_row, const Bfloat16* b,
                              int64_t width) {
  const int64_t row_of_a = 2 * a_row, row_of_b = 4 * width;
  for (; steps >= TILE_STEPS; steps -= TILE_STEPS, a += TILE_STEPS, b += TILE_STEPS * width) {
    load_tile<TILE_OF_A>(a, row_of_a);
    unrolled<N>([&](auto n) RNNATTN_LAMBDA {
      load_tile<TILE_OF_B>(b + 2 * n * W, row_of_b);
      multiply_tiles<TILE_OF_C + n, TILE_OF_A, TILE_OF_B>();
    });
  }
  if (steps > 0) {
    load_tile<REST_OF_A>(a, row_of_a);
    unrolled<N>([&](auto n) RNNATTN_LAMBDA {
      load_tile<REST_OF_B>(b + 2 * n * W, row_of_b);
      multiply_tiles<TILE_OF_C + n, REST_OF_A, REST_OF_B>();
    });
  }
}

template <int R, int N>
RNNATTN_INLINE void accumulate(V (&sums)[R][N], int64_t steps, const Bfloat16* a, int64_t a_row,
                               const Bfloat16* b, int64_t width) {
  begin_tiles(sums, steps % TILE_STEPS);
  add_tiles<N>(steps, a, a_row, b, width);
  end_tiles(sums);
}

template <int R, int N>
RNNATTN_INLINE void accumulate_blocks(V (&sums)[R][N], int64_t blocks, int64_t steps,
                                      const Bfloat16* a, int64_t a_row, int64_t a_block,
                                      int64_t second, const Bfloat16* b, int64_t width) {
  begin_tiles(sums, steps % TILE_STEPS);
  for (; blocks > 0; --blocks, a += a_block, b += steps * width) {
    add_tiles<N>(steps, a, a_row, b, width);
    add_tiles<N>(steps, a + second, a_row, b, width);
  }
  end_tiles(sums);
}

#endif
#endif

// tile.run<R>(first) for rows [first, past) in tiles of R rows, LIMIT at most, as even as can be;
// of those of AMX, which take more, of LIMIT rows, and what is left by halves: few numbers R.
template <int LIMIT, class Tile>
RNNATTN_INLINE void over_tiles(int64_t first, int64_t past, Tile tile) {
  if constexpr (LIMIT > TILE_ROWS) {
    for (; past - first >= LIMIT; first += LIMIT) tile.template run<LIMIT>(first);
    over_tiles<LIMIT / 2>(first, past, tile);
  } else {
    for (int64_t tiles = ceil_div(past - first, LIMIT); tiles > 0; --tiles) {
      const int64_t rows = (past - first) / tiles;
      as_constant<LIMIT>(rows, [&](auto R) RNNATTN_LAMBDA { tile.template run<R>(first); });
      first += rows;
    }
  }
}

// Element (row, step) of A.
enum class Stored { by_row, by_step };

// What C begins with: nothing, itself, or row r of it times scale[r].
enum class From { zero, c, scaled };

template <From from, int R, int N>
RNNATTN_INLINE void begin_sums(V (&sums)[R][N], const float* c, int64_t c_stride,
                               const float* scale) {
  unrolled<R>([&](auto r) RNNATTN_LAMBDA {
    unrolled<N>([&](auto n) RNNATTN_LAMBDA {
      sums[r][n] = from == From::zero ? V{} : load(c + r * c_stride + n * W);
      if constexpr (from == From::scaled) sums[r][n] *= scale[r];
    });
  });
}
template <int R, int N>
RNNATTN_INLINE void end_sums(const V (&sums)[R][N], float* c, int64_t c_stride) {
  unrolled<R>([&](auto r) RNNATTN_LAMBDA {
    unrolled<N>([&](auto n) RNNATTN_LAMBDA { store(c + r * c_stride + n * W, sums[r][n]); });
  });
}

template <int N, Stored stored, From from, class Number>
struct ProductTile {
  int64_t steps;
  const float* a;
  int64_t a_stride;
  const Number* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  const float* scale;

  template <int R>
  void run(int64_t first) const {
    constexpr bool by_row = stored == Stored::by_row;
    const int64_t a_row = by_row ? a_stride : 1, a_step = by_row ? 1 : a_stride;
    const float* of_a = a + first * a_row;
    float* rows = c + first * c_stride;
    const auto add = [&](V(&to)[R][N], int64_t step, int64_t count) RNNATTN_LAMBDA {
      multiply<Held::b>(to, count, of_a + step * a_step, a_row, a_step, b + step * b_stride,
                        b_stride);
    };
    V sums[R][N];
    begin_sums<from>(sums, rows, c_stride, scale ? scale + first : nullptr);
    int64_t step = 0;
    if constexpr (from == From::scaled && R * N < LEAST_SUMS) {
      // sums of every second step, or every fourth: few sums would wait at each step for the last
      constexpr int APART = 2 * R * N < LEAST_SUMS ? 4 : 2;
      V others[APART - 1][R][N] = {};
      for (; step + APART <= steps; step += APART) {
        add(sums, step, 1);
        unrolled<APART - 1>([&](auto i) RNNATTN_LAMBDA { add(others[i], step + 1 + i, 1); });
      }
      for (const auto& other : others)
        unrolled<R>([&](auto r) RNNATTN_LAMBDA {
          unrolled<N>([&](auto n) RNNATTN_LAMBDA { sums[r][n] += other[r][n]; });
        });
    }
    add(sums, step, steps - step);
    end_sums(sums, rows, c_stride);
  }
};

// C = A B, or C + A B, of `columns` vectors. B is in panels of TILE_COLUMNS: the next one is
// `b_panel` numbers on, TILE_COLUMNS where B is one matrix: its tiles are as even as can be.
template <Stored stored, From from, class Number>
static void product(int64_t rows, int64_t columns, int64_t steps, const float* a, int64_t a_stride,
                    const Number* b, int64_t b_stride, int64_t b_panel, float* c, int64_t c_stride,
                    const float* scale = nullptr) {
  const bool even = b_panel == TILE_COLUMNS;
  for (int64_t tiles = ceil_div(columns, TILE_VECTORS); tiles > 0; --tiles) {
    const int64_t width = even ? ceil_div(columns, tiles) : least(columns, TILE_VECTORS);
    as_constant<TILE_VECTORS>(width, [&](auto N) RNNATTN_LAMBDA {
      over_tiles<TILE_ROWS>(0, rows,
                            ProductTile<N, stored, from, Number>{steps, a, a_stride, b, b_stride, c,
                                                                 c_stride, scale});
    });
    columns -= width;
    b += even ? width * W : b_panel;
    c += width * W;
  }
}

}  // namespace rnnattn::RNNATTN_SET
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_PRODUCT_INL_H_
