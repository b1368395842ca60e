// A team of threads for one step, and how its members share work and wait for each other.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

namespace clara::cpu {

// Lets `size` members through once the last one has arrived; that one first calls `completion`.
class Barrier {
 public:
  template <typename Completion>
  void arrive_and_wait(int size, Completion completion) {
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      completion();
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      // The others are at most a chunk behind, unless something else has their core.
      if (spins >= kSpinsBeforeYield) std::this_thread::yield();
    }
  }

 private:
  static constexpr int kSpinsBeforeYield = 2000;
  std::atomic<int> arrived_{0};
  std::atomic<int> phase_{0};
};

// Deals out items 0 to count - 1: to each member a contiguous share, so that it streams through memory, then what is
// left of the others' shares. There may be fewer members than shares. Backwards, each share from its end: what a member
// worked on last is what its cache still has.
class Shares {
 public:
  Shares(int members, int64_t count, bool backwards = false)
      : members_(members), backwards_(backwards), shares_(new Share[static_cast<size_t>(members)]) {
    deal(count);
  }

  // Anew; not while a member is at work on them.
  void deal(int64_t count) {
    for (int member = 0; member < members_; ++member) {
      shares_[member].taken.store(0, std::memory_order_relaxed);
      shares_[member].first = count * member / members_;
      shares_[member].last = count * (member + 1) / members_;
    }
  }

  template <typename WorkOn>
  void work(int member, WorkOn work_on) {
    for (int i = 0; i < members_; ++i) {
      Share& share = shares_[(member + i) % members_];
      while (true) {
        const int64_t taken = share.taken.fetch_add(1, std::memory_order_relaxed);
        if (taken >= share.last - share.first) break;
        work_on(backwards_ ? share.last - 1 - taken : share.first + taken);
      }
    }
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> taken{0};
    int64_t first = 0, last = 0;
  };

  const int members_;
  const bool backwards_;
  std::unique_ptr<Share[]> shares_;
};

using TeamBody = std::function<void(int member, int size)>;

// Calls body(member, team size) once on each member of a team of at most `threads`, and returns when all are
// done. The body must not throw.
//
// Note [Borrowed OpenMP]: the threads are those of the OpenMP runtime that torch has loaded, so that the two do not
// compete for the cores; nothing is linked against it. Without one the team is made of fresh threads.
void run_team(int threads, const TeamBody& body);

// Where the threads come from: "openmp" or "std::thread".
const char* thread_source();

}  // namespace clara::cpu
