// The gradient of recurrent units: against the direction of running, chunk by chunk.

#ifndef RNNATTN_RECURRENT_GRADIENT_INL_H_
#define RNNATTN_RECURRENT_GRADIENT_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "product-inl.h"
#include "recurrent_few_gradient-inl.h"
#include "recurrent_forward-inl.h"
#include "recurrent_tiles-inl.h"
#include "recurrent_unit-inl.h"
#include "simd-inl.h"
#include "threads.h"
#include "util-inl.h"
#include "workspace-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::recurrent {

// What the products with dz are of: dz w_hᵀ in the loop, and dx and the weight gradients behind it.
// Rounded to bfloat16, dz would make their errors 1.4 times as large, and what a step leaves out
// goes through all steps before it; as the sum of two it takes as long as in float32, unless by
// tiles.
template <class Operand>
struct OperandsOfGradient {
  using Step = Operand;
  using Dx = float;
};
#if defined(RNNATTN_TILES)
template <>
struct OperandsOfGradient<Bfloat16> {
  using Step = Bfloat16;
  using Dx = Bfloat16;
};
#elif defined(RNNATTN_FIXED)
template <>
struct OperandsOfGradient<Bfloat16> {
  using Step = Fixed;
  using Dx = Fixed;
};
#endif

// How far behind its first part the second part of dz lies, see `Panels`.
template <class Unit>
RNNATTN_INLINE int64_t rest_of(int64_t H) {
  return tiles_across<Unit>(H) * PANEL;
}

template <class Unit, class Operand>
RNNATTN_INLINE void put_parts(Operand* to, V v, int64_t H) {
  store_units(to, v, W);
  store_units(to + rest_of<Unit>(H), v - rounded(Operand{}, v), W);
}

// What the weight gradient is a product of, rows of [x h₋ q 1] and of dz in panels: as they lie.
template <class Operand>
struct WeightOperands {
  static constexpr int ROWS = GATE_TILE_ROWS;  // of a register tile
  const float* xh;
  int64_t stride;
  Gates dz;

  void take(Memory&, int64_t, int64_t, int64_t) {}
  bool prepare(Threads&, int64_t, int64_t) const { return true; }

  // sum += rows [m, m + R) of [x h₋ q 1]ᵀ dz: the columns from `first` on of panel u, and `depth`
  // rows from r on.
  template <int R, int N>
  void add(V (&sum)[R][N], int64_t m, int64_t u, int first, int64_t r, int64_t depth) const {
    multiply<Held::a>(sum, depth, xh + r * stride + m, 1, stride,
                      dz.data + u * dz.tile + r * dz.row + first, PANEL);
  }
};

#if defined(RNNATTN_TILES)
// By tiles of pairs: [x h₋ 1] turned over, which is of 16 bits as it is, and dz as the sum of two.
template <>
struct WeightOperands<Bfloat16> {
  static constexpr int ROWS = PAIR_ROWS;
  const float* xh;
  int64_t stride;
  Gates dz;
  int64_t columns = 0, panels = 0, capacity = 0;
  Bfloat16 *turned = nullptr, *pairs = nullptr;

  // For so many rows, columns of [x h₋ 1] and panels of dz.
  void take(Memory& memory, int64_t rows, int64_t width, int64_t tiles) {
    columns = width, panels = tiles, capacity = whole_vectors(rows);
    turned = memory.take<Bfloat16>(whole_vectors(columns) * turned_stride());
    pairs = memory.take<Bfloat16>(panels * 2 * part());
  }
  bool prepare(Threads& threads, int64_t limit, int64_t rows) const {
    return parallel_for(threads, panels + ceil_div(columns, W), limit, 0,
                        [&](int64_t item, float*) {
                          if (item < panels)
                            pair_panel(item, rows);
                          else
                            turn_columns((item - panels) * W, rows);
                        });
  }
  template <int R, int N>
  void add(V (&sum)[R][N], int64_t m, int64_t u, int first, int64_t r, int64_t depth) const {
    const int64_t steps = whole_steps<Bfloat16>(depth);
    const Bfloat16* a = turned + m * turned_stride() + r;
    const Bfloat16* b = pairs + u * 2 * part() + r * PANEL + 2 * first;
    accumulate(sum, steps, a, turned_stride(), b, PANEL);
    accumulate(sum, steps, a, turned_stride(), b + part(), PANEL);
  }

 private:
  // A cache line longer than the rows: those of a tile would fall into the same set of a cache.
  int64_t turned_stride() const { return capacity + LINE_BYTES / sizeof(Bfloat16); }
  int64_t part() const { return capacity * PANEL; }

  // Columns [m, m + W) as rows, zeros behind them to whole vectors.
  void turn_columns(int64_t m, int64_t rows) const {
    for (int64_t r = 0; r < rows; r += W) {
      V block[W];
      for (int64_t i = 0; i < W; ++i)
        block[i] = r + i < rows ? load(xh + (r + i) * stride + m) : V{};
      transpose(block);
      for (int64_t i = 0; i < W; ++i)
        store_units(turned + (m + i) * turned_stride() + r, block[i], W);
    }
  }
  // Two rows of a panel in each 32 bits, zeros behind the last: the numbers rounded, and what that
  // leaves.
  void pair_panel(int64_t u, int64_t rows) const {
    const float* row = dz.data + u * dz.tile;
    Bfloat16 *to = pairs + u * 2 * part(), *rest = to + part();
    for (int64_t r = 0; r < rows; r += 2, row += 2 * PANEL)
      for (int64_t j = 0; j < PANEL; j += W) {
        const V first = load(row + j), second = r + 1 < rows ? load(row + PANEL + j) : V{};
        put_pairs(to, first, second);
        put_pairs(rest, first - rounded(Bfloat16{}, first), second - rounded(Bfloat16{}, second));
      }
  }
};
#endif

