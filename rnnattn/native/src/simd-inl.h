// The vector type of an instruction set, by its lanes: 16 (AVX-512), 8 (AVX2 and FMA), 4 (what
// every x86-64 or aarch64 has).
//
// Vector extensions of GCC and Clang, and intrinsics only where these have no expression for it.

#ifndef RNNATTN_SIMD_INL_H_
#define RNNATTN_SIMD_INL_H_

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "instruction_set.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET {

constexpr int W = RNNATTN_LANES;

using V = float __attribute__((vector_size(4 * W)));
using Integers = int32_t __attribute__((vector_size(4 * W)));

// x − 0 is x for every x, and so compiles to a broadcast.
RNNATTN_INLINE V splat(float x) { return x - V{}; }

// Of any alignment; a vector type of less alignment would say so too, but not to every compiler.
RNNATTN_INLINE V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
RNNATTN_INLINE void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }

// A vector that several products read is to be read from memory once. Compilers would read it again
// for each where these are three or fewer, as such an instruction may have one operand in memory.
template <class Vector>
RNNATTN_INLINE void keep_in_register(Vector& v) {
#if RNNATTN_LANES == 16
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#else
  (void)v;
#endif
}

// a b + c, contracted where the target has a fused multiply-add.
RNNATTN_INLINE V fma(V a, V b, V c) { return a * b + c; }

// Of which lanes something holds: the first n; and a of these, b of the others.
#if RNNATTN_LANES == 16
using Lanes = __mmask16;
RNNATTN_INLINE Lanes first_lanes(int64_t n) { return static_cast<Lanes>((1u << n) - 1); }
RNNATTN_INLINE V where(Lanes holds, V a, V b) { return _mm512_mask_blend_ps(holds, b, a); }
#else
using Lanes = Integers;
template <int... lane>
RNNATTN_INLINE Lanes first_lanes(int32_t n, std::integer_sequence<int, lane...>) {
  return Integers{lane...} < n;
}
RNNATTN_INLINE Lanes first_lanes(int64_t n) {
  return first_lanes(static_cast<int32_t>(n), std::make_integer_sequence<int, W>{});
}
RNNATTN_INLINE V where(Lanes holds, V a, V b) { return holds ? a : b; }
#endif

#if RNNATTN_LANES == 16

// The larger and the smaller; b where either is NaN.
RNNATTN_INLINE V max(V a, V b) { return _mm512_maskz_max_ps(0xffff, a, b); }
RNNATTN_INLINE V min(V a, V b) { return _mm512_maskz_min_ps(0xffff, a, b); }
RNNATTN_INLINE V sqrt(V x) { return _mm512_maskz_sqrt_ps(0xffff, x); }

// The first n lanes, zero behind them; and to the first n places only.
RNNATTN_INLINE V load(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
RNNATTN_INLINE void store(float* p, V v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }

// y 2ⁿ, n rounded down, of any size.
RNNATTN_INLINE V scale_by_power(V y, V n) { return _mm512_maskz_scalef_ps(0xffff, y, n); }

// Which of the first n bytes are not 0, which of the first n numbers are x.
RNNATTN_INLINE Lanes nonzero(const uint8_t* p, int n) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(n), p);
  return _mm_test_epi8_mask(bytes, bytes);
}
RNNATTN_INLINE Lanes equal(const int32_t* p, int n, int32_t x) {
  const Lanes some = first_lanes(n);
  return _mm512_mask_cmpeq_epi32_mask(some, _mm512_maskz_loadu_epi32(some, p),
                                      _mm512_set1_epi32(x));
}

#elif RNNATTN_LANES == 8

RNNATTN_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
RNNATTN_INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
RNNATTN_INLINE V sqrt(V x) { return _mm256_sqrt_ps(x); }

RNNATTN_INLINE V load(const float* p, int n) {
  return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(first_lanes(n)));
}
RNNATTN_INLINE void store(float* p, V v, int n) {
  _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(first_lanes(n)), v);
}

#else

