// The LSTM forwards: L1 and L2 for all steps, or for a single one of few rows.

#ifndef RNNATTN_LSTM_FORWARD_INL_H_
#define RNNATTN_LSTM_FORWARD_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "lstm_tiles-inl.h"
#include "numbers-inl.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "threads.h"
#include "util-inl.h"
#include "workspace-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::lstm {

// The halved pre-activations of rows [lo, hi), b + a w: `a` is x alone, or [x h₋], in whole steps.
template <class Operand>
struct PreactivationTile {
  const Cells<Operand>& cells;
  const Operand* a;
  int64_t stride, K;
  const Gates& out;
  int64_t u;
  int n;

  template <int R>
  void run(int64_t r) const {
    V z[R][4];
    unrolled<R>([&](auto i) RNNATTN_LAMBDA {
      unrolled<4>([&](auto g) RNNATTN_LAMBDA { z[i][g] = cells.bias(u, g); });
    });
    accumulate(z, K, a + r * stride, stride, cells.x(u), PANEL);
    unrolled<R>([&](auto i) RNNATTN_LAMBDA {
      unrolled<4>([&](auto g) RNNATTN_LAMBDA { out.put(r + i, g, u, z[i][g], n); });
    });
  }
};

template <class Operand>
static void preactivate(const Cells<Operand>& cells, const Operand* a, int64_t stride, int64_t K,
                        const Gates& out, int64_t u, int64_t lo, int64_t hi) {
  const int n = static_cast<int>(least(W, cells.H - u * W));
  over_tiles<GATE_TILE_ROWS>(lo, hi, PreactivationTile<Operand>{cells, a, stride, K, out, u, n});
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
  const Lstm<Number>& s;
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

// b + x w_x of all rows of `steps` from t on: the units and blocks of rows are shared out.
template <class Number>
static bool project(Threads& threads, const Lstm<Number>& s, const Cells<Operand<Number>>& cells,
                    const Inputs<Number>& inputs, const Gates& out, int64_t t, int64_t steps) {
  const int64_t rows = steps * s.B, blocks = ceil_div(rows, PROJECTED_ROWS);
  const auto first_of = [&](int64_t block) { return rows * block / blocks; };
  const Operand<Number>* x = inputs.rows(t, 0, 0);
  return parallel_for(threads, blocks, s.threads, 0,
                      [&](int64_t block, float*) {
                        inputs.rows(t, first_of(block), first_of(block + 1));
                      }) &&
         parallel_for(threads, ceil_div(s.H, W) * blocks, s.threads, 0, [&](int64_t item, float*) {
           const int64_t u = item / blocks, block = item % blocks;
           preactivate(cells, x, inputs.stride(s.D), whole_steps<Operand<Number>>(s.D), out, u,
                       first_of(block), first_of(block + 1));
         });
}

// L1, L2 in the registers of a tile: from a, halved, and c₋ to c and h.
RNNATTN_INLINE void cell(const V (&a)[4], V c_prev, V& c, V& h) {
  const V half = splat(0.5f);
  const V i = fma(half, tanh(a[0]), half), f = fma(half, tanh(a[1]), half);
  const V g = tanh(a[2]), o = fma(half, tanh(a[3]), half);
  c = fma(f, c_prev, i * g);
  h = o * tanh(c);
}

// The state of all rows as the steps go: h before and after the step, c in place. Rows are whole
// vectors apart.
template <class Operand>
struct State {
  Operand *h, *h_next;
  float* c;
  int64_t stride;
  bool turned = false;  // the step goes through the weights backwards

  State after(int64_t steps) const {
    return steps % 2 ? State{h_next, h, c, stride, !turned} : *this;
  }
};

// What one step reads and writes, (B, …) each; null where absent.
template <class Number>
struct Step {
  const Operand<Number>* x;  // or null, and b + x w_x in `from_x`
  int64_t x_stride;
  Gates from_x;
  const uint8_t* valid;
  Number* y;
  float* c;
  Gates a;
};

template <class Number>
struct CellTile {
  const Cells<Operand<Number>>& cells;
  const State<Operand<Number>>& state;
  const Step<Number>& step;
  int64_t u;
  int n;

  template <int R>
  void run(int64_t r) const {
    const int64_t H = cells.H, j = u * W;
    V z[R][4];
    if (step.from_x) {
      unrolled<R>([&](auto i) RNNATTN_LAMBDA {
        unrolled<4>([&](auto g) RNNATTN_LAMBDA { z[i][g] = step.from_x.get(r + i, g, u, n); });
      });
    } else {
      unrolled<R>([&](auto i) RNNATTN_LAMBDA {
        unrolled<4>([&](auto g) RNNATTN_LAMBDA { z[i][g] = cells.bias(u, g); });
      });
      accumulate(z, whole_steps<Operand<Number>>(cells.D), step.x + r * step.x_stride,
                 step.x_stride, cells.x(u), PANEL);
    }
    accumulate(z, whole_steps<Operand<Number>>(H), state.h + r * state.stride, state.stride,
               cells.h(u), PANEL);
    // in memory, so that one body does for all rows
    V a[R][4];
    unrolled<R>([&](auto i) RNNATTN_LAMBDA {
      unrolled<4>([&](auto g) RNNATTN_LAMBDA { a[i][g] = z[i][g]; });
    });
    for (int i = 0; i < R; ++i) {
      const int64_t row = r + i, at = row * state.stride + j;
      V c = load(state.c + at), h, y;
      if (!step.valid || step.valid[row]) {
        cell(a[i], c, c, h);
        h = rounded(Number{}, h);
        y = h;
      } else {
        h = load_units(state.h + at, W);
        y = splat(0);
        for (int g = 0; g < 4; ++g) a[i][g] = splat(0);
      }
      store(state.c + at, c);
      store_units(state.h_next + at, h, W);
      store_units(step.y + row * H + j, y, n);
      if (step.c) store_units(step.c + row * H + j, c, n);
      if (step.a)
        for (int g = 0; g < 4; ++g) step.a.put(row, g, u, a[i][g], n);
    }
  }
};

// Where a row is fresh, its part of the state is zeroed: units [j, past) of rows [lo, hi).
template <class Operand>
static void zero_fresh(Operand* h, float* c, int64_t stride, const uint8_t* fresh,
                       const uint8_t* valid, int64_t lo, int64_t hi, int64_t j, int64_t past) {
  if (!fresh) return;
  for (int64_t r = lo; r < hi; ++r)
    if (fresh[r] && (!valid || valid[r])) {
      std::memset(h + r * stride + j, 0, sizeof(Operand) * static_cast<size_t>(past - j));
      zero(c + r * stride + j, past - j);
    }
}

// One step of blocks of units [u, past) and rows [lo, hi), of a state that is not turned over yet.
template <class Number>
static void advance(const Cells<Operand<Number>>& cells, const State<Operand<Number>>& state,
                    const Step<Number>& step, int64_t u, int64_t past, int64_t lo, int64_t hi) {
  // To and fro, so that a step begins with the weights that the one before left in the cache.
  over_steps(state.turned, u, past, [&](int64_t i) {
    const int n = static_cast<int>(least(W, cells.H - i * W));
    over_tiles<GATE_TILE_ROWS>(lo, hi, CellTile<Number>{cells, state, step, i, n});
  });
}

// One step of rows [lo, hi).
template <class Number>
static void advance_rows(const Cells<Operand<Number>>& cells, State<Operand<Number>>& state,
                         const Step<Number>& step, const uint8_t* fresh, int64_t lo, int64_t hi) {
  zero_fresh(state.h, state.c, state.stride, fresh, step.valid, lo, hi, 0, state.stride);
  advance(cells, state, step, 0, ceil_div(cells.H, W), lo, hi);
  state = state.after(1);
}

// Into how many groups the rows are split, of FEW_ROWS at least.
template <class Number>
static int64_t groups_of(const Lstm<Number>& s) {
  return most(1, least(s.threads, s.B / FEW_ROWS));
}

// How many threads can share out the units: none that has less to do than waiting takes.
template <class Number>
static int64_t members_of(const Lstm<Number>& s) {
  const int64_t worth = s.B * s.H * 4 * s.H / SHARE;
  return most(1, least(least(s.threads, ceil_div(s.H, W)), worth));
}

// Whether they do, there being too few rows to share out: each then reads a part of the weights
// alone, and waits for the others after every step.
template <class Number>
static bool shares_units(const Lstm<Number>& s) {
  const int64_t with_enough = most(1, least(s.threads, s.B / ENOUGH_ROWS));
  return s.B < FEW_ROWS || members_of(s) > with_enough;
}

// The steps whose b + x w_x is computed at once.
template <class Number>
static int64_t chunk_of(const Lstm<Number>& s) {
  return most(1, least(s.T, CHUNK_ROWS / most(s.B, 1)));
}

template <class Number, class F>
static bool over_groups(Threads& threads, const Lstm<Number>& s, F f) {
  const int64_t groups = groups_of(s);
  return parallel_for(threads, groups, s.threads, 0, [&](int64_t group, float*) {
    f(s.B * group / groups, s.B * (group + 1) / groups);
  });
}

RNNATTN_INLINE const uint8_t* mask_at(const uint8_t* mask, int64_t t, int64_t B) {
  return mask ? mask + t * B : nullptr;
}

RNNATTN_INLINE float* at(float* array, int64_t t, int64_t floats) {
  return array ? array + t * floats : nullptr;
}

// Steps [from, to) of all rows, the units shared out. `step_of(t)` is what step t reads and writes,
// `before(state, t, j, past)` looks at units [j, past) of the state before it. Every member zeroes
// the fresh part of its units before it ends the step before.
template <class Number, class StepOf, class Before>
static void share_units(Threads& threads, const Lstm<Number>& s,
                        const Cells<Operand<Number>>& cells, State<Operand<Number>>& state,
                        int64_t from, int64_t to, StepOf step_of, Before before) {
  const int64_t steps = to - from, units = ceil_div(s.H, W);
  const auto step_at = [&](int64_t round) { return s.reverse ? to - 1 - round : from + round; };
  const auto begin = [&](const State<Operand<Number>>& now, int64_t t, int64_t j, int64_t past) {
    before(now, t, j, past);
    zero_fresh(now.h, now.c, now.stride, mask_at(s.fresh, t, s.B), mask_at(s.valid, t, s.B), 0, s.B,
               j, past);
  };
  if (steps <= 0) return;
  begin(state, step_at(0), 0, state.stride);
  over_rounds(threads, steps, members_of(s), [&](int64_t round, int64_t member, int64_t members) {
    const int64_t u = units * member / members, past = units * (member + 1) / members;
    const State<Operand<Number>> now = state.after(round);
    advance(cells, now, step_of(step_at(round)), u, past, 0, s.B);
    if (round + 1 < steps) begin(now.after(1), step_at(round + 1), u * W, past * W);
  });
  state = state.after(steps);
}

template <class Number>
struct StepsMemory {
  Memory memory;
  Operand<Number>*cells, *x, *h, *h_next;
  float *from_x, *c;

  StepsMemory(const Lstm<Number>& s, int64_t packed, int64_t rows_of_x, int64_t projected,
              float* base)
      : memory{base} {
    const int64_t state = s.B * whole_vectors(s.H);
    cells = memory.take<Operand<Number>>(packed);
    x = memory.take<Operand<Number>>(Inputs<Number>::size(s.D, rows_of_x));
    from_x = projected ? memory.take(projected) : nullptr;
    h = memory.take<Operand<Number>>(state);
    h_next = memory.take<Operand<Number>>(state);
    c = memory.take(state);
  }
};

template <class Number>
static bool all_steps(Threads& threads, const LstmForward<Number>& s) {
  using Operand = rnnattn::RNNATTN_SET::Operand<Number>;
  const int64_t T = s.T, B = s.B, D = s.D, H = s.H, stride = whole_vectors(H);
  const int64_t weights = Cells<Operand>::size(D, H);
  const bool once = T == 1 && weights > CACHED;    // a block of units after the other
  const bool by_units = !once && shares_units(s);  // and b + x w_x of many steps at once
  const int64_t length = by_units ? chunk_of(s) : s.interval ? s.interval : most(T, 1);
  const int64_t rows_of_x = by_units ? least(length, T) * B : B;
  const int64_t projected = by_units && !s.a ? ceil_div(H, W) * Gates::panel(rows_of_x) : 0;
  const int64_t packed = once ? 0 : weights;
  const StepsMemory<Number> size(s, packed, rows_of_x, projected, nullptr);
  const Allocation allocation(size.memory.used);
  if (!allocation.data()) return false;
  advise_huge_pages(allocation.data(), size.memory.used);
  const StepsMemory<Number> my(s, packed, rows_of_x, projected, allocation.data());
  const Cells<Operand> cells{my.cells, D, H};
  const Inputs<Number> inputs{s, my.x};
  const Gates gates = Gates::in_rows(s.a, H);
  const Gates from_x = Gates::in_panels(my.from_x, rows_of_x);
  // What step t reads and writes: x, or b + x w_x.
  auto step_at = [&](int64_t t, const Operand* x, const Gates& projection) {
    const Gates a = gates.from(t * B);
    return Step<Number>{x,
                        inputs.stride(D),
                        projection,
                        mask_at(s.valid, t, B),
                        s.y + t * B * H,
                        at(s.c_all, t, B * H),
                        a};
  };
  // The state before the steps of interval k: units [j, past) of rows [lo, hi).
  auto keep = [&](const State<Operand>& state, int64_t k, int64_t j, int64_t past, int64_t lo,
                  int64_t hi) {
    const int64_t at = k * B * H + j, width = least(past, H) - j;
    for (int64_t r = lo; r < hi; ++r) {
      copy_numbers(state.h + r * stride + j, width, s.h_starts + at + r * H);
      copy_numbers(state.c + r * stride + j, width, s.c_starts + at + r * H);
    }
  };
  auto enter = [&](int64_t lo, int64_t hi) {
    copy_rows(s.h, H, my.h, stride, H, lo, hi);
    copy_rows(s.c, H, my.c, stride, H, lo, hi);
    return State<Operand>{my.h, my.h_next, my.c, stride};
  };
  auto leave = [&](const State<Operand>& state, int64_t lo, int64_t hi) {
    copy_rows(state.h, stride, s.h_last, H, H, lo, hi);
    copy_rows(state.c, stride, s.c_last, H, H, lo, hi);
  };

  advise_huge_pages(s.y, T * B * H);
  advise_huge_pages(s.c_all, T * B * H);
  advise_huge_pages(s.a, T * B * 4 * H);
  const int64_t chunks = ceil_div(T, length), units = ceil_div(H, W);
  if (once) {
    const State<Operand> state{my.h, my.h_next, my.c, stride};
    const Operand* x = inputs.rows(0, 0, 0);
    const int64_t floats = cells.stride(D, H) / TOGETHER<Operand>;
    return over_groups(threads, s,
                       [&](int64_t lo, int64_t hi) {
                         enter(lo, hi);
                         inputs.rows(0, lo, hi);
                         if (s.interval) keep(state, 0, 0, H, lo, hi);
                         zero_fresh(state.h, state.c, stride, s.fresh, s.valid, lo, hi, 0, stride);
                       }) &&
           parallel_for(threads, units, s.threads, floats,
                        [&](int64_t u, float* memory) {
                          Operand* block = reinterpret_cast<Operand*>(memory);
                          pack_cells(s, u, block);
                          advance(Cells<Operand>{block, D, H, u}, state, step_at(0, x, Gates{}), u,
                                  u + 1, 0, B);
                        }) &&
           over_groups(threads, s, [&](int64_t lo, int64_t hi) { leave(state.after(1), lo, hi); });
  }
  if (!parallel_for(threads, units, s.threads, 0, [&](int64_t u, float*) {
        pack_cells(s, u, my.cells + u * cells.stride(D, H));
      }))
    return false;
  if (!by_units)
    return over_groups(threads, s, [&](int64_t lo, int64_t hi) {
      State<Operand> state = enter(lo, hi);
      over_steps(s.reverse, 0, chunks, [&](int64_t k) {
        if (s.interval) keep(state, k, 0, H, lo, hi);
        over_steps(s.reverse, k * length, least((k + 1) * length, T), [&](int64_t t) {
          const Step<Number> step = step_at(t, inputs.rows(t, lo, hi), Gates{});
          advance_rows(cells, state, step, mask_at(s.fresh, t, B), lo, hi);
        });
      });
      leave(state, lo, hi);
    });

  State<Operand> state = enter(0, B);
  bool ok = true;
  over_steps(s.reverse, 0, chunks, [&](int64_t k) {
    const int64_t from = k * length, to = least(from + length, T);
    const Gates out = gates ? gates.from(from * B) : from_x;
    ok = ok && project(threads, s, cells, inputs, out, from, to - from);
    share_units(
        threads, s, cells, state, from, to,
        [&](int64_t t) { return step_at(t, nullptr, out.from((t - from) * B)); },
        [&](const State<Operand>& before, int64_t t, int64_t j, int64_t past) {
          const bool begins = s.interval && (s.reverse ? t == T - 1 || (t + 1) % s.interval == 0
                                                       : t % s.interval == 0);
          if (begins) keep(before, t / s.interval, j, past, 0, B);
        });
  });
  leave(state, 0, B);
  return ok;
}

// ---- few steps of few rows --------------------------------------------------------------------

// Weights that are hardly read again are not worth packing: they are read along their rows.

// z += a w for R rows; z (R, 4, `units`) of the units from `first` on, a (R, K), w (K, 4, H).
template <int R, class Number>
static void add_product(const float* a, const Number* w, int64_t K, int64_t H, int64_t first,
                        int64_t units, float* z) {
  constexpr int AT_ONCE = 8 / R;
  for (int64_t k = 0; k < K; k += AT_ONCE) {
    const int64_t depth = least(AT_ONCE, K - k);
    V e[R][AT_ONCE];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < AT_ONCE; ++i) e[r][i] = splat(i < depth ? a[r * K + k + i] : 0);
    for (int g = 0; g < 4; ++g) {
      const Number* block = w + k * 4 * H + g * H + first;
      for (int64_t j = 0; j < units; j += W) {
        const int n = static_cast<int>(least(W, units - j));
        V sum[R];
        for (int r = 0; r < R; ++r) sum[r] = load_units(z + (r * 4 + g) * units + j, n);
        const auto add = [&](int i) {
          const V v = load_units(block + i * 4 * H + j, n);
          for (int r = 0; r < R; ++r) sum[r] = fma(e[r][i], v, sum[r]);
        };
        if (depth == AT_ONCE)
          for (int i = 0; i < AT_ONCE; ++i) add(i);
        else
          for (int i = 0; i < depth; ++i) add(i);
        for (int r = 0; r < R; ++r) store_units(z + (r * 4 + g) * units + j, sum[r], n);
      }
    }
  }
}

