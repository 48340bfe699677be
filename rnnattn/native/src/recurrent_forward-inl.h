// Recurrent units forwards, with packed weights.

#ifndef RNNATTN_RECURRENT_FORWARD_INL_H_
#define RNNATTN_RECURRENT_FORWARD_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "product-inl.h"
#include "recurrent_few_steps-inl.h"
#include "recurrent_tiles-inl.h"
#include "recurrent_unit-inl.h"
#include "simd-inl.h"
#include "threads.h"
#include "util-inl.h"
#include "workspace-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::recurrent {

// z of rows that were computed before; and their biases.
template <class Unit, int R, int N>
RNNATTN_INLINE void get_gates(V (&z)[R][N], const Gates& from, int64_t r, int64_t u, int64_t H) {
  using All = Columns<Unit, typename Unit::OfBias>;
  unrolled<R>([&](auto i) RNNATTN_LAMBDA {
    unrolled<N>([&](auto v)
                    RNNATTN_LAMBDA { z[i][v] = from.get(r + i, v, u, All::lanes(v, u, H)); });
  });
}
template <class Unit, int R, int N>
RNNATTN_INLINE void put_gates(const V (&z)[R][N], const Gates& to, int64_t r, int64_t u,
                              int64_t H) {
  using All = Columns<Unit, typename Unit::OfBias>;
  unrolled<R>([&](auto i) RNNATTN_LAMBDA {
    unrolled<N>([&](auto v) RNNATTN_LAMBDA { to.put(r + i, v, u, z[i][v], All::lanes(v, u, H)); });
  });
}
template <class Unit, class Operand, int R, int N>
RNNATTN_INLINE void get_biases(V (&z)[R][N], const Cells<Unit, Operand>& cells, int64_t u) {
  unrolled<R>([&](auto i) RNNATTN_LAMBDA {
    unrolled<N>([&](auto v) RNNATTN_LAMBDA { z[i][v] = cells.bias(u, v); });
  });
}

// The scaled pre-activations of rows [lo, hi), biases + x w_x + h₋ w_h: rows of `xh` are [x h₋],
// each in whole steps, or x alone.
template <class Unit, class Operand>
struct PreactivationTile {
  using Cells = recurrent::Cells<Unit, Operand>;
  const Cells& cells;
  const Operand* xh;
  int64_t stride;
  bool has_h;
  const Gates& out;
  int64_t u;

  template <int R>
  void run(int64_t r) const {
    const int64_t D = whole_steps<Operand>(cells.D);
    const Operand* x = xh + r * stride;
    V z[R][VECTORS<Unit>];
    get_biases(z, cells, u);
    accumulate_gates<typename Cells::OfX>(z, D, x, stride, cells.x(u), u, cells.H);
    if (has_h)
      accumulate_gates<typename Cells::OfH>(z, whole_steps<Operand>(cells.R), x + D, stride,
                                            cells.h(u), u, cells.H);
    put_gates<Unit>(z, out, r, u, cells.H);
  }
};

template <class Unit, class Operand>
static void preactivate(const Cells<Unit, Operand>& cells, const Operand* xh, int64_t stride,
                        bool has_h, const Gates& out, int64_t u, int64_t lo, int64_t hi) {
  over_tiles<GATE_ROWS<Operand>>(
      lo, hi, PreactivationTile<Unit, Operand>{cells, xh, stride, has_h, out, u});
}

// Copies rows [lo, hi) of `width` between arrays of different strides, zero beyond the width.
template <class From, class To>
static void copy_rows(const From* from, int64_t from_stride, To* to, int64_t to_stride,
                      int64_t width, int64_t lo, int64_t hi) {
  for (int64_t r = lo; r < hi; ++r)
    copy_numbers(from + r * from_stride, width, to + r * to_stride,
                 to_stride >= ceil_div(width, W) * W);
}

// x as products read it: where that is not how it lies in memory, rows are copied first.
template <class Number>
struct Inputs {
  const Recurrent<Number>& s;
  Operand<Number>* copied;
  static constexpr bool ALIKE = std::is_same_v<Number, Operand<Number>>;

