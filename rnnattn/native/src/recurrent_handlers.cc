// The handlers of the recurrent units.

#include <cstdint>
#include <type_traits>

#include "checks.h"
#include "handlers.h"
#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace rnnattn {
namespace {

constexpr int64_t WORK_OF_A_THREAD = 1 << 21;  // multiply-adds that pay for waking another
constexpr int64_t READING = 16;  // those that take as long as to read a weight and to pack it

struct LstmOptions {
  bool reverse;
  float clip;
  bool coupled;
  int64_t interval, instruction_set, threads;
};

struct GruOptions {
  bool reverse, reset_after;
  int64_t interval, instruction_set, threads;
};

struct RnnOptions {
  bool reverse, relu;
  int64_t interval, instruction_set, threads;
};

// What all units have, but for the rest of the state; G blocks of columns in a weight.
template <class Number, class Options>
void fill(Checks& checks, Recurrent<Number>& p, ffi::ThreadPool pool, int64_t G, Buffer x,
          Buffer w_x, Buffer w_h, Buffer b, Buffer h, Buffer valid, Buffer fresh,
          const Options& options) {
  checks.require(x.dimensions().size() == 3, "x", "another rank than 3");
  checks.require(w_h.dimensions().size() == 2, "w_h", "another rank than 2");
  checks.require(options.interval >= 0, "interval", "negative");
  if (checks.error()) return;
  p.T = x.dimensions()[0], p.B = x.dimensions()[1], p.D = x.dimensions()[2];
  p.R = w_h.dimensions()[0], p.H = w_h.dimensions()[1] / G, p.G = G;
  checks.require(x.element_count() > 0 && w_h.element_count() > 0, "x, w_h", "empty");
  p.x = checks.data<const Number>("x", x, {p.T, p.B, p.D});
  p.w_x = checks.data<const Number>("w_x", w_x, {p.D, G * p.H});
  p.w_h = checks.data<const Number>("w_h", w_h, {p.R, G * p.H});
  p.b = checks.data<const Number>("b", b, {G * p.H});
  p.h = checks.data<const Number>("h", h, {p.B, p.R});
  p.valid = checks.optional<const uint8_t>("valid", valid, {p.T, p.B});
  p.fresh = checks.optional<const uint8_t>("fresh", fresh, {p.T, p.B});
  p.reverse = options.reverse;
  p.interval = options.interval;
  const int64_t work = (p.T * p.B + READING) * (p.D + p.R) * G * p.H;
  p.threads = threads_for(pool, options.threads, work, WORK_OF_A_THREAD);
}

template <class Number>
void fill_lstm(Checks& checks, Recurrent<Number>& p, ffi::ThreadPool pool, Buffer x, Buffer w_x,
               Buffer w_h, Buffer b, Buffer peephole, Buffer projection, Buffer h, Buffer c,
               Buffer valid, Buffer fresh, const LstmOptions& options) {
  fill(checks, p, pool, 4, x, w_x, w_h, b, h, valid, fresh, options);
  p.peephole = checks.optional<const Number>("peephole", peephole, {3, p.H});
  p.projection = checks.optional<const Number>("projection", projection, {p.H, p.R});
  checks.require(p.projection || p.R == p.H, "w_h", "another shape than expected");
  p.c = checks.data<const float>("c", c, {p.B, p.H});
  p.clip = options.clip;
  p.coupled = options.coupled;
}

template <class Number>
void fill_gru(Checks& checks, Recurrent<Number>& p, ffi::ThreadPool pool, Buffer x, Buffer w_x,
              Buffer w_h, Buffer b, Buffer b_n, Buffer h, Buffer valid, Buffer fresh,
              const GruOptions& options) {
  fill(checks, p, pool, 3, x, w_x, w_h, b, h, valid, fresh, options);
  p.b_n = checks.optional<const Number>("b_n", b_n, {p.H});
  checks.require(options.reset_after || !p.b_n, "b_n", "one where the reset is before the product");
  checks.require(options.reset_after || std::is_same_v<Number, float>, "x",
                 "16 bits where the reset is before the product");
  checks.require(p.R == p.H, "w_h", "another shape than expected");
}

void fill_rnn(Checks& checks, Recurrent<float>& p, ffi::ThreadPool pool, Buffer x, Buffer w_x,
              Buffer w_h, Buffer b, Buffer h, Buffer valid, Buffer fresh,
              const RnnOptions& options) {
  fill(checks, p, pool, 1, x, w_x, w_h, b, h, valid, fresh, options);
  checks.require(p.R == p.H, "w_h", "another shape than expected");
  p.relu = options.relu;
}

template <class Number>
int64_t starts_of(const Recurrent<Number>& p) {
  return p.interval ? (p.T - 1) / p.interval + 1 : 0;
}

template <class Number>
ffi::Error lstm_forward_of(ffi::ThreadPool pool, Buffer x, Buffer w_x, Buffer w_h, Buffer b,
                           Buffer peephole, Buffer projection, Buffer h, Buffer c, Buffer valid,
                           Buffer fresh, Result y, Result h_last, Result c_last, Result c_all,
                           Result a, Result h_starts, Result c_starts, LstmOptions options) {
  Checks checks;
  RecurrentForward<Number> p{};
  fill_lstm(checks, p, pool, x, w_x, w_h, b, peephole, projection, h, c, valid, fresh, options);
  p.y = checks.data<Number>("y", *y, {p.T, p.B, p.R});
  p.h_last = checks.data<Number>("h_last", *h_last, {p.B, p.R});
  p.c_last = checks.data<float>("c_last", *c_last, {p.B, p.H});
  p.c_all = checks.optional<float>("c_all", *c_all, {p.T, p.B, p.H});
  p.a = checks.optional<float>("a", *a, {p.T, p.B, 4 * p.H});
  if (p.interval) {
    p.h_starts = checks.data<Number>("h_starts", *h_starts, {starts_of(p), p.B, p.R});
    p.c_starts = checks.data<float>("c_starts", *c_starts, {starts_of(p), p.B, p.H});
  }
  return run(
      "an LSTM", [](const Kernels& of) { return of.lstm(Number{}).forward; }, checks, pool, options,
      p);
}

template <class Number>
ffi::Error lstm_backward_of(ffi::ThreadPool pool, Buffer x, Buffer w_x, Buffer w_h, Buffer b,
                            Buffer peephole, Buffer projection, Buffer h, Buffer c, Buffer valid,
                            Buffer fresh, Buffer y, Buffer c_all, Buffer a, Buffer h_starts,
                            Buffer c_starts, Buffer dy, Buffer dh_last, Buffer dc_last, Result dx,
                            Result dw_x, Result dw_h, Result db, Result dpeephole,
                            Result dprojection, Result dh, Result dc, LstmOptions options) {
  Checks checks;
  RecurrentBackward<Number> p{};
  fill_lstm(checks, p, pool, x, w_x, w_h, b, peephole, projection, h, c, valid, fresh, options);
  if (p.interval) {
    p.h_starts = checks.data<const Number>("h_starts", h_starts, {starts_of(p), p.B, p.R});
    p.c_starts = checks.data<const float>("c_starts", c_starts, {starts_of(p), p.B, p.H});
  } else {
    p.y = checks.data<const Number>("y", y, {p.T, p.B, p.R});
    p.c_all = checks.data<const float>("c_all", c_all, {p.T, p.B, p.H});
    p.a = checks.optional<const float>("a", a, {p.T, p.B, 4 * p.H});
  }
  p.dy = checks.data<const Number>("dy", dy, {p.T, p.B, p.R});
  p.dh_last = checks.data<const Number>("dh_last", dh_last, {p.B, p.R});
  p.dc_last = checks.data<const float>("dc_last", dc_last, {p.B, p.H});
  p.dx = checks.data<Number>("dx", *dx, {p.T, p.B, p.D});
  p.dw_x = checks.data<Number>("dw_x", *dw_x, {p.D, 4 * p.H});
  p.dw_h = checks.data<Number>("dw_h", *dw_h, {p.R, 4 * p.H});
  p.db = checks.data<Number>("db", *db, {4 * p.H});
  if (p.peephole) p.dpeephole = checks.data<Number>("dpeephole", *dpeephole, {3, p.H});
  if (p.projection) p.dprojection = checks.data<Number>("dprojection", *dprojection, {p.H, p.R});
  p.dh = checks.data<Number>("dh", *dh, {p.B, p.R});
  p.dc = checks.data<float>("dc", *dc, {p.B, p.H});
  return run(
      "an LSTM", [](const Kernels& of) { return of.lstm(Number{}).backward; }, checks, pool,
      options, p);
}

// What is given out by units whose state is h alone; `a` of so many gates.
template <class Number>
void fill_results(Checks& checks, RecurrentForward<Number>& p, int64_t gates, Result y,
                  Result h_last, Result a, Result h_starts) {
  p.y = checks.data<Number>("y", *y, {p.T, p.B, p.H});
  p.h_last = checks.data<Number>("h_last", *h_last, {p.B, p.H});
  p.a = checks.optional<float>("a", *a, {p.T, p.B, gates * p.H});
  if (p.interval) p.h_starts = checks.data<Number>("h_starts", *h_starts, {starts_of(p), p.B, p.H});
}

// What was kept of them, what comes back, and what is made of it.
template <class Number>
void fill_gradient(Checks& checks, RecurrentBackward<Number>& p, int64_t gates, Buffer y, Buffer a,
                   Buffer h_starts, Buffer dy, Buffer dh_last, Result dx, Result dw_x, Result dw_h,
                   Result db, Result dh) {
  if (p.interval) {
    p.h_starts = checks.data<const Number>("h_starts", h_starts, {starts_of(p), p.B, p.H});
  } else {
    p.y = checks.data<const Number>("y", y, {p.T, p.B, p.H});
    p.a = checks.optional<const float>("a", a, {p.T, p.B, gates * p.H});
  }
  p.dy = checks.data<const Number>("dy", dy, {p.T, p.B, p.H});
  p.dh_last = checks.data<const Number>("dh_last", dh_last, {p.B, p.H});
  p.dx = checks.data<Number>("dx", *dx, {p.T, p.B, p.D});
  p.dw_x = checks.data<Number>("dw_x", *dw_x, {p.D, p.G * p.H});
  p.dw_h = checks.data<Number>("dw_h", *dw_h, {p.H, p.G * p.H});
  p.db = checks.data<Number>("db", *db, {p.G * p.H});
  p.dh = checks.data<Number>("dh", *dh, {p.B, p.H});
}

template <class Number>
const RecurrentKernels<Number>& gru_kernels(const Kernels& of, const GruOptions& options) {
  if constexpr (std::is_same_v<Number, float>)
    if (!options.reset_after) return of.gru_before;
  return of.gru(Number{});
}
int64_t gates_of(const GruOptions& options) { return options.reset_after ? 4 : 3; }

template <class Number>
ffi::Error gru_forward_of(ffi::ThreadPool pool, Buffer x, Buffer w_x, Buffer w_h, Buffer b,
                          Buffer b_n, Buffer h, Buffer valid, Buffer fresh, Result y, Result h_last,
                          Result a, Result h_starts, GruOptions options) {
  Checks checks;
  RecurrentForward<Number> p{};
  fill_gru(checks, p, pool, x, w_x, w_h, b, b_n, h, valid, fresh, options);
  fill_results(checks, p, gates_of(options), y, h_last, a, h_starts);
  return run(
      "a GRU", [&](const Kernels& of) { return gru_kernels<Number>(of, options).forward; }, checks,
      pool, options, p);
}

template <class Number>
ffi::Error gru_backward_of(ffi::ThreadPool pool, Buffer x, Buffer w_x, Buffer w_h, Buffer b,
                           Buffer b_n, Buffer h, Buffer valid, Buffer fresh, Buffer y, Buffer a,
                           Buffer h_starts, Buffer dy, Buffer dh_last, Result dx, Result dw_x,
                           Result dw_h, Result db, Result db_n, Result dh, GruOptions options) {
  Checks checks;
  RecurrentBackward<Number> p{};
  fill_gru(checks, p, pool, x, w_x, w_h, b, b_n, h, valid, fresh, options);
  fill_gradient(checks, p, gates_of(options), y, a, h_starts, dy, dh_last, dx, dw_x, dw_h, db, dh);
  if (p.b_n) p.db_n = checks.data<Number>("db_n", *db_n, {p.H});
  return run(
      "a GRU", [&](const Kernels& of) { return gru_kernels<Number>(of, options).backward; }, checks,
      pool, options, p);
}

ffi::Error rnn_forward(ffi::ThreadPool pool, Buffer x, Buffer w_x, Buffer w_h, Buffer b, Buffer h,
                       Buffer valid, Buffer fresh, Result y, Result h_last, Result a,
                       Result h_starts, RnnOptions options) {
  Checks checks;
  RecurrentForward<float> p{};
  fill_rnn(checks, p, pool, x, w_x, w_h, b, h, valid, fresh, options);
  fill_results(checks, p, 1, y, h_last, a, h_starts);
  return run("an RNN", [](const Kernels& of) { return of.rnn.forward; }, checks, pool, options, p);
}

ffi::Error rnn_backward(ffi::ThreadPool pool, Buffer x, Buffer w_x, Buffer w_h, Buffer b, Buffer h,
                        Buffer valid, Buffer fresh, Buffer y, Buffer a, Buffer h_starts, Buffer dy,
                        Buffer dh_last, Result dx, Result dw_x, Result dw_h, Result db, Result dh,
                        RnnOptions options) {
  Checks checks;
  RecurrentBackward<float> p{};
  fill_rnn(checks, p, pool, x, w_x, w_h, b, h, valid, fresh, options);
  fill_gradient(checks, p, 1, y, a, h_starts, dy, dh_last, dx, dw_x, dw_h, db, dh);
  return run("an RNN", [](const Kernels& of) { return of.rnn.backward; }, checks, pool, options, p);
}

constexpr auto lstm_forward = [](ffi::ThreadPool pool, Buffer x, auto... others) {
  const auto of = [](auto number, auto... all) {
    return lstm_forward_of<decltype(number)>(all...);
  };
  return by_dtype(of, pool, x, others...);
};

constexpr auto lstm_backward = [](ffi::ThreadPool pool, Buffer x, auto... others) {
  const auto of = [](auto number, auto... all) {
    return lstm_backward_of<decltype(number)>(all...);
  };
  return by_dtype(of, pool, x, others...);
};

constexpr auto gru_forward = [](ffi::ThreadPool pool, Buffer x, auto... others) {
  const auto of = [](auto number, auto... all) { return gru_forward_of<decltype(number)>(all...); };
  return by_dtype(of, pool, x, others...);
};

constexpr auto gru_backward = [](ffi::ThreadPool pool, Buffer x, auto... others) {
  const auto of = [](auto number, auto... all) {
    return gru_backward_of<decltype(number)>(all...);
  };
  return by_dtype(of, pool, x, others...);
};

}  // namespace
}  // namespace rnnattn

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(rnnattn::LstmOptions, xla::ffi::StructMember<bool>("reverse"),
                                      xla::ffi::StructMember<float>("clip"),
                                      xla::ffi::StructMember<bool>("coupled"),
                                      xla::ffi::StructMember<int64_t>("interval"),
                                      xla::ffi::StructMember<int64_t>("instruction_set"),
                                      xla::ffi::StructMember<int64_t>("threads"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(rnnattn::GruOptions, xla::ffi::StructMember<bool>("reverse"),
                                      xla::ffi::StructMember<bool>("reset_after"),
                                      xla::ffi::StructMember<int64_t>("interval"),
                                      xla::ffi::StructMember<int64_t>("instruction_set"),
                                      xla::ffi::StructMember<int64_t>("threads"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(rnnattn::RnnOptions, xla::ffi::StructMember<bool>("reverse"),
                                      xla::ffi::StructMember<bool>("relu"),
                                      xla::ffi::StructMember<int64_t>("interval"),
                                      xla::ffi::StructMember<int64_t>("instruction_set"),
                                      xla::ffi::StructMember<int64_t>("threads"));

namespace rnnattn {
namespace {

// The weights, the sequence and the initial state, in the order of `fill_lstm` and the others.
auto lstm_arguments() { return arguments<10>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()); }
auto gru_arguments() { return arguments<8>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()); }
auto rnn_arguments() { return arguments<7>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(rnnattn_lstm_forward, lstm_forward,
                              results<7>(lstm_arguments()).Attrs<LstmOptions>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(rnnattn_lstm_backward, lstm_backward,
                              results<8>(arguments<8>(lstm_arguments())).Attrs<LstmOptions>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(rnnattn_gru_forward, gru_forward,
                              results<4>(gru_arguments()).Attrs<GruOptions>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(rnnattn_gru_backward, gru_backward,
                              results<6>(arguments<5>(gru_arguments())).Attrs<GruOptions>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(rnnattn_rnn_forward, rnn_forward,
                              results<4>(rnn_arguments()).Attrs<RnnOptions>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(rnnattn_rnn_backward, rnn_backward,
                              results<5>(arguments<5>(rnn_arguments())).Attrs<RnnOptions>());

}  // namespace rnnattn
