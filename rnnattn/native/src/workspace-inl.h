// Memory of the kernels: how arrays are laid out, and where from.

#ifndef RNNATTN_WORKSPACE_INL_H_
#define RNNATTN_WORKSPACE_INL_H_

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "instruction_set.h"
#include "memory.h"
#include "threads.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET {

// Arrays one after the other in one piece of memory, each from the start of a cache line on.
// Without a base it counts what they take, so that the code that lays them out is the code that
// sizes them.
struct Memory {
  float* base;
  int64_t used = 0;  // in floats, whole cache lines

  template <class T = float>
  T* take(int64_t count) {
    T* taken = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += ceil_div(count * sizeof(T), LINE_BYTES) * LINE;
    return taken;
  }
};

// Memory of a call, beside the workspaces of its threads; `data` is null where there is none.
class Allocation {
 public:
  explicit Allocation(int64_t floats) : data_(take_memory(floats)) {}
  ~Allocation() { give_back_memory(data_); }
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

// Ask for a large array in pages of 2 MiB, as its memory may never have been touched. With those of
// 4 KiB a fifth of the time of a long sequence's gradient goes into page faults, and reading
// columns misses the TLB at every row.
template <class T>
static inline void advise_huge_pages(const T* array, int64_t count) {
#if defined(__linux__)
  constexpr int64_t LARGE = 1 << 21;  // bytes
  constexpr uintptr_t PAGE = 4096;
  if (array == nullptr || count * static_cast<int64_t>(sizeof(T)) < LARGE) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(array) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = reinterpret_cast<uintptr_t>(array + count) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)array, (void)count;
#endif
}

}  // namespace rnnattn::RNNATTN_SET
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_WORKSPACE_INL_H_