  static bool as_given(int64_t D) { return ALIKE && D % TOGETHER<Operand<Number>> == 0; }
  static int64_t stride(int64_t D) { return as_given(D) ? D : whole_vectors(D); }
  // What `copied` takes for so many rows.
  static int64_t size(int64_t D, int64_t rows) { return as_given(D) ? 0 : rows * stride(D); }

  // Rows [lo, hi) from step t on.
  const Operand<Number>* rows(int64_t t, int64_t lo, int64_t hi) const {
    const Number* x = s.x + t * s.B * s.D;
    if constexpr (ALIKE)
      if (as_given(s.D)) return x;
    copy_rows(x, s.D, copied, stride(s.D), s.D, lo, hi);
    return copied;
  }
};

// The biases + x w_x of all rows of `steps` from t on: the units and blocks of rows are shared out.
template <class Unit, class Number>
static bool project(Threads& threads, const Recurrent<Number>& s,
                    const Cells<Unit, Operand<Number>>& cells, const Inputs<Number>& inputs,
                    const Gates& out, int64_t t, int64_t steps) {
  const int64_t rows = steps * s.B, blocks = ceil_div(rows, PROJECTED_ROWS);
  const auto first_of = [&](int64_t block) { return rows * block / blocks; };
  const Operand<Number>* x = inputs.rows(t, 0, 0);
  return parallel_for(threads, blocks, s.threads, 0,
                      [&](int64_t block, float*) {
                        inputs.rows(t, first_of(block), first_of(block + 1));
                      }) &&
         parallel_for(threads, tiles_across<Unit>(s.H) * blocks, s.threads, 0,
                      [&](int64_t item, float*) {
                        const int64_t u = item / blocks, block = item % blocks;
                        preactivate(cells, x, inputs.stride(s.D), false, out, u, first_of(block),
                                    first_of(block + 1));
                      });
}

// What a step projects, h = m P: P packed, m of all rows, and h before it is rounded. Null where
// nothing is projected.
struct Projection {
  float *packed, *m, *h;
};

// What a step hands from its first product to its second: q, and the gates as far as they are. Null
// where there is no second.
template <class Operand>
struct Between {
  Operand* q;
  Gates a;
};

// The state of all rows as the steps go: h before and after the step, c in place, null if the unit
// has none. Rows of h and q are `stride` apart, those of c and m `c_stride`, whole vectors.
template <class Operand>
struct State {
  Operand *h, *h_next;
  float* c;
  Projection projection;
  Between<Operand> between;
  int64_t stride, c_stride;
  bool turned = false;  // the step goes through the weights backwards

  State after(int64_t steps) const {
    return steps % 2 ? State{h_next, h, c, projection, between, stride, c_stride, !turned} : *this;
  }
};

// What of a step one thread does: tiles of units [u, past) and columns [v, v_past) of h, in
// vectors. Those of the same units without a projection.
struct Share {
  int64_t u, past, v, v_past;

  template <class Unit>
  static Share of(int64_t H, int64_t R, int64_t member, int64_t members) {
    const int64_t tiles = tiles_across<Unit>(H), columns = ceil_div(R, W);
    const int64_t u = tiles * member / members, past = tiles * (member + 1) / members;
    if (Unit::CELLS > 1)
      return {u, past, least(u * Unit::CELLS, columns), least(past * Unit::CELLS, columns)};
    return {u, past, columns * member / members, columns * (member + 1) / members};
  }
};

// What one step reads and writes, (B, …) each; null where absent.
template <class Number>
struct Step {
  const Operand<Number>* x;  // or null, and the biases + x w_x in `from_x`
  int64_t x_stride;
  Gates from_x;
  const uint8_t* valid;
  Number* y;
  float* c;
  Gates a;
};

// h after the step, W columns of a row: a row that is not valid holds what it has, and gives zero.
template <class Number>
RNNATTN_INLINE void put_h(const State<Operand<Number>>& state, const Step<Number>& step, int64_t r,
                          int64_t R, int64_t v, V h) {
  const int64_t at = r * state.stride + v * W;
  V y = h;
  if (step.valid && !step.valid[r]) h = load_units(state.h + at, W), y = splat(0);
  store_units(state.h_next + at, h, W);
  store_units(step.y + r * R + v * W, y, static_cast<int>(least(W, R - v * W)));
}

