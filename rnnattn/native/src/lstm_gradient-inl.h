// The LSTM's gradient, L3 to L8: against the direction of running, chunk by chunk.

#ifndef RNNATTN_LSTM_GRADIENT_INL_H_
#define RNNATTN_LSTM_GRADIENT_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "lstm_forward-inl.h"
#include "lstm_tiles-inl.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "threads.h"
#include "util-inl.h"
#include "workspace-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::lstm {

// L3, L4, L8 for blocks of units [u, past) of one row r of a step: dz and, in place, dc; h's
// cotangent is dh + dy.
RNNATTN_INLINE void cell_gradient(const Gates& a, const float* c, const float* c_prev,
                                  const float* dy, const float* dh, float* dc, const Gates& dz,
                                  int64_t r, int64_t H, int64_t u, int64_t past) {
  const V half = splat(0.5f), one = splat(1.0f);
  for (int64_t j = u * W; u < past; ++u, j += W) {
    const int n = static_cast<int>(least(W, H - j));
    const V i = fma(half, tanh(a.get(r, 0, u, n)), half);
    const V f = fma(half, tanh(a.get(r, 1, u, n)), half);
    const V g = tanh(a.get(r, 2, u, n));
    const V o = fma(half, tanh(a.get(r, 3, u, n)), half);
    const V tanh_c = tanh(load_units(c + j, n));
    const V before = c_prev ? load_units(c_prev + j, n) : splat(0);
    const V dm = load(dh + j) + load_units(dy + j, n);
    const V d = fma(dm * o, one - tanh_c * tanh_c, load(dc + j));
    store(dc + j, d * f);
    dz.put(r, 0, u, d * (g * (i * (one - i))), n);
    dz.put(r, 1, u, d * (before * (f * (one - f))), n);
    dz.put(r, 2, u, d * (i * (one - g * g)), n);
    dz.put(r, 3, u, dm * (tanh_c * (o * (one - o))), n);
  }
}

// A block of the weight gradient, rows [m, m + R) of [x h₋ 1]ᵀ dz and one panel of dz.
struct WeightTile {
  const LstmBackward& s;
  const float* a;  // [x h₋ 1] of the first row of dz
  int64_t stride;
  const float* panel;  // of dz
  int64_t depth, u;
  bool adds;  // to what the gradient holds

  template <int R>
  void run(int64_t m) const {
    const int64_t H = s.H;
    const int n = static_cast<int>(least(W, H - u * W));
    float* row[R];
    for (int i = 0; i < R; ++i) {
      const int64_t k = m + i;
      float* of = k < s.D ? s.dw_x + k * 4 * H : k < s.D + H ? s.dw_h + (k - s.D) * 4 * H : s.db;
      row[i] = of + u * W;
      // fetched while the product is computed, which is then added to them
      if (adds)
        for (int g = 0; g < 4; ++g) __builtin_prefetch(row[i] + g * H, 1);
    }
    V sum[R][4] = {};
    multiply<Held::a>(sum, depth, a + m, 1, stride, panel, PANEL);
    unrolled<R>([&](auto i) RNNATTN_LAMBDA {
      unrolled<4>([&](auto g) RNNATTN_LAMBDA {
        float* to = row[i] + g * H;
        store_units(to, adds ? load_units(to, n) + sum[i][g] : sum[i][g], n);
      });
    });
  }
};

// One chunk of steps [from, to): where its rows of y, c, a and what comes before them lie.
struct Chunk {
  int64_t from, to;
  const float *y, *c;              // of `from`
  Gates a;                         // likewise
  const float *h_start, *c_start;  // before the first step run
};

class Backward {
 public:
  Backward(Threads& threads, const LstmBackward& s) : threads_(threads), s_(s) {}

