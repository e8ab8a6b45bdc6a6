// Helpers of a thread that waits for none of them.
//
// A region of torch's runtime ends when all of its threads have come to its end. Where another process takes a CPU, one of them waits for
// its turn there: some milliseconds, for a product of a fraction of one. Here a helper that does not come takes no work. A piece that it
// took and does not hand over in time is done again by the calling thread, and what the helper makes of it is dropped: so it may still be
// at work when the region is over, and a job owns all that it reads.
//
// 48 layers of 1024x1024, bitmap of 50 %, fp32, one row, two CPUs (Zen 3), another process that computes all the time: 10 to 12 ms, where
// one thread takes 13 to 14, torch's runtime 20 (median; 41 in the mean), and both CPUs undisturbed 9 to 10.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

inline int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Work in pieces that may be done in any order, and by two threads at once.
class Job {
 public:
  virtual ~Job() = default;
  virtual int64_t pieces() const = 0;
  virtual int64_t work(int64_t piece) const = 0;  // in a unit of the job's own
  virtual void here(int64_t piece) = 0;           // into the result
  virtual void apart(int64_t piece) = 0;          // into memory of this thread
  virtual void hand_over(int64_t piece) = 0;      // from there into the result
  virtual void own() = 0;                         // from now on reads nothing that it does not own
};

inline void alone(Job& job) {
  for (int64_t i = 0; i < job.pieces(); ++i) job.here(i);
}

// Which CPUs a helper runs on. On that of the thread which it helps it would only hold that up, and the system takes long to see this: with
// helpers that go away the layers above are 1.4 times as fast.
class Place {
 public:
#if defined(__linux__)
  Place() { allowed_known_ = sched_getaffinity(0, sizeof(allowed_), &allowed_) == 0; }
  static int cpu() { return sched_getcpu(); }
  int64_t cpus() const { return allowed_known_ ? CPU_COUNT(&allowed_) : std::thread::hardware_concurrency(); }
  void leave(int cpu) {
    if (!allowed_known_ || cpu < 0 || sched_getcpu() != cpu) return;
    cpu_set_t now;
    if (sched_getaffinity(0, sizeof(now), &now)) return;
    if (!CPU_EQUAL(&now, &chosen_)) allowed_ = now;  // somebody else's choice
    chosen_ = allowed_;
    CPU_CLR(static_cast<size_t>(cpu), &chosen_);
    if (!CPU_COUNT(&chosen_) || sched_setaffinity(0, sizeof(chosen_), &chosen_)) chosen_ = now;
  }

 private:
  cpu_set_t allowed_, chosen_{};
  bool allowed_known_;
#else
  static int cpu() { return -1; }
  int64_t cpus() const { return std::thread::hardware_concurrency(); }
  void leave(int) {}
#endif
};