// z of R rows, biases + x w_x + h₋ w_h.
template <class Unit, class Number, int R, int N>
RNNATTN_INLINE void products(V (&z)[R][N], const Cells<Unit, Operand<Number>>& cells,
                             const State<Operand<Number>>& state, const Step<Number>& step,
                             int64_t r, int64_t u) {
  using Cells = recurrent::Cells<Unit, Operand<Number>>;
  if (step.from_x) {
    get_gates<Unit>(z, step.from_x, r, u, cells.H);
  } else {
    get_biases(z, cells, u);
    accumulate_gates<typename Cells::OfX>(z, whole_steps<Operand<Number>>(cells.D),
                                          step.x + r * step.x_stride, step.x_stride, cells.x(u), u,
                                          cells.H);
  }
  accumulate_gates<typename Cells::OfH>(z, whole_steps<Operand<Number>>(cells.R),
                                        state.h + r * state.stride, state.stride, cells.h(u), u,
                                        cells.H);
}

// The first product of a step that has two: q.
template <class Unit, class Number>
struct ResetTile {
  const Recurrent<Number>& s;
  const Cells<Unit, Operand<Number>>& cells;
  const State<Operand<Number>>& state;
  const Step<Number>& step;
  int64_t u;

  template <int R>
  void run(int64_t r) const {
    const int64_t j = first_unit<Unit>(u, 0);
    V z[R][VECTORS<Unit>];
    products<Unit>(z, cells, state, step, r, u);
    put_gates<Unit>(z, state.between.a, r, u, cells.H);
    const Unit unit = Unit::of(s, j, units_of<Unit>(u, 0, cells.H));
    unrolled<R>([&](auto i) RNNATTN_LAMBDA {
      const int64_t at = (r + i) * state.stride + j;
      store_units(state.between.q + at, reset(unit, z[i][Unit::RESET], load_units(state.h + at, W)),
                  W);
    });
  }
};

// The second of many rows at once, q being known: it joins what `a` holds.
template <class Unit, class Operand>
struct SecondProductTile {
  using Cells = recurrent::Cells<Unit, Operand>;
  const Cells& cells;
  const Operand* q;
  int64_t stride;
  const Gates& a;
  int64_t u;

  template <int R>
  RNNATTN_INLINE void add(V (&z)[R][VECTORS<Unit>], const SecondProductTile& of, int64_t r) {
    get_gates<Unit>(z, of.a, r, of.u, of.cells.H);
    accumulate_gates<typename Cells::OfQ>(z, whole_steps<Operand>(of.cells.R), of.q + r * of.stride,
                                          of.stride, of.cells.q(of.u), of.u, of.cells.H);
  }

  template <int R>
  void run(int64_t r) const {
    V z[R][VECTORS<Unit>];
    add(z, *this, r);
    put_gates<Unit>(z, a, r, u, cells.H);
  }
};

template <class Unit, class Number>
struct CellTile {
  const Recurrent<Number>& s;
  const Cells<Unit, Operand<Number>>& cells;
  const State<Operand<Number>>& state;
  const Step<Number>& step;
  int64_t u;

