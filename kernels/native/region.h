// Who takes part in a job: torch's own threads, which are awake when other operators have run before, or, where another process takes a
// CPU, helpers that nobody waits for.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "team.h"

namespace {

// Whether a region of torch's threads would end late: one did, a short while ago. The while doubles when the next one does so soon
// after it: on a machine that stays busy asking costs some hundredths, and one that falls idle is soon used as before.
class Lateness {
 public:
  bool expected() const {
    const int forced = forced_.load(std::memory_order_relaxed);
    return forced < 0 ? nanoseconds() < until_.load(std::memory_order_relaxed) : forced != 0;
  }
  void force(int on) { forced_.store(on); }

  // Of a region that took `work` ns until its caller had nothing left to do, and then `wait` until it ended.
  void saw(int64_t end, int64_t work, int64_t wait) {
    if (wait < std::max(kLate, work / 4)) {
      in_time_.store(in_time_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
      return;
    }
    const bool soon = in_time_.exchange(0, std::memory_order_relaxed) < kFew || end - until_.load(std::memory_order_relaxed) < kShortest;
    const int64_t length = soon ? std::min(2 * length_.load(std::memory_order_relaxed), kLongest) : kShortest;
    length_.store(length, std::memory_order_relaxed);
    until_.store(end + length, std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kLate = 300'000;  // ns: a hundred times what threads that are all there need
  static constexpr int64_t kShortest = 16'000'000, kLongest = 1'000'000'000;
  static constexpr int64_t kFew = 64;  // regions

  std::atomic<int64_t> until_{0};
  std::atomic<int64_t> length_{kShortest / 2};
  std::atomic<int64_t> in_time_{0};  // regions since the last late one
  std::atomic<int> forced_{-1};      // by a test
};

inline Lateness& lateness() {
  static Lateness found;
  return found;
}

// Whether torch's own threads would be waited for too long, or in vain: a child of fork() has none of them.
inline bool without_torch() { return lateness().expected() || Pool::is_child(); }

// f(begin, end) of parts of [0, count), at least `grain` each: for what takes little time beside the product that it is done for.
template <class F>
void spread(int64_t count, int64_t grain, const F& f) {
  if (count > grain && !without_torch()) return torch::stable::parallel_for(0, count, grain, f);
  if (count) f(0, count);
}

// All pieces of `job` in up to `threads` threads.
inline void together(const std::shared_ptr<Job>& job, int64_t threads) {
  if (threads == 1) return alone(*job);
  Pool& pool = Pool::instance();
  Team* const team = Team::led();
  if (without_torch()) {
    if (team) team->dismiss();
    return pool.run(job, threads);
  }
  pool.sweep();
  const int64_t start = nanoseconds();
  if (team) {
    const int64_t idle = team->work(*job, threads), end = nanoseconds();
    return lateness().saw(end, idle - start, end - idle);
  }
  const pthread_t caller = pthread_self();
  const int64_t count = job->pieces();
  int64_t idle = start;  // since when the calling thread has nothing left to do
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) job->here(i);
    if (pthread_equal(pthread_self(), caller)) idle = nanoseconds();
  });
  const int64_t end = nanoseconds();
  lateness().saw(end, idle - start, end - idle);
}

}  // namespace
