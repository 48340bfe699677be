// Recurrent units forwards, a few steps of a few rows: weights that are hardly read again are not
// worth packing.

#ifndef RNNATTN_RECURRENT_FEW_STEPS_INL_H_
#define RNNATTN_RECURRENT_FEW_STEPS_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "numbers-inl.h"
#include "product-inl.h"
#include "recurrent_tiles-inl.h"
#include "recurrent_unit-inl.h"
#include "simd-inl.h"
#include "threads.h"
#include "util-inl.h"
#include "workspace-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::recurrent {

constexpr int64_t AT_ONCE = 32;                    // rows of the weights are read at once,
constexpr int64_t FEW_AT_ONCE = 8;                 // or so many,
constexpr int64_t FAR = 1 << 22;                   // where no cache of a core holds the weights
constexpr int64_t PRODUCTS_OF_A_THREAD = 3 << 15;  // with fewer a second one does not pay,
constexpr int64_t CELLS_OF_A_THREAD = 1 << 11;     // or with fewer cells

// Whether rows of the weights are whole or half pages apart, and so fall into few sets of a cache.
template <class Number>
static bool are_apart(const Recurrent<Number>& s, int64_t bytes) {
  return s.G * s.H * static_cast<int64_t>(sizeof(Number)) % bytes == 0;
}
constexpr int64_t PAGE = 4096, HALF_A_PAGE = PAGE / 2;

// Whether all rows run all steps, and nothing is kept to run them again.
template <class Number>
static bool is_bare(const Recurrent<Number>& s) {
  return !s.valid && !s.fresh && !s.interval;
}

// Whether the weights are read where they are: to pack them is to read and to write them once, and
// pays where they are read more often than that, the sooner where packed ones are pairs.
template <class Number>
static bool are_few_steps(const Recurrent<Number>& s) {
  constexpr bool pairs = TOGETHER<Operand<Number>> > 1;
  const int64_t steps = pairs ? 4 : are_apart(s, HALF_A_PAGE) ? 8 : 16, rows = pairs ? 8 : 16;
  return s.T <= steps && s.T * s.B <= rows && is_bare(s);
}

// Rows of float32, `stride` apart.
template <class Float>
struct Rows {
  Float* data;
  int64_t count, stride;
};

// The columns of a product that fill no vector; see ProductTile.
template <Stored stored, From from, class Number>
struct RestTile {
  int64_t steps;
  const float* a;
  int64_t a_stride;
  const Number* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  int columns;

  template <int R>
  void run(int64_t first) const {
    constexpr bool by_row = stored == Stored::by_row;
    const int64_t a_row = by_row ? a_stride : 1, a_step = by_row ? 1 : a_stride;
    const float* of_a = a + first * a_row;
    float* rows = c + first * c_stride;
    V sums[R]{};
    if constexpr (from == From::c)
      unrolled<R>([&](auto r)
                      RNNATTN_LAMBDA { sums[r] = load_units(rows + r * c_stride, columns); });
    for (int64_t step = 0; step < steps; ++step) {
      V y = load_units(b + step * b_stride, columns);
      if constexpr (R > 1) keep_in_register(y);
      unrolled<R>([&](auto r) RNNATTN_LAMBDA {
        sums[r] = fma(splat(of_a[r * a_row + step * a_step]), y, sums[r]);
      });
    }
    unrolled<R>([&](auto r) RNNATTN_LAMBDA { store_units(rows + r * c_stride, sums[r], columns); });
  }
};

// C = A B, or C + A B, of so many columns, none written beyond them.
template <Stored stored, From from, class Number>
static void product_of_columns(int64_t rows, int64_t columns, int64_t steps, const float* a,
                               int64_t a_stride, const Number* b, int64_t b_stride, float* c,
                               int64_t c_stride) {
  const int64_t whole = columns / W, done = whole * W;
  product<stored, from>(rows, whole, steps, a, a_stride, b, b_stride, TILE_COLUMNS, c, c_stride);
  if (done < columns)
    over_tiles<TILE_ROWS>(
        0, rows,
        RestTile<stored, from, Number>{steps, a, a_stride, b + done, b_stride, c + done, c_stride,
                                       static_cast<int>(columns - done)});
}