  template <int R>
  void run(int64_t r) const {
    constexpr int CELLS = Unit::CELLS, GATES = recurrent::GATES<Unit>;
    const int64_t H = cells.H;
    float* const projected = state.projection.m;
    V z[R][VECTORS<Unit>];
    if constexpr (HAS_Q<Unit>) {
      using Second = SecondProductTile<Unit, Operand<Number>>;
      const Between<Operand<Number>>& between = state.between;
      Second::add(z, Second{cells, between.q, state.stride, between.a, u}, r);
    } else {
      products<Unit>(z, cells, state, step, r, u);
    }
    // in memory, so that one body does for all rows
    V a[R][CELLS][GATES];
    unrolled<R>([&](auto i) RNNATTN_LAMBDA {
      unrolled<CELLS * GATES>([&](auto v) RNNATTN_LAMBDA { a[i][v / GATES][v % GATES] = z[i][v]; });
    });
    for (int k = 0; k < CELLS; ++k) {
      const int n = units_of<Unit>(u, k, H);
      if (CELLS > 1 && n == 0) break;
      const int64_t j = first_unit<Unit>(u, k);
      const Unit unit = Unit::of(s, j, n);
      for (int i = 0; i < R; ++i) {
        const int64_t row = r + i, at = row * state.c_stride + j;
        const V before =
            Unit::CARRIES_C ? load(state.c + at) : load_units(state.h + row * state.stride + j, W);
        V c = before, m = splat(0);
        if (!step.valid || step.valid[row]) {
          cell(unit, a[i][k], before, c, m);
          m = rounded(Number{}, m);
        } else {
          for (int g = 0; g < GATES; ++g) a[i][k][g] = splat(0);
        }
        if (Unit::CARRIES_C) store(state.c + at, c);
        if (projected)
          store(projected + at, m);
        else
          put_h(state, step, row, H, j / W, m);
        if (step.c) store_units(step.c + row * H + j, c, n);
        if (step.a)
          for (int g = 0; g < GATES; ++g) step.a.put(row, k * GATES + g, u, a[i][k][g], n);
      }
    }
  }
};

// Where a row is fresh, a part of its state is zeroed: vectors [first, past) of rows [lo, hi).
template <class T>
static void zero_fresh(T* state, int64_t stride, const uint8_t* fresh, const uint8_t* valid,
                       int64_t lo, int64_t hi, int64_t first, int64_t past) {
  if (!fresh) return;
  for (int64_t r = lo; r < hi; ++r)
    if (fresh[r] && (!valid || valid[r]))
      std::memset(state + r * stride + first * W, 0,
                  sizeof(T) * static_cast<size_t>((past - first) * W));
}
template <class Operand>
static void zero_fresh(const State<Operand>& state, const uint8_t* fresh, const uint8_t* valid,
                       int64_t lo, int64_t hi, const Share& share) {
  zero_fresh(state.h, state.stride, fresh, valid, lo, hi, share.v, share.v_past);
  if (state.c) zero_fresh(state.c, state.c_stride, fresh, valid, lo, hi, share.u, share.past);
}

// One step of tiles of units [u, past) and rows [lo, hi), of a state that is not turned over yet;
// or its first product, where it has two.
template <class Tile, class Unit, class Number>
static void advance(const Recurrent<Number>& s, const Cells<Unit, Operand<Number>>& cells,
                    const State<Operand<Number>>& state, const Step<Number>& step, int64_t u,
                    int64_t past, int64_t lo, int64_t hi) {
  // To and fro, so that a step begins with the weights that the one before left in the cache.
  over_steps(state.turned, u, past, [&](int64_t i) {
    over_tiles<GATE_ROWS<Operand<Number>>>(lo, hi, Tile{s, cells, state, step, i});
  });
}

// The rest of the step where h is projected: h = m P of columns [v, past), in vectors.
template <class Number>
static void project_state(const Recurrent<Number>& s, const State<Operand<Number>>& state,
                          const Step<Number>& step, int64_t v, int64_t past, int64_t lo,
                          int64_t hi) {
  const Projection& p = state.projection;
  product<Stored::by_row, From::zero>(hi - lo, past - v, s.H, p.m + lo * state.c_stride,
                                      state.c_stride, p.packed + v * W, padded(s.R), TILE_COLUMNS,
                                      p.h + lo * state.stride + v * W, state.stride);
  for (int64_t r = lo; r < hi; ++r)
    for (int64_t i = v; i < past; ++i)
      put_h(state, step, r, s.R, i, rounded(Number{}, load(p.h + r * state.stride + i * W)));
}

// A step is of one round or two: of the units, then of what waits for all of them.
template <class Unit, class Number>
static int64_t rounds_of_step(const Recurrent<Number>& s) {
  return HAS_Q<Unit> || s.projection ? 2 : 1;
}

