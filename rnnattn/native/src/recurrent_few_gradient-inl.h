// The gradient of a few steps of a few rows, with weights where they lie, and the pre-activations
// kept.

#ifndef RNNATTN_RECURRENT_FEW_GRADIENT_INL_H_
#define RNNATTN_RECURRENT_FEW_GRADIENT_INL_H_

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

constexpr int64_t DOTS = 4;          // rows of a weight are read side by side,
constexpr int64_t WEIGHT_ROWS = 24;  // and so many of its gradient made

// The products of R rows of A with DOTS rows of B, of which there may be fewer.
template <class Number>
struct DotTile {
  const float* a;
  int64_t a_stride;
  const Number* b;
  int64_t b_stride, width, columns;
  float* c;
  int64_t c_stride;
  bool adds;

  template <int R>
  void run(int64_t first) const {
    const float* rows = a + first * a_stride;
    V sums[W]{};
    const auto add = [&](int64_t j, int n) RNNATTN_LAMBDA {
      V x[R];
      unrolled<R>([&](auto r) RNNATTN_LAMBDA { x[r] = load_units(rows + r * a_stride + j, n); });
      unrolled<DOTS>([&](auto i) RNNATTN_LAMBDA {
        V y = load_units(b + least(i, columns - 1) * b_stride + j, n);
        if constexpr (R > 1) keep_in_register(y);
        unrolled<R>([&](auto r) RNNATTN_LAMBDA {
          V& sum = sums[r * DOTS + i];
          sum = fma(x[r], y, sum);
        });
      });
    };
    const int64_t whole = width / W * W;
    for (int64_t j = 0; j < whole; j += W) add(j, W);
    if (whole < width) add(whole, static_cast<int>(width - whole));
    float dots[W];
    store(dots, sum_of_each(sums));
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < least(DOTS, columns); ++i) {
        float& to = c[(first + r) * c_stride + i];
        to = adds ? to + dots[r * DOTS + i] : dots[r * DOTS + i];
      }
  }
};

// C = A Bᵀ, or C + A Bᵀ, of rows [first, past) of B, which are `width` wide and b_stride apart.
template <class Number>
static void product_of_rows(const Rows<float>& a, int64_t width, const Number* b, int64_t b_stride,
                            Range rows, const Rows<float>& c, bool adds) {
  for (int64_t i = rows.first; i < rows.past; i += DOTS)
    over_tiles<W / DOTS>(0, a.count,
                         DotTile<Number>{a.data, a.stride, b + i * b_stride, b_stride, width,
                                         rows.past - i, c.data + i, c.stride, adds});
}

// Whether the weights are read where they are; see `are_few_steps`. To pack one turned over takes
// longer than to pack it, so that this pays with more rows.
template <class Number>
static bool is_few_gradient(const RecurrentBackward<Number>& s) {
  constexpr int64_t rows = TOGETHER<Operand<Number>> > 1 ? 24 : 64;
  return s.a && s.T <= 16 && s.T * s.B <= rows && is_bare(s);
}

// dz of all steps, and the products of them with the weights and with what met these. Rows are of
// the batch and time.
template <class Unit, class Number>
class FewStepsGradient {
  using OfX = typename Unit::OfX;
  using OfH = typename Unit::OfH;
  using OfQ = typename Unit::OfQ;
  static constexpr int GATES = recurrent::GATES<Unit>;

 public:
  FewStepsGradient(Threads& threads, const RecurrentBackward<Number>& s)
      : threads_(threads), s_(s), rows_(s.T * s.B) {}

  bool run() {
    Memory size{nullptr};
    lay_out(size);
    const Allocation allocation(size.used);
    if (size.used > 0 && !allocation.data()) return false;
    Memory memory{allocation.data()};
    lay_out(memory);
    const int64_t T = s_.T, B = s_.B, R = s_.R, H = s_.H;
    x_ = in_float(s_.x, rows_ * s_.D, copied_x_);
    advise_huge_pages(s_.dw_x, s_.D * s_.G * H);
    advise_huge_pages(s_.dw_h, R * s_.G * H);
    for (int64_t t = 0; t < T; ++t) {
      const int64_t before = s_.reverse ? t + 1 : t - 1;
      const bool begins = before < 0 || before >= T;
      copy_numbers(begins ? s_.h : s_.y + before * B * R, B * R, h_.data + t * B * R);
    }
    copy_numbers(s_.dh_last, B * R, dh_.data);
    if (s_.c) copy(s_.dc_last, B * H, dc_);
    bool ok = true;
    over_steps(!s_.reverse, 0, T, [&](int64_t t) { ok = ok && step(t); });
    copy_numbers(dh_.data, B * R, s_.dh);
    if (s_.c) copy(dc_, B * H, s_.dc);
    ok = ok && products();
    other_gradients();
    return ok;
  }

