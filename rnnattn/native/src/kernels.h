// What the kernels compute and with what; each instruction set has a table of them.

#ifndef RNNATTN_KERNELS_H_
#define RNNATTN_KERNELS_H_

#include <cstdint>

#include "threads.h"

namespace rnnattn {

// A matrix of logits, (#B, #M, #G, #T, #S): the strides of axes of size 1 are 0.
template <class T>
struct OfLogits {
  T* data = nullptr;
  int64_t b = 0, m = 0, g = 0, t = 0, s = 0;

  T* row(int64_t ib, int64_t im, int64_t ig, int64_t it) const {
    return data + ib * b + im * m + ig * g + it * t;
  }
};

// Numbers of 16 bits, as they lie in memory.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Of a page of keys, a multiple: whole blocks of keys lie in one page.
constexpr int64_t PAGE_KEYS = 64;

// Axes and letters are those of rnnattn/attention/equations.py. Pointers are null where an argument
// is absent. The head comes after the position, as in the arguments of attention: query (B, T, M,
// G, K), key (B, S, M, K), and so all others but `lse` and `dlse`, (B, M, G, T). A `Number` is a
// float, a Bfloat16 or a Float16; the logits and all sums are float32.
struct Attention {
  int64_t B, M, G, T, S, K, V;
  OfLogits<const float> scale;  // of the logits, and of dq; (#B, #M, #G, 1, 1)
  OfLogits<const float> bias;
  // What a logit grows by that depends on s − t alone, (#B, #M, #G, 1, T + S − 1): that of s − t
  // lies T − 1 behind it, so that the row of a query begins one number before that of the last one.
  OfLogits<const float> by_distance;
  OfLogits<const uint8_t> mask;
  const int32_t* offset;
  int64_t offset_stride;
  const int32_t *query_lengths, *key_lengths;
  const int32_t *query_segments, *key_segments;  // (B, T), (B, S)
  const int32_t* key_ranges;  // (B, T, 2), the keys [first, past) of a query, whatever its position
  const float* sinks;         // (M, G)
  bool is_causal;
  int64_t left, right;  // −1: open
  float soft_cap;       // 0: none
  // Where keys and values are (P, page_size, M, …), the pages of each row, (B, pages_of_row): S is
  // what these have room for. Of a gradient there are none.
  const int32_t* pages;
  int64_t P, page_size, pages_of_row;
};

template <class Number>
struct AttentionForward : Attention {
  const Number *query, *key, *value;
  float* o;  // or, where it is not kept for the gradient:
  Number* narrow_o;
  float* lse;
};

template <class Number>
struct AttentionBackward : Attention {
  const Number *query, *key, *value, *d_o;
  const float *o, *lse, *dlse;
  Number *dq, *dk, *dv;
  OfLogits<float> dbias;
  int64_t dbias_size;
  float* d_by_distance;  // (B, M, G, T + S − 1)
};

template <class Number>
struct AttentionKernels {
  // False if there is no memory for it.
  bool (*forward)(Threads&, const AttentionForward<Number>&);
  bool (*backward)(Threads&, const AttentionBackward<Number>&);
};

// Axes and letters are those of rnnattn/recurrent/units; time-major. Pointers are null where an
// argument is absent, as those of other units are, or a result not wanted. A `Number` is a float, a
// Bfloat16 or a Float16; c, the gates and all sums are float32. G is 4 for the LSTM, 3 for the GRU,
// 1 for the plain unit.
template <class Number>
struct Recurrent {
  int64_t T, B, D, H, R;  // R: the width of h, H where nothing is projected
  int64_t G;              // blocks of H columns, of the weights
  int64_t threads;
  bool reverse;
  int64_t interval;  // the state is kept every so many steps; 0: never
  const Number *x, *w_x, *w_h, *b;
  const Number* b_n;         // (H,)
  const Number* peephole;    // (3, H)
  const Number* projection;  // (H, R)
  float clip;                // 0: none
  bool coupled;
  bool relu;
  const Number* h;  // the initial state
  const float* c;
  const uint8_t *valid, *fresh;  // (T, B)
};

template <class Number>
struct RecurrentForward : Recurrent<Number> {
  Number *y, *h_last;
  float* c_last;
  float *c_all, *a;  // (T, B, H); (T, B, gates H), in the order of the unit
  Number* h_starts;  // (⌈T / interval⌉, B, R)
  float* c_starts;
};

template <class Number>
struct RecurrentBackward : Recurrent<Number> {
  const Number* y;
  const float *c_all, *a;
  const Number* h_starts;
  const float* c_starts;
  const Number *dy, *dh_last;
  const float* dc_last;
  Number *dx, *dw_x, *dw_h, *db, *db_n, *dpeephole, *dprojection, *dh;
  float* dc;
};

template <class Number>
struct RecurrentKernels {
  bool (*forward)(Threads&, const RecurrentForward<Number>&);
  bool (*backward)(Threads&, const RecurrentBackward<Number>&);
};

// Axes and letters are those of rnnattn/linear/equations.py; arrays of steps are (B, T, …), or
// (T, B, …) if time_major. Pointers are null where an argument is absent. A `Number` is a float, a
// Bfloat16 or a Float16; the state is float32.
enum class LinearUnit : int64_t { linear, mingru, minlstm, rglru };
constexpr int64_t LINEAR_BLOCKS = 3;  // of what a step reads, at most

// Of a step's numbers: where they are in the first step, and how far apart those of two steps.
template <class Number>
struct Block {
  Number* data;
  int64_t stride;
};

template <class Number>
struct LinearScan {
  LinearUnit unit;
  int64_t B, T, H;
  int64_t threads;
  bool reverse, time_major;
  Block<const Number> p[LINEAR_BLOCKS];
  const float* w;   // (n, H)
  const float* h0;  // (B, H)
  const uint8_t *valid, *fresh;
};

template <class Number>
struct LinearScanForward : LinearScan<Number> {
  Number* h;
  float* h_last;
};

template <class Number>
struct LinearScanBackward : LinearScan<Number> {
  const Number *h, *dh;
  const float* dh_last;
  Block<Number> dp[LINEAR_BLOCKS];
  float* dw;  // (B, n, H)
  float* dh0;
};

template <class Number>
struct LinearScanKernels {
  bool (*forward)(Threads&, const LinearScanForward<Number>&);
  bool (*backward)(Threads&, const LinearScanBackward<Number>&);
};

struct Kernels {
  const char* name;
  AttentionKernels<float> attention_f32;
  AttentionKernels<Bfloat16> attention_bf16;
  AttentionKernels<Float16> attention_f16;
  RecurrentKernels<float> lstm_f32;
  RecurrentKernels<Bfloat16> lstm_bf16;
  RecurrentKernels<Float16> lstm_f16;
  RecurrentKernels<float> gru_f32;
  RecurrentKernels<Bfloat16> gru_bf16;
  RecurrentKernels<Float16> gru_f16;
  RecurrentKernels<float> gru_before;  // the reset before the product; in 32 bits alone
  RecurrentKernels<float> rnn;         // likewise
  LinearScanKernels<float> linear_f32;
  LinearScanKernels<Bfloat16> linear_bf16;
  LinearScanKernels<Float16> linear_f16;