  bool run() {
    const int64_t T = s_.T, B = s_.B, D = s_.D, H = s_.H, stride = whole_vectors(H);
    const int64_t H4 = 4 * H;
    recomputes_steps_ = s_.interval > 0;
    recomputes_a_ = !recomputes_steps_ && !s_.a;
    length_ = recomputes_steps_
                  ? least(s_.interval, most(T, 1))
                  : most(1, least(T, least(CHUNK_ROWS, CHUNK_FLOATS / H4) / most(B, 1)));
    Memory size{nullptr};
    lay_out(size);
    const Allocation allocation(size.used);
    if (!allocation.data()) return false;
    advise_huge_pages(allocation.data(), size.used);
    Memory memory{allocation.data()};
    lay_out(memory);

    const int64_t blocks = packed_cells_ ? ceil_div(H, W) : 0, panels = Transposed::panels(H);
    bool ok = parallel_for(threads_, blocks + panels + Transposed::panels(D), s_.threads, 0,
                           [&](int64_t item, float*) {
                             if (item < blocks)
                               pack_cells(s_, item, packed_cells_);
                             else if (item < blocks + panels)
                               pack_transposed(s_.w_h, H, H, item - blocks, packed_h_);
                             else
                               pack_transposed(s_.w_x, D, H, item - blocks - panels, packed_x_);
                           });
    advise_huge_pages(s_.dx, T * B * D);
    advise_huge_pages(s_.dw_x, D * H4);
    advise_huge_pages(s_.dw_h, H * H4);
    copy_rows(s_.dh_last, H, dh_, stride, H, 0, B);
    copy_rows(s_.dc_last, H, dc_, stride, H, 0, B);

    bool is_first = true;
    over_steps(!s_.reverse, 0, ceil_div(T, length_), [&](int64_t k) {
      const Chunk chunk = chunk_at(k);
      if (recomputes_a_) ok = ok && preactivations(chunk);
      if (shares_units(s_))
        ok = ok && steps_by_units(chunk);
      else
        ok = ok && over_groups(threads_, s_, [&](int64_t lo, int64_t hi) { steps(chunk, lo, hi); });
      ok = ok && products(chunk, is_first);
      is_first = false;
    });
    copy_rows(dh_, stride, s_.dh, H, H, 0, B);
    copy_rows(dc_, stride, s_.dc, H, H, 0, B);
    return ok;
  }

 private:
  void lay_out(Memory& memory) {
    const int64_t D = s_.D, H = s_.H, rows = length_ * s_.B, state = s_.B * whole_vectors(H);
    packed_cells_ = recomputes_steps_ || recomputes_a_ ? memory.take(Cells::floats(s_)) : nullptr;
    packed_h_ = memory.take(Transposed::floats(H, H));
    packed_x_ = memory.take(Transposed::floats(D, H));
    dz_ = Gates::in_panels(memory.take(ceil_div(H, W) * Gates::panel(rows)), rows);
    width_ = ceil_div(D + H + 1, LINE) * LINE + LINE;
    xh_ = memory.take(rows * width_);
    dh_ = memory.take(state);
    dc_ = memory.take(state);
    if (recomputes_steps_) {
      h_ = memory.take(state);
      h_next_ = memory.take(state);
      c_run_ = memory.take(state);
      y_ = memory.take(rows * H);
      c_ = memory.take(rows * H);
    }
    cells_ = {packed_cells_, D, H};
    to_h_ = {packed_h_, H, H};
    to_x_ = {packed_x_, D, H};
  }

  Chunk chunk_at(int64_t k) const {
    const int64_t BH = s_.B * s_.H, from = k * length_, to = least(from + length_, s_.T);
    if (recomputes_steps_)
      return {from, to, y_, c_, dz_, s_.h_starts + k * BH, s_.c_starts + k * BH};
    const int64_t before = s_.reverse ? to : from - 1;
    const bool is_first = before < 0 || before >= s_.T;
    // only read from
    const Gates kept = Gates::in_rows(const_cast<float*>(s_.a), s_.H);
    return {from,
            to,
            s_.y + from * BH,
            s_.c_all + from * BH,
            s_.a ? kept.from(from * s_.B) : dz_,
            s_.h,
            is_first ? s_.c : s_.c_all + before * BH};
  }

  bool is_valid(int64_t t, int64_t b) const { return !s_.valid || s_.valid[t * s_.B + b]; }

  bool is_fresh(int64_t t, int64_t b) const { return s_.fresh && s_.fresh[t * s_.B + b]; }

  // h₋ and c₋ of a valid row; null for zeros. A row whose step before is not valid has not begun.
  const float* h_before(const Chunk& chunk, int64_t t, int64_t b) const {
    if (is_fresh(t, b)) return nullptr;
    const int64_t before = s_.reverse ? t + 1 : t - 1;
    const int64_t first = recomputes_steps_ ? chunk.from : 0,
                  last = recomputes_steps_ ? chunk.to : s_.T;
    if (before < first || before >= last || !is_valid(before, b)) return chunk.h_start + b * s_.H;
    return chunk.y + ((before - chunk.from) * s_.B + b) * s_.H;
  }
  const float* c_before(const Chunk& chunk, int64_t t, int64_t b) const {
    if (is_fresh(t, b)) return nullptr;
    const int64_t before = s_.reverse ? t + 1 : t - 1;
    if (before < chunk.from || before >= chunk.to) return chunk.c_start + b * s_.H;
    return chunk.c + ((before - chunk.from) * s_.B + b) * s_.H;
  }

