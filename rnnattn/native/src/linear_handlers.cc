// The handlers of linear recurrences.

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "checks.h"
#include "handlers.h"
#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace rnnattn {
namespace {

constexpr int64_t WORK_OF_A_THREAD = 1 << 15;  // numbers that pay for waking another

struct LinearOptions {
  int64_t unit;
  bool reverse, time_major;
  int64_t instruction_set, threads;
};

// How many blocks of p and weights a unit has, in the order of LinearUnit.
constexpr int64_t BLOCKS[] = {2, 2, 3, 3}, WEIGHTS[] = {0, 2, 3, 3};

// The blocks of a unit, one after the other, each as wide as the state, in one to three arrays.
template <class Number>
void split(Checks& checks, const char* name, const LinearScan<std::remove_const_t<Number>>& p,
           Block<Number>* blocks, std::initializer_list<Buffer> arrays) {
  const int64_t outer = p.time_major ? p.T : p.B, inner = p.time_major ? p.B : p.T;
  int64_t count = 0;
  for (const Buffer& array : arrays) {
    if (array.element_count() == 0) continue;
    checks.require(array.dimensions().size() == 3, name, "another rank than 3");
    if (checks.error()) return;
    const int64_t width = array.dimensions()[2], end = count + width / p.H;
    checks.require(width % p.H == 0 && end <= LINEAR_BLOCKS, name, "another shape than expected");
    Number* data = checks.data<Number>(name, array, {outer, inner, width});
    if (checks.error()) return;
    for (int64_t k = count; k < end; ++k) blocks[k] = {data + (k - count) * p.H, width};
    count = end;
  }
  checks.require(count == BLOCKS[static_cast<int64_t>(p.unit)], name, "other blocks than a unit's");
}

template <class Number>
void fill(Checks& checks, LinearScan<Number>& p, ffi::ThreadPool pool, Buffer first, Buffer second,
          Buffer third, Buffer w, Buffer h0, Buffer valid, Buffer fresh,
          const LinearOptions& options) {
  checks.require(options.unit >= 0 && options.unit < 4, "unit", "unknown");
  checks.require(first.dimensions().size() == 3, "p", "another rank than 3");
  checks.require(h0.dimensions().size() == 2, "h0", "another rank than 2");
  checks.require(first.element_count() > 0 && h0.element_count() > 0, "p, h0", "empty");
  if (checks.error()) return;
  p.unit = static_cast<LinearUnit>(options.unit);
  p.reverse = options.reverse;
  p.time_major = options.time_major;
  p.B = h0.dimensions()[0], p.H = h0.dimensions()[1];
  p.T = first.dimensions()[options.time_major ? 0 : 1];
  split<const Number>(checks, "p", p, p.p, {first, second, third});
  p.w = checks.optional<const float>("w", w, {WEIGHTS[options.unit], p.H});
  checks.require(p.w || WEIGHTS[options.unit] == 0, "w", "another shape than expected");
  p.h0 = checks.data<const float>("h0", h0, {p.B, p.H});
  const int64_t outer = p.time_major ? p.T : p.B, inner = p.time_major ? p.B : p.T;
  p.valid = checks.optional<const uint8_t>("valid", valid, {outer, inner});
  p.fresh = checks.optional<const uint8_t>("fresh", fresh, {outer, inner});
  p.threads = threads_for(pool, options.threads, p.B * p.T * p.H, WORK_OF_A_THREAD);
}

template <class Number>
ffi::Error forward_of(ffi::ThreadPool pool, Buffer first, Buffer second, Buffer third, Buffer w,
                      Buffer h0, Buffer valid, Buffer fresh, Result h, Result h_last,
                      LinearOptions options) {
  Checks checks;
  LinearScanForward<Number> p{};
  fill(checks, p, pool, first, second, third, w, h0, valid, fresh, options);
  const int64_t outer = p.time_major ? p.T : p.B, inner = p.time_major ? p.B : p.T;
  p.h = checks.data<Number>("h", *h, {outer, inner, p.H});
  p.h_last = checks.data<float>("h_last", *h_last, {p.B, p.H});
  return run(
      "linear recurrence", [](const Kernels& of) { return of.linear(Number{}).forward; }, checks,
      pool, options, p);
}

template <class Number>
ffi::Error backward_of(ffi::ThreadPool pool, Buffer first, Buffer second, Buffer third, Buffer w,
                       Buffer h0, Buffer valid, Buffer fresh, Buffer h, Buffer dh, Buffer dh_last,
                       Result dfirst, Result dsecond, Result dthird, Result dw, Result dh0,
                       LinearOptions options) {
  Checks checks;
  LinearScanBackward<Number> p{};
  fill(checks, p, pool, first, second, third, w, h0, valid, fresh, options);
  const int64_t outer = p.time_major ? p.T : p.B, inner = p.time_major ? p.B : p.T;
  p.h = checks.data<const Number>("h", h, {outer, inner, p.H});
  p.dh = checks.data<const Number>("dh", dh, {outer, inner, p.H});
  p.dh_last = checks.data<const float>("dh_last", dh_last, {p.B, p.H});
  if (!checks.error()) split<Number>(checks, "dp", p, p.dp, {*dfirst, *dsecond, *dthird});
  if (p.w) p.dw = checks.data<float>("dw", *dw, {p.B, WEIGHTS[options.unit], p.H});
  p.dh0 = checks.data<float>("dh0", *dh0, {p.B, p.H});
  return run(
      "linear recurrence", [](const Kernels& of) { return of.linear(Number{}).backward; }, checks,
      pool, options, p);
}

constexpr auto linear_forward = [](ffi::ThreadPool pool, Buffer first, auto... others) {
  const auto of = [](auto number, auto... all) { return forward_of<decltype(number)>(all...); };
  return by_dtype(of, pool, first, others...);
};

constexpr auto linear_backward = [](ffi::ThreadPool pool, Buffer first, auto... others) {
  const auto of = [](auto number, auto... all) { return backward_of<decltype(number)>(all...); };
  return by_dtype(of, pool, first, others...);
};

}  // namespace
}  // namespace rnnattn

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(rnnattn::LinearOptions,
                                      xla::ffi::StructMember<int64_t>("unit"),
                                      xla::ffi::StructMember<bool>("reverse"),
                                      xla::ffi::StructMember<bool>("time_major"),
                                      xla::ffi::StructMember<int64_t>("instruction_set"),
                                      xla::ffi::StructMember<int64_t>("threads"));

namespace rnnattn {
namespace {

// What the steps read, the weights, the initial state and the masks, in the order of `fill`.
auto linear_arguments() { return arguments<7>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(rnnattn_linear_forward, linear_forward,
                              results<2>(linear_arguments()).Attrs<LinearOptions>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(rnnattn_linear_backward, linear_backward,
                              results<5>(arguments<3>(linear_arguments())).Attrs<LinearOptions>());

}  // namespace rnnattn