  const AttentionKernels<float>& attention(float) const { return attention_f32; }
  const AttentionKernels<Bfloat16>& attention(Bfloat16) const { return attention_bf16; }
  const AttentionKernels<Float16>& attention(Float16) const { return attention_f16; }
  const RecurrentKernels<float>& lstm(float) const { return lstm_f32; }
  const RecurrentKernels<Bfloat16>& lstm(Bfloat16) const { return lstm_bf16; }
  const RecurrentKernels<Float16>& lstm(Float16) const { return lstm_f16; }
  const RecurrentKernels<float>& gru(float) const { return gru_f32; }
  const RecurrentKernels<Bfloat16>& gru(Bfloat16) const { return gru_bf16; }
  const RecurrentKernels<Float16>& gru(Float16) const { return gru_f16; }
  const LinearScanKernels<float>& linear(float) const { return linear_f32; }
  const LinearScanKernels<Bfloat16>& linear(Bfloat16) const { return linear_bf16; }
  const LinearScanKernels<Float16>& linear(Float16) const { return linear_f16; }
};

// Kernels of a set, but for products of bfloat16.
inline Kernels with_bfloat16(Kernels kernels, const char* name,
                             const AttentionKernels<Bfloat16>& attention,
                             const RecurrentKernels<Bfloat16>& lstm,
                             const RecurrentKernels<Bfloat16>& gru) {
  kernels.name = name;
  kernels.attention_bf16 = attention;
  kernels.lstm_bf16 = lstm;
  kernels.gru_bf16 = gru;
  return kernels;
}

// Null where this machine or this build has none.
const Kernels* avx512_amx_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* neon_bf16_kernels();
const Kernels* baseline_kernels();

// By number; null where it does not run here. Programs that were compiled and kept have the number.
inline const Kernels* kernels_of(int64_t set) {
  switch (set) {
    case 0: return avx512_kernels();
    case 1: return avx2_kernels();
    case 2: return baseline_kernels();
    case 3: return avx512_bf16_kernels();
    case 4: return neon_bf16_kernels();
    case 5: return avx512_amx_kernels();
    default: return nullptr;
  }
}
constexpr int64_t PREFERENCE[] = {5, 3, 0, 1, 4, 2};

}  // namespace rnnattn

#endif  // RNNATTN_KERNELS_H_