  // [x h₋ 1] of one row; zeros where it is not valid, so that no NaN of the padding passes.
  void gather(const Chunk& chunk, int64_t t, int64_t b) const {
    const int64_t D = s_.D, H = s_.H;
    float* row = xh_ + ((t - chunk.from) * s_.B + b) * width_;
    if (!is_valid(t, b)) {
      zero(row, D + H + 1);
      return;
    }
    copy(s_.x + (t * s_.B + b) * D, D, row);
    if (const float* h = h_before(chunk, t, b))
      copy(h, H, row + D);
    else
      zero(row + D, H);
    row[D + H] = 1;
  }

  // In how many items the products of so many rows are shared out: as many to each thread.
  int64_t items_of(int64_t rows) const {
    return s_.threads * ceil_div(rows, s_.threads * ITEM_ROWS);
  }

  // All h₋ of the chunk are known: its a is one product, into dz.
  bool preactivations(const Chunk& chunk) const {
    const int64_t rows = (chunk.to - chunk.from) * s_.B, items = items_of(rows);
    return parallel_for(threads_, items, s_.threads, 0, [&](int64_t item, float*) {
      const int64_t lo = rows * item / items, hi = rows * (item + 1) / items;
      for (int64_t r = lo; r < hi; ++r) gather(chunk, chunk.from + r / s_.B, r % s_.B);
      for (int64_t u = 0; u * W < s_.H; ++u)
        preactivate(cells_, xh_, width_, s_.D + s_.H, dz_, u, lo, hi);
    });
  }

  // The state before the chunk is all there is: run its steps again, from where `state_before` is.
  State state_before(const Chunk& chunk, int64_t lo, int64_t hi) const {
    const int64_t H = s_.H, stride = whole_vectors(H);
    copy_rows(chunk.h_start, H, h_, stride, H, lo, hi);
    copy_rows(chunk.c_start, H, c_run_, stride, H, lo, hi);
    return State{h_, h_next_, c_run_, stride};
  }

  Step step_again(const Chunk& chunk, int64_t t, const Gates& from_x) const {
    const int64_t row = (t - chunk.from) * s_.B;
    return {s_.x + t * s_.B * s_.D,
            from_x ? from_x.from(row) : from_x,
            mask_at(s_.valid, t, s_.B),
            y_ + row * s_.H,
            c_ + row * s_.H,
            dz_.from(row)};
  }

  // A step of rows [lo, hi) and blocks of units [u, past): dz and dc₋ from dh and dc.
  void cells(const Chunk& chunk, int64_t t, int64_t u, int64_t past, int64_t lo, int64_t hi) const {
    const int64_t B = s_.B, H = s_.H, stride = whole_vectors(H);
    for (int64_t r = lo; r < hi; ++r) {
      const int64_t k = (t - chunk.from) * B + r;
      if (is_valid(t, r))
        cell_gradient(chunk.a, chunk.c + k * H, c_before(chunk, t, r), s_.dy + (t * B + r) * H,
                      dh_ + r * stride, dc_ + r * stride, dz_, k, H, u, past);
      else
        for (int64_t i = u; i < past; ++i)
          for (int g = 0; g < 4; ++g) dz_.put(k, g, i, splat(0), W);
    }
  }

  // What goes back from it, from dz of all units: dh₋, and nothing where a row is fresh.
  void back(const Chunk& chunk, int64_t t, int64_t u, int64_t past, int64_t lo, int64_t hi) const {
    const int64_t B = s_.B, stride = whole_vectors(s_.H);
    const uint8_t* valid = mask_at(s_.valid, t, B);
    times_transposed(dz_.from((t - chunk.from) * B), to_h_, dh_, stride, valid, u, past, lo, hi);
    zero_fresh(State{nullptr, nullptr, dc_, stride}, dh_, mask_at(s_.fresh, t, B), valid, lo, hi,
               u * W, past * W);
  }

