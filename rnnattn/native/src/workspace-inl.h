// Memory of the kernels.

#ifndef RNNATTN_WORKSPACE_INL_H_
#define RNNATTN_WORKSPACE_INL_H_

#include <cstdint>

#include "instruction_set.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET {

struct Memory {
  float* base;
  int64_t used = 0;

  template <class T = float>
  T* take(int64_t count) {
    T* taken = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += ceil_div(count * sizeof(T), 64) * 16;
    return taken;
  }
};

}  // namespace rnnattn::RNNATTN_SET
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_WORKSPACE_INL_H_
