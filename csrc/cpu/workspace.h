// Memory that a step needs while it runs.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

namespace clara {
namespace cpu {

// One block for all optimizers of the process: they step one after the other, and leave nothing there that is worth
// keeping. It grows to what the largest has asked for, and goes with the last of its owners. A process that was forked
// while a thread stepped does without.
class Workspace {
 public:
  static std::shared_ptr<Workspace> of_process();

  // Frees the memory until the next step needs it; nothing if a thread has it. Returns how many bytes there were.
  int64_t release();

  // Has the workspace to itself for as long as it lives.
  class Loan {
   public:
    Loan(Workspace& workspace, int64_t bytes);

    // Aligned to a cache line. Null if none was asked for, another thread has the workspace, or memory is short: a step
    // must be able to do without.
    char* memory() const { return memory_; }

   private:
    std::unique_lock<std::mutex> lock_;
    char* memory_ = nullptr;
  };

 private:
  struct AlignedDelete {
    void operator()(char* block) const;
  };

  std::mutex in_use_;
  std::unique_ptr<char[], AlignedDelete> block_;
  int64_t bytes_ = 0;
};

}  // namespace cpu
}  // namespace clara
