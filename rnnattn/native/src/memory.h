// The memory of a call, which later calls get again.
//
// What is freed at the end of malloc's memory goes back to the system, and the next call has to
// touch each of its pages for the first time, which can take as long as all that a short call does.

#ifndef RNNATTN_MEMORY_H_
#define RNNATTN_MEMORY_H_

#include <cstdint>

namespace rnnattn {

// Larger blocks are not kept, and so many at most of the others: two of a call, for two at a time.
constexpr int64_t KEPT_BYTES = int64_t{1} << 25;
constexpr int KEPT_BLOCKS = 4;

// So many floats from the start of a cache line on, not initialised; null if there is no memory.
// Any thread may take them, and give them back.
float* take_memory(int64_t floats);
void give_back_memory(float* memory);  // may be null

}  // namespace rnnattn

#endif  // RNNATTN_MEMORY_H_