// Some columns of z += a w, with w (K, `width`) where it lies: a few of its rows at a time, along
// which memory is fetched ahead.
template <class Number>
static void add_product(const Rows<const float>& a, int64_t K, const Number* w, int64_t width,
                        int64_t columns, const Rows<float>& z, int64_t at_once) {
  for (int64_t k = 0; k < K; k += at_once)
    product_of_columns<Stored::by_row, From::c>(a.count, columns, least(at_once, K - k), a.data + k,
                                                a.stride, w + k * width, width, z.data, z.stride);
}

// z has a block for each of the biases [b b_n]. Where in z what a weight has for a gate is added.
template <class Unit, class Of>
static constexpr int block_of_z(int block_of_w) {
  for (int g = Of::FIRST; g < Of::PAST; ++g)
    if (Of::of(g) == block_of_w) return Unit::OfBias::of(g);
  return -1;
}

// f(blocks, shift) of neighbouring blocks of a weight that are neighbours in z, too, `shift` blocks
// behind.
template <class Unit, class Of, class F>
static void over_runs(F f) {
  constexpr int BLOCKS = recurrent::GATES<Unit>;
  for (int first = 0, past; first < BLOCKS; first = past) {
    const int z = block_of_z<Unit, Of>(first);
    for (past = first + 1; past < BLOCKS; ++past)
      if (z < 0 || block_of_z<Unit, Of>(past) != z + past - first) break;
    if (z >= 0) f(Range{first, past}, z - first);
  }
}

// Numbers as float32: in `copied`, if they are not.
template <class Number>
static const float* in_float(const Number* numbers, int64_t count, float* copied) {
  if constexpr (IS_WIDE<Number>) return numbers;
  copy_numbers(numbers, count, copied);
  return copied;
}

static Range within(Range columns, int64_t first, int64_t past) {
  return {most(columns.first, first), least(columns.past, past)};
}

// f of parts of a range, `unit` each or a multiple of it.
template <class F>
static bool over_parts(Threads& threads, int64_t limit, Range all, int64_t unit, int64_t items,
                       F f) {
  const int64_t units = ceil_div(all.past - all.first, unit);
  items = least(items, units);
  return parallel_for(threads, items, limit, 0, [&](int64_t item, float*) {
    f(Range{all.first + units * item / items * unit,
            least(all.first + units * (item + 1) / items * unit, all.past)});
  });
}

// Into how many parts products are shared out.
static int64_t parts_of_products(int64_t threads, int64_t multiply_adds) {
  return multiply_adds < PRODUCTS_OF_A_THREAD ? 1 : 2 * threads;
}
// Rows that take as long as so many, see FEW_ROWS.
static int64_t as_many_rows(int64_t rows) { return most(rows, FEW_ROWS); }

// f of parts of the units, for the cells of a step.
template <class Number, class F>
static bool over_units(Threads& threads, const Recurrent<Number>& s, F f) {
  return over_parts(threads, s.threads, {0, s.H}, W, ceil_div(s.B * s.H, CELLS_OF_A_THREAD), f);
}

// The columns of weights are shared out, all gates alike: what a thread reads lies together, and
// what two of them read, apart. Then the cells.
template <class Unit, class Number>
class FewSteps {
  static constexpr int GATES = recurrent::GATES<Unit>;

 public:
  FewSteps(Threads& threads, const RecurrentForward<Number>& s)
      : threads_(threads), s_(s), z_stride_(whole_vectors(GATES * s.H)) {
    const bool is_far = (s.D + s.R) * s.G * s.H > FAR;
    at_once_ = is_far || (s.B == 1 && are_apart(s, PAGE)) ? FEW_AT_ONCE : AT_ONCE;
  }

