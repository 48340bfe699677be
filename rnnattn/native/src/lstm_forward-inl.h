// The LSTM forwards: L1 and L2 for all steps, or for a single one of few rows.

#ifndef RNNATTN_LSTM_FORWARD_INL_H_
#define RNNATTN_LSTM_FORWARD_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "lstm_tiles-inl.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "threads.h"
#include "util-inl.h"
#include "workspace-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::lstm {

// The halved pre-activations of rows [lo, hi), b + a w: `a` is x alone, or [x h₋].
struct PreactivationTile {
  const float* a;
  int64_t stride, K;
  const float* block;
  const Gates& out;
  int64_t u;
  int n;

  template <int R>
  void run(int64_t r) const {
    V z[R][4];
    unrolled<R>([&](auto i) RNNATTN_LAMBDA {
      unrolled<4>([&](auto g) RNNATTN_LAMBDA { z[i][g] = load(block + g * W); });
    });
    multiply<Held::a>(z, K, a + r * stride, stride, 1, block + PANEL, PANEL);
    unrolled<R>([&](auto i) RNNATTN_LAMBDA {
      unrolled<4>([&](auto g) RNNATTN_LAMBDA { out.put(r + i, g, u, z[i][g], n); });
    });
  }
};

static void preactivate(const Cells& cells, const float* a, int64_t stride, int64_t K,
                        const Gates& out, int64_t u, int64_t lo, int64_t hi) {
  const int n = static_cast<int>(least(W, cells.H - u * W));
  over_tiles<GATE_TILE_ROWS>(lo, hi, PreactivationTile{a, stride, K, cells.block(u), out, u, n});
}

// b + x w_x of all `rows`: the units and blocks of rows are shared out.
static bool project(Threads& threads, const Lstm& s, const Cells& cells, const float* x,
                    const Gates& out, int64_t rows) {
  const int64_t blocks = ceil_div(rows, PROJECTED_ROWS);
  return parallel_for(threads, ceil_div(s.H, W) * blocks, s.threads, 0, [&](int64_t item, float*) {
    const int64_t u = item / blocks, block = item % blocks;
    preactivate(cells, x, s.D, s.D, out, u, rows * block / blocks, rows * (block + 1) / blocks);
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
// vectors projects_first.
struct State {
  float *h, *h_next, *c;
  int64_t stride;
  bool turned = false;  // the step goes through the weights backwards

  State after(int64_t steps) const {
    return steps % 2 ? State{h_next, h, c, stride, !turned} : *this;
  }
};

// What one step reads and writes, (B, …) each; null where absent.
struct Step {
  const float* x;  // or null, and b + x w_x in `from_x`
  Gates from_x;
  const uint8_t* valid;
  float *y, *c;
  Gates a;
};

struct CellTile {
  const Cells& cells;
  const State& state;
  const Step& step;
  int64_t u;
  int n;

  template <int R>
  void run(int64_t r) const {
    const int64_t D = cells.D, H = cells.H, j = u * W;
    const float* block = cells.block(u);
    V z[R][4];
    if (step.from_x) {
      unrolled<R>([&](auto i) RNNATTN_LAMBDA {
        unrolled<4>([&](auto g) RNNATTN_LAMBDA { z[i][g] = step.from_x.get(r + i, g, u, n); });
      });
    } else {
      unrolled<R>([&](auto i) RNNATTN_LAMBDA {
        unrolled<4>([&](auto g) RNNATTN_LAMBDA { z[i][g] = load(block + g * W); });
      });
      multiply<Held::a>(z, D, step.x + r * D, D, 1, block + PANEL, PANEL);
    }
    multiply<Held::a>(z, H, state.h + r * state.stride, state.stride, 1, block + (1 + D) * PANEL,
                      PANEL);
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
        y = h;
      } else {
        h = load(state.h + at);
        y = splat(0);
        for (int g = 0; g < 4; ++g) a[i][g] = splat(0);
      }
      store(state.c + at, c);
      store(state.h_next + at, h);
      store_units(step.y + row * H + j, y, n);
      if (step.c) store_units(step.c + row * H + j, c, n);
      if (step.a)
        for (int g = 0; g < 4; ++g) step.a.put(row, g, u, a[i][g], n);
    }
  }
};

// Where a row is fresh, its part of the state is zeroed: units [j, past) of rows [lo, hi).
static void zero_fresh(const State& state, float* h, const uint8_t* fresh, const uint8_t* valid,
                       int64_t lo, int64_t hi, int64_t j, int64_t past) {
  if (!fresh) return;
  for (int64_t r = lo; r < hi; ++r)
    if (fresh[r] && (!valid || valid[r])) {
      zero(h + r * state.stride + j, past - j);
      zero(state.c + r * state.stride + j, past - j);
    }
}

// One step of blocks of units [u, past) and rows [lo, hi), of a state that is not turned over yet.
static void advance(const Cells& cells, const State& state, const Step& step, int64_t u,
                    int64_t past, int64_t lo, int64_t hi) {
  // To and fro, so that a step begins with the weights that the one before left in the cache.
  over_steps(state.turned, u, past, [&](int64_t i) {
    const int n = static_cast<int>(least(W, cells.H - i * W));
    over_tiles<GATE_TILE_ROWS>(lo, hi, CellTile{cells, state, step, i, n});
  });
}

// One step of rows [lo, hi).
static void advance_rows(const Cells& cells, State& state, const Step& step, const uint8_t* fresh,
                         int64_t lo, int64_t hi) {
  zero_fresh(state, state.h, fresh, step.valid, lo, hi, 0, state.stride);
  advance(cells, state, step, 0, ceil_div(cells.H, W), lo, hi);
  state = state.after(1);
}

// Copies rows [lo, hi) of `width` between arrays of different strides, zero beyond the width.
static void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride,
                      int64_t width, int64_t lo, int64_t hi) {
  for (int64_t r = lo; r < hi; ++r)
    for (int64_t j = 0; j < width; j += W) {
      const int n = static_cast<int>(least(W, width - j));
      store_units(to + r * to_stride + j, load_units(from + r * from_stride + j, n),
                  to_stride >= j + W ? W : n);
    }
}