 private:
  void lay_out(Memory& memory) {
    const int64_t B = s_.B, D = s_.D, R = s_.R, H = s_.H;
    const auto take = [&](int64_t rows, int64_t width) {
      return Rows<float>{memory.take(rows * width), rows, width};
    };
    dz_ = take(rows_, whole_vectors(GATES * H));
    copied_x_ = memory.take(IS_WIDE<Number> ? 0 : rows_ * D);
    h_ = take(rows_, R);
    q_ = take(HAS_Q<Unit> ? rows_ : 0, H);
    dq_ = take(HAS_Q<Unit> ? B : 0, H);
    dh_ = take(B, R);
    dc_ = memory.take(s_.c ? B * H : 0);
    const bool projects = s_.projection != nullptr;
    m_ = take(projects ? rows_ : 0, H);
    dm_ = take(projects ? B : 0, H);
    dh_of_steps_ = take(projects ? rows_ : 0, R);
    if constexpr (IS_WIDE<Number>)
      dx_ = {s_.dx, rows_, D};
    else
      dx_ = take(rows_, D);
  }

  // Rows of a step, and columns of all of them.
  Rows<float> of_step(const Rows<float>& rows, int64_t t) const {
    return {rows.data + t * s_.B * rows.stride, s_.B, rows.stride};
  }
  static Rows<float> from(const Rows<float>& rows, int64_t column) {
    return {rows.data + column, rows.count, rows.stride};
  }

  // f(columns of a weight, columns of z) of those that are products with the same.
  template <class Of, class F>
  void over_columns(F f) const {
    over_runs<Unit, Of>([&](Range blocks, int64_t shift) {
      f(Range{blocks.first * s_.H, blocks.past * s_.H}, (blocks.first + shift) * s_.H);
    });
  }

  // Rows of dz wᵀ, of the gates that have columns in w; columns [first, past) of what comes.
  template <class Of>
  void back(const Rows<float>& dz, const Number* w, Range rows, const Rows<float>& to,
            bool adds) const {
    over_columns<Of>([&](Range columns, int64_t of_z) {
      product_of_rows(from(dz, of_z), columns.past - columns.first, w + columns.first, s_.G * s_.H,
                      rows, to, adds);
      adds = true;
    });
  }

  template <class F>
  bool over_rows(int64_t count, int64_t width, F f) const {
    const int64_t parts = parts_of_products(s_.threads, as_many_rows(s_.B) * count * width);
    return over_parts(threads_, s_.threads, {0, count}, DOTS, parts, f);
  }

  // dz of a step, then dh₋.
  bool step(int64_t t) {
    const int64_t B = s_.B, R = s_.R, H = s_.H, width = s_.G * H;
    const Rows<float> dz = of_step(dz_, t);
    bool ok = true;
    if (s_.projection) {
      const Rows<float> dh = of_step(dh_of_steps_, t);
      for (int64_t i = 0; i < B * R; i += W) {
        const int n = static_cast<int>(least(W, B * R - i));
        store_units(dh.data + i, load_units(dh_.data + i, n) + load_units(s_.dy + t * B * R + i, n),
                    n);
      }
      ok = over_rows(
          H, R, [&](Range units) { product_of_rows(dh, R, s_.projection, R, units, dm_, false); });
    }
    ok = ok && over_units(threads_, s_, [&](Range units) { cells(t, units); });
    if constexpr (HAS_Q<Unit>)
      ok = ok && over_rows(R, H, [&](Range rows) { back<OfQ>(dz, s_.w_h, rows, dq_, false); }) &&
           over_units(threads_, s_, [&](Range units) { resets(t, units); });
    return ok && over_rows(R, width,
                           [&](Range rows) { back<OfH>(dz, s_.w_h, rows, dh_, !Unit::CARRIES_C); });
  }

