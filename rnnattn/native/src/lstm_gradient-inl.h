// The LSTM's gradient, L3 to L8: against the direction of running, chunk by chunk.

#ifndef RNNATTN_LSTM_GRADIENT_INL_H_
#define RNNATTN_LSTM_GRADIENT_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "lstm_forward-inl.h"
#include "lstm_tiles-inl.h"
#include "numbers-inl.h"
#include "product-inl.h"
#include "simd-inl.h"
#include "threads.h"
#include "util-inl.h"
#include "workspace-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::lstm {

// How far behind its first part the second part of dz lies, see `Panels`.
RNNATTN_INLINE int64_t rest_of(int64_t H) { return ceil_div(H, W) * PANEL; }

template <class Operand>
RNNATTN_INLINE void put_parts(Operand* to, V v, int64_t H) {
  store_units(to, v, W);
  store_units(to + rest_of(H), v - rounded(Operand{}, v), W);
}

// L3, L4, L8 for blocks of units [u, past) of one row r of a step: dz and, in place, dc; h's
// cotangent is dh + dy. `narrow` is dz once more, of this row, as pairs; null where products read
// dz.
template <class Number>
RNNATTN_INLINE void cell_gradient(const Gates& a, const float* c, const float* c_prev,
                                  const Number* dy, const float* dh, float* dc, const Gates& dz,
                                  Operand<Number>* narrow, int64_t r, int64_t H, int64_t u,
                                  int64_t past) {
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
    const V of_gates[4] = {d * (g * (i * (one - i))), d * (before * (f * (one - f))),
                           d * (i * (one - g * g)), dm * (tanh_c * (o * (one - o)))};
    for (int gate = 0; gate < 4; ++gate) {
      dz.put(r, gate, u, of_gates[gate], n);
      if (narrow) put_parts(narrow + u * PANEL + gate * W, of_gates[gate], H);
    }
  }
}

// A block of the weight gradient, rows [m, m + R) of [x h₋ 1]ᵀ dz and one panel of dz.
struct WeightTile {
  int64_t D, H;
  float *dw_x, *dw_h, *db;
  const float* a;  // [x h₋ 1] of the first row of dz
  int64_t stride;
  const float* panel;  // of dz
  int64_t depth, u;
  bool adds;  // to what the gradient holds

