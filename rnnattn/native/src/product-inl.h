// Products of small matrices in tiles of registers: the loops of both kernels, and the product of
// two matrices that are in a cache.

#ifndef RNNATTN_PRODUCT_INL_H_
#define RNNATTN_PRODUCT_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET {

// A step of a product takes R numbers of A and N vectors of B. One of the two is held in registers
// through the step, beside the R × N sums, and the other passes through a single one: which it is
// decides what tiles fit. The bits are the same. Steps of A are a moving pointer in one case and an
// index in the other, whichever GCC makes the better loop of.
enum class Held { a, b };

// sums += A B. Number (r, step) of A is a[r * a_row + step * a_step]; rows of B are b_step apart.
template <Held held, int R, int N>
RNNATTN_INLINE void multiply(V (&sums)[R][N], int64_t steps, const float* a, int64_t a_row,
                             int64_t a_step, const float* b, int64_t b_step) {
  for (int64_t step = 0; step < steps; ++step, b += b_step) {
    if constexpr (held == Held::a) {
      V column[R];
      unrolled<R>([&](auto r) RNNATTN_LAMBDA { column[r] = splat(a[r * a_row]); });
      unrolled<N>([&](auto n) RNNATTN_LAMBDA {
        const V y = load(b + n * W);
        unrolled<R>([&](auto r) RNNATTN_LAMBDA { sums[r][n] = fma(column[r], y, sums[r][n]); });
      });
      a += a_step;
    } else {
      V row[N];
      unrolled<N>([&](auto n) RNNATTN_LAMBDA { row[n] = load(b + n * W); });
      unrolled<R>([&](auto r) RNNATTN_LAMBDA {
        const V x = splat(a[r * a_row + step * a_step]);
        unrolled<N>([&](auto n) RNNATTN_LAMBDA { sums[r][n] = fma(x, row[n], sums[r][n]); });
      });
    }
  }
}

// tile.run<R>(first) for rows [first, past) in tiles of R rows, LIMIT at most, as even as can be.
template <int LIMIT, class Tile>
RNNATTN_INLINE void over_tiles(int64_t first, int64_t past, Tile tile) {
  for (int64_t tiles = ceil_div(past - first, LIMIT); tiles > 0; --tiles) {
    const int64_t rows = (past - first) / tiles;
    as_constant<LIMIT>(rows, [&](auto R) RNNATTN_LAMBDA { tile.template run<R>(first); });
    first += rows;
  }
}

// A tile of `product`, which holds vectors of B: 6 × 2 sums, 2 vectors and a number are 15 of AVX2.
constexpr int TILE_ROWS = 6;
#if RNNATTN_LANES == 16 || defined(__aarch64__)
constexpr int TILE_VECTORS = 4;  // of 32 registers
#else
constexpr int TILE_VECTORS = 2;  // of 16
#endif
constexpr int TILE_COLUMNS = TILE_VECTORS * W;

// Element (row, step) of A.
enum class Stored { by_row, by_step };

// What C begins with: nothing, itself, or row r of it times scale[r].
enum class From { zero, c, scaled };

template <int N, Stored stored, From from>
struct ProductTile {
  int64_t steps;
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  const float* scale;

  template <int R>
  void run(int64_t first) const {
    constexpr bool by_row = stored == Stored::by_row;
    const int64_t a_row = by_row ? a_stride : 1, a_step = by_row ? 1 : a_stride;
    float* rows = c + first * c_stride;
    V sums[R][N];
    unrolled<R>([&](auto r) RNNATTN_LAMBDA {
      unrolled<N>([&](auto n) RNNATTN_LAMBDA {
        sums[r][n] = from == From::zero ? V{} : load(rows + r * c_stride + n * W);
        if constexpr (from == From::scaled) sums[r][n] *= scale[first + r];
      });
    });
    multiply<Held::b>(sums, steps, a + first * a_row, a_row, a_step, b, b_stride);
    unrolled<R>([&](auto r) RNNATTN_LAMBDA {
      unrolled<N>([&](auto n) RNNATTN_LAMBDA { store(rows + r * c_stride + n * W, sums[r][n]); });
    });
  }
};

// C = A B, or C + A B, of `columns` vectors. B is in panels of TILE_COLUMNS: the next one is
// `b_panel` floats on, TILE_COLUMNS where B is one matrix.
template <Stored stored, From from>
static void product(int64_t rows, int64_t columns, int64_t steps, const float* a, int64_t a_stride,
                    const float* b, int64_t b_stride, int64_t b_panel, float* c, int64_t c_stride,
                    const float* scale = nullptr) {
  for (; columns > 0; columns -= TILE_VECTORS, b += b_panel, c += TILE_COLUMNS)
    as_constant<TILE_VECTORS>(columns, [&](auto N) RNNATTN_LAMBDA {
      over_tiles<TILE_ROWS>(
          0, rows,
          ProductTile<N, stored, from>{steps, a, a_stride, b, b_stride, c, c_stride, scale});
    });
}

// The products of a row with `columns` rows of B, W at most: of both `width` numbers, and zeros
// behind them in the row. Where there are fewer than W, those of the last stand for the others, as
// many quarters of W as there are. If `ahead`, the W rows behind are asked for meanwhile: W at once
// are more than a core would see coming.
template <int quarters, bool ahead>
RNNATTN_INLINE V dots_with(int64_t columns, int64_t width, const float* row, const float* b,
                           int64_t b_stride) {
  // Four pointers, and numbers of strides that an address can hold, in place of W pointers.
  constexpr int rows = quarters * (W / 4);
  const float* quarter[4];
  if constexpr (ahead)
    for (int i = 0; i < 4; ++i) quarter[i] = b + i * (W / 4) * b_stride;
  const auto at = [&](auto i) RNNATTN_LAMBDA {
    if constexpr (ahead) return quarter[i / (W / 4)] + i % (W / 4) * b_stride;
    return b + least(i, columns - 1) * b_stride;
  };
  V sums[W]{};
  int64_t k = 0;
  for (; k + W <= width; k += W) {
    const V x = load(row + k);
    unrolled<rows>([&](auto i) RNNATTN_LAMBDA {
      sums[i] = fma(x, load(at(i) + k), sums[i]);
      if constexpr (ahead) __builtin_prefetch(at(i) + k + W * b_stride);
    });
  }
  if (k < width) {
    const V x = load(row + k);
    const int rest = static_cast<int>(width - k);
    unrolled<rows>([&](auto i)
                       RNNATTN_LAMBDA { sums[i] = fma(x, load(at(i) + k, rest), sums[i]); });
  }
  return sum_of_each(sums);
}

// C = A Bᵀ, with B in rows that are not packed. Rows of A are whole vectors, with zeros behind what
// they hold; C has whole vectors of columns.
static void product_of_rows(int64_t rows, int64_t columns, int64_t width, const float* a,
                            int64_t a_stride, const float* b, int64_t b_stride, float* c,
                            int64_t c_stride) {
  for (int64_t j = 0; j < columns; j += W, b += W * b_stride)
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = a + r * a_stride;
      float* to = c + r * c_stride + j;
      if (columns - j >= W)
        store(to, dots_with<4, true>(W, width, row, b, b_stride));
      else
        as_constant<4>(ceil_div(4 * (columns - j), W), [&](auto quarters) RNNATTN_LAMBDA {
          store(to, dots_with<quarters, false>(columns - j, width, row, b, b_stride));
        });
    }
}

}  // namespace rnnattn::RNNATTN_SET
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_PRODUCT_INL_H_