  // f(row of the batch, row, unit, count) of W units each.
  template <class F>
  void over_cells(int64_t t, Range units, F f) const {
    for (int64_t b = 0; b < s_.B; ++b)
      for (int64_t j = units.first; j < units.past; j += W)
        f(b, t * s_.B + b, j, static_cast<int>(least(W, units.past - j)));
  }
  V pre_activation(int64_t row, int g, int64_t j, int n) const {
    return load_units(s_.a + (row * GATES + g) * s_.H + j, n);
  }
  void put_dz(int64_t row, int g, int64_t j, V dz, int n) const {
    store_units(dz_.data + row * dz_.stride + Unit::OfBias::of(g) * s_.H + j, dz, n);
  }
  const float* c_before(int64_t t) const {
    const int64_t before = s_.reverse ? t + 1 : t - 1;
    return before < 0 || before >= s_.T ? s_.c : s_.c_all + before * s_.B * s_.H;
  }

  void cells(int64_t t, Range units) const {
    const int64_t H = s_.H;
    over_cells(t, units, [&](int64_t b, int64_t row, int64_t j, int n) {
      const int64_t at = b * H + j;
      const Unit unit = Unit::template of<Number>(s_, j, n);
      V a[GATES], dz[GATES];
      for (int g = 0; g < GATES; ++g) a[g] = pre_activation(row, g, j, n);
      const V before = load_units((Unit::CARRIES_C ? c_before(t) : h_.data + t * s_.B * H) + at, n);
      const V after = Unit::CARRIES_C ? load_units(s_.c_all + row * H + j, n) : splat(0);
      const V dm = s_.projection
                       ? load_units(dm_.data + at, n)
                       : load_units(dh_.data + at, n) + load_units(s_.dy + row * H + j, n);
      float* dprev = (Unit::CARRIES_C ? dc_ : dh_.data) + at;
      V d = load_units(dprev, n);
      const V m = cell_gradient(unit, a, before, after, dm, d, dz);
      store_units(dprev, d, n);
      if (s_.projection) store_units(m_.data + row * H + j, m, n);
      for (int g = 0; g < GATES; ++g)
        if (!waits_for_dq<Unit>(g)) put_dz(row, g, j, dz[g], n);
    });
  }

  // Of a step with two products: dz of the gate that q is made of, and what dq adds to dh₋.
  void resets(int64_t t, Range units) const {
    if constexpr (HAS_Q<Unit>)
      over_cells(t, units, [&](int64_t b, int64_t row, int64_t j, int n) {
        const int64_t at = b * s_.H + j;
        const Unit unit = Unit::template of<Number>(s_, j, n);
        const V a = pre_activation(row, Unit::RESET, j, n);
        const V before = load_units(h_.data + row * s_.H + j, n);
        V d = load_units(dh_.data + at, n);
        const V dz = reset_gradient(unit, a, before, load_units(dq_.data + at, n), d);
        store_units(dh_.data + at, d, n);
        store_units(q_.data + row * s_.H + j, reset(unit, a, before), n);
        put_dz(row, Unit::RESET, j, dz, n);
      });
  }

  // Rows [first, past) of aᵀ b, `columns` wide, to rows of a result; those of a are `width` wide.
  void outer_products(const float* a, int64_t width, Range rows, const Rows<float>& b,
                      int64_t columns, Number* to, int64_t stride, float* memory) const {
    for (int64_t k = rows.first; k < rows.past; k += WEIGHT_ROWS) {
      const int64_t count = least(WEIGHT_ROWS, rows.past - k);
      const auto make = [&](float* sums, int64_t sums_stride) {
        product_of_columns<Stored::by_step, From::zero>(count, columns, rows_, a + k, width, b.data,
                                                        b.stride, sums, sums_stride);
      };
      if constexpr (IS_WIDE<Number>) {
        make(to + k * stride, stride);
      } else {
        make(memory, columns);
        for (int64_t i = 0; i < count; ++i)
          copy_numbers(memory + i * columns, columns, to + (k + i) * stride);
      }
    }
  }
  template <class Of>
  void add_weight(const float* a, int64_t width, Range rows, Number* to, float* memory) const {
    over_columns<Of>([&](Range columns, int64_t of_z) {
      outer_products(a, width, rows, from(dz_, of_z), columns.past - columns.first,
                     to + columns.first, s_.G * s_.H, memory);
    });
  }

