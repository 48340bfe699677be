// Linear recurrences: R1 for all steps, and R5, the same in reverse.
//
// An item of work is a range of channels of a row, over all of its steps: each number is read and
// written once, and the state stays in the cache nearest to the core.

#ifndef RNNATTN_LINEAR_INL_H_
#define RNNATTN_LINEAR_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "kernels.h"
#include "linear_units-inl.h"
#include "numbers-inl.h"
#include "simd-inl.h"
#include "threads.h"
#include "util-inl.h"
#include "workspace-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET::linear {

// The channels of an item, at most: so many that memory is read in long pieces, and so few that the
// state and what comes back to the weights fit the cache.
constexpr int64_t CHANNELS = 512;

// How rows and channels are shared out: an item is `channels` of one row, in whole cache lines.
struct Items {
  int64_t channels, parts, count;

  template <class Number>
  static Items of(const LinearScan<Number>& s) {
    const int64_t for_all = least(ceil_div(s.threads, s.B), ceil_div(s.H, LINE));
    const int64_t parts = most(ceil_div(s.H, CHANNELS), for_all);
    const int64_t channels = ceil_div(ceil_div(s.H, parts), LINE) * LINE;
    return {channels, ceil_div(s.H, channels), s.B * ceil_div(s.H, channels)};
  }
};

// The steps of one row in the order they run, and what each of them reads.
template <class Unit, class Number>
struct Row {
  const LinearScan<Number>& s;
  int64_t b;

  // Where the n-th step run is among all steps of all rows.
  int64_t at(int64_t n) const {
    const int64_t t = s.reverse ? s.T - 1 - n : n;
    return s.time_major ? t * s.B + b : b * s.T + t;
  }
  bool valid(int64_t step) const { return !s.valid || s.valid[step]; }
  bool fresh(int64_t step) const { return s.fresh && s.fresh[step]; }

  void read(int64_t step, int64_t j, int n, V* p, V* w) const {
    unrolled<Unit::BLOCKS>([&](auto k) RNNATTN_LAMBDA {
      p[k] = load_units(s.p[k].data + step * s.p[k].stride + j, n);
    });
    unrolled<Unit::WEIGHTS>([&](auto k)
                                RNNATTN_LAMBDA { w[k] = load_units(s.w + k * s.H + j, n); });
  }
};

// f(j, n) for each vector of channels [first, past), the n channels from j on.
template <class F>
RNNATTN_INLINE void over_vectors(int64_t first, int64_t past, F f) {
  int64_t j = first;
  for (; j + W <= past; j += W) f(j, W);
  if (j < past) f(j, static_cast<int>(past - j));
}

template <class Unit, class Number>
static void forward_item(const LinearScanForward<Number>& s, int64_t b, int64_t first, int64_t past,
                         float* state) {
  const Row<Unit, Number> row{s, b};
  copy(s.h0 + b * s.H + first, past - first, state);
  for (int64_t n = 0; n < s.T; ++n) {
    const int64_t step = row.at(n);
    const bool valid = row.valid(step), fresh = row.fresh(step);
    over_vectors(first, past, [&](int64_t j, int count) RNNATTN_LAMBDA {
      V h = load(state + (j - first));
      if (valid) {
        V p[Unit::BLOCKS], w[Unit::WEIGHTS + 1], a, added;
        row.read(step, j, count, p, w);
        Unit::coefficients(p, w, fresh, a, added);
        h = fresh ? added : fma(a, h, added);
        store(state + (j - first), h);
      }
      store_units(s.h + step * s.H + j, h, count);
    });
  }
  copy(state, past - first, s.h_last + b * s.H + first);
}

template <class Unit, class Number>
static void backward_item(const LinearScanBackward<Number>& s, int64_t b, int64_t first,
                          int64_t past, float* state, int64_t channels) {
  const Row<Unit, Number> row{s, b};
  float* weights = state + channels;
  copy(s.dh_last + b * s.H + first, past - first, state);
  zero(weights, Unit::WEIGHTS * channels);
  for (int64_t n = s.T - 1; n >= 0; --n) {
    const int64_t step = row.at(n);
    const bool valid = row.valid(step), fresh = row.fresh(step);
    const Number* before = n > 0 ? s.h + row.at(n - 1) * s.H : nullptr;
    over_vectors(first, past, [&](int64_t j, int count) RNNATTN_LAMBDA {
      V dp[Unit::BLOCKS]{};
      if (valid) {
        V p[Unit::BLOCKS], w[Unit::WEIGHTS + 1], dw[Unit::WEIGHTS + 1], h_prev{};
        row.read(step, j, count, p, w);
        if (!fresh)
          h_prev = before ? load_units(before + j, count) : load_units(s.h0 + b * s.H + j, count);
        const V dh = load(state + (j - first)) + load_units(s.dh + step * s.H + j, count);
        const V a = Unit::gradient(p, w, fresh, h_prev, dh, dp, dw);
        store(state + (j - first), fresh ? V{} : a * dh);
        unrolled<Unit::WEIGHTS>([&](auto k) RNNATTN_LAMBDA {
          float* sum = weights + k * channels + (j - first);
          store(sum, load(sum) + dw[k]);
        });
      }
      unrolled<Unit::BLOCKS>([&](auto k) RNNATTN_LAMBDA {
        store_units(s.dp[k].data + step * s.dp[k].stride + j, dp[k], count);
      });
    });
  }
  copy(state, past - first, s.dh0 + b * s.H + first);
  for (int64_t k = 0; k < Unit::WEIGHTS; ++k)
    copy(weights + k * channels, past - first, s.dw + (b * Unit::WEIGHTS + k) * s.H + first);
}

// f of the unit of a call, as a constant.
template <class F>
static bool with_unit(LinearUnit unit, F f) {
  switch (unit) {
    case LinearUnit::mingru: return f(MinGru{});
    case LinearUnit::minlstm: return f(MinLstm{});
    case LinearUnit::rglru: return f(RgLru{});
    default: return f(Linear{});
  }
}

template <class Number>
static bool forward(Threads& threads, const LinearScanForward<Number>& s) {
  const Items items = Items::of(s);
  advise_huge_pages(s.h, s.B * s.T * s.H);
  return with_unit(s.unit, [&](auto unit) {
    using Unit = decltype(unit);
    return parallel_for(threads, items.count, s.threads, items.channels,
                        [&](int64_t item, float* workspace) {
                          const int64_t first = item % items.parts * items.channels;
                          const int64_t past = least(first + items.channels, s.H);
                          forward_item<Unit>(s, item / items.parts, first, past, workspace);
                        });
  });
}

template <class Number>
static bool backward(Threads& threads, const LinearScanBackward<Number>& s) {
  const Items items = Items::of(s);
  return with_unit(s.unit, [&](auto unit) {
    using Unit = decltype(unit);
    for (int k = 0; k < Unit::BLOCKS; ++k)
      advise_huge_pages(s.dp[k].data, (s.B * s.T - 1) * s.dp[k].stride + s.H);
    return parallel_for(threads, items.count, s.threads, (1 + Unit::WEIGHTS) * items.channels,
                        [&](int64_t item, float* workspace) {
                          const int64_t first = item % items.parts * items.channels;
                          const int64_t past = least(first + items.channels, s.H);
                          backward_item<Unit>(s, item / items.parts, first, past, workspace,
                                              items.channels);
                        });
  });
}

template <class Number>
static constexpr LinearScanKernels<Number> kernels{forward<Number>, backward<Number>};

}  // namespace rnnattn::RNNATTN_SET::linear
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_LINEAR_INL_H_