// Into how many groups the rows are split, of FEW_ROWS at least.
static int64_t groups_of(const Lstm& s) { return most(1, least(s.threads, s.B / FEW_ROWS)); }

// How many threads can share out the units: none that has less to do than waiting takes.
static int64_t members_of(const Lstm& s) {
  const int64_t worth = s.B * s.H * 4 * s.H / SHARE;
  return most(1, least(least(s.threads, ceil_div(s.H, W)), worth));
}

// Whether they do, there being too few rows to share out: each then reads a part of the weights
// alone, and waits for the others after every step.
static bool shares_units(const Lstm& s) { return s.B < FEW_ROWS || members_of(s) > groups_of(s); }

// The steps whose b + x w_x is computed at once.
static int64_t chunk_of(const Lstm& s) { return most(1, least(s.T, CHUNK_ROWS / most(s.B, 1))); }

template <class F>
static bool over_groups(Threads& threads, const Lstm& s, F f) {
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
template <class StepOf, class Before>
static void share_units(Threads& threads, const Lstm& s, const Cells& cells, State& state,
                        int64_t from, int64_t to, StepOf step_of, Before before) {
  const int64_t steps = to - from, units = ceil_div(s.H, W);
  const auto step_at = [&](int64_t round) { return s.reverse ? to - 1 - round : from + round; };
  const auto begin = [&](const State& now, int64_t t, int64_t j, int64_t past) {
    before(now, t, j, past);
    zero_fresh(now, now.h, mask_at(s.fresh, t, s.B), mask_at(s.valid, t, s.B), 0, s.B, j, past);
  };
  if (steps <= 0) return;
  begin(state, step_at(0), 0, state.stride);
  over_rounds(threads, steps, members_of(s), [&](int64_t round, int64_t member, int64_t members) {
    const int64_t u = units * member / members, past = units * (member + 1) / members;
    const State now = state.after(round);
    advance(cells, now, step_of(step_at(round)), u, past, 0, s.B);
    if (round + 1 < steps) begin(now.after(1), step_at(round + 1), u * W, past * W);
  });
  state = state.after(steps);
}

struct StepsMemory {
  Memory memory;
  float *cells, *from_x, *h, *h_next, *c;

  StepsMemory(const Lstm& s, int64_t projected, float* base) : memory{base} {
    const int64_t state = s.B * whole_vectors(s.H);
    cells = memory.take(Cells::floats(s));
    from_x = projected ? memory.take(projected) : nullptr;
    h = memory.take(state);
    h_next = memory.take(state);
    c = memory.take(state);
  }
};

static bool all_steps(Threads& threads, const LstmForward& s) {
  const int64_t T = s.T, B = s.B, D = s.D, H = s.H, stride = whole_vectors(H);
  const bool by_units = shares_units(s);  // and b + x w_x of many steps at once
  const int64_t length = by_units ? chunk_of(s) : s.interval ? s.interval : most(T, 1);
  const int64_t projected =
      by_units && !s.a ? ceil_div(H, W) * Gates::panel(least(length, T) * B) : 0;
  const StepsMemory size(s, projected, nullptr);
  const Allocation allocation(size.memory.used);
  if (!allocation.data()) return false;
  advise_huge_pages(allocation.data(), size.memory.used);
  const StepsMemory my(s, projected, allocation.data());
  const Cells cells{my.cells, D, H};
  const Gates gates = Gates::in_rows(s.a, H);
  const Gates from_x = Gates::in_panels(my.from_x, least(length, T) * B);
  if (!parallel_for(threads, ceil_div(H, W), s.threads, 0,
                    [&](int64_t u, float*) { pack_cells(s, u, my.cells); }))
    return false;

  // What step t reads and writes, its b + x w_x in row `projected` if it is there.
  auto step_at = [&](int64_t t, int64_t row) {
    const Gates a = gates.from(t * B);
    const Gates pre = !by_units ? Gates{} : a ? a : from_x.from(row);
    return Step{s.x + t * B * D,       pre, mask_at(s.valid, t, B), s.y + t * B * H,
                at(s.c_all, t, B * H), a};
  };
  // The state before the steps of interval k: units [j, past) of rows [lo, hi).
  auto keep = [&](const State& state, int64_t k, int64_t j, int64_t past, int64_t lo, int64_t hi) {
    const int64_t at = k * B * H + j, width = least(past, H) - j;
    for (int64_t r = lo; r < hi; ++r) {
      copy(state.h + r * stride + j, width, s.h_starts + at + r * H);
      copy(state.c + r * stride + j, width, s.c_starts + at + r * H);
    }
  };
  auto enter = [&](int64_t lo, int64_t hi) {
    copy_rows(s.h, H, my.h, stride, H, lo, hi);
    copy_rows(s.c, H, my.c, stride, H, lo, hi);
    return State{my.h, my.h_next, my.c, stride};
  };
  auto leave = [&](const State& state, int64_t lo, int64_t hi) {
    copy_rows(state.h, stride, s.h_last, H, H, lo, hi);
    copy_rows(state.c, stride, s.c_last, H, H, lo, hi);
  };

  advise_huge_pages(s.y, T * B * H);
  advise_huge_pages(s.c_all, T * B * H);
  advise_huge_pages(s.a, T * B * 4 * H);
  const int64_t chunks = ceil_div(T, length);
  if (!by_units)
    return over_groups(threads, s, [&](int64_t lo, int64_t hi) {
      State state = enter(lo, hi);
      over_steps(s.reverse, 0, chunks, [&](int64_t k) {
        if (s.interval) keep(state, k, 0, H, lo, hi);
        over_steps(s.reverse, k * length, least((k + 1) * length, T), [&](int64_t t) {
          advance_rows(cells, state, step_at(t, 0), mask_at(s.fresh, t, B), lo, hi);
        });
      });
      leave(state, lo, hi);
    });

  State state = enter(0, B);
  bool ok = true;
  over_steps(s.reverse, 0, chunks, [&](int64_t k) {
    const int64_t from = k * length, to = least(from + length, T);
    const Gates out = gates ? gates.from(from * B) : from_x;
    ok = ok && project(threads, s, cells, s.x + from * B * D, out, (to - from) * B);
    share_units(
        threads, s, cells, state, from, to, [&](int64_t t) { return step_at(t, (t - from) * B); },
        [&](const State& before, int64_t t, int64_t j, int64_t past) {
          const bool begins = s.interval && (s.reverse ? t == T - 1 || (t + 1) % s.interval == 0
                                                       : t % s.interval == 0);
          if (begins) keep(before, t / s.interval, j, past, 0, B);
        });
  });
  leave(state, 0, B);
  return ok;
}

// ---- a single step of few rows ----------------------------------------------------------------

// Weights that are read once are not worth packing: they are read along their rows.

// z += a w for R rows; z (R, 4, `units`) of the units from `first` on, a (R, K), w (K, 4, H).
template <int R>
static void add_product(const float* a, const float* w, int64_t K, int64_t H, int64_t first,
                        int64_t units, float* z) {
  constexpr int AT_ONCE = 8 / R;
  for (int64_t k = 0; k < K; k += AT_ONCE) {
    const int64_t depth = least(AT_ONCE, K - k);
    V e[R][AT_ONCE];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < AT_ONCE; ++i) e[r][i] = splat(i < depth ? a[r * K + k + i] : 0);
    for (int g = 0; g < 4; ++g) {
      const float* block = w + k * 4 * H + g * H + first;
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

template <int R>
static void step_of_units(const LstmForward& s, int64_t first, int64_t units, float* z) {
  const int64_t H = s.H;
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < 4; ++g) copy(s.b + g * H + first, units, z + (r * 4 + g) * units);
  add_product<R>(s.x, s.w_x, s.D, H, first, units, z);
  add_product<R>(s.h, s.w_h, H, H, first, units, z);
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

static bool is_single_step(const LstmForward& s) {
  return s.T == 1 && s.B <= STEP_ROWS && !s.valid && !s.fresh && !s.interval;
}

static bool single_step(Threads& threads, const LstmForward& s) {
  const int64_t blocks = ceil_div(s.H, STEP_UNITS);
  const int64_t limit = (s.D + s.H) * 4 * s.H < STEP_ALONE ? 1 : s.threads;
  return parallel_for(threads, blocks, limit, s.B * 4 * STEP_UNITS, [&](int64_t item, float* z) {
    const int64_t first = item * STEP_UNITS, units = least(STEP_UNITS, s.H - first);
    switch (s.B) {
      case 1: step_of_units<1>(s, first, units, z); break;
      case 2: step_of_units<2>(s, first, units, z); break;
      case 3: step_of_units<3>(s, first, units, z); break;
      default: step_of_units<4>(s, first, units, z);
    }
  });
}

static bool forward(Threads& threads, const LstmForward& s) {
  return is_single_step(s) ? single_step(threads, s) : all_steps(threads, s);
}

}  // namespace rnnattn::RNNATTN_SET::lstm
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_LSTM_FORWARD_INL_H_