  bool run() {
    Memory size{nullptr};
    lay_out(size);
    const Allocation allocation(size.used);
    if (size.used > 0 && !allocation.data()) return false;
    Memory memory{allocation.data()};
    lay_out(memory);
    const Rows<const float> x{in_float(s_.x, s_.T * s_.B * s_.D, x_), s_.T * s_.B, s_.D};
    const Number* h_before = s_.h;
    const float* c = s_.c;
    bool ok = true, first = true;
    over_steps(s_.reverse, 0, s_.T, [&](int64_t t) {
      const Rows<const float> h{in_float(h_before, s_.B * s_.R, h_), s_.B, s_.R};
      const int64_t of_h = as_many_rows(s_.B) * s_.R;
      const int64_t of_x = first ? as_many_rows(x.count) * s_.D : 0;
      ok = ok && over_columns({0, s_.G * s_.H}, of_x + of_h, [&](Range columns) {
             if (first) {
               begin(columns);
               add<typename Unit::OfX>(x, s_.w_x, s_.D, columns, 0);
             }
             add<typename Unit::OfH>(h, s_.w_h, s_.R, columns, t);
           });
      if constexpr (HAS_Q<Unit>) {
        const int64_t block = Unit::OfQ::of(Unit::OfQ::FIRST) * s_.H;
        ok = ok && over_units(threads_, s_, [&](Range units) { reset_units(h.data, t, units); }) &&
             over_columns({block, block + s_.H}, of_h, [&](Range columns) {
               add<typename Unit::OfQ>({between_, s_.B, s_.H}, s_.w_h, s_.R, columns, t);
             });
      }
      ok = ok && over_units(threads_, s_, [&](Range units) { cells(h.data, c, t, units); });
      if (s_.projection)
        ok = ok && over_columns({0, s_.R}, as_many_rows(s_.B) * s_.H,
                                [&](Range columns) { project(t, columns); });
      h_before = s_.y + t * s_.B * s_.R;
      c = s_.c_last;
      first = false;
    });
    copy_numbers(h_before, s_.B * s_.R, s_.h_last);
    return ok;
  }

 private:
  void lay_out(Memory& memory) {
    z_ = memory.take(s_.T * s_.B * z_stride_);
    x_ = memory.take(IS_WIDE<Number> ? 0 : s_.T * s_.B * s_.D);
    h_ = memory.take(IS_WIDE<Number> ? 0 : s_.B * s_.R);
    between_ = memory.take(HAS_Q<Unit> || s_.projection ? s_.B * s_.H : 0);
    projected_ = memory.take(s_.projection ? s_.B * whole_vectors(s_.R) : 0);
  }

  template <class F>
  bool over_columns(Range columns, int64_t steps, F f) const {
    const int64_t parts = parts_of_products(s_.threads, steps * (columns.past - columns.first));
    return over_parts(threads_, s_.threads, columns, W, parts, f);
  }

  // Where in z the columns [first, …) of a weight of a step are added to.
  Rows<float> columns_of(int64_t t, int64_t first, int64_t rows) const {
    return {z_ + t * s_.B * z_stride_ + first, rows, z_stride_};
  }

  // The biases, for what some columns of the weights add to in all steps.
  void begin(Range columns) const {
    const int64_t H = s_.H;
    const auto put = [&](Range blocks, int64_t shift) {
      for (int64_t block = blocks.first; block < blocks.past; ++block) {
        const Range some = within(columns, block * H, (block + 1) * H);
        const int64_t count = some.past - some.first;
        if (count <= 0) continue;
        const Number* bias = bias_block(s_, static_cast<int>(block + shift));
        const Rows<float> z = columns_of(0, some.first + shift * H, s_.T * s_.B);
        for (int64_t r = 0; r < z.count; ++r)
          if (bias)
            copy_numbers(bias + some.first - block * H, count, z.data + r * z.stride);
          else
            zero(z.data + r * z.stride, count);
      }
    };
    over_runs<Unit, typename Unit::OfX>(put);
    over_runs<Unit, typename Unit::OfH>([&](Range blocks, int64_t shift) {
      if (blocks.first + shift >= s_.G) put(blocks, shift);  // x has none there
    });
  }