// A round of a share of the rows [lo, hi).
template <class Unit, class Number>
static void run_round(int64_t round, const Recurrent<Number>& s,
                      const Cells<Unit, Operand<Number>>& cells,
                      const State<Operand<Number>>& state, const Step<Number>& step,
                      const Share& share, int64_t lo, int64_t hi) {
  using Cell = CellTile<Unit, Number>;
  if constexpr (HAS_Q<Unit>) {
    using Reset = ResetTile<Unit, Number>;
    if (round == 0)
      advance<Reset>(s, cells, state, step, share.u, share.past, lo, hi);
    else
      advance<Cell>(s, cells, state, step, share.u, share.past, lo, hi);
  } else {
    if (round == 0)
      advance<Cell>(s, cells, state, step, share.u, share.past, lo, hi);
    else
      project_state(s, state, step, share.v, share.v_past, lo, hi);
  }
}

// One step of rows [lo, hi).
template <class Unit, class Number>
static void advance_rows(const Recurrent<Number>& s, const Cells<Unit, Operand<Number>>& cells,
                         State<Operand<Number>>& state, const Step<Number>& step,
                         const uint8_t* fresh, int64_t lo, int64_t hi) {
  const Share all = Share::of<Unit>(s.H, s.R, 0, 1);
  zero_fresh(state, fresh, step.valid, lo, hi, all);
  for (int64_t round = 0; round < rounds_of_step<Unit>(s); ++round)
    run_round(round, s, cells, state, step, all, lo, hi);
  state = state.after(1);
}

// Into how many groups the rows are split, of GROUP_ROWS at least.
template <class Number>
static int64_t groups_of(const Recurrent<Number>& s) {
  return most(1, least(s.threads, s.B / GROUP_ROWS));
}

// How many threads can share out the units: none that has less to do than waiting takes. A row
// alone takes as long as a few, which is how long it takes to read the weights.
template <class Unit, class Number>
static int64_t members_of(const Recurrent<Number>& s) {
  const int64_t worth = most(s.B, FEW_ROWS) * s.R * s.G * s.H / SHARE;
  return most(1, least(least(s.threads, tiles_across<Unit>(s.H)), worth));
}

// Whether they do, there being too few rows to share out, or too few to read so many weights for in
// every step: each then reads a part of these alone, and waits for the others after the step.
template <class Unit, class Number>
static bool shares_units(const Recurrent<Number>& s, int64_t weights) {
  const int64_t members = members_of<Unit>(s), rows = ceil_div(s.B, groups_of(s));
  const int64_t with_enough = most(1, least(s.threads, s.B / ENOUGH_ROWS));
  return s.B <= FEW_ROWS || members > with_enough ||
         (members > 1 && weights > WEIGHTS_OF_A_ROW * rows);
}

// The steps whose biases + x w_x are computed at once.
template <class Number>
static int64_t chunk_of(const Recurrent<Number>& s) {
  return most(1, least(s.T, CHUNK_ROWS / most(s.B, 1)));
}

template <class Number, class F>
static bool over_groups(Threads& threads, const Recurrent<Number>& s, F f) {
  const int64_t groups = groups_of(s);
  return parallel_for(threads, groups, s.threads, 0, [&](int64_t group, float*) {
    f(s.B * group / groups, s.B * (group + 1) / groups);
  });
}

RNNATTN_INLINE const uint8_t* mask_at(const uint8_t* mask, int64_t t, int64_t B) {
  return mask ? mask + t * B : nullptr;
}

template <class Float>
RNNATTN_INLINE Float* at(Float* array, int64_t t, int64_t floats) {
  return array ? array + t * floats : nullptr;
}

