// XLA's own threads, for the kernels.

#ifndef RNNATTN_POOL_THREADS_H_
#define RNNATTN_POOL_THREADS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>

#include "threads.h"
#include "xla/ffi/api/ffi.h"

// How XLA's pool hands a task to another thread is not seen by ThreadSanitizer: it is told.
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define RNNATTN_HANDED_OVER(call) __tsan_release(call)
#define RNNATTN_TAKEN_OVER(call) __tsan_acquire(call)
#else
#define RNNATTN_HANDED_OVER(call)
#define RNNATTN_TAKEN_OVER(call)
#endif

namespace rnnattn {

// Work items on XLA's pool. A call waits until its items are done, not until the tasks that it gave
// the pool have run, and so waits for nobody's turn: a task that starts later than that finds no
// item left and touches nothing of the call's.
class PoolThreads final : public Threads {
 public:
  PoolThreads(xla::ffi::ThreadPool pool, int64_t limit) : pool_(pool), limit_(limit) {}

  bool run(int64_t items, int64_t limit, int64_t floats, Work work, void* argument) override {
    if (items <= 0) return true;
    int64_t threads = std::min({items, limit, pool_.num_threads() + 1});
    if (limit_ > 0) threads = std::min(threads, limit_);
    threads = std::max<int64_t>(threads, 1);
    floats = (floats + LINE - 1) / LINE * LINE;
    std::unique_ptr<float, void (*)(void*)> memory(nullptr, std::free);
    if (floats > 0) {
      memory.reset(
          static_cast<float*>(std::aligned_alloc(LINE_BYTES, threads * floats * sizeof(float))));
      if (!memory) return false;
    }
    auto call = std::make_shared<Call>();
    call->items = items;
    call->work = work;
    call->argument = argument;
    call->memory = memory.get();
    call->floats = floats;
    RNNATTN_HANDED_OVER(call.get());
    for (int64_t i = 1; i < threads; ++i) pool_.Schedule([call] { call->take_part(); });
    call->take_part();
    call->wait();
    return true;
  }

 private:
  struct Call {
    int64_t items, floats;
    Work work;
    void* argument;
    float* memory;
    std::atomic<int64_t> next{0}, threads{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;

    void take_part() {
      RNNATTN_TAKEN_OVER(this);
      int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= items) return;
      float* mine = memory + threads.fetch_add(1, std::memory_order_relaxed) * floats;
      int64_t count = 0;
      for (; item < items; item = next.fetch_add(1, std::memory_order_relaxed), ++count)
        work(argument, item, mine);
      if (done.fetch_add(count, std::memory_order_acq_rel) + count == items) {
        std::lock_guard<std::mutex> lock(mutex);
        all_done.notify_one();
      }
    }

    void wait() {
      const auto finished = [this] { return done.load(std::memory_order_acquire) == items; };
      // the others are mostly about to be done, and going to sleep would take longer
      for (int i = 0; i < 100; ++i, std::this_thread::yield())
        if (finished()) return;
      std::unique_lock<std::mutex> lock(mutex);
      all_done.wait(lock, finished);
    }
  };

  xla::ffi::ThreadPool pool_;
  int64_t limit_;
};

}  // namespace rnnattn

#endif  // RNNATTN_POOL_THREADS_H_