  // Some columns of the products of rows from step t on with a weight.
  template <class Of>
  void add(const Rows<const float>& a, const Number* w, int64_t K, Range columns, int64_t t) const {
    over_runs<Unit, Of>([&](Range blocks, int64_t shift) {
      const Range some = within(columns, blocks.first * s_.H, blocks.past * s_.H);
      if (some.first < some.past)
        add_product(a, K, w + some.first, s_.G * s_.H, some.past - some.first,
                    columns_of(t, some.first + shift * s_.H, a.count), at_once_);
    });
  }

  // f(row, unit, count, a, before) for W units each, with what their cell meets.
  template <class F>
  void over_cells(const float* h, const float* c, int64_t t, Range units, F f) const {
    for (int64_t r = 0; r < s_.B; ++r)
      for (int64_t j = units.first; j < units.past; j += W) {
        const int n = static_cast<int>(least(W, units.past - j));
        const V before = load_units((Unit::CARRIES_C ? c : h) + r * s_.H + j, n);
        V a[GATES];
        for (int g = 0; g < GATES; ++g) {
          const Rows<float> z = columns_of(t, Unit::OfBias::of(g) * s_.H + j, s_.B);
          a[g] = load_units(z.data + r * z.stride, n) * splat(Unit::scale(g));
        }
        f(r, j, n, a, before);
      }
  }

  void reset_units(const float* h, int64_t t, Range units) const {
    over_cells(h, nullptr, t, units,
               [&](int64_t r, int64_t j, int n, const V(&a)[GATES], V before) {
                 const V q = reset(Unit::of(s_, j, n), a[Unit::RESET], before);
                 store_units(between_ + r * s_.H + j, rounded(Number{}, q), n);
               });
  }

  void cells(const float* h, const float* c, int64_t t, Range units) const {
    over_cells(h, c, t, units, [&](int64_t r, int64_t j, int n, V(&a)[GATES], V before) {
      const int64_t row = t * s_.B + r, at = row * s_.H + j;
      V after = before, m;
      cell(Unit::of(s_, j, n), a, before, after, m);
      if (s_.projection)
        store_units(between_ + r * s_.H + j, rounded(Number{}, m), n);
      else
        store_units(s_.y + at, m, n);
      if (Unit::CARRIES_C) store_units(s_.c_last + r * s_.H + j, after, n);
      if (s_.c_all) store_units(s_.c_all + at, after, n);
      if (s_.a)
        for (int g = 0; g < GATES; ++g) store_units(s_.a + (row * GATES + g) * s_.H + j, a[g], n);
    });
  }

  // Some columns of h = m P.
  void project(int64_t t, Range columns) const {
    const int64_t count = columns.past - columns.first;
    const Rows<float> h{projected_ + columns.first, s_.B, whole_vectors(s_.R)};
    for (int64_t r = 0; r < s_.B; ++r) zero(h.data + r * h.stride, count);
    add_product({between_, s_.B, s_.H}, s_.H, s_.projection + columns.first, s_.R, count, h,
                at_once_);
    for (int64_t r = 0; r < s_.B; ++r)
      copy_numbers(h.data + r * h.stride, count, s_.y + (t * s_.B + r) * s_.R + columns.first);
  }

  Threads& threads_;
  const RecurrentForward<Number>& s_;
  const int64_t z_stride_;
  int64_t at_once_;
  float* z_ = nullptr;  // of all steps, a row as the biases lie
  float *x_ = nullptr, *h_ = nullptr;
  float* between_ = nullptr;  // q, or what is projected, of all units
  float* projected_ = nullptr;
};

}  // namespace rnnattn::RNNATTN_SET::recurrent
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_RECURRENT_FEW_STEPS_INL_H_