// Steps [from, to) of all rows, the units shared out. `step_of(t)` is what step t reads and writes,
// `before(state, t, share)` looks at a share of the state before it. Every member zeroes the fresh
// part of its share before it ends the step before.
template <class Unit, class Number, class StepOf, class Before>
static void share_units(Threads& threads, const Recurrent<Number>& s,
                        const Cells<Unit, Operand<Number>>& cells, State<Operand<Number>>& state,
                        int64_t from, int64_t to, StepOf step_of, Before before) {
  const int64_t steps = to - from, rounds = rounds_of_step<Unit>(s);
  const auto step_at = [&](int64_t step) { return s.reverse ? to - 1 - step : from + step; };
  const auto begin = [&](const State<Operand<Number>>& now, int64_t t, const Share& share) {
    before(now, t, share);
    zero_fresh(now, mask_at(s.fresh, t, s.B), mask_at(s.valid, t, s.B), 0, s.B, share);
  };
  if (steps <= 0) return;
  begin(state, step_at(0), Share::of<Unit>(s.H, s.R, 0, 1));
  const auto round_of = [&](int64_t round, int64_t member, int64_t members) {
    const int64_t done = round / rounds;
    const Share share = Share::of<Unit>(s.H, s.R, member, members);
    const State<Operand<Number>> now = state.after(done);
    const Step<Number> step = step_of(step_at(done));
    run_round(round % rounds, s, cells, now, step, share, 0, s.B);
    if (round % rounds == rounds - 1 && done + 1 < steps)
      begin(now.after(1), step_at(done + 1), share);
  };
  over_rounds(threads, steps * rounds, members_of<Unit>(s), round_of);
  state = state.after(steps);
}

template <class Unit, class Number>
static State<Operand<Number>> take_state(Memory& memory, const Recurrent<Number>& s) {
  using Operand = rnnattn::RNNATTN_SET::Operand<Number>;
  const int64_t h = s.B * whole_vectors(s.R), c = s.B * whole_vectors(s.H);
  State<Operand> state{memory.take<Operand>(h), memory.take<Operand>(h), nullptr, {}, {}, 0, 0};
  if (s.c) state.c = memory.take(c);
  if (s.projection)
    state.projection = {memory.take(s.H * padded(s.R)), memory.take(c), memory.take(h)};
  if constexpr (HAS_Q<Unit>)
    state.between = {memory.take<Operand>(h), take_panels<Unit>(memory, s.H, s.B)};
  state.stride = whole_vectors(s.R);
  state.c_stride = whole_vectors(s.H);
  return state;
}

// The state of rows [lo, hi) from where it is kept.
template <class Number>
static void enter(const Recurrent<Number>& s, const State<Operand<Number>>& state, const Number* h,
                  const float* c, int64_t lo, int64_t hi) {
  copy_rows(h, s.R, state.h, state.stride, s.R, lo, hi);
  if (s.c) copy_rows(c, s.H, state.c, state.c_stride, s.H, lo, hi);
}

// All steps. The rows of the batch are shared out, or the units where rows are few; one or two
// steps with large weights go through these block by block.
template <class Unit, class Number>
class Forward {
  using Operand = rnnattn::RNNATTN_SET::Operand<Number>;
  using Cells = recurrent::Cells<Unit, Operand>;
  using State = recurrent::State<Operand>;
  using Step = recurrent::Step<Number>;

 public:
  Forward(Threads& threads, const RecurrentForward<Number>& s) : threads_(threads), s_(s) {}

  bool run() {
    const int64_t T = s_.T, B = s_.B, H = s_.H, weights = Cells::size(s_.D, H, s_.R);
    const bool by_blocks = T <= BLOCKWISE_STEPS && weights > CACHED && !HAS_Q<Unit>;
    const bool by_units = !by_blocks && shares_units<Unit>(s_, weights);
    projects_ = by_units && !(Inputs<Number>::as_given(s_.D) && s_.D <= NARROW_X * B);
    length_ = projects_ ? chunk_of(s_) : !by_units && s_.interval ? s_.interval : most(T, 1);
    rows_of_x_ = projects_ ? least(length_, T) * B : B;
    const int64_t packed = by_blocks ? 0 : weights;
    const bool has_panels = projects_ && !s_.a;
    Memory size{nullptr};
    lay_out(size, packed, has_panels);
    const Allocation allocation(size.used);
    if (!allocation.data()) return false;
    advise_huge_pages(allocation.data(), size.used);
    Memory memory{allocation.data()};
    lay_out(memory, packed, has_panels);
    advise_huge_pages(s_.y, T * B * s_.R);
    advise_huge_pages(s_.c_all, T * B * H);
    advise_huge_pages(s_.a, T * B * GATES<Unit> * H);
    if (by_blocks) return block_by_block();
    // one thread alone runs all steps: what another had packed would have to come from its cache
    const bool alone = by_units && !projects_ && members_of<Unit>(s_) == 1 && weights <= CACHED;
    return pack(alone ? 1 : s_.threads) && (by_units ? units_shared_out() : rows_shared_out());
  }

