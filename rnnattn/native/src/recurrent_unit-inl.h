// What a unit is to the schedules of recurrent units, of which the LSTM and the GRU are two.
//
// It has four gates. What x w_x, h₋ w_h and the biases add to each comes together in four vectors
// of a register tile; a weight may have blocks of columns for three of the gates alone, which then
// are neighbours, so that no product is with zeros. A `Unit` is what the cell of W units needs of
// the arguments beside these, and has
//
//     OfX, OfH, OfBias   which gates the blocks of w_x, of w_h and of the biases [b b_n] are of
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

#ifndef RNNATTN_RECURRENT_UNIT_INL_H_
#define RNNATTN_RECURRENT_UNIT_INL_H_

#include "instruction_set.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::recurrent {

constexpr int GATES = 4;

// Gates [FIRST, FIRST + COUNT), and the block of a weight's columns that each has there.
template <int first, int... blocks>
struct Blocks {
  static constexpr int FIRST = first, COUNT = sizeof...(blocks), PAST = FIRST + COUNT;
  static constexpr int of(int g) {
    constexpr int all[] = {blocks...};
    return all[g - FIRST];
  }
};

}  // namespace rnnattn::RNNATTN_SET::recurrent
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_RECURRENT_UNIT_INL_H_