#if defined(RNNATTN_FIXED)
// In fixed point, both in blocks of rows.
template <>
struct WeightOperands<Fixed> {
  static constexpr int ROWS = GATE_TILE_ROWS;
  static constexpr int64_t STEPS = 32, BLOCK = with_scale(STEPS);
  const float* xh;
  int64_t stride;
  Gates dz;
  int64_t columns = 0, panels = 0, blocks = 0;
  Fixed *of_xh = nullptr, *of_dz = nullptr;

  // For so many rows, columns of [x h₋ 1] and panels of dz.
  void take(Memory& memory, int64_t rows, int64_t width, int64_t tiles) {
    columns = width, panels = tiles, blocks = ceil_div(rows, STEPS);
    of_xh = memory.take<Fixed>(blocks * BLOCK * across());
    of_dz = memory.take<Fixed>(panels * blocks * BLOCK * PANEL);
  }
  bool prepare(Threads& threads, int64_t limit, int64_t rows) const {
    const int64_t used = ceil_div(rows, STEPS);
    return parallel_for(threads, (panels + 1) * used, limit, 0, [&](int64_t item, float*) {
      const int64_t u = item / used, block = item % used, r = block * STEPS;
      const int64_t count = least(STEPS, rows - r);
      if (u < panels)
        put<Factor::b>(dz.data + u * dz.tile + r * dz.row, dz.row, count, PANEL, of_panel(u, block),
                       PANEL);
      else
        put<Factor::a>(xh + r * stride, stride, count, columns, of_rows(block), across());
    });
  }
  // Inlined, or the sums would go through memory.
  template <int R, int N>
  RNNATTN_METHOD void add(V (&sum)[R][N], int64_t m, int64_t u, int first, int64_t r,
                          int64_t depth) const {
    const FixedRows rows{of_rows(r / STEPS) + 2 * m, 2, 2 * across(), BLOCK * across()};
    accumulate_blocks<STEPS>(sum, depth, rows, of_panel(u, r / STEPS) + 2 * first, PANEL);
  }

 private:
  // A cache line longer than the columns: the rows of a tile would fall into the same set of a
  // cache.
  int64_t across() const { return whole_vectors(columns) + LINE; }
  Fixed* of_rows(int64_t block) const { return of_xh + block * BLOCK * across(); }
  Fixed* of_panel(int64_t u, int64_t block) const {
    return of_dz + (u * blocks + block) * BLOCK * PANEL;
  }
  // A block of `count` rows, zeros behind them, to rows of `across` pairs.
  template <Factor factor>
  static void put(const float* rows, int64_t stride, int64_t count, int64_t width, Fixed* to,
                  int64_t across) {
    for (int64_t j = 0; j < width; j += W)
      put_columns<factor>(to + 2 * j, across, STEPS, [&](int64_t step) RNNATTN_LAMBDA {
        return step < count ? load(rows + step * stride + j) : V{};
      });
  }
};
#endif

// The gradient of the weights, or the sums in float32 that it is made of where not all rows of dz
// are multiplied at once.
template <class Number>
struct WeightRows {
  Number *dw_x, *dw_h, *db;  // db of all gates
  int64_t D, K, past_q;      // where in a row of [x h₋ q 1] x, h₋ and q end
  int64_t width;

  // What comes of column k of [x h₋ q 1].
  Number* row(int64_t k) const {
    return k < D        ? dw_x + k * width
           : k < K      ? dw_h + (k - D) * width
           : k < past_q ? dw_h + (k - K) * width
                        : db;
  }
};

// A block of the weight gradient, rows [m, m + R) of [x h₋ q 1]ᵀ dz and one panel of dz, of those
// gates that have a block in these rows.
template <class Columns, class Operand, class Number>
struct WeightTile {
  const WeightRows<float>& sums;
  const WeightRows<Number>& gradient;
  const WeightOperands<Operand>& operands;
  int64_t u, first, depth, H;  // the panel of dz, and rows of it
  bool adds, ends;             // to the sums; with it the gradient is complete

