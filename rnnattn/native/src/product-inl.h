// Products of small matrices that are in a cache: C = A B, or C + A B.

#ifndef RNNATTN_PRODUCT_INL_H_
#define RNNATTN_PRODUCT_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET {

// A register tile is of R rows and N vectors: all of C's tile, one row of B's, one number of A's.
constexpr int TILE_ROWS = 6;
#if RNNATTN_LANES == 16 || defined(__aarch64__)
constexpr int TILE_VECTORS = 4;  // of 32 registers
#else
constexpr int TILE_VECTORS = 2;  // of 16
#endif
constexpr int PANEL = TILE_VECTORS * W;

// Element (row, step) of A.
enum class Stored { by_row, by_step };

template <Stored stored>
RNNATTN_INLINE const float& element(const float* a, int64_t stride, int64_t row, int64_t step) {
  return stored == Stored::by_row ? a[row * stride + step] : a[step * stride + row];
}

// What C begins with: nothing, itself, or row r of it times scale[r].
enum class From { zero, c, scaled };

template <int R, int N, Stored stored, From from>
static void tile(int64_t steps, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                 float* c, int64_t c_stride, const float* scale) {
  V sums[R][N];
  unrolled<R>([&](auto r) RNNATTN_LAMBDA {
    unrolled<N>([&](auto n) RNNATTN_LAMBDA {
      sums[r][n] = from == From::zero ? V{} : load(c + r * c_stride + n * W);
      if constexpr (from == From::scaled) sums[r][n] *= scale[r];
    });
  });
  for (int64_t step = 0; step < steps; ++step, b += b_stride) {
    V row[N];
    unrolled<N>([&](auto n) RNNATTN_LAMBDA { row[n] = load(b + n * W); });
    unrolled<R>([&](auto r) RNNATTN_LAMBDA {
      const V x = splat(element<stored>(a, a_stride, r, step));
      unrolled<N>([&](auto n) RNNATTN_LAMBDA { sums[r][n] = fma(x, row[n], sums[r][n]); });
    });
  }
  unrolled<R>([&](auto r) RNNATTN_LAMBDA {
    unrolled<N>([&](auto n) RNNATTN_LAMBDA { store(c + r * c_stride + n * W, sums[r][n]); });
  });
}

template <int N, Stored stored, From from>
static void tiles(int64_t rows, int64_t steps, const float* a, int64_t a_stride, const float* b,
                  int64_t b_stride, float* c, int64_t c_stride, const float* scale) {
  const int64_t count = ceil_div(rows, TILE_ROWS);
  for (int64_t i = 0, r = 0; i < count; ++i) {
    const int64_t height = (rows - r) / (count - i);
    const float* from_a = &element<stored>(a, a_stride, r, 0);
    float* to = c + r * c_stride;
    const float* of = from == From::scaled ? scale + r : nullptr;
    switch (height) {
#define RNNATTN_TILE(R)                                                            \
  case R:                                                                          \
    tile<R, N, stored, from>(steps, from_a, a_stride, b, b_stride, to, c_stride, of); \
    break;
      RNNATTN_TILE(1)
      RNNATTN_TILE(2)
      RNNATTN_TILE(3)
      RNNATTN_TILE(4)
      RNNATTN_TILE(5)
      RNNATTN_TILE(6)
#undef RNNATTN_TILE
    }
    r += height;
  }
}

// `columns` vectors of C. B is in panels of PANEL columns: the next one is `b_panel` floats on,
// PANEL where B is one matrix.
template <Stored stored, From from>
static void product(int64_t rows, int64_t columns, int64_t steps, const float* a, int64_t a_stride,
                    const float* b, int64_t b_stride, int64_t b_panel, float* c, int64_t c_stride,
                    const float* scale = nullptr) {
  for (; columns > 0; columns -= TILE_VECTORS, b += b_panel, c += PANEL) switch (columns) {
#define RNNATTN_TILES(N) \
  tiles<N, stored, from>(rows, steps, a, a_stride, b, b_stride, c, c_stride, scale)
      case 1: RNNATTN_TILES(1); break;
#if RNNATTN_LANES == 16 || defined(__aarch64__)
      case 2: RNNATTN_TILES(2); break;
      case 3: RNNATTN_TILES(3); break;
#endif
      default: RNNATTN_TILES(TILE_VECTORS);
#undef RNNATTN_TILES
    }
}

}  // namespace rnnattn::RNNATTN_SET
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_PRODUCT_INL_H_
