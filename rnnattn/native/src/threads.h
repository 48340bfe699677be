// Work items on XLA's own threads.
//
// Items are independent of one another and each is computed by one thread in one order, so that
// results do not depend on how many threads there are.

#ifndef RNNATTN_THREADS_H_
#define RNNATTN_THREADS_H_

#include <cstdint>

namespace rnnattn {

// A cache line, with which arrays begin: bytes, and floats.
constexpr int64_t LINE_BYTES = 64;
constexpr int64_t LINE = LINE_BYTES / sizeof(float);

class Threads {
 public:
  // `work(argument, item, workspace)` for every item in [0, items). Threads that are free take the
  // items in this order; the calling thread is one of them, and at most `limit` take part. Each has
  // a workspace of `floats` floats, which begins with a cache line and is not initialised. False if
  // there is no memory.
  using Work = void (*)(void* argument, int64_t item, float* workspace);
  virtual bool run(int64_t items, int64_t limit, int64_t floats, Work work, void* argument) = 0;

  // `work(argument, round, member, members)` for every round in [0, rounds), one after the other:
  // by each of the members, who are `limit` threads at most and of whom the calling one is the
  // first. A round begins when all have done the one before. Threads come as they are free, so the
  // members may become more from round to round.
  using Round = void (*)(void* argument, int64_t round, int64_t member, int64_t members);
  virtual void run_rounds(int64_t rounds, int64_t limit, Round work, void* argument) = 0;

 protected:
  ~Threads() = default;
};

}  // namespace rnnattn

#endif  // RNNATTN_THREADS_H_
