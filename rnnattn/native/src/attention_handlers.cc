// The handlers of attention.

#include <cstdint>

#include "checks.h"
#include "handlers.h"
#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace rnnattn {
namespace {

struct AttentionOptions {
  bool is_causal;
  int64_t left, right;
  float soft_cap;
  int64_t instruction_set, threads;
};

template <class Arguments>
void fill_pages(Checks& checks, Arguments& p, Buffer pages, int64_t count, int64_t page_size) {
  checks.require(pages.dimensions().size() == 2, "pages", "another rank than 2");
  checks.require(page_size > 0 && page_size % PAGE_KEYS == 0, "key", "pages of an odd size");
  if (checks.error()) return;
  p.P = count, p.page_size = page_size, p.pages_of_row = pages.dimensions()[1];
  p.S = p.pages_of_row * p.page_size;
  p.pages = checks.data<const int32_t>("pages", pages, {p.B, p.pages_of_row});
  if (checks.error()) return;
  for (int64_t i = 0; i < p.B * p.pages_of_row; ++i)
    checks.require(0 <= p.pages[i] && p.pages[i] < p.P, "pages", "a page that there is not");
}

// What a logit grows by, by distance: the row of a query begins one number before the last one's.
OfLogits<const float> of_distances(Checks& checks, Buffer given, const Attention& p) {
  const int64_t distances = p.T + p.S - 1;
  OfLogits<const float> of =
      checks.of_logits<const float>("by_distance", given, {p.B, p.M, p.G, 1, distances});
  if (!of.data) return of;
  checks.require(given.dimensions()[4] == distances, "by_distance", "too few distances");
  of.data += p.T - 1;
  of.t = -1;
  return of;
}

template <class Number, class Arguments>
void fill(Checks& checks, Arguments& p, Buffer query, Buffer key, Buffer value, Buffer scale,
          Buffer bias, Buffer mask, Buffer offset, Buffer query_lengths, Buffer key_lengths,
          Buffer query_segments, Buffer key_segments, Buffer key_ranges, Buffer by_distance,
          const AttentionOptions& options, const Buffer* pages = nullptr) {
  checks.require(query.dimensions().size() == 4, "query", "another rank than 4");
  checks.require(key.dimensions().size() == 4, "key", "another rank than 4");
  checks.require(value.dimensions().size() == 4, "value", "another rank than 4");
  if (checks.error()) return;
  const auto q = query.dimensions();
  const auto keys = key.dimensions();
  checks.require(keys[2] > 0 && q[2] % keys[2] == 0, "query", "heads that keys do not divide");
  if (checks.error()) return;
  p.B = q[0], p.T = q[1], p.M = keys[2], p.G = q[2] / keys[2], p.K = q[3];
  p.S = keys[1], p.V = value.dimensions()[3];
  if (pages) fill_pages(checks, p, *pages, keys[0], keys[1]);
  if (checks.error()) return;
  checks.require(query.element_count() > 0 && p.S > 0 && p.V > 0, "query, key, value", "empty");
  checks.require(p.T < INT32_MAX && p.S < INT32_MAX, "query, key", "too long");
  p.query = checks.data<const Number>("query", query, {p.B, p.T, p.M * p.G, p.K});
  const int64_t rows = pages ? p.P : p.B, of_row = pages ? p.page_size : p.S;
  p.key = checks.data<const Number>("key", key, {rows, of_row, p.M, p.K});
  p.value = checks.data<const Number>("value", value, {rows, of_row, p.M, p.V});
  checks.require(scale.element_count() > 0, "scale", "empty");
  p.scale = checks.of_logits<const float>("scale", scale, {p.B, p.M, p.G, 1, 1});
  p.bias = checks.of_logits<const float>("bias", bias, {p.B, p.M, p.G, p.T, p.S});
  p.mask = checks.of_logits<const uint8_t>("mask", mask, {p.B, p.M, p.G, p.T, p.S});
  p.offset_stride = offset.element_count() == 1 ? 0 : 1;
  p.offset = checks.data<const int32_t>("offset", offset, {p.offset_stride ? p.B : 1});
  p.query_lengths = checks.optional<const int32_t>("query_lengths", query_lengths, {p.B});
  p.key_lengths = checks.optional<const int32_t>("key_lengths", key_lengths, {p.B});
  p.query_segments = checks.optional<const int32_t>("query_segments", query_segments, {p.B, p.T});
  p.key_segments = checks.optional<const int32_t>("key_segments", key_segments, {p.B, p.S});
  checks.require(!p.query_segments == !p.key_segments, "segments", "one without the other");
  p.key_ranges = checks.optional<const int32_t>("key_ranges", key_ranges, {p.B, p.T, 2});
  p.by_distance = of_distances(checks, by_distance, p);
  p.is_causal = options.is_causal;
  p.left = options.left, p.right = options.right;
  p.soft_cap = options.soft_cap;
}

template <class Number>
ffi::Error forward_over(const Buffer* pages, ffi::ThreadPool pool, Buffer query, Buffer key,
                        Buffer value, Buffer scale, Buffer bias, Buffer mask, Buffer offset,
                        Buffer query_lengths, Buffer key_lengths, Buffer query_segments,
                        Buffer key_segments, Buffer key_ranges, Buffer by_distance, Buffer sinks,
                        Result o, Result lse, AttentionOptions options) {
  Checks checks;
  AttentionForward<Number> p{};
  fill<Number>(checks, p, query, key, value, scale, bias, mask, offset, query_lengths, key_lengths,
               query_segments, key_segments, key_ranges, by_distance, options, pages);
  p.sinks = checks.optional<const float>("sinks", sinks, {1, p.M, p.G, 1});
  if (o->element_type() == ffi::F32)
    p.o = checks.data<float>("o", *o, {p.B, p.T, p.M * p.G, p.V});
  else
    p.narrow_o = checks.data<Number>("o", *o, {p.B, p.T, p.M * p.G, p.V});
  p.lse = checks.data<float>("lse", *lse, {p.B, p.M, p.G, p.T});
  return run(
      "an attention", [](const Kernels& of) { return of.attention(Number{}).forward; }, checks,
      pool, options, p);
}

template <class Number>
ffi::Error paged_forward_of(ffi::ThreadPool pool, Buffer query, Buffer key, Buffer value,
                            Buffer scale, Buffer bias, Buffer mask, Buffer offset,
                            Buffer query_lengths, Buffer key_lengths, Buffer query_segments,
                            Buffer key_segments, Buffer key_ranges, Buffer by_distance,
                            Buffer sinks, Buffer pages, Result o, Result lse,
                            AttentionOptions options) {
  return forward_over<Number>(&pages, pool, query, key, value, scale, bias, mask, offset,
                              query_lengths, key_lengths, query_segments, key_segments, key_ranges,
                              by_distance, sinks, o, lse, options);
}

template <class Number>
ffi::Error backward_of(ffi::ThreadPool pool, Buffer query, Buffer key, Buffer value, Buffer scale,
                       Buffer bias, Buffer mask, Buffer offset, Buffer query_lengths,
                       Buffer key_lengths, Buffer query_segments, Buffer key_segments,
                       Buffer key_ranges, Buffer by_distance, Buffer o, Buffer lse, Buffer d_o,
                       Buffer dlse, Result dq, Result dk, Result dv, Result dbias,
                       Result d_by_distance, AttentionOptions options) {
  Checks checks;
  AttentionBackward<Number> p{};
  fill<Number>(checks, p, query, key, value, scale, bias, mask, offset, query_lengths, key_lengths,
               query_segments, key_segments, key_ranges, by_distance, options);
  p.o = checks.data<const float>("o", o, {p.B, p.T, p.M * p.G, p.V});
  p.lse = checks.data<const float>("lse", lse, {p.B, p.M, p.G, p.T});
  p.d_o = checks.data<const Number>("do", d_o, {p.B, p.T, p.M * p.G, p.V});
  p.dlse = checks.data<const float>("dlse", dlse, {p.B, p.M, p.G, p.T});
  p.dq = checks.data<Number>("dq", *dq, {p.B, p.T, p.M * p.G, p.K});
  p.dk = checks.data<Number>("dk", *dk, {p.B, p.S, p.M, p.K});
  p.dv = checks.data<Number>("dv", *dv, {p.B, p.S, p.M, p.V});
  p.dbias = checks.of_logits<float>("dbias", *dbias, {p.B, p.M, p.G, p.T, p.S});
  p.dbias_size = dbias->element_count();
  p.d_by_distance =
      checks.optional<float>("d_by_distance", *d_by_distance, {p.B, p.M, p.G, 1, p.T + p.S - 1});
  return run(
      "an attention", [](const Kernels& of) { return of.attention(Number{}).backward; }, checks,
      pool, options, p);
}

constexpr auto attention_forward = [](ffi::ThreadPool pool, Buffer query, auto... others) {
  const auto of = [](auto number, auto... all) {
    return forward_over<decltype(number)>(nullptr, all...);
  };
  return by_dtype(of, pool, query, others...);
};

constexpr auto attention_paged_forward = [](ffi::ThreadPool pool, Buffer query, auto... others) {
  const auto of = [](auto number, auto... all) {
    return paged_forward_of<decltype(number)>(all...);
  };
  return by_dtype(of, pool, query, others...);
};

constexpr auto attention_backward = [](ffi::ThreadPool pool, Buffer query, auto... others) {
  const auto of = [](auto number, auto... all) { return backward_of<decltype(number)>(all...); };
  return by_dtype(of, pool, query, others...);
};

}  // namespace
}  // namespace rnnattn

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(rnnattn::AttentionOptions,
                                      xla::ffi::StructMember<bool>("is_causal"),
                                      xla::ffi::StructMember<int64_t>("left"),
                                      xla::ffi::StructMember<int64_t>("right"),
                                      xla::ffi::StructMember<float>("soft_cap"),
                                      xla::ffi::StructMember<int64_t>("instruction_set"),
                                      xla::ffi::StructMember<int64_t>("threads"));

namespace rnnattn {
namespace {

// The operands and the masking, in the order of `fill`.
auto attention_arguments() { return arguments<13>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    rnnattn_attention_forward, attention_forward,
    results<2>(arguments<1>(attention_arguments())).Attrs<AttentionOptions>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    rnnattn_attention_paged_forward, attention_paged_forward,
    results<2>(arguments<2>(attention_arguments())).Attrs<AttentionOptions>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    rnnattn_attention_backward, attention_backward,
    results<5>(arguments<4>(attention_arguments())).Attrs<AttentionOptions>());

}  // namespace rnnattn
