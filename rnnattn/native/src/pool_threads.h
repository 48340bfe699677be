// XLA's own threads, for the kernels.

#ifndef RNNATTN_POOL_THREADS_H_
#define RNNATTN_POOL_THREADS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

#include "memory.h"
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

// What a thread does that waits for a moment: it leaves the core to the other thread on it.
#if defined(__x86_64__)
#define RNNATTN_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RNNATTN_PAUSE() asm volatile("yield")
#else
#define RNNATTN_PAUSE()
#endif

namespace rnnattn {

// Work items on XLA's pool. A call waits until its items are done, not until the tasks that it gave
// the pool have run, and so waits for nobody's turn: a task that starts later than that finds no
// item left and touches nothing of the call's.
//
// As many threads take part as the pool has, the calling one among them: with one more, each of
// them would lose its core to another now and then, for as long as a short call takes.
class PoolThreads final : public Threads {
 public:
  PoolThreads(xla::ffi::ThreadPool pool, int64_t limit) : pool_(pool), limit_(limit) {}

  bool run(int64_t items, int64_t limit, int64_t floats, Work work, void* argument) override {
    if (items <= 0) return true;
    const int64_t threads = threads_for(std::min(items, limit));
    floats = (floats + LINE - 1) / LINE * LINE;
    std::unique_ptr<float, void (*)(float*)> memory(nullptr, give_back_memory);
    if (floats > 0) {
      memory.reset(take_memory(threads * floats));
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

  void run_rounds(int64_t rounds, int64_t limit, Round work, void* argument) override {
    const int64_t threads = rounds > 1 ? threads_for(limit) : 1;
    if (threads == 1) {
      for (int64_t round = 0; round < rounds; ++round) work(argument, round, 0, 1);
      return;
    }
    auto team = std::make_shared<Team>();
    team->work = work;
    team->argument = argument;
    RNNATTN_HANDED_OVER(team.get());
    for (int64_t i = 1; i < threads; ++i) pool_.Schedule([team] { team->follow(); });
    team->lead(rounds);
  }

 private:
  int64_t threads_for(int64_t limit) const {
    int64_t threads = std::min(limit, pool_.num_threads());
    if (limit_ > 0) threads = std::min(threads, limit_);
    return std::max<int64_t>(threads, 1);
  }

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
      } else {
        stay_awake();
      }
    }

    bool finished() const { return done.load(std::memory_order_acquire) == items; }

    // Until the others are done, too, for some tenths of a millisecond at most: to wake a thread
    // for the next call would take longer than many a call does.
    void stay_awake() const {
      for (int i = 0; i < 5000 && !finished(); ++i) RNNATTN_PAUSE();
    }

    void wait() {
      // the others are mostly about to be done, and going to sleep would take longer
      for (int i = 0; i < 100; ++i, std::this_thread::yield())
        if (finished()) return;
      std::unique_lock<std::mutex> lock(mutex);
      all_done.wait(lock, [this] { return finished(); });
    }
  };

  // Threads that go from round to round together. Only those are waited for that have come, each
  // being one that runs: the pool owes nobody a thread, and the one that leads may be all there is.
  // Who comes takes part from the next round on; who comes when all is done touches nothing.
  struct Team {
    Round work;
    void* argument;
    // each is written by one side and waited for by the other, and so has a line of its own
    alignas(LINE_BYTES) std::atomic<int64_t> followers{0};
    alignas(LINE_BYTES) std::atomic<int64_t> begun{0};  // the last round, and its members
    alignas(LINE_BYTES) std::atomic<int64_t> done{0};   // shares of followers, of all rounds

    static constexpr int64_t ALL_DONE = -1, MOST = 1 << 16;

    void lead(int64_t rounds) {
      int64_t shares = 0;
      for (int64_t round = 0; round < rounds; ++round) {
        const int64_t members = std::min(1 + followers.load(std::memory_order_relaxed), MOST - 1);
        begun.store((round + 1) * MOST + members, std::memory_order_release);
        work(argument, round, 0, members);
        shares += members - 1;
        wait_until([&] { return done.load(std::memory_order_acquire) == shares; });
      }
      begun.store(ALL_DONE, std::memory_order_release);
    }

    void follow() {
      RNNATTN_TAKEN_OVER(this);
      const int64_t member = 1 + followers.fetch_add(1, std::memory_order_relaxed);
      for (int64_t last = 0, now = 0;; last = now) {
        wait_until([&] { return (now = begun.load(std::memory_order_acquire)) != last; });
        if (now == ALL_DONE) return;
        const int64_t members = now % MOST;
        if (member >= members) continue;  // it began before this thread came
        work(argument, now / MOST - 1, member, members);
        done.fetch_add(1, std::memory_order_acq_rel);
      }
    }

    // The others are about to be done, unless their cores were taken away.
    template <class F>
    static void wait_until(F holds) {
      for (int64_t i = 0; !holds(); ++i)
        if (i < 500)
          RNNATTN_PAUSE();
        else
          std::this_thread::yield();
    }
  };

  xla::ffi::ThreadPool pool_;
  int64_t limit_;
};

}  // namespace rnnattn

#endif  // RNNATTN_POOL_THREADS_H_