  template <int R>
  void run(int64_t m) const {
    constexpr int FIRST = Columns::FIRST, COUNT = Columns::COUNT;
    // fetched while the product is computed, which is then added to them
    if (adds)
      for (int i = 0; i < R; ++i)
        for (int v = 0; v < COUNT; ++v)
          __builtin_prefetch(sums.row(m + i) + Columns::at(FIRST + v, u, H), 1);
    V sum[R][COUNT] = {};
    Columns::together(u, H, [&](auto together) RNNATTN_LAMBDA {
      using Together = decltype(together);
      V vectors[R][Together::VECTORS] = {};
      operands.add(vectors, m, u, FIRST * Together::LANES, first, depth);
      unrolled<R>([&](auto i) RNNATTN_LAMBDA { take_apart<Together>(vectors[i], sum[i]); });
    });
    unrolled<R>([&](auto i) RNNATTN_LAMBDA {
      float* const from = sums.row(m + i);
      Number* const to = gradient.row(m + i);
      unrolled<COUNT>([&](auto v) RNNATTN_LAMBDA {
        const int n = Columns::lanes(FIRST + v, u, H);
        const int64_t j = Columns::at(FIRST + v, u, H);
        const V total = adds ? load_units(from + j, n) + sum[i][v] : sum[i][v];
        if (ends)
          store_units(to + j, total, n);
        else
          store_units(from + j, total, n);
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
  bool is_first, is_last;  // of those that the gradient goes through
};

template <class Unit, class Number>
class Backward {
  using OfX = typename Unit::OfX;
  using OfH = typename Unit::OfH;
  using Operand = rnnattn::RNNATTN_SET::Operand<Number>;
  using OfStep = typename OperandsOfGradient<Operand>::Step;
  using OfDx = typename OperandsOfGradient<Operand>::Dx;
  static constexpr bool PAIRS = !std::is_same_v<Operand, float>;  // of the gates, computed again
  static constexpr bool FIXED = std::is_same_v<OfStep, Fixed>;
  using Cells = recurrent::Cells<Unit, Operand>;
  using TransposedH = Transposed<Unit, OfH, OfStep>;
  using TransposedQ = Transposed<Unit, typename Unit::OfQ, OfStep>;
  using TransposedX = Transposed<Unit, OfX, OfDx>;
  using Chunk = recurrent::Chunk<Number>;
  using State = recurrent::State<Operand>;
  using Step = recurrent::Step<Number>;
  static constexpr int GATES = recurrent::GATES<Unit>, VECTORS = recurrent::VECTORS<Unit>;

 public:
  Backward(Threads& threads, const RecurrentBackward<Number>& s) : threads_(threads), s_(s) {}

  bool run() {
    const int64_t T = s_.T, B = s_.B, D = s_.D, H = s_.H, R = s_.R;
    const int64_t stride = whole_vectors(R), c_stride = whole_vectors(H);
    recomputes_steps_ = s_.interval > 0;
    recomputes_a_ = !recomputes_steps_ && !s_.a;
    length_ =
        recomputes_steps_
            ? least(s_.interval, most(T, 1))
            : most(1, least(T, least(CHUNK_ROWS, CHUNK_FLOATS / (tiles_across<Unit>(H) * PANEL)) /
                                   most(B, 1)));
    Memory size{nullptr};
    lay_out(size);
    const Allocation allocation(size.used);
    if (!allocation.data()) return false;
    advise_huge_pages(allocation.data(), size.used);
    Memory memory{allocation.data()};
    lay_out(memory);

    const int64_t blocks = packed_cells_ || s_.projection ? tiles_across<Unit>(H) : 0,
                  panels = TransposedH::panels(R), width = s_.G * H;
    bool ok = parallel_for(threads_, blocks + panels + TransposedX::panels(D), s_.threads, 0,
                           [&](int64_t item, float*) {
                             if (item < blocks) return pack_units(item);
                             item -= blocks;
                             if (item < panels) {
                               pack_transposed<TransposedH>(s_.w_h, width, R, H, item, packed_h_);
                               if constexpr (HAS_Q<Unit>)
                                 pack_transposed<TransposedQ>(s_.w_h, width, R, H, item, packed_q_);
                             } else {
                               pack_transposed<TransposedX>(s_.w_x, width, D, H, item - panels,
                                                            packed_x_);
                             }
                           });
    advise_huge_pages(s_.dx, T * B * D);
    advise_huge_pages(s_.dw_x, D * s_.G * H);
    advise_huge_pages(s_.dw_h, R * s_.G * H);
    copy_rows(s_.dh_last, R, dh_, stride, R, 0, B);
    if (s_.c) copy_rows(s_.dc_last, H, dc_, c_stride, H, 0, B);

    over_steps(!s_.reverse, 0, ceil_div(T, length_), [&](int64_t k) {
      const Chunk chunk = chunk_at(k);
      if (recomputes_a_) ok = ok && preactivations(chunk);
      if (shares_units<Unit>(s_, s_.R * s_.G * H))
        ok = ok && steps_by_units(chunk);
      else
        ok = ok && over_groups(threads_, s_, [&](int64_t lo, int64_t hi) { steps(chunk, lo, hi); });
      ok = ok && products(chunk);
    });
    copy_rows(dh_, stride, s_.dh, R, R, 0, B);
    if (s_.c) copy_rows(dc_, c_stride, s_.dc, H, H, 0, B);
    other_gradients();
    return ok;
  }

 private:
  void lay_out(Memory& memory) {
    const int64_t D = s_.D, H = s_.H, R = s_.R, rows = length_ * s_.B;
    const bool recomputes = recomputes_steps_ || recomputes_a_;
    packed_cells_ = recomputes ? memory.take<Operand>(Cells::size(D, H, R)) : nullptr;
    packed_h_ = memory.take<OfStep>(TransposedH::size(R, H));
    packed_q_ = memory.take<OfStep>(TransposedQ::size(R, H));
    packed_x_ = memory.take<OfDx>(TransposedX::size(D, H));
    dz_ = take_panels<Unit>(memory, H, rows);
    width_ = ceil_div(past_q() + 1, LINE) * LINE + LINE;
    xh_ = memory.take(rows * width_);
    operands_ = {xh_, width_, dz_};
    operands_.take(memory, rows, past_q() + 1, tiles_across<Unit>(H));
    dh_ = memory.take(s_.B * whole_vectors(R));
    if (HAS_Q<Unit>) dq_ = memory.take(s_.B * whole_vectors(R));
    if (s_.c) dc_ = memory.take(s_.B * whole_vectors(H));
    if (s_.projection) {
      packed_p_ = memory.take(R * padded(H));
      m_ = memory.take(rows * padded(H));
      dm_ = memory.take(s_.B * whole_vectors(H));
      dh_of_steps_ = memory.take(rows * padded(R));
      dprojection_ = memory.take(H * whole_vectors(R));
    }
    if constexpr (PAIRS) {
      narrow_stride_ =
          (FIXED ? tiles_across<Unit>(H) * TILE_SIZE<OfStep, typename TransposedH::Columns>
                 : 2 * rest_of<Unit>(H)) +
          LINE;
      narrow_steps_ = std::is_same_v<OfDx, Operand> ? length_ : 2;
      narrow_ = memory.take<OfStep>(narrow_steps_ * s_.B * narrow_stride_);
      xh_stride_ = ceil_div(whole_steps<Operand>(D) + R, W) * W + LINE;
      if (recomputes_a_) xh_pairs_ = memory.take<Operand>(rows * xh_stride_);
    }
    if constexpr (FIXED) {
      fixed_stride_ = tiles_across<Unit>(H) * TILE_SIZE<OfDx, typename TransposedX::Columns> + LINE;
      fixed_ = memory.take<Fixed>(rows * fixed_stride_);
    }
    gradient_ = weight_rows(s_.dw_x, s_.dw_h, memory.take<Number>(GATES * H));
    if constexpr (std::is_same_v<Number, float>) {
      sums_ = gradient_, dpeephole_ = s_.dpeephole;
    } else {
      float *dw_x = memory.take(D * s_.G * H), *dw_h = memory.take(R * s_.G * H);
      sums_ = weight_rows(dw_x, dw_h, memory.take(GATES * H));
      dpeephole_ = s_.peephole ? memory.take(3 * H) : nullptr;
    }
    if (recomputes_steps_) {
      state_ = take_state<Unit, Number>(memory, s_);
      y_ = memory.take<Number>(rows * R);
      if (s_.c) c_ = memory.take(rows * H);
      inputs_.copied = memory.take<Operand>(inputs_.size(D, rows));
    }
    cells_ = {packed_cells_, D, H, R};
    to_h_ = {packed_h_, R, H};
    to_q_ = {packed_q_, R, H};
    to_x_ = {packed_x_, D, H};
  }

  // Where in a row [x h₋ q 1] q ends.
  int64_t past_q() const { return s_.D + (HAS_Q<Unit> ? 2 : 1) * s_.R; }

  template <class To>
  WeightRows<To> weight_rows(To* dw_x, To* dw_h, To* db) const {
    return {dw_x, dw_h, db, s_.D, s_.D + s_.R, past_q(), s_.G * s_.H};
  }

  // What is packed of a tile of units.
  void pack_units(int64_t u) const {
    if (packed_cells_)
      pack_cells<Unit, Number>(s_, u, u + 1, packed_cells_ + u * cells_.stride(s_.D, s_.R));
    if (!s_.projection) return;
    if (recomputes_steps_) pack_projection<Number>(s_, u * W, state_.projection.packed);
    pack_transposed_projection<Number>(s_, u * W, packed_p_);
  }

  Chunk chunk_at(int64_t k) const {
    const int64_t BH = s_.B * s_.H, BR = s_.B * s_.R, from = k * length_,
                  to = least(from + length_, s_.T);
    const bool has_start = from == 0, has_end = to == s_.T;
    const bool is_first = s_.reverse ? has_start : has_end;
    const bool is_last = s_.reverse ? has_end : has_start;
    if (recomputes_steps_)
      return {from,     to,     y_, c_, dz_, s_.h_starts + k * BR, at(s_.c_starts, k, BH),
              is_first, is_last};
    const int64_t before = s_.reverse ? to : from - 1;
    // only read from
    const Gates kept = Gates::in_rows<Unit>(const_cast<float*>(s_.a), s_.H);
    return {from,
            to,
            s_.y + from * BR,
            at(s_.c_all, from, BH),
            s_.a ? kept.from(from * s_.B) : dz_,
            s_.h,
            is_last ? s_.c : at(s_.c_all, before, BH),
            is_first,
            is_last};
  }

  bool is_valid(int64_t t, int64_t b) const { return !s_.valid || s_.valid[t * s_.B + b]; }

  bool is_fresh(int64_t t, int64_t b) const { return s_.fresh && s_.fresh[t * s_.B + b]; }

  // h₋ and c₋ of a valid row; null for zeros. A row whose step before is not valid has not begun.
  const Number* h_before(const Chunk& chunk, int64_t t, int64_t b) const {
    if (is_fresh(t, b)) return nullptr;
    const int64_t before = s_.reverse ? t + 1 : t - 1;
    const int64_t first = recomputes_steps_ ? chunk.from : 0,
                  last = recomputes_steps_ ? chunk.to : s_.T;
    if (before < first || before >= last || !is_valid(before, b)) return chunk.h_start + b * s_.R;
    return chunk.y + ((before - chunk.from) * s_.B + b) * s_.R;
  }
  const float* c_before(const Chunk& chunk, int64_t t, int64_t b) const {
    if (is_fresh(t, b)) return nullptr;
    const int64_t before = s_.reverse ? t + 1 : t - 1;
    if (before < chunk.from || before >= chunk.to) return chunk.c_start + b * s_.H;
    return chunk.c + ((before - chunk.from) * s_.B + b) * s_.H;
  }

  // [x h₋ q 1] of one row, q to come; zeros where it is not valid, so that no NaN of the padding
  // passes.
  void gather(const Chunk& chunk, int64_t t, int64_t b) const {
    const int64_t D = s_.D, R = s_.R;
    float* row = xh_ + ((t - chunk.from) * s_.B + b) * width_;
    if (!is_valid(t, b)) {
      zero(row, past_q() + 1);
      return;
    }
    copy_numbers(s_.x + (t * s_.B + b) * D, D, row);
    if (const Number* h = h_before(chunk, t, b))
      copy_numbers(h, R, row + D);
    else
      zero(row + D, R);
    row[past_q()] = 1;
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
      const int64_t D = s_.D, R = s_.R, h = whole_steps<Operand>(D);
      copy_numbers(row, D, pairs);
      copy_numbers(row + D, R, pairs + h);
      if (h > D) pairs[D] = Operand{};
      if (R % 2) pairs[h + R] = Operand{};
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
      const Operand* first = rows_of_operands();
      for (int64_t u = 0; u < tiles_across<Unit>(s_.H); ++u)
        preactivate(cells_, first, PAIRS ? xh_stride_ : width_, true, dz_, u, lo, hi);
      if constexpr (HAS_Q<Unit>) second_products(lo, hi);
    });
  }

  // q of rows [lo, hi) of the chunk, and what its products add to their a.
  void second_products(int64_t lo, int64_t hi) const {
    static_assert(!PAIRS, "q is an operand as it is");
    const int64_t H = s_.H, tiles = tiles_across<Unit>(H);
    for (int64_t r = lo; r < hi; ++r)
      for (int64_t u = 0; u < tiles; ++u) {
        const int64_t j = first_unit<Unit>(u, 0);
        const int n = units_of<Unit>(u, 0, H);
        put_q(Unit::template of<Number>(s_, j, n), r, j, n, dz_.get(r, Unit::RESET, u, n),
              load_units(xh_ + r * width_ + s_.D + j, n));
      }
    const float* q = xh_ + s_.D + s_.R;
    for (int64_t u = 0; u < tiles; ++u)
      over_tiles<GATE_TILE_ROWS>(lo, hi, SecondProductTile<Unit, float>{cells_, q, width_, dz_, u});
  }

  // The state before the chunk is all there is: run its steps again, from where `state_before` is.
  State state_before(const Chunk& chunk, int64_t lo, int64_t hi) const {
    enter<Number>(s_, state_, chunk.h_start, chunk.c_start, lo, hi);
    return state_;
  }

  Step step_again(const Chunk& chunk, int64_t t, const Operand* x, const Gates& from_x) const {
    const int64_t row = (t - chunk.from) * s_.B;
    return {x,
            inputs_.stride(s_.D),
            from_x.from(row),
            mask_at(s_.valid, t, s_.B),
            y_ + row * s_.R,
            at(c_, row, s_.H),
            dz_.from(row)};
  }

  // h's cotangents dh + dy of a step, where they are projected: columns [v, v_past) of rows
  // [lo, hi), zeros where a row is not valid.
  void cotangents(const Chunk& chunk, int64_t t, const Share& share, int64_t lo, int64_t hi) const {
    const int64_t stride = whole_vectors(s_.R);
    for (int64_t r = lo; r < hi; ++r) {
      const Number* dy = s_.dy + (t * s_.B + r) * s_.R;
      float* out = dh_of_steps_ + ((t - chunk.from) * s_.B + r) * padded(s_.R);
      for (int64_t i = share.v * W; i < share.v_past * W; i += W) {
        const int n = static_cast<int>(least(W, s_.R - i));
        store(out + i,
              is_valid(t, r) ? load(dh_ + r * stride + i) + load_units(dy + i, n) : splat(0));
      }
    }
  }

  // A step of rows [lo, hi) and blocks of units [u, past): dz from dh and dc, and what of dh₋ and
  // dc₋ comes past the products.
  void cells(const Chunk& chunk, int64_t t, int64_t u, int64_t past, int64_t lo, int64_t hi) const {
    const int64_t B = s_.B, H = s_.H;
    if (s_.projection)  // dm = dh Pᵀ
      product<Stored::by_row, From::zero>(hi - lo, past - u, s_.R,
                                          dh_of_steps_ + ((t - chunk.from) * B + lo) * padded(s_.R),
                                          padded(s_.R), packed_p_ + u * W, padded(H), TILE_COLUMNS,
                                          dm_ + lo * whole_vectors(H) + u * W, whole_vectors(H));
    for (int64_t r = lo; r < hi; ++r) {
      const int64_t k = (t - chunk.from) * B + r;
      if (is_valid(t, r))
        cells_of_row(chunk, t, r, u, past);
      else
        for (int64_t i = u; i < past; ++i) {
          for (int v = 0; v < VECTORS; ++v) put_dz(k, narrow(t, r), v, i, splat(0), W);
          if constexpr (FIXED) put_fixed<TransposedH>(narrow(t, r), i, {});
        }
      if (s_.projection && !is_valid(t, r)) zero(m_ + k * padded(H) + u * W, (past - u) * W);
    }
  }

  void put_dz(int64_t row, OfStep* pairs, int v, int64_t u, V dz, int n) const {
    dz_.put(row, v, u, dz, n);
    if constexpr (PAIRS && !FIXED) put_parts<Unit>(pairs + u * PANEL + v * W, dz, s_.H);
  }

  // Of tile u of a row, dz of those gates that a transposed weight has.
  template <class Of>
  static void put_fixed(Fixed* row, int64_t u, const V (&dz)[GATES]) {
    using Tile = FixedTile<typename Of::Columns>;
    unrolled<Tile::BLOCKS>([&](auto k) RNNATTN_LAMBDA {
      V block[Tile::VECTORS];
      unrolled<Tile::VECTORS>([&](auto v) RNNATTN_LAMBDA {
        block[v] = dz[Of::Columns::FIRST + k * Tile::VECTORS + v];
      });
      put_row(row + u * Tile::SIZE + k * Tile::BLOCK, block);
    });
  }

  // The same of a row that is valid; m's cotangent is dh + dy, or what is projected back of it.
  void cells_of_row(const Chunk& chunk, int64_t t, int64_t r, int64_t u, int64_t past) const {
    const int64_t H = s_.H, row = (t - chunk.from) * s_.B + r, stride = whole_vectors(H);
    const bool projects = s_.projection != nullptr;
    // what the unit meets of the states around the step
    const float* c = Unit::CARRIES_C ? chunk.c + row * H : nullptr;
    const float* prev = Unit::CARRIES_C ? c_before(chunk, t, r) : xh_ + row * width_ + s_.D;
    const Number* dy = projects ? nullptr : s_.dy + (t * s_.B + r) * H;
    const float* dm = (projects ? dm_ : dh_) + r * stride;
    float* dprev = (Unit::CARRIES_C ? dc_ : dh_) + r * stride;
    OfStep* pairs = narrow(t, r);
    for (; u < past; ++u) {
      for (int k = 0; k < Unit::CELLS; ++k) {
        const int64_t j = first_unit<Unit>(u, k);
        const int n = units_of<Unit>(u, k, H);
        if (Unit::CELLS > 1 && n == 0) {
          for (int v = k * GATES; v < VECTORS; ++v) put_dz(row, pairs, v, u, splat(0), n);
          break;
        }
        const Unit unit = Unit::template of<Number>(s_, j, n);
        V a[GATES], dz[GATES], d = load(dprev + j);
        for (int g = 0; g < GATES; ++g) a[g] = chunk.a.get(row, k * GATES + g, u, n);
        const V after = Unit::CARRIES_C ? load_units(c + j, n) : splat(0);
        const V before = prev ? load_units(prev + j, n) : splat(0);
        if (recomputes_a_) see(unit, before, after, a);
        const V back = dy ? load(dm + j) + load_units(dy + j, n) : load(dm + j);
        const V m = cell_gradient(unit, a, before, after, back, d, dz);
        store(dprev + j, d);
        if (projects) store(m_ + row * padded(H) + j, m);
        for (int g = 0; g < GATES; ++g)
          if (!waits_for_dq<Unit>(g)) put_dz(row, pairs, k * GATES + g, u, dz[g], n);
        if constexpr (FIXED) put_fixed<TransposedH>(pairs, u, dz);
      }
    }
  }

  // Of a step with two products, from dz of the second of all units: dq, and what is made of it.
  void resets(const Chunk& chunk, int64_t t, const Share& share, int64_t lo, int64_t hi) const {
    if constexpr (HAS_Q<Unit>) {
      const int64_t stride = whole_vectors(s_.R);
      times_transposed(operand_of_step(chunk, t), to_q_, dq_, false, stride,
                       mask_at(s_.valid, t, s_.B), share.v, share.v_past, lo, hi);
      for (int64_t r = lo; r < hi; ++r) {
        if (!is_valid(t, r)) continue;
        const int64_t row = (t - chunk.from) * s_.B + r;
        for (int64_t u = share.u; u < share.past; ++u) {
          const int64_t j = first_unit<Unit>(u, 0);
          const int n = units_of<Unit>(u, 0, s_.H);
          const Unit unit = Unit::template of<Number>(s_, j, n);
          const V a = chunk.a.get(row, Unit::RESET, u, n);
          const V before = load_units(xh_ + row * width_ + s_.D + j, n);
          float* dh = dh_ + r * stride + j;
          V d = load(dh);
          const V dq = load_units(dq_ + r * stride + j, n);  // nothing is written beyond H
          const V dz = reset_gradient(unit, a, before, dq, d);
          store(dh, d);
          put_q(unit, row, j, n, a, before);
          put_dz(row, narrow(t, r), Unit::RESET, u, dz, n);
        }
      }
    }
  }

  // q of n units from j on, in its place in [x h₋ q 1].
  void put_q(const Unit& unit, int64_t row, int64_t j, int n, V a, V before) const {
    store_units(xh_ + row * width_ + s_.D + s_.R + j, reset(unit, a, before), n);
  }

  // dz of a step in 16 bits, or null: while one step is read, the one before it is written. Where
  // dx is of pairs, too, the steps of a chunk are kept.
  OfStep* narrow(int64_t t, int64_t r) const {
    return PAIRS ? narrow_ + (t % narrow_steps_ * s_.B + r) * narrow_stride_ : nullptr;
  }

  Panels<OfStep> operand_of_step(const Chunk& chunk, int64_t t) const {
    if constexpr (FIXED)
      return {narrow(t, 0), narrow_stride_, 0, 0};
    else if constexpr (PAIRS)
      return {narrow(t, 0), narrow_stride_, PANEL, rest_of<Unit>(s_.H)};
    else
      return panels_of(dz_.from((t - chunk.from) * s_.B));
  }

  // dz of all steps, to read rows [lo, hi) of it: in fixed point these are made here.
  Panels<OfDx> operand_of_dx(const Chunk& chunk, int64_t lo, int64_t hi) const {
    if constexpr (FIXED) {
      for (int64_t r = lo; r < hi; ++r)
        for (int64_t u = 0; u < tiles_across<Unit>(s_.H); ++u) {
          V dz[GATES];
          for (int g = 0; g < GATES; ++g) dz[g] = dz_.get(r, g, u, W);
          put_fixed<TransposedX>(fixed_ + r * fixed_stride_, u, dz);
        }
      return {fixed_, fixed_stride_, 0, 0};
    } else if constexpr (std::is_same_v<OfDx, float>)
      return panels_of(dz_);
    else
      return operand_of_step(chunk, chunk.from);
  }
  static Panels<float> panels_of(const Gates& dz) { return {dz.data, dz.row, dz.tile, 0}; }

  // What goes back from it, from dz of all units: dh₋, and nothing where a row is fresh. Where the
  // unit carries no c, a part of dh₋ is there already.
  void back(const Chunk& chunk, int64_t t, const Share& share, int64_t lo, int64_t hi) const {
    const int64_t B = s_.B, stride = whole_vectors(s_.R);
    const uint8_t *valid = mask_at(s_.valid, t, B), *fresh = mask_at(s_.fresh, t, B);
    times_transposed(operand_of_step(chunk, t), to_h_, dh_, !Unit::CARRIES_C, stride, valid,
                     share.v, share.v_past, lo, hi);
    zero_fresh(dh_, stride, fresh, valid, lo, hi, share.v, share.v_past);
    if (dc_) zero_fresh(dc_, whole_vectors(s_.H), fresh, valid, lo, hi, share.u, share.past);
  }

  // The steps of rows [lo, hi), against the direction of running: dz, dh and dc.
  void steps(const Chunk& chunk, int64_t lo, int64_t hi) const {
    const int64_t B = s_.B;
    const Share all = Share::of<Unit>(s_.H, s_.R, 0, 1);
    if (recomputes_steps_) {
      State state = state_before(chunk, lo, hi);
      over_steps(s_.reverse, chunk.from, chunk.to, [&](int64_t t) {
        const Step step = step_again(chunk, t, inputs_.rows(t, lo, hi), Gates{});
        advance_rows<Unit, Number>(s_, cells_, state, step, mask_at(s_.fresh, t, B), lo, hi);
      });
    }
    over_steps(!s_.reverse, chunk.from, chunk.to, [&](int64_t t) {
      if (!recomputes_a_)
        for (int64_t r = lo; r < hi; ++r) gather(chunk, t, r);
      if (s_.projection) cotangents(chunk, t, all, lo, hi);
      cells(chunk, t, 0, all.past, lo, hi);
      resets(chunk, t, all, lo, hi);
      back(chunk, t, all, lo, hi);
    });
  }

  // The same of all rows, the units shared out. The units of dh that a member makes are those that
  // it needs next, so that one round is dh₋ of a step and dz of the one before it.
  bool steps_by_units(const Chunk& chunk) const {
    const int64_t B = s_.B, steps = chunk.to - chunk.from, rounds = rounds_of_step<Unit>(s_);
    bool ok = true;
    if (recomputes_steps_) {
      State state = state_before(chunk, 0, B);
      ok = project<Unit, Number>(threads_, s_, cells_, inputs_, dz_, chunk.from, steps);
      share_units<Unit, Number>(
          threads_, s_, cells_, state, chunk.from, chunk.to,
          [&](int64_t t) { return step_again(chunk, t, nullptr, dz_); },
          [](const State&, int64_t, const Share&) {});
    }
    if (!recomputes_a_)
      ok = ok && parallel_for(threads_, steps, s_.threads, 0, [&](int64_t step, float*) {
             for (int64_t r = 0; r < B; ++r) gather(chunk, chunk.from + step, r);
           });
    const auto step_at = [&](int64_t step) {
      return s_.reverse ? chunk.from + step : chunk.to - 1 - step;
    };
    const auto round_of = [&](int64_t round, int64_t member, int64_t members) {
      const Share share = Share::of<Unit>(s_.H, s_.R, member, members);
      const int64_t step = round / rounds;
      const bool begins = round % rounds == 0, ends = round % rounds == rounds - 1;
      if (begins && step > 0) back(chunk, step_at(step - 1), share, 0, B);
      if (step == steps) return;
      if (begins && s_.projection) cotangents(chunk, step_at(step), share, 0, B);
      if (s_.projection ? ends : begins) cells(chunk, step_at(step), share.u, share.past, 0, B);
      if (ends) resets(chunk, step_at(step), share, 0, B);
    };
    over_rounds(threads_, steps * rounds + 1, members_of<Unit>(s_), round_of);
    return ok;
  }

  // What a chunk adds to rows [m, past) of the gradient of [w_x w_h w_h b], of one panel of dz: w_h
  // once with what met h₋, and once with what met q.
  void add_weights(const Chunk& chunk, int64_t rows, int64_t m, int64_t past, int64_t u) const {
    const int64_t D = s_.D, K = D + s_.R;
    for (int64_t first = 0; first < rows; first += DEPTH) {
      const auto add = [&](auto blocks, int64_t lo, int64_t hi) {
        const int64_t depth = least(DEPTH, rows - first);
        const bool adds = !chunk.is_first || first > 0;
        const bool ends = chunk.is_last && first + depth == rows;
        over_tiles<WeightOperands<OfDx>::ROWS>(
            most(m, lo), least(past, hi),
            WeightTile<Columns<Unit, decltype(blocks)>, OfDx, Number>{
                sums_, gradient_, operands_, u, first, depth, s_.H, adds, ends});
      };
      if constexpr (std::is_same_v<OfX, OfH>) {
        add(OfX{}, 0, K + 1);
      } else {
        add(OfX{}, 0, D);
        add(OfH{}, D, K);
        if constexpr (HAS_Q<Unit>) add(typename Unit::OfQ{}, K, past_q());
        add(typename Unit::OfBias{}, past_q(), past_q() + 1);
      }
    }
  }

  // What W units of a chunk add to the gradient of the peepholes: Σ dz_i ⊙ c₋, Σ dz_f ⊙ c₋ and
  // Σ dz_o ⊙ c.
  void add_peepholes(const Chunk& chunk, int64_t u) const {
    const int64_t H = s_.H, j = u * W;
    const int n = static_cast<int>(least(W, H - j));
    V sum[3] = {};
    for (int64_t t = chunk.from; t < chunk.to; ++t)
      for (int64_t b = 0; b < s_.B; ++b) {
        if (!is_valid(t, b)) continue;
        const int64_t r = (t - chunk.from) * s_.B + b;
        const float* c_prev = c_before(chunk, t, b);
        const V before = c_prev ? load_units(c_prev + j, n) : splat(0);
        sum[0] = fma(dz_.get(r, 0, u, n), before, sum[0]);
        sum[1] = fma(dz_.get(r, 1, u, n), before, sum[1]);
        sum[2] = fma(dz_.get(r, 3, u, n), load_units(chunk.c + r * H + j, n), sum[2]);
      }
    for (int k = 0; k < 3; ++k) {
      float* to = dpeephole_ + k * H + j;
      store_units(to, chunk.is_first ? sum[k] : load_units(to, n) + sum[k], n);
    }
  }

  // What a chunk adds to the gradient of the projection, Σ mᵀ dh: a block of its rows.
  void add_projection(const Chunk& chunk, int64_t rows, int64_t block) const {
    const int64_t m = block * BLOCK, units = least(BLOCK, s_.H - m), width = whole_vectors(s_.R);
    if (chunk.is_first) zero(dprojection_ + m * width, units * width);
    for (int64_t first = 0; first < rows; first += DEPTH)
      product<Stored::by_step, From::c>(units, width / W, least(DEPTH, rows - first),
                                        m_ + first * padded(s_.H) + m, padded(s_.H),
                                        dh_of_steps_ + first * padded(s_.R), padded(s_.R),
                                        TILE_COLUMNS, dprojection_ + m * width, width);
  }

  // dx of a chunk, and what it adds to the gradients of the weights.
  bool products(const Chunk& chunk) const {
    const int64_t rows = (chunk.to - chunk.from) * s_.B, M = past_q() + 1;
    const int64_t panels = tiles_across<Unit>(s_.H), dx_items = items_of(rows);
    // a block of [x h₋ 1] stays in a core's cache while it meets one panel after the other
    const int64_t shared_out =
        s_.threads > 1 ? ceil_div(s_.threads * ITEMS_OF_A_THREAD, panels) : 1;
    const int64_t blocks = most(ceil_div(M, BLOCK), least(ceil_div(M, GATE_TILE_ROWS), shared_out));
    const int64_t peepholes = s_.peephole ? panels : 0;
    const int64_t projections = s_.projection ? ceil_div(s_.H, BLOCK) : 0;
    const auto compute = [&](int64_t item, float*) {
      if (item < blocks * panels) {
        const int64_t block = item / panels;
        return add_weights(chunk, rows, M * block / blocks, M * (block + 1) / blocks,
                           item % panels);
      }
      item -= blocks * panels;
      if (item < dx_items) {
        const int64_t lo = rows * item / dx_items, hi = rows * (item + 1) / dx_items;
        return times_transposed(operand_of_dx(chunk, lo, hi), to_x_,
                                s_.dx + chunk.from * s_.B * s_.D, false, s_.D, nullptr, 0,
                                ceil_div(s_.D, W), lo, hi);
      }
      item -= dx_items;
      if (item < peepholes) return add_peepholes(chunk, item);
      add_projection(chunk, rows, item - peepholes);
    };
    return operands_.prepare(threads_, s_.threads, rows) &&
           parallel_for(threads_, blocks * panels + dx_items + peepholes + projections, s_.threads,
                        0, compute);
  }

  // Those of the biases, the projection and the peepholes, in their arrays and types.
  void other_gradients() const {
    const int64_t H = s_.H, width = s_.G * H;
    copy_numbers(gradient_.db, width, s_.db);
    if (s_.db_n) copy_numbers(gradient_.db + width, H, s_.db_n);
    if (s_.projection)
      copy_rows(dprojection_, whole_vectors(s_.R), s_.dprojection, s_.R, s_.R, 0, H);
    if constexpr (!std::is_same_v<Number, float>)
      if (dpeephole_) copy_numbers(dpeephole_, 3 * H, s_.dpeephole);
  }

  Threads& threads_;
  const RecurrentBackward<Number>& s_;
  int64_t length_ = 0, width_ = 0;
  bool recomputes_steps_ = false, recomputes_a_ = false;
  int64_t narrow_stride_ = 0, narrow_steps_ = 0, fixed_stride_ = 0, xh_stride_ = 0;
  Operand* packed_cells_ = nullptr;
  OfStep *packed_h_ = nullptr, *packed_q_ = nullptr;
  OfDx* packed_x_ = nullptr;
  Cells cells_{};
  TransposedH to_h_{};
  TransposedQ to_q_{};
  TransposedX to_x_{};
  Inputs<Number> inputs_{s_, nullptr};
  Gates dz_{};
  WeightOperands<OfDx> operands_{};
  float *xh_ = nullptr, *dh_ = nullptr, *dq_ = nullptr, *dc_ = nullptr;
  OfStep* narrow_ = nullptr;
  Operand* xh_pairs_ = nullptr;
  Fixed* fixed_ = nullptr;
  WeightRows<float> sums_{};
  WeightRows<Number> gradient_{};
  float* dpeephole_ = nullptr;
  float *packed_p_ = nullptr, *m_ = nullptr, *dm_ = nullptr;
  float *dh_of_steps_ = nullptr, *dprojection_ = nullptr;
  State state_{};
  float* c_ = nullptr;
  Number* y_ = nullptr;
};

template <class Unit, class Number>
static bool backward(Threads& threads, const RecurrentBackward<Number>& s) {
  return is_few_gradient(s) ? FewStepsGradient<Unit, Number>(threads, s).run()
                            : Backward<Unit, Number>(threads, s).run();
}

template <class Unit, class Number>
static constexpr RecurrentKernels<Number> kernels{forward<Unit, Number>, backward<Unit, Number>};

}  // namespace rnnattn::RNNATTN_SET::recurrent
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_RECURRENT_GRADIENT_INL_H_