// Rows of numbers as float32: in `copied`, if they are not.
RNNATTN_INLINE const float* in_float(const float* numbers, int64_t, float*) { return numbers; }
template <class Number>
RNNATTN_INLINE const float* in_float(const Number* numbers, int64_t count, float* copied) {
  copy_numbers(numbers, count, copied);
  return copied;
}

template <int R, class Number>
static void step_of_units(const LstmForward<Number>& s, int64_t first, int64_t units, float* z) {
  const int64_t H = s.H;
  float* copied = z + R * 4 * STEP_UNITS;
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < 4; ++g) copy_numbers(s.b + g * H + first, units, z + (r * 4 + g) * units);
  add_product<R>(in_float(s.x, R * s.D, copied), s.w_x, s.D, H, first, units, z);
  add_product<R>(in_float(s.h, R * H, copied), s.w_h, H, H, first, units, z);
  for (int r = 0; r < R; ++r)
    for (int64_t j = 0; j < units; j += W) {
      const int n = static_cast<int>(least(W, units - j));
      const int64_t at = r * H + first + j;
      V a[4], c = load_units(s.c + at, n), h;
      for (int g = 0; g < 4; ++g)
        a[g] = load_units(z + (r * 4 + g) * units + j, n) * splat(g == 2 ? 1.0f : 0.5f);
      cell(a, c, c, h);
      store_units(s.y + at, h, n);
      store_units(s.h_last + at, h, n);
      store_units(s.c_last + at, c, n);
      if (s.c_all) store_units(s.c_all + at, c, n);
      if (s.a)
        for (int g = 0; g < 4; ++g) store_units(s.a + (r * 4 + g) * H + first + j, a[g], n);
    }
}

