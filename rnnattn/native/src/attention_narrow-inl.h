// Attention's products with P and dS, float32, where products of 16 bits are so fast that these are
// narrowed for them, and what they meet, q, k, v or dO, is of bfloat16 as it was given.
//
// In fixed point P v stays in float32: Δ is of O, and where one weight is nearly 1, dS is what dP
// and Δ differ in, and must not have what fixed point leaves out of v.

#ifndef RNNATTN_ATTENTION_NARROW_INL_H_
#define RNNATTN_ATTENTION_NARROW_INL_H_

#include <cstdint>

#if defined(RNNATTN_TILES)
#include "attention_terms-inl.h"
#elif defined(RNNATTN_FIXED)
#include "attention_fixed-inl.h"
#endif
#include "instruction_set.h"
#include "kernels.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "util-inl.h"
#include "workspace-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::attention {

// Whether dv, dk and dq are such products, and whether P v is.
template <class Number>
constexpr bool NARROWS_GRADIENT = false;
template <class Number>
constexpr bool NARROWS_VALUES = false;

#if !defined(RNNATTN_TILES) && !defined(RNNATTN_FIXED)

struct NarrowMemory {
  void take(Memory&, int64_t, int64_t, int64_t) {}
};

#else

template <>
constexpr bool NARROWS_GRADIENT<Bfloat16> = true;
#if defined(RNNATTN_TILES)
template <>
constexpr bool NARROWS_VALUES<Bfloat16> = true;
#endif

struct NarrowMemory {
  Narrow *weights, *turned;     // P or dS of a block, and turned over
  NarrowRows along_s, along_t;  // what they meet: keys or values, queries or dO

  // For so many rows of queries, and keys.
  void take(Memory& memory, int64_t rows, int64_t keys, int64_t width) {
    weights = memory.take<Narrow>(weights_size(rows));
    turned = memory.take<Narrow>(turned_size(rows, keys));
    along_s.take(memory, keys, width);
    along_t.take(memory, rows, width);
  }
};

template <int N, From from>
struct NarrowTile {
  int64_t steps;
  const NarrowWeights& a;
  const Narrow* b;
  float* c;
  int64_t c_stride;
  const float* scale;

  template <int R>
  void run(int64_t first) const {
    V sums[R][N];
    float* rows = c + first * c_stride;
    begin_sums<from>(sums, rows, c_stride, scale ? scale + first : nullptr);
    accumulate_narrow(sums, steps, a, first, b);
    end_sums(sums, rows, c_stride);
  }
};

// `product` of P or dS and of `steps` rows of B, from `first` on.
template <From from>
static void product_of_narrow(int64_t rows, int64_t width, int64_t steps, const NarrowWeights& a,
                              const NarrowRows& b, int64_t first, float* c, int64_t c_stride,
                              const float* scale = nullptr) {
  for (int64_t column = 0; column < width; column += NARROW_VECTORS * W)
    as_constant<NARROW_VECTORS>(ceil_div(width - column, W), [&](auto N) RNNATTN_LAMBDA {
      over_tiles<NARROW_ROWS>(
          0, rows,
          NarrowTile<N, from>{steps, a, b.pair(first, column), c + column, c_stride, scale});
    });
}

#endif

}  // namespace rnnattn::RNNATTN_SET::attention
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_ATTENTION_NARROW_INL_H_
