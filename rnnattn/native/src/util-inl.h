// What every kernel needs: loops over constants and over work items, and a little arithmetic.

#ifndef RNNATTN_UTIL_INL_H_
#define RNNATTN_UTIL_INL_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "instruction_set.h"
#include "threads.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET {

#define RNNATTN_INLINE static inline __attribute__((always_inline))
#define RNNATTN_LAMBDA __attribute__((always_inline))
#define RNNATTN_METHOD __attribute__((always_inline))

// The smaller and the larger: those of the standard library are templates, see instruction_set.h.
RNNATTN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
RNNATTN_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
RNNATTN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Number>
RNNATTN_INLINE void zero(Number* to, int64_t n) {
  std::memset(static_cast<void*>(to), 0, sizeof(Number) * static_cast<size_t>(n));
}
RNNATTN_INLINE void copy(const float* from, int64_t n, float* to) {
  std::memcpy(to, from, sizeof(float) * static_cast<size_t>(n));
}

// [first, past).
struct Range {
  int64_t first, past;
};

// f of 0 … count − 1, as constants: so that compilers keep arrays of vectors in registers.
template <class F, int... i>
RNNATTN_INLINE void unrolled(F f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>{}), ...);
}
template <int count, class F>
RNNATTN_INLINE void unrolled(F f) {
  unrolled(f, std::make_integer_sequence<int, count>{});
}

// f of n as a constant, and of LIMIT for any larger n.
template <int LIMIT, class F>
RNNATTN_INLINE void as_constant(int64_t n, F f) {
  if constexpr (LIMIT > 1)
    if (n < LIMIT) return as_constant<LIMIT - 1>(n, f);
  f(std::integral_constant<int, LIMIT>{});
}

// f(item, workspace) for every item, see Threads::run.
template <class F>
static bool parallel_for(Threads& threads, int64_t items, int64_t limit, int64_t floats, F f) {
  return threads.run(
      items, limit, floats,
      [](void* of, int64_t item, float* workspace) { (*static_cast<F*>(of))(item, workspace); },
      &f);
}

// f(round, member, members) for every round, see Threads::run_rounds.
template <class F>
static void over_rounds(Threads& threads, int64_t rounds, int64_t limit, F f) {
  threads.run_rounds(
      rounds, limit,
      [](void* of, int64_t round, int64_t member, int64_t members) {
        (*static_cast<F*>(of))(round, member, members);
      },
      &f);
}

}  // namespace rnnattn::RNNATTN_SET
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_UTIL_INL_H_