template <class Number>
static bool are_few_steps(const LstmForward<Number>& s) {
  const int64_t few = (s.D + s.H) * 4 * s.H < SMALL_STEP ? 2 : 4;
  return s.T <= few && s.B <= STEP_ROWS && !s.valid && !s.fresh && !s.interval;
}

template <class Number>
static bool single_step(Threads& threads, const LstmForward<Number>& s) {
  const int64_t blocks = ceil_div(s.H, STEP_UNITS);
  const int64_t limit = (s.D + s.H) * 4 * s.H < SMALL_STEP ? 1 : s.threads;
  const int64_t floats = s.B * (4 * STEP_UNITS + most(s.D, s.H));
  return parallel_for(threads, blocks, limit, floats, [&](int64_t item, float* z) {
    const int64_t first = item * STEP_UNITS, units = least(STEP_UNITS, s.H - first);
    switch (s.B) {
      case 1: step_of_units<1>(s, first, units, z); break;
      case 2: step_of_units<2>(s, first, units, z); break;
      case 3: step_of_units<3>(s, first, units, z); break;
      default: step_of_units<4>(s, first, units, z);
    }
  });
}

template <class Number>
static bool few_steps(Threads& threads, const LstmForward<Number>& s) {
  LstmForward<Number> step = s;
  const int64_t BH = s.B * s.H;
  bool ok = true;
  over_steps(s.reverse, 0, s.T, [&](int64_t t) {
    step.x = s.x + t * s.B * s.D;
    step.y = s.y + t * BH;
    step.c_all = at(s.c_all, t, BH);
    step.a = at(s.a, t, 4 * BH);
    ok = ok && single_step(threads, step);
    // h is read by all units while they write y, and so is that of the step before
    step.h = step.y;
    step.c = s.c_last;
  });
  return ok;
}

template <class Number>
static bool forward(Threads& threads, const LstmForward<Number>& s) {
  return are_few_steps(s) ? few_steps(threads, s) : all_steps(threads, s);
}

}  // namespace rnnattn::RNNATTN_SET::lstm
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_LSTM_FORWARD_INL_H_
