#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <utility>

#include "threads.h"

namespace rnnattn {
namespace {

// A line before what is handed out.
struct alignas(LINE_BYTES) Block {
  int64_t bytes;  // behind it
};

// With AddressSanitizer none is kept: it sees who reads past the end of a call's memory, or after
// the call.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool KEEPS = false;
#else
constexpr bool KEEPS = true;
#endif

std::mutex mutex;
Block* kept[KEPT_BLOCKS] = {};  // first what was given back last

}  // namespace

float* take_memory(int64_t floats) {
  const int64_t bytes = (floats + LINE - 1) / LINE * LINE_BYTES;
  Block* block = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (Block*& one : kept)
      if (!block && one && one->bytes >= bytes) std::swap(one, block);
  }
  if (!block) {
    block = static_cast<Block*>(std::aligned_alloc(LINE_BYTES, sizeof(Block) + bytes));
    if (!block) return nullptr;
    block->bytes = bytes;
  }
  return reinterpret_cast<float*>(block + 1);
}

void give_back_memory(float* memory) {
  if (!memory) return;
  Block* block = reinterpret_cast<Block*>(memory) - 1;
  if (KEEPS && block->bytes <= KEPT_BYTES) {
    // Into the first place, whose block moves on to the next, and so on; one may be left over.
    const std::lock_guard<std::mutex> lock(mutex);
    for (Block*& one : kept)
      if (block) std::swap(one, block);
  }
  std::free(block);
}

}  // namespace rnnattn