RNNATTN_INLINE V max(V a, V b) { return a > b ? a : b; }
RNNATTN_INLINE V min(V a, V b) { return a < b ? a : b; }
RNNATTN_INLINE V sqrt(V x) {
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

RNNATTN_INLINE V load(const float* p, int n) {
  V v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
RNNATTN_INLINE void store(float* p, V v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}

#endif

#if RNNATTN_LANES != 16

// W numbers, of which the first n are those from p on.
template <class Number>
RNNATTN_INLINE auto load_some(const Number* p, int n) {
  Number __attribute__((vector_size(W * sizeof(Number)))) x{};
  if (n == W)
    __builtin_memcpy(&x, p, sizeof x);
  else
    for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
RNNATTN_INLINE Lanes nonzero(const uint8_t* p, int n) {
#if RNNATTN_LANES == 8
  // of a conversion of the vector the compiler makes one of each byte
  const __m128i bytes = _mm_cvtsi64_si128(reinterpret_cast<int64_t>(load_some(p, n)));
  return reinterpret_cast<Integers>(_mm256_cvtepu8_epi32(bytes)) != 0;
#else
  return __builtin_convertvector(load_some(p, n), Integers) != 0;
#endif
}
RNNATTN_INLINE Lanes equal(const int32_t* p, int n, int32_t x) { return load_some(p, n) == x; }

// y 2ⁿ for whole n in [−252, 254]: two factors, so that neither leaves the normal numbers.
RNNATTN_INLINE V scale_by_power(V y, V n) {
  Integers power = __builtin_convertvector(n, Integers), half = power >> 1;
  Integers first = (half + 127) << 23, second = (power - half + 127) << 23;
  return y * reinterpret_cast<V>(first) * reinterpret_cast<V>(second);
}

#endif

// eˣ within 1 ulp or so: 0 from −104 down, ∞ from 88.73 up, NaN of NaN.
//
// x = n s + r with |r| ≤ ½ s for whole n; added to 1.5 · 2²³, n is rounded, as no bits are left for
// a fraction. The step s is ln 2, or a sixteenth of it where one instruction looks up the sixteen
// powers of 2^(1/16): a shorter polynomial is as near then.
#if RNNATTN_LANES == 16
RNNATTN_INLINE V exp(V x) {
  constexpr V ROOTS = {1.0f,          1.0442737824f, 1.0905077327f, 1.1387886348f,
                       1.1892071150f, 1.2418578121f, 1.2968395547f, 1.3542555469f,
                       1.4142135624f, 1.4768261459f, 1.5422108254f, 1.6104903320f,
                       1.6817928305f, 1.7562521604f, 1.8340080864f, 1.9152065614f};
  x = min(splat(89.0f), max(splat(-105.0f), x));
  constexpr float rounds = 12582912.0f;
  const V rounded = fma(x, splat(16 * 1.44269504f), splat(rounds)), n = rounded - rounds;
  V r = fma(n, splat(-0.693359375f / 16), x);
  r = fma(n, splat(2.12194440e-4f / 16), r);
  const V less_one = fma(fma(splat(1.0f / 6), r, splat(0.5f)), r * r, r);
  // by the last four bits of n
  const V root = _mm512_maskz_permutexvar_ps(0xffff, reinterpret_cast<__m512i>(rounded), ROOTS);
  return scale_by_power(fma(root, less_one, root), n / 16);
}
#else
RNNATTN_INLINE V exp(V x) {
  x = min(splat(89.0f), max(splat(-105.0f), x));
  constexpr float rounds = 12582912.0f;
  V n = fma(x, splat(1.44269504f), splat(rounds)) - rounds;
  V r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  V p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  return scale_by_power(p, n);
}
#endif

// tanh x within 6 ulp, a quotient of polynomials in x² (that of XLA and Eigen).
RNNATTN_INLINE V tanh(V x) {
  V z = min(splat(7.90531110763549805f), max(splat(-7.90531110763549805f), x)), y = z * z;
  V p = splat(-2.76076847742355e-16f);
  p = fma(p, y, splat(2.00018790482477e-13f));
  p = fma(p, y, splat(-8.60467152213735e-11f));
  p = fma(p, y, splat(5.12229709037114e-08f));
  p = fma(p, y, splat(1.48572235717979e-05f));
  p = fma(p, y, splat(6.37261928875436e-04f));
  p = fma(p, y, splat(4.89352455891786e-03f));
  V q = splat(1.19825839466702e-06f);
  q = fma(q, y, splat(1.18534705686654e-04f));
  q = fma(q, y, splat(2.26843463243900e-03f));
  q = fma(q, y, splat(4.89352518554385e-03f));
  return z * p / q;
}

// ½ + ½ tanh ½x.
RNNATTN_INLINE V sigmoid(V x) { return fma(splat(0.5f), tanh(0.5f * x), splat(0.5f)); }

// Lanes of two vectors, those of the second behind those of the first.
template <int... lane>
RNNATTN_INLINE V lanes_of(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane...);
#else
  return __builtin_shuffle(a, b, Integers{lane...});
#endif
}

// The lanes of a vector, each in the place of that `by` of its bits away.
template <int by, int... lane>
RNNATTN_INLINE V swapped(V v, std::integer_sequence<int, lane...>) {
  return lanes_of<(lane ^ by)...>(v, v);
}
// Of all lanes, halves first: one order for one instruction set.
template <int half = W / 2>
RNNATTN_INLINE float sum(V v) {
  v += swapped<half>(v, std::make_integer_sequence<int, W>{});
  if constexpr (half > 1) return sum<half / 2>(v);
  return v[0];
}

// Of two rows, every other `half` lanes of the first for those before them of the second.
template <int half, int... lane>
RNNATTN_INLINE void exchange(V& x, V& y, std::integer_sequence<int, lane...>) {
  const V a = x, b = y;
  x = lanes_of<(lane & half ? lane - half + W : lane)...>(a, b);
  y = lanes_of<(lane & half ? lane + W : lane + half)...>(a, b);
}

// `n` lanes of v from `first` on, zeros behind them; and these in the place of those of another.
template <int first, int n, int... lane>
RNNATTN_INLINE V get_lanes(V v, std::integer_sequence<int, lane...>) {
  return lanes_of<(lane < n ? first + lane : W + lane)...>(v, V{});
}
template <int first, int n, int... lane>
RNNATTN_INLINE V put_lanes(V to, V v, std::integer_sequence<int, lane...>) {
  return lanes_of<(lane < first || lane >= first + n ? lane : W + lane - first)...>(to, v);
}

// W rows of W numbers to W columns, in place: 2 × 2 blocks of `half` change places, for each half.
template <int half = W / 2>
RNNATTN_INLINE void transpose(V (&x)[W]) {
  unrolled<W / 2>([&](auto pair) RNNATTN_LAMBDA {
    constexpr int i = pair / half * 2 * half + pair % half;
    exchange<half>(x[i], x[i + half], std::make_integer_sequence<int, W>{});
  });
  if constexpr (half > 1) transpose<half / 2>(x);
}

// Of each of W vectors all lanes, joined by `of`, which changes its first: halves of two vectors
// become one, then quarters of two of these.
template <int half = W / 2, class Of>
RNNATTN_INLINE V of_each(V (&x)[W], Of of) {
  unrolled<half>([&](auto i) RNNATTN_LAMBDA {
    exchange<half>(x[i], x[i + half], std::make_integer_sequence<int, W>{});
    of(x[i], x[i + half]);
  });
  if constexpr (half > 1) return of_each<half / 2>(x, of);
  return x[0];
}
RNNATTN_INLINE V sum_of_each(V (&x)[W]) {
  return of_each(x, [](V& a, const V& b) RNNATTN_LAMBDA { a += b; });
}
RNNATTN_INLINE V max_of_each(V (&x)[W]) {
  return of_each(x, [](V& a, const V& b) RNNATTN_LAMBDA { a = max(a, b); });
}

RNNATTN_INLINE int64_t whole_vectors(int64_t n) { return ceil_div(n, W) * W; }

}  // namespace rnnattn::RNNATTN_SET
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_SIMD_INL_H_