 private:
  void lay_out(Memory& memory, int64_t packed, bool has_panels) {
    packed_ = memory.take<Operand>(packed);
    inputs_.copied = memory.take<Operand>(Inputs<Number>::size(s_.D, rows_of_x_));
    if (has_panels) from_x_ = take_panels<Unit>(memory, s_.H, rows_of_x_);
    state_ = take_state<Unit>(memory, s_);
    cells_ = {packed_, s_.D, s_.H, s_.R};
  }

  bool pack(int64_t threads) const {
    const int64_t tiles = tiles_across<Unit>(s_.H),
                  items = most(ceil_div(tiles, PACKED_TILES), least(tiles, threads));
    return parallel_for(threads_, items, threads, 0, [&](int64_t item, float*) {
      const int64_t u = tiles * item / items, past = tiles * (item + 1) / items;
      pack_cells<Unit, Number>(s_, u, past, packed_ + u * cells_.stride(s_.D, s_.R));
      if (!s_.projection) return;
      for (int64_t i = u; i < past; ++i) pack_projection(s_, i * W, state_.projection.packed);
    });
  }

  Share all_of_it() const { return Share::of<Unit>(s_.H, s_.R, 0, 1); }

  // What step t reads and writes: x, or the biases + x w_x.
  Step step_at(int64_t t, const Operand* x, const Gates& from_x) const {
    return {x,
            inputs_.stride(s_.D),
            from_x,
            mask_at(s_.valid, t, s_.B),
            s_.y + t * s_.B * s_.R,
            at(s_.c_all, t, s_.B * s_.H),
            Gates::in_rows<Unit>(s_.a, s_.H).from(t * s_.B)};
  }

  void enter_rows(int64_t lo, int64_t hi) const { enter<Number>(s_, state_, s_.h, s_.c, lo, hi); }
  void leave_rows(const State& state, int64_t lo, int64_t hi) const {
    copy_rows(state.h, state.stride, s_.h_last, s_.R, s_.R, lo, hi);
    if (s_.c) copy_rows(state.c, state.c_stride, s_.c_last, s_.H, s_.H, lo, hi);
  }

  // Whether the state before step t is kept.
  bool begins_interval(int64_t t) const {
    const int64_t n = s_.interval;
    return n && (s_.reverse ? t == s_.T - 1 || (t + 1) % n == 0 : t % n == 0);
  }
  // The state before the steps of interval k: a share of rows [lo, hi).
  void keep(const State& state, int64_t k, const Share& share, int64_t lo, int64_t hi) const {
    const int64_t i = share.v * W, j = share.u * W;
    for (int64_t r = lo; r < hi; ++r) {
      copy_numbers(state.h + r * state.stride + i, least(share.v_past * W, s_.R) - i,
                   s_.h_starts + (k * s_.B + r) * s_.R + i);
      if (s_.c)
        copy_numbers(state.c + r * state.c_stride + j, least(share.past * W, s_.H) - j,
                     s_.c_starts + (k * s_.B + r) * s_.H + j);
    }
  }