  // The steps of rows [lo, hi), against the direction of running: dz, dh and dc.
  void steps(const Chunk& chunk, int64_t lo, int64_t hi) const {
    const int64_t B = s_.B, units = ceil_div(s_.H, W);
    if (recomputes_steps_) {
      State state = state_before(chunk, lo, hi);
      over_steps(s_.reverse, chunk.from, chunk.to, [&](int64_t t) {
        const Step step = step_again(chunk, t, Gates{});
        advance_rows(cells_, state, step, mask_at(s_.fresh, t, B), lo, hi);
      });
    }
    over_steps(!s_.reverse, chunk.from, chunk.to, [&](int64_t t) {
      if (!recomputes_a_)
        for (int64_t r = lo; r < hi; ++r) gather(chunk, t, r);
      cells(chunk, t, 0, units, lo, hi);
      back(chunk, t, 0, units, lo, hi);
    });
  }

  // The same of all rows, the units shared out. The units of dh that a member makes are those that
  // it needs next, so that one round is dh₋ of a step and dz of the one before it.
  bool steps_by_units(const Chunk& chunk) const {
    const int64_t B = s_.B, units = ceil_div(s_.H, W), steps = chunk.to - chunk.from;
    bool ok = true;
    if (recomputes_steps_) {
      State state = state_before(chunk, 0, B);
      ok = project(threads_, s_, cells_, s_.x + chunk.from * B * s_.D, dz_, steps * B);
      share_units(
          threads_, s_, cells_, state, chunk.from, chunk.to,
          [&](int64_t t) { return step_again(chunk, t, dz_); },
          [](const State&, int64_t, int64_t, int64_t) {});
    }
    if (!recomputes_a_)
      ok = ok && parallel_for(threads_, steps, s_.threads, 0, [&](int64_t step, float*) {
             for (int64_t r = 0; r < B; ++r) gather(chunk, chunk.from + step, r);
           });
    const auto step_at = [&](int64_t round) {
      return s_.reverse ? chunk.from + round : chunk.to - 1 - round;
    };
    const auto round_of = [&](int64_t round, int64_t member, int64_t members) {
      const int64_t u = units * member / members, past = units * (member + 1) / members;
      if (round > 0) back(chunk, step_at(round - 1), u, past, 0, B);
      if (round < steps) cells(chunk, step_at(round), u, past, 0, B);
    };
    over_rounds(threads_, steps + 1, members_of(s_), round_of);
    return ok;
  }

  // dx of a chunk, and what it adds to dw_x, dw_h and db.
  bool products(const Chunk& chunk, bool is_first) const {
    const int64_t rows = (chunk.to - chunk.from) * s_.B, M = s_.D + s_.H + 1;
    const int64_t panels = ceil_div(s_.H, W), dx_items = items_of(rows);
    // a block of [x h₋ 1] stays in a core's cache while it meets one panel after the other
    const int64_t blocks =
        most(ceil_div(M, BLOCK), least(ceil_div(M, GATE_TILE_ROWS), s_.threads / panels));
    const auto compute = [&](int64_t item, float*) {
      if (item >= blocks * panels) {
        item -= blocks * panels;
        times_transposed(dz_, to_x_, s_.dx + chunk.from * s_.B * s_.D, s_.D, nullptr, 0,
                         ceil_div(s_.D, W), rows * item / dx_items, rows * (item + 1) / dx_items);
        return;
      }
      const int64_t block = item / panels, u = item % panels;
      for (int64_t first = 0; first < rows; first += DEPTH) {
        const WeightTile tile{s_,
                              xh_ + first * width_,
                              width_,
                              dz_.data + u * dz_.unit + first * dz_.row,
                              least(DEPTH, rows - first),
                              u,
                              !is_first || first > 0};
        over_tiles<GATE_TILE_ROWS>(M * block / blocks, M * (block + 1) / blocks, tile);
      }
    };
    return parallel_for(threads_, blocks * panels + dx_items, s_.threads, 0, compute);
  }

  Threads& threads_;
  const LstmBackward& s_;
  int64_t length_ = 0, width_ = 0;
  bool recomputes_steps_ = false, recomputes_a_ = false;
  float *packed_cells_ = nullptr, *packed_h_ = nullptr, *packed_x_ = nullptr;
  Cells cells_{};
  Transposed to_h_{}, to_x_{};
  Gates dz_{};
  float *xh_ = nullptr, *dh_ = nullptr, *dc_ = nullptr;
  float *h_ = nullptr, *h_next_ = nullptr, *c_run_ = nullptr, *y_ = nullptr, *c_ = nullptr;
};

static bool backward(Threads& threads, const LstmBackward& s) { return Backward(threads, s).run(); }

}  // namespace rnnattn::RNNATTN_SET::lstm
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_LSTM_GRADIENT_INL_H_
