// What a unit is to the schedules of recurrent units, of which the LSTM and the GRU are two.
//
// A register tile is four vectors wide: the four gates of W units at most, or the one gate of 4 W
// units. What x w_x, h₋ w_h and the biases add to each comes together there; a weight may have
// blocks of columns for some of the gates alone, which then are neighbours, so that no product is
// with zeros. A `Unit` is what the cell of W units needs of the arguments beside these, and has
//
//     OfX, OfH, OfBias   which gates the blocks of w_x, of w_h and of the biases [b b_n] are of;
//                        the biases are of all
//     OfQ                those of w_h that are multiplied by q, which is made of gates and h₋, and
//                        not by h₋ itself: a second product, which waits for the first
//     CELLS              how many cells of W units stand side by side in a tile
//     scale(g)           what the weights and biases of gate g are multiplied by: ½ for a sigmoid
//     CARRIES_C          whether c is carried beside h: its cell then meets c₋, and else h₋
//     of(s, j, n)        units j to j + n of the arguments
//
// and beside it, found by its type:
//
//     cell(unit, a, before, c, m)    a step: c and m from the pre-activations and c₋ or h₋
//     see(unit, before, after, a)    what c adds to pre-activations that are products alone
//     cell_gradient(unit, a, before, after, dm, d, dz)
//                                    dz; in the place of dc that of c₋, or what of dh₋ comes past
//                                    the products; gives m, which the gradient of a projection
//                                    needs
//
// where there is a q, too:
//
//     RESET                          the gate that q is made of
//     reset(unit, a, before)         q, from the pre-activation of that gate
//     reset_gradient(unit, a, before, dq, d)
//                                    dz of that gate, and in the place of d what dq adds to it

#ifndef RNNATTN_RECURRENT_UNIT_INL_H_
#define RNNATTN_RECURRENT_UNIT_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::recurrent {

constexpr int TILE_WIDTH = 4;  // vectors

// Gates [FIRST, FIRST + COUNT), and the block of a weight's columns that each has there.
template <int first, int... blocks>
struct Blocks {
  static constexpr int FIRST = first, COUNT = sizeof...(blocks), PAST = FIRST + COUNT;
  static constexpr int of(int g) {
    constexpr int all[] = {blocks...};
    return all[g - FIRST];
  }
};
using NoBlocks = Blocks<0>;

// The gates of a cell, and the vectors of a tile: those of its first cell, then of the next.
template <class Unit>
constexpr int GATES = Unit::OfBias::PAST;
template <class Unit>
constexpr int VECTORS = Unit::CELLS * GATES<Unit>;

template <class Unit>
constexpr bool HAS_Q = Unit::OfQ::COUNT > 0;

// Whether dz of a gate is made of dq: until then its place may hold its pre-activation.
template <class Unit>
constexpr bool waits_for_dq(int g) {
  if constexpr (HAS_Q<Unit>)
    return g == Unit::RESET;
  else
    return false;
}

// Tiles beside one another, for H units.
template <class Unit>
RNNATTN_INLINE int64_t tiles_across(int64_t H) {
  return ceil_div(H, Unit::CELLS * W);
}

// Of the units of cell k of tile u, the first, and how many there are: none beyond H.
template <class Unit>
RNNATTN_INLINE int64_t first_unit(int64_t u, int k) {
  return (u * Unit::CELLS + k) * W;
}
template <class Unit>
RNNATTN_INLINE int units_of(int64_t u, int k, int64_t H) {
  const int64_t n = least(W, H - first_unit<Unit>(u, k));
  return static_cast<int>(Unit::CELLS == 1 ? n : most(n, 0));
}

// How many lanes a gate of tile u has where it is multiplied: with few units, as in the last tile,
// two or four gates share a vector.
template <class Unit>
RNNATTN_INLINE int lanes_of_gate(int64_t u, int64_t H) {
  if (Unit::CELLS > 1) return W;
  const int n = units_of<Unit>(u, 0, H);
  return n > W / 2 ? W : n > W / 4 ? W / 2 : W / 4;
}

// The vectors that gates then take, with so many lanes of each.
template <int vectors, int lanes>
struct Together {
  static constexpr int VECTORS = vectors, LANES = lanes;
};

// The vectors of a tile that have columns in a weight, and which these are.
template <class Unit, class Of>
struct Columns {
  static_assert(Unit::CELLS == 1 || Of::COUNT == 0 || Of::COUNT == GATES<Unit>);
  static constexpr int FIRST = Of::FIRST, COUNT = Unit::CELLS * Of::COUNT, PAST = FIRST + COUNT;
  static constexpr int gate(int v) { return v % GATES<Unit>; }

  static int64_t at(int v, int64_t u, int64_t H) {
    return Of::of(gate(v)) * H + first_unit<Unit>(u, v / GATES<Unit>);
  }
  static int lanes(int v, int64_t u, int64_t H) { return units_of<Unit>(u, v / GATES<Unit>, H); }

  // f of the `Together` of these gates in tile u, where cells without units have no vector.
  template <class F>
  RNNATTN_METHOD static void together(int64_t u, int64_t H, F f) {
    if constexpr (Unit::CELLS > 1) {
      const int64_t cells = ceil_div(H - first_unit<Unit>(u, 0), W);
      as_constant<COUNT>(cells, [&](auto n) RNNATTN_LAMBDA { f(Together<n, W>{}); });
    } else {
      const int lanes = lanes_of_gate<Unit>(u, H);
      if (lanes == W) return f(Together<COUNT, W>{});
      if (lanes == W / 2) return f(Together<(COUNT + 1) / 2, W / 2>{});
      f(Together<(COUNT + 3) / 4, W / 4>{});
    }
  }
};

}  // namespace rnnattn::RNNATTN_SET::recurrent
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_RECURRENT_UNIT_INL_H_