  // Few steps: in each a block of weights is packed in a core's cache, and multiplied by at once.
  bool block_by_block() const {
    const Share all = all_of_it();
    const int64_t floats = cells_.stride(s_.D, s_.R) / TOGETHER<Operand>;
    const int64_t panels = s_.projection ? ceil_div(all.v_past, TILE_VECTORS) : 0;
    State state = state_;
    enter_rows(0, s_.B);
    bool ok = true;
    over_steps(s_.reverse, 0, s_.T, [&](int64_t t) {
      const Step step = step_at(t, inputs_.rows(t, 0, s_.B), Gates{});
      if (begins_interval(t)) keep(state, t / s_.interval, all, 0, s_.B);
      zero_fresh(state, mask_at(s_.fresh, t, s_.B), step.valid, 0, s_.B, all);
      ok =
          ok &&
          parallel_for(threads_, tiles_across<Unit>(s_.H), s_.threads, floats,
                       [&](int64_t u, float* memory) {
                         Operand* block = reinterpret_cast<Operand*>(memory);
                         pack_cells<Unit, Number>(s_, u, u + 1, block);
                         if (s_.projection && !state.turned)  // the first step
                           pack_projection(s_, u * W, state.projection.packed);
                         advance<CellTile<Unit, Number>>(s_, Cells{block, s_.D, s_.H, s_.R, u},
                                                         state, step, u, u + 1, 0, s_.B);
                       }) &&
          parallel_for(threads_, panels, s_.threads, 0, [&](int64_t panel, float*) {
            const int64_t v = panel * TILE_VECTORS;
            project_state<Number>(s_, state, step, v, least(v + TILE_VECTORS, all.v_past), 0, s_.B);
          });
      state = state.after(1);
    });
    leave_rows(state, 0, s_.B);
    return ok;
  }

  bool rows_shared_out() const {
    return over_groups(threads_, s_, [&](int64_t lo, int64_t hi) {
      State state = state_;
      enter_rows(lo, hi);
      over_steps(s_.reverse, 0, ceil_div(s_.T, length_), [&](int64_t k) {
        if (s_.interval) keep(state, k, all_of_it(), lo, hi);
        over_steps(s_.reverse, k * length_, least((k + 1) * length_, s_.T), [&](int64_t t) {
          const Step step = step_at(t, inputs_.rows(t, lo, hi), Gates{});
          advance_rows<Unit, Number>(s_, cells_, state, step, mask_at(s_.fresh, t, s_.B), lo, hi);
        });
      });
      leave_rows(state, lo, hi);
    });
  }

  // The biases + x w_x of many steps at once, then these; or step by step, if x is narrow.
  bool units_shared_out() const {
    const int64_t T = s_.T, B = s_.B;
    const Gates gates = Gates::in_rows<Unit>(s_.a, s_.H);
    State state = state_;
    enter_rows(0, B);
    bool ok = true;
    over_steps(s_.reverse, 0, ceil_div(T, length_), [&](int64_t k) {
      const int64_t from = k * length_, to = least(from + length_, T);
      const Gates out = gates ? gates.from(from * B) : from_x_;
      if (projects_)
        ok = ok && project<Unit, Number>(threads_, s_, cells_, inputs_, out, from, to - from);
      share_units<Unit, Number>(
          threads_, s_, cells_, state, from, to,
          [&](int64_t t) {
            return projects_ ? step_at(t, nullptr, out.from((t - from) * B))
                             : step_at(t, inputs_.rows(t, 0, 0), Gates{});
          },
          [&](const State& before, int64_t t, const Share& share) {
            if (begins_interval(t)) keep(before, t / s_.interval, share, 0, B);
          });
    });
    leave_rows(state, 0, B);
    return ok;
  }

  Threads& threads_;
  const RecurrentForward<Number>& s_;
  int64_t length_ = 0, rows_of_x_ = 0;
  bool projects_ = false;  // x w_x of many steps at once
  Operand* packed_ = nullptr;
  Gates from_x_{};
  Cells cells_{};
  Inputs<Number> inputs_{s_, nullptr};
  State state_{};
};

template <class Unit, class Number>
static bool forward(Threads& threads, const RecurrentForward<Number>& s) {
  return are_few_steps(s) ? FewSteps<Unit, Number>(threads, s).run()
                          : Forward<Unit, Number>(threads, s).run();
}

}  // namespace rnnattn::RNNATTN_SET::recurrent
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_RECURRENT_FORWARD_INL_H_
