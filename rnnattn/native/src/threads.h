// Work items on XLA's own threads.
//
// Items are independent of one another and each is computed by one thread in one order, so that
// results do not depend on how many threads there are.

#pragma once

#include <cstdint>

namespace rnnattn {

class Threads {
 public:
  // `work(argument, item, workspace)` for every item in [0, items): taken in this order by whoever
  // is free, the calling thread among them. at most `limit` threads take part; each has a workspace
  // of `floats` floats, aligned to 64 bytes and not initialised. False if there is no memory.
  using Work = void (*)(void* argument, int64_t item, float* workspace);
  virtual bool run(int64_t items, int64_t limit, int64_t floats, Work work, void* argument) = 0;

 protected:
  ~Threads() = default;
};

}  // namespace rnnattn