class Pool {
 public:
  // That of this process: a child of fork() inherits no threads.
  static Pool& instance() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
      current().store(nullptr);
      forked().store(true);
    });
    (void)registered;
    Pool* found = current().load(std::memory_order_acquire);
    if (!found) {
      Pool* const fresh = new Pool;
      if (current().compare_exchange_strong(found, fresh)) return *fresh;
      delete fresh;
    }
    return *found;
  }

  // Whether this process is a child of fork(): it has none of the threads that torch's runtime counts on.
  static bool is_child() { return forked().load(std::memory_order_relaxed); }

  // In up to `threads` threads, unless another thread has the helpers.
  void run(const std::shared_ptr<Job>& job, int64_t threads) {
    const Turn turn(owned_);
    const int64_t helpers = turn.mine ? grow(threads - 1) : 0;
    if (helpers < 1) return alone(*job);
    job->own();
    Region& region = vacant();
    const bool others = late_.exchange(true, std::memory_order_relaxed);
    open(region, job, helpers);
    try {
      finish(region, take_part(region));
    } catch (...) {
      withdraw(region);
      throw;
    }
    if (region.vacate(hurried().load(std::memory_order_relaxed) ? 0 : kPatience)) late_.store(others, std::memory_order_relaxed);
  }

  // Helpers dawdle, and what they have begun is done again at once: for tests.
  static std::atomic<bool>& hurried() {
    static std::atomic<bool> on{false};
    return on;
  }

  // Lets go of jobs that helpers have left by now.
  void sweep() {
    if (!late_.load(std::memory_order_relaxed)) return;
    const Turn turn(owned_);
    if (turn.mine) vacant();
  }

 private:
  enum State { kPending, kHanding, kDone, kTaken };
  static constexpr int64_t kMost = 255;          // helpers
  static constexpr int64_t kSpin = 20'000;       // ns that a helper waits for the next region before it sleeps
  static constexpr int64_t kSlack = 3'000;       // ns
  static constexpr int64_t kPatience = 1'000;    // ns for a helper to leave

  // Helpers are in at most one region each, so that of one more than there are helpers one is vacant.
  struct alignas(64) Region {
    std::shared_ptr<Job> job;
    std::unique_ptr<std::atomic<int>[]> states;  // of pieces
    int64_t room = 0;                            // for these
    std::atomic<int64_t> next{0};                // piece
    std::atomic<int64_t> left{0};                // helpers that came and went
    int64_t came = 0;                            // and all that came; -1 as long as it is open
    int cpu = -1;                                // of the calling thread

    bool vacate(int64_t patience) {
      const int64_t until = patience ? nanoseconds() + patience : 0;
      while (left.load(std::memory_order_acquire) != came)
        if (!patience || nanoseconds() > until) return false;
      job.reset();
      return true;
    }
  };

  struct Pace {
    int64_t end;  // when there was no piece left
    double rate;  // ns for a unit of work
  };

  struct Turn {
    explicit Turn(std::atomic_flag& flag) : owned(flag), mine(!flag.test_and_set(std::memory_order_acquire)) {}
    ~Turn() {
      if (mine) owned.clear(std::memory_order_release);
    }
    Turn(const Turn&) = delete;
    std::atomic_flag& owned;
    const bool mine;
  };

  static std::atomic<Pool*>& current() {
    static std::atomic<Pool*> pool{nullptr};  // never destroyed: helpers outlast main()
    return pool;
  }
  static std::atomic<bool>& forked() {
    static std::atomic<bool> child{false};
    return child;
  }

  // ---- the calling thread --------------------------------------------------------------------------------------------------

  // How many helpers there are, of those that are wanted.
  int64_t grow(int64_t wanted) {
    if (!cpus_) cpus_ = Place().cpus();
    wanted = std::min({wanted, cpus_ - 1, kMost});
    if (helpers_ >= wanted) return wanted;
    sigset_t all, before;  // signals are for the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; helpers_ < wanted; ++helpers_) std::thread(&Pool::serve, this).detach();
    } catch (const std::system_error&) {
      wanted = helpers_;  // no more are to be had
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return wanted;
  }

  Region& vacant() {
    Region* found = nullptr;
    bool late = false;
    for (int64_t i = 0; i <= helpers_; ++i) {
      Region& region = regions_[i];
      if (region.job && !region.vacate(0))
        late = true;
      else if (!found)
        found = &region;
    }
    late_.store(late, std::memory_order_relaxed);
    return *found;
  }

  void open(Region& region, const std::shared_ptr<Job>& job, int64_t seats) {
    const int64_t count = job->pieces();
    if (region.room < count) {
      region.states.reset(new std::atomic<int>[static_cast<size_t>(count)]);
      region.room = count;
    }
    for (int64_t i = 0; i < count; ++i) region.states[static_cast<size_t>(i)].store(kPending, std::memory_order_relaxed);
    region.job = job;
    region.next.store(0, std::memory_order_relaxed);
    region.left.store(0, std::memory_order_relaxed);
    region.came = -1;
    region.cpu = Place::cpu();
    seats_ = seats;
    const uint64_t number = (gate_.load(std::memory_order_relaxed) >> 32) + 1;
    gate_.store(number << 32 | static_cast<uint64_t>(&region - regions_) << 16 | static_cast<uint64_t>(seats), std::memory_order_seq_cst);
    // A helper that is about to sleep may miss this, and comes at the next region.
    for (int64_t asleep = std::min(seats, sleepers_.load(std::memory_order_seq_cst)); asleep > 0; --asleep) bell_.notify_one();
  }

  Pace take_part(Region& region) {
    Job& job = *region.job;
    const int64_t count = job.pieces(), start = nanoseconds();
    int64_t done = 0;
    for (int64_t i; (i = region.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      job.here(i);
      region.states[static_cast<size_t>(i)].store(kDone, std::memory_order_relaxed);
      done += job.work(i);
    }
    close(region);
    const int64_t end = nanoseconds();
    return Pace{end, done ? static_cast<double>(end - start) / static_cast<double>(done) : 0.0};
  }

  void close(Region& region) {
    const uint64_t gate = gate_.fetch_and(~uint64_t{0xffff}, std::memory_order_acq_rel);
    region.came = seats_ - static_cast<int64_t>(gate & 0xffff);
  }

  // Nothing is written into the result from now on.
  void withdraw(Region& region) {
    if (region.came < 0) close(region);
    const int64_t count = region.job->pieces();
    for (int64_t i = 0; i < count; ++i) {
      std::atomic<int>& state = region.states[static_cast<size_t>(i)];
      int pending = kPending;
      state.compare_exchange_strong(pending, kTaken);
      while (state.load(std::memory_order_acquire) == kHanding) std::this_thread::yield();
    }
  }

  // What helpers have begun and do not end in time.
  void finish(Region& region, const Pace& pace) {
    Job& job = *region.job;
    const int64_t count = job.pieces();
    const bool hurry = hurried().load(std::memory_order_relaxed);
    for (int64_t i = 0; i < count; ++i) {
      std::atomic<int>& state = region.states[static_cast<size_t>(i)];
      if (state.load(std::memory_order_acquire) == kDone) continue;
      const int64_t fair = kSlack + static_cast<int64_t>(1.5 * pace.rate * static_cast<double>(job.work(i)));
      const int64_t until = pace.end + (hurry ? 0 : fair);
      while (state.load(std::memory_order_acquire) != kDone) {
        int pending = kPending;
        if (nanoseconds() < until) continue;
        if (state.compare_exchange_strong(pending, kTaken)) {
          job.here(i);
          break;
        }
        std::this_thread::yield();  // it is being handed over
      }
    }
  }

  // ---- a helper ------------------------------------------------------------------------------------------------------------

  void serve() {
    Place place;
    uint64_t seen = 0;  // the last region
    int caller = -1;    // its thread's CPU
    for (;;) {
      uint64_t gate = wait(seen, place, caller);
      if (!gate_.compare_exchange_strong(gate, gate - 1, std::memory_order_acq_rel)) continue;
      seen = gate >> 32;
      Region& region = regions_[gate >> 16 & 0xffff];
      caller = region.cpu;
      place.leave(caller);
      help(region);
      region.left.fetch_add(1, std::memory_order_release);
    }
  }

  // The gate of a region with a free seat that this helper has not been in.
  uint64_t wait(uint64_t seen, Place& place, int caller) {
    uint64_t gate = 0;
    const auto ready = [&] {
      gate = gate_.load(std::memory_order_seq_cst);
      return gate >> 32 != seen && (gate & 0xffff);
    };
    for (const int64_t until = nanoseconds() + kSpin; nanoseconds() < until;) {
      if (ready()) return gate;
      place.leave(caller);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    bell_.wait(lock, ready);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    return gate;
  }

  static void dawdle() {
    if (hurried().load(std::memory_order_relaxed)) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }

  static void help(Region& region) noexcept {
    Job& job = *region.job;
    const int64_t count = job.pieces();
    for (int64_t i; (i = region.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      dawdle();
      try {
        job.apart(i);
      } catch (...) {
        return;  // no memory: the calling thread does it again
      }
      dawdle();
      std::atomic<int>& state = region.states[static_cast<size_t>(i)];
      int pending = kPending;
      if (!state.compare_exchange_strong(pending, kHanding, std::memory_order_acq_rel)) continue;
      job.hand_over(i);
      state.store(kDone, std::memory_order_release);
    }
  }

  std::atomic_flag owned_ = ATOMIC_FLAG_INIT;
  std::atomic<uint64_t> gate_{0};  // number of the region, which of regions_ it is, and seats that are free: 32, 16 and 16 bits
  int64_t seats_ = 0;
  int64_t helpers_ = 0;
  int64_t cpus_ = 0;
  std::atomic<bool> late_{false};
  std::atomic<int64_t> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable bell_;
  Region regions_[kMost + 1];
};

}  // namespace