  template <int R>
  void run(int64_t m) const {
    const int n = static_cast<int>(least(W, H - u * W));
    float* row[R];
    for (int i = 0; i < R; ++i) {
      const int64_t k = m + i;
      float* of = k < D ? dw_x + k * 4 * H : k < D + H ? dw_h + (k - D) * 4 * H : db;
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
template <class Number>
struct Chunk {
  int64_t from, to;
  const Number* y;        // of `from`
  const float* c;         // likewise
  Gates a;                // likewise
  const Number* h_start;  // before the first step run
  const float* c_start;
};

template <class Number>
class Backward {
  using Operand = rnnattn::RNNATTN_SET::Operand<Number>;
  using Chunk = lstm::Chunk<Number>;
  using State = lstm::State<Operand>;
  using Step = lstm::Step<Number>;
  // Whether dz w_hᵀ and the gates that are computed again are products of pairs. Those that give
  // dx, dw and db are of float32: dz rounded for them would make their errors 1.4 times as large,
  // and two parts of it are no faster.
  static constexpr bool PAIRS = !std::is_same_v<Operand, float>;

 public:
  Backward(Threads& threads, const LstmBackward<Number>& s) : threads_(threads), s_(s) {}

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

    const int64_t blocks = packed_cells_ ? ceil_div(H, W) : 0,
                  panels = Transposed<float>::panels(H);
    bool ok =
        parallel_for(threads_, blocks + panels + Transposed<float>::panels(D), s_.threads, 0,
                     [&](int64_t item, float*) {
                       if (item < blocks)
                         pack_cells(s_, item, packed_cells_ + item * Cells<Operand>::stride(D, H));
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
    return ok && weight_gradients();
  }

 private:
  void lay_out(Memory& memory) {
    const int64_t D = s_.D, H = s_.H, rows = length_ * s_.B, state = s_.B * whole_vectors(H);
    const bool recomputes = recomputes_steps_ || recomputes_a_;
    packed_cells_ = recomputes ? memory.take<Operand>(Cells<Operand>::size(D, H)) : nullptr;
    packed_h_ = memory.take<Operand>(Transposed<Operand>::size(H, H));
    packed_x_ = memory.take(Transposed<float>::size(D, H));
    dz_ = Gates::in_panels(memory.take(ceil_div(H, W) * Gates::panel(rows)), rows);
    width_ = ceil_div(D + H + 1, LINE) * LINE + LINE;
    xh_ = memory.take(rows * width_);
    dh_ = memory.take(state);
    dc_ = memory.take(state);
    if constexpr (PAIRS) {
      narrow_stride_ = 2 * rest_of(H) + LINE;
      narrow_ = memory.take<Operand>(2 * s_.B * narrow_stride_);
      xh_stride_ = ceil_div(whole_steps<Operand>(D) + H, W) * W + LINE;
      if (recomputes_a_) xh_pairs_ = memory.take<Operand>(rows * xh_stride_);
    }
    if constexpr (std::is_same_v<Number, float>) {
      dw_x_ = s_.dw_x, dw_h_ = s_.dw_h, db_ = s_.db;
    } else {
      dw_x_ = memory.take(D * 4 * H);
      dw_h_ = memory.take(H * 4 * H);
      db_ = memory.take(4 * H);
    }
    if (recomputes_steps_) {
      h_ = memory.take<Operand>(state);
      h_next_ = memory.take<Operand>(state);
      c_run_ = memory.take(state);
      y_ = memory.take<Number>(rows * H);
      c_ = memory.take(rows * H);
      inputs_.copied = memory.take<Operand>(inputs_.size(D, rows));
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
  const Number* h_before(const Chunk& chunk, int64_t t, int64_t b) const {
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
    copy_numbers(s_.x + (t * s_.B + b) * D, D, row);
    if (const Number* h = h_before(chunk, t, b))
      copy_numbers(h, H, row + D);
    else
      zero(row + D, H);
    row[D + H] = 1;
  }

  const Operand* rows_of_operands() const {
    if constexpr (PAIRS)
      return xh_pairs_;
    else
      return xh_;
  }

  // A row that was gathered, as an operand of the gates.
  void make_operand(int64_t r) const {
    if constexpr (PAIRS) {
      const float* row = xh_ + r * width_;
      Operand* pairs = xh_pairs_ + r * xh_stride_;
      const int64_t D = s_.D, H = s_.H, h = whole_steps<Operand>(D);
      copy_numbers(row, D, pairs);
      copy_numbers(row + D, H, pairs + h);
      if (h > D) pairs[D] = Operand{};
      if (H % 2) pairs[h + H] = Operand{};
    }
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
      for (int64_t r = lo; r < hi; ++r) {
        gather(chunk, chunk.from + r / s_.B, r % s_.B);
        make_operand(r);
      }
      const int64_t K = whole_steps<Operand>(s_.D) + whole_steps<Operand>(s_.H);
      const Operand* first = rows_of_operands();
      for (int64_t u = 0; u * W < s_.H; ++u)
        preactivate(cells_, first, PAIRS ? xh_stride_ : width_, K, dz_, u, lo, hi);
    });
  }

  // The state before the chunk is all there is: run its steps again, from where `state_before` is.
  State state_before(const Chunk& chunk, int64_t lo, int64_t hi) const {
    const int64_t H = s_.H, stride = whole_vectors(H);
    copy_rows(chunk.h_start, H, h_, stride, H, lo, hi);
    copy_rows(chunk.c_start, H, c_run_, stride, H, lo, hi);
    return State{h_, h_next_, c_run_, stride};
  }

  Step step_again(const Chunk& chunk, int64_t t, const Operand* x, const Gates& from_x) const {
    const int64_t row = (t - chunk.from) * s_.B;
    return {x,
            inputs_.stride(s_.D),
            from_x.from(row),
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
                      dh_ + r * stride, dc_ + r * stride, dz_, narrow(t, r), k, H, u, past);
      else
        for (int64_t i = u; i < past; ++i)
          for (int g = 0; g < 4; ++g) {
            dz_.put(k, g, i, splat(0), W);
            if (PAIRS) put_parts(narrow(t, r) + i * PANEL + g * W, splat(0), H);
          }
    }
  }

  // dz of a step as pairs, or null: while one step is read, the one before it is written.
  Operand* narrow(int64_t t, int64_t r) const {
    return PAIRS ? narrow_ + (t % 2 * s_.B + r) * narrow_stride_ : nullptr;
  }

  Panels<Operand> operand_of_step(const Chunk& chunk, int64_t t) const {
    if constexpr (PAIRS)
      return {narrow(t, 0), narrow_stride_, PANEL, rest_of(s_.H)};
    else
      return panels_of(dz_.from((t - chunk.from) * s_.B));
  }

  static Panels<float> panels_of(const Gates& dz) { return {dz.data, dz.row, dz.unit, 0}; }

  // What goes back from it, from dz of all units: dh₋, and nothing where a row is fresh.
  void back(const Chunk& chunk, int64_t t, int64_t u, int64_t past, int64_t lo, int64_t hi) const {
    const int64_t B = s_.B, stride = whole_vectors(s_.H);
    const uint8_t* valid = mask_at(s_.valid, t, B);
    times_transposed(operand_of_step(chunk, t), to_h_, dh_, stride, valid, u, past, lo, hi);
    zero_fresh(dh_, dc_, stride, mask_at(s_.fresh, t, B), valid, lo, hi, u * W, past * W);
  }

  // The steps of rows [lo, hi), against the direction of running: dz, dh and dc.
  void steps(const Chunk& chunk, int64_t lo, int64_t hi) const {
    const int64_t B = s_.B, units = ceil_div(s_.H, W);
    if (recomputes_steps_) {
      State state = state_before(chunk, lo, hi);
      over_steps(s_.reverse, chunk.from, chunk.to, [&](int64_t t) {
        const Step step = step_again(chunk, t, inputs_.rows(t, lo, hi), Gates{});
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
      ok = project<Number>(threads_, s_, cells_, inputs_, dz_, chunk.from, steps);
      share_units(
          threads_, s_, cells_, state, chunk.from, chunk.to,
          [&](int64_t t) { return step_again(chunk, t, nullptr, dz_); },
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
        times_transposed(panels_of(dz_), to_x_, s_.dx + chunk.from * s_.B * s_.D, s_.D, nullptr, 0,
                         ceil_div(s_.D, W), rows * item / dx_items, rows * (item + 1) / dx_items);
        return;
      }
      const int64_t block = item / panels, u = item % panels;
      for (int64_t first = 0; first < rows; first += DEPTH) {
        const WeightTile tile{s_.D,
                              s_.H,
                              dw_x_,
                              dw_h_,
                              db_,
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

  // What was summed in float32, in the type of the weights.
  bool weight_gradients() const {
    if constexpr (!std::is_same_v<Number, float>) {
      const int64_t D = s_.D, H4 = 4 * s_.H;
      return parallel_for(threads_, D + s_.H + 1, s_.threads, 0, [&](int64_t k, float*) {
        if (k < D)
          copy_numbers(dw_x_ + k * H4, H4, s_.dw_x + k * H4);
        else if (k < D + s_.H)
          copy_numbers(dw_h_ + (k - D) * H4, H4, s_.dw_h + (k - D) * H4);
        else
          copy_numbers(db_, H4, s_.db);
      });
    }
    return true;
  }

  Threads& threads_;
  const LstmBackward<Number>& s_;
  int64_t length_ = 0, width_ = 0;
  bool recomputes_steps_ = false, recomputes_a_ = false;
  int64_t narrow_stride_ = 0, xh_stride_ = 0;
  Operand *packed_cells_ = nullptr, *packed_h_ = nullptr;
  float* packed_x_ = nullptr;
  Cells<Operand> cells_{};
  Transposed<Operand> to_h_{};
  Transposed<float> to_x_{};
  Inputs<Number> inputs_{s_, nullptr};
  Gates dz_{};
  float *xh_ = nullptr, *dh_ = nullptr, *dc_ = nullptr;
  Operand *narrow_ = nullptr, *xh_pairs_ = nullptr;
  float *dw_x_ = nullptr, *dw_h_ = nullptr, *db_ = nullptr;
  Operand *h_ = nullptr, *h_next_ = nullptr;
  float *c_run_ = nullptr, *c_ = nullptr;
  Number* y_ = nullptr;
};

template <class Number>
static bool backward(Threads& threads, const LstmBackward<Number>& s) {
  return Backward<Number>(threads, s).run();
}

template <class Number>
static constexpr LstmKernels<Number> kernels{forward<Number>, backward<Number>};

}  // namespace rnnattn::RNNATTN_SET::lstm
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_LSTM_GRADIENT_INL_H_
