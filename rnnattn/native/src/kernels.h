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

// Axes and letters are those of rnnattn/scores.py. Pointers are null where an argument is absent.
// The head comes after the position, as in the arguments of attention: query (B, T, M, G, K), key
// (B, S, M, K), and so all others but `lse` and `dlse`, (B, M, G, T).
struct Attention {
  int64_t B, M, G, T, S, K, V;
  const float *query, *key, *value;
  OfLogits<const float> scale;  // of the logits, and of dq; (#B, #M, #G, 1, 1)
  OfLogits<const float> bias;
  OfLogits<const uint8_t> mask;
  const int32_t* offset;
  int64_t offset_stride;
  const int32_t *query_lengths, *key_lengths;
  const int32_t *query_segments, *key_segments;  // (B, T), (B, S)
  const float* sinks;                            // (M, G)
  bool is_causal;
  int64_t left, right;  // −1: open
  float soft_cap;       // 0: none
};

struct AttentionForward : Attention {
  float *o, *lse;
};

struct AttentionBackward : Attention {
  const float *o, *lse, *d_o, *dlse;
  float *dq, *dk, *dv;
  OfLogits<float> dbias;
  int64_t dbias_size;
};

// Axes and letters are those of rnnattn/cell.py; time-major. Pointers are null where an argument is
// absent or a result not wanted.
struct Lstm {
  int64_t T, B, D, H;
  int64_t threads;
  bool reverse;
  int64_t interval;  // the state is kept every so many steps; 0: never
  const float *x, *w_x, *w_h, *b;
  const float *h, *c;            // the initial state
  const uint8_t *valid, *fresh;  // (T, B)
};

struct LstmForward : Lstm {
  float *y, *h_last, *c_last;
  float *c_all, *a;            // (T, B, H), (T, B, 4H)
  float *h_starts, *c_starts;  // (⌈T / interval⌉, B, H)
};

struct LstmBackward : Lstm {
  const float *y, *c_all, *a, *h_starts, *c_starts;
  const float *dy, *dh_last, *dc_last;
  float *dx, *dw_x, *dw_h, *db, *dh, *dc;
};

struct Kernels {
  const char* name;
  // False if there is no memory for it.
  bool (*attention_forward)(Threads&, const AttentionForward&);
  bool (*attention_backward)(Threads&, const AttentionBackward&);
  bool (*lstm_forward)(Threads&, const LstmForward&);
  bool (*lstm_backward)(Threads&, const LstmBackward&);
};

// Null where this machine or this build has none.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* baseline_kernels();

// By number, in the order of preference; null where it does not run here.
inline const Kernels* kernels_of(int64_t set) {
  switch (set) {
    case 0: return avx512_kernels();
    case 1: return avx2_kernels();
    case 2: return baseline_kernels();
    default: return nullptr;
  }
}
constexpr int64_t SETS = 3;

}  // namespace rnnattn

#endif  // RNNATTN_KERNELS_H_
