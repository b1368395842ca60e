#include "workspace.h"

#include <new>
#include <utility>

namespace clara {
namespace cpu {
namespace {

constexpr std::align_val_t kCacheLine{64};

}  // namespace

std::shared_ptr<Workspace> Workspace::of_process() {
  static std::mutex creating;
  static std::weak_ptr<Workspace> living;
  const std::lock_guard<std::mutex> lock(creating);
  std::shared_ptr<Workspace> workspace = living.lock();
  if (workspace == nullptr) living = workspace = std::make_shared<Workspace>();
  return workspace;
}

int64_t Workspace::release() {
  const std::unique_lock<std::mutex> lock(in_use_, std::try_to_lock);
  if (!lock) return 0;
  block_.reset();
  return std::exchange(bytes_, 0);
}

Workspace::Loan::Loan(Workspace& workspace, int64_t bytes) : lock_(workspace.in_use_, std::defer_lock) {
  if (bytes <= 0 || !lock_.try_lock()) return;
  if (bytes > workspace.bytes_) {
    workspace.block_.reset();  // before the larger one: both together might not fit
    workspace.block_.reset(static_cast<char*>(::operator new(static_cast<size_t>(bytes), kCacheLine, std::nothrow)));
    workspace.bytes_ = workspace.block_ == nullptr ? 0 : bytes;
  }
  memory_ = workspace.block_.get();
}

void Workspace::AlignedDelete::operator()(char* block) const { ::operator delete(block, kCacheLine); }

}  // namespace cpu
}  // namespace clara