  // dx, and the gradients of the weights and of the projection, by blocks of their rows.
  bool products() const {
    const int64_t D = s_.D, R = s_.R, H = s_.H, width = s_.G * H;
    const int64_t multiply_adds = rows_ * width * (2 * D + R);
    const int64_t of_x = ceil_div(D, WEIGHT_ROWS), of_h = ceil_div(R, WEIGHT_ROWS);
    const int64_t of_m = s_.projection ? ceil_div(H, WEIGHT_ROWS) : 0;
    const auto block = [](int64_t item, int64_t count) {
      return Range{item * WEIGHT_ROWS, least((item + 1) * WEIGHT_ROWS, count)};
    };
    return parallel_for(
        threads_, of_x + of_h + of_m, multiply_adds < PRODUCTS_OF_A_THREAD ? 1 : s_.threads,
        IS_WIDE<Number> ? 0 : WEIGHT_ROWS * most(width, R), [&](int64_t item, float* memory) {
          if (item < of_x) {
            const Range rows = block(item, D);
            back<OfX>(dz_, s_.w_x, rows, dx_, false);
            return add_weight<OfX>(x_, D, rows, s_.dw_x, memory);
          }
          item -= of_x;
          if (item < of_h) {
            const Range rows = block(item, R);
            add_weight<OfH>(h_.data, R, rows, s_.dw_h, memory);
            if constexpr (HAS_Q<Unit>) add_weight<OfQ>(q_.data, H, rows, s_.dw_h, memory);
            return;
          }
          outer_products(m_.data, H, block(item - of_h, H), dh_of_steps_, R, s_.dprojection, R,
                         memory);
        });
  }

  // Those of the biases and the peepholes, Σ dz, and Σ dz_i ⊙ c₋, Σ dz_f ⊙ c₋ and Σ dz_o ⊙ c; and
  // dx in its type.
  void other_gradients() const {
    const int64_t H = s_.H, B = s_.B;
    for (int64_t j = 0; j < H; j += W) {
      const int n = static_cast<int>(least(W, H - j));
      for (int block = 0; block < GATES; ++block) {
        V sum{};
        for (int64_t r = 0; r < rows_; ++r) sum += load_units(dz_at(r, block) + j, n);
        if (block < s_.G)
          store_units(s_.db + block * H + j, sum, n);
        else if (s_.db_n)
          store_units(s_.db_n + j, sum, n);
      }
      if (!s_.peephole) continue;
      V sums[3]{};
      for (int64_t r = 0; r < rows_; ++r) {
        const V before = load_units(c_before(r / B) + r % B * H + j, n);
        sums[0] = fma(load_units(dz_at(r, 0) + j, n), before, sums[0]);
        sums[1] = fma(load_units(dz_at(r, 1) + j, n), before, sums[1]);
        sums[2] = fma(load_units(dz_at(r, 3) + j, n), load_units(s_.c_all + r * H + j, n), sums[2]);
      }
      for (int k = 0; k < 3; ++k) store_units(s_.dpeephole + k * H + j, sums[k], n);
    }
    if constexpr (!IS_WIDE<Number>) copy_numbers(dx_.data, rows_ * s_.D, s_.dx);
  }
  const float* dz_at(int64_t row, int block) const {
    return dz_.data + row * dz_.stride + block * s_.H;
  }

  Threads& threads_;
  const RecurrentBackward<Number>& s_;
  const int64_t rows_;
  const float* x_ = nullptr;
  float* copied_x_ = nullptr;
  Rows<float> dz_{}, h_{}, q_{}, m_{};  // of all steps; a row of dz as the biases lie
  Rows<float> dx_{}, dh_of_steps_{};    // likewise
  Rows<float> dh_{}, dq_{}, dm_{};
  float* dc_ = nullptr;
};

}  // namespace rnnattn::RNNATTN_SET::recurrent
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_RECURRENT_FEW_GRADIENT_INL_H_
