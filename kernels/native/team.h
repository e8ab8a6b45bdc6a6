// The threads of one region of torch's, for many jobs in a row: a token is some hundred of them, and each would else open a region and
// wait for its end.
#pragma once
#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>

#include "pool.h"

namespace {

// Waits in short steps; after some microseconds it gives way to other threads at each.
class Patience {
 public:
  void step() {
    if (++steps_ > kSteps) return std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

 private:
  static constexpr int kSteps = 1000;
  int steps_ = 0;
};

class Team {
 public:
  // The team that this thread leads, or none.
  static Team*& led() {
    thread_local Team* team = nullptr;
    return team;
  }

  // f, by this thread, which leads up to threads - 1 others meanwhile; returns since when, in ns, it had nothing left to do.
  template <class F>
  static int64_t gather(int64_t threads, const F& f) {
    Team team;
    int64_t idle = 0;
    const pthread_t leader = pthread_self();
    std::exception_ptr thrown;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      if (!pthread_equal(pthread_self(), leader)) return team.serve(begin);
      led() = &team;
      try {
        f();
      } catch (...) {
        thrown = std::current_exception();
      }
      led() = nullptr;
      team.dismiss();
      idle = nanoseconds();
    });
    if (thrown) std::rethrow_exception(thrown);
    return idle;
  }

  // How many threads torch has for a region, also within one, where it may be asked for those of a region inside of it.
  static int64_t available() {
    Team* const team = led();
    return team ? team->available_ : torch::stable::get_num_threads();
  }

  // All pieces of a job, in up to `threads` threads; returns since when, in ns, the leader had nothing left to do.
  int64_t work(Job& job, int64_t threads) {
    const int64_t count = job.pieces();
    job_ = &job;
    count_ = count;
    done_.store(0, std::memory_order_relaxed);
    left_.store(count, std::memory_order_release);
    posted_.store(++jobs_ << 16 | std::min<int64_t>(threads, 0xffff), std::memory_order_release);
    int64_t own = 0;
    try {
      for (int64_t i; (i = next()) >= 0; ++own) job.here(i);
    } catch (...) {
      const int64_t nobodys = left_.exchange(0);
      wait_for(count - own - 1 - nobodys);
      throw;
    }
    const int64_t idle = nanoseconds();
    wait_for(count - own);
    if (failed_) std::rethrow_exception(failed_);
    return idle;
  }

  // The others leave.
  void dismiss() { over_.store(true, std::memory_order_release); }

 private:
  // A piece that nobody has taken; -1 where there is none. What belongs to the job stays until all who took one have done it.
  int64_t next() {
    int64_t left = left_.load(std::memory_order_relaxed);
    while (left > 0)
      if (left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel, std::memory_order_relaxed)) return count_ - left;
    return -1;
  }

  void wait_for(int64_t others) {
    for (Patience patience; done_.load(std::memory_order_acquire) != others;) patience.step();
  }

  void serve(int64_t seat) noexcept {
    int64_t seen = 0;
    for (Patience patience; !over_.load(std::memory_order_acquire); patience.step()) {
      const int64_t posted = posted_.load(std::memory_order_acquire);
      if (posted == seen) continue;
      seen = posted;
      if (seat >= (posted & 0xffff)) continue;
      for (int64_t i; (i = next()) >= 0; patience = Patience()) {
        try {
          job_->here(i);
        } catch (...) {
          if (!failing_.test_and_set()) failed_ = std::current_exception();
        }
        done_.fetch_add(1, std::memory_order_release);
      }
    }
  }

  // Of the job at hand. What those who wait look at is written once for a job, and lies apart from what the others write to.
  alignas(64) std::atomic<int64_t> left_{0};  // pieces
  Job* job_ = nullptr;
  int64_t count_ = 0;
  int64_t jobs_ = 0;
  const int64_t available_ = torch::stable::get_num_threads();
  alignas(64) std::atomic<int64_t> done_{0};    // by others than the leader
  alignas(64) std::atomic<int64_t> posted_{0};  // number of the job, and how many threads it is worth: the rest and 16 bits
  std::atomic<bool> over_{false};
  std::atomic_flag failing_ = ATOMIC_FLAG_INIT;
  std::exception_ptr failed_;
};

}  // namespace
