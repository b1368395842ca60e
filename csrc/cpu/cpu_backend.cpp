#include "cpu_backend.h"

#include <algorithm>

#include "kernels.h"
#include "team.h"

namespace clara {
namespace cpu {
namespace {

// So many elements that a thread has measured are still in its cache for apply.
constexpr int64_t kCachedElements = 65536;
// Elements that are worth handing to a thread at once.
constexpr int64_t kTaskElements = 16384;

// Note [Kept directions]: apply needs Adam's step of every element once more, and would read both moments again to
// compute it. Of a tensor too large for the innermost caches they come from memory, and what a core can fetch from
// there is the limit. So measure also leaves the step for apply: 4 bytes written and 4 read (float32) take the place of
// 8 read. Apply finds the same bits.
//
// A tensor is applied while the next one is measured, chunk by chunk: the steps of the one go where those of the other
// have just been read, which the cache still has, so nothing is fetched in order to be overwritten. The first tensor's
// steps find no such place; they are stored past the caches, which costs a little more.
//
// The memory is the process's Workspace: all of it for the tensors that the threads share, then one part per thread for
// the tensors that are a thread's own. It holds half of the list's elements (float32), which is every tensor of most
// lists; where a single tensor is more than that, the moments of the rest are read again.
constexpr int64_t kMaxKeptBytesPerElement = 2;

// A tensor on its way from measure to apply, and where its directions are kept meanwhile: those of the first chunks, as
// many as there is room for.
template <typename T>
struct InFlight {
  int64_t tensor = 0;
  int64_t chunks = 0;  // 0: no tensor
  T* directions = nullptr;
  int64_t kept_chunks = 0;

  T* direction_of(int64_t chunk) const { return chunk < kept_chunks ? directions + chunk * kChunk : nullptr; }
};

template <typename T>
class KeptDirections {
 public:
  KeptDirections(const TensorList& list, const Schedule& schedule)
      : list_(list),
        threads_(schedule.threads()),
        room_for_shared_(room(schedule.shared_tensors(), threads_, schedule.max_kept_bytes())),
        room_for_own_(room(schedule.own_tensors(), 1, schedule.max_kept_bytes() / threads_)),
        loan_(schedule.workspace(), std::max(room_for_shared_, threads_ * room_for_own_) * kChunkBytes) {}

  InFlight<T> shared(int64_t tensor) const {
    return kept_at(0, std::min(room_for_shared_, to_keep(tensor, threads_)), tensor);
  }
  InFlight<T> own(int member, int64_t tensor) const {
    return kept_at(member * room_for_own_, std::min(room_for_own_, to_keep(tensor, 1)), tensor);
  }

 private:
  static constexpr int64_t kChunkBytes = kChunk * static_cast<int64_t>(sizeof(T));

  // In chunks: none of what the caches of so many threads keep anyway.
  int64_t to_keep(int64_t tensor, int threads) const {
    const int64_t numel = list_.tensors[tensor].numel;
    return numel > threads * kCachedElements ? chunks_of(numel) : 0;
  }

  // In chunks: enough for each of the tensors, which come largest first, within max_bytes.
  int64_t room(const std::vector<int64_t>& tensors, int threads, int64_t max_bytes) const {
    return tensors.empty() ? 0 : std::min(to_keep(tensors.front(), threads), max_bytes / kChunkBytes);
  }

  InFlight<T> kept_at(int64_t first_chunk, int64_t kept_chunks, int64_t tensor) const {
    InFlight<T> in_flight{tensor, chunks_of(list_.tensors[tensor].numel)};
    if (loan_.memory() != nullptr) {
      in_flight.directions = reinterpret_cast<T*>(loan_.memory() + first_chunk * kChunkBytes);
      in_flight.kept_chunks = kept_chunks;
    }
    return in_flight;
  }

  const TensorList& list_;
  int threads_;
  int64_t room_for_shared_, room_for_own_;
  Workspace::Loan loan_;
};

bool skipped(const TensorList& list) { return list.found_inf != nullptr && *list.found_inf != 0.0f; }

// ---------------------------------------------------------------------------------------------------------------
// One chunk of one tensor
// ---------------------------------------------------------------------------------------------------------------

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4;
    case DType::kBFloat16: return 2;
    case DType::kFloat16: return 2;
    case DType::kFloat64: return 8;
  }
  return 0;
}

void* advanced(void* pointer, int64_t elements, DType dtype) {
  return pointer == nullptr ? nullptr : static_cast<char*>(pointer) + elements * element_size(dtype);
}

// The operations on a list for its arithmetic type T, with the loops that serve its storage types.
template <typename T>
class Worker {
 public:
  explicit Worker(const TensorList& list)
      : list_(list), kernels_(best_kernels()), apply_(kernels_.apply(list.param_dtype)) {}

  // `just_applied`: what was applied right before, whose directions the caches still have.
  void measure(const InFlight<T>& of, int64_t first_chunk, int64_t last_chunk,
               const InFlight<T>& just_applied = {}) const {
    const TensorRecord& record = list_.tensors[of.tensor];
    const GroupOptions& options = list_.groups[record.group];
    const T step = static_cast<T>(*record.step) + T(1);
    const auto measure_with = measure_coefficients<T>(options, step, list_.grad_scale);
    const auto apply_with = list_.deferred ? apply_coefficients<T>(options, step, *record.lr_scale)
                                           : ApplyCoefficients<T>{};
    const MeasureMode mode = list_.deferred                        ? MeasureMode::kApply
                             : measure_with.coupled_decay != T(0) ? MeasureMode::kCoupled
                                                                  : MeasureMode::kPlain;
    const MeasureChunk loop = kernels_.measure(list_.param_dtype, list_.grad_dtype, list_.path_dtype, mode,
                                               record.max_exp_avg_sq != nullptr);
    auto* partial_sums = static_cast<PartialSums<double>*>(list_.partial_sums) + record.first_chunk;
    for (int64_t i = first_chunk; i < last_chunk; ++i) {
      Chunk measured = chunk(of, i);
      measured.direction_is_cached = measured.direction == just_applied.direction_of(i);
      partial_sums[i] = loop(measured, &measure_with, &apply_with);
    }
  }

  // After adapt has counted the step.
  void apply_backwards(const InFlight<T>& of, int64_t first_chunk, int64_t last_chunk) const {
    const TensorRecord& record = list_.tensors[of.tensor];
    const auto apply_with =
        apply_coefficients<T>(list_.groups[record.group], static_cast<T>(*record.step), *record.lr_scale);
    for (int64_t i = last_chunk - 1; i >= first_chunk; --i) apply_(chunk(of, i), &apply_with);
  }

  // Chunk i of each of two tensors, where they have one.
  void apply_and_measure(const InFlight<T>& applied, const InFlight<T>& measured, int64_t i) const {
    if (i < applied.chunks) apply_backwards(applied, i, i + 1);
    if (i < measured.chunks) measure(measured, i, i + 1, applied);
  }

 private:
  Chunk chunk(const InFlight<T>& of, int64_t index) const {
    constexpr DType kMoments = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
    const TensorRecord& record = list_.tensors[of.tensor];
    const int64_t first = index * kChunk;
    return {advanced(record.param, first, list_.param_dtype),
            advanced(const_cast<void*>(list_.grads[of.tensor]), first, list_.grad_dtype),
            advanced(record.exp_avg, first, kMoments),
            advanced(record.exp_avg_sq, first, kMoments),
            advanced(record.max_exp_avg_sq, first, kMoments),
            advanced(record.path, first, list_.path_dtype),
            of.direction_of(index),
            false,
            std::min(kChunk, record.numel - first)};
  }

  const TensorList& list_;
  const Kernels& kernels_;
  const ApplyChunk apply_;
};

// Calls work(worker) with the worker of the list's arithmetic type.
template <typename Work>
void with_worker(const TensorList& list, Work work) {
  if (list.param_dtype == DType::kFloat64) {
    work(Worker<double>(list));
  } else {
    work(Worker<float>(list));
  }
}

// Runs body(member, size) on each member of a team.
template <typename Body>
void run_on_team(int threads, Body body) {
  run_team(
      threads, [](void* context, int member, int size) { (*static_cast<Body*>(context))(member, size); }, &body);
}

// A tensor whose directions are not kept.
template <typename T>
InFlight<T> without_directions(const TensorList& list, int64_t tensor) {
  return {tensor, chunks_of(list.tensors[tensor].numel)};
}

template <typename T>
void measure_span(const Worker<T>& worker, const TensorList& list, const Schedule::Span& span) {
  if (span.last_tensor - span.first_tensor == 1) {
    worker.measure(without_directions<T>(list, span.first_tensor), span.first_chunk, span.last_chunk);
    return;
  }
  for (int64_t i = span.first_tensor; i < span.last_tensor; ++i) {
    const auto tensor = without_directions<T>(list, i);
    worker.measure(tensor, 0, tensor.chunks);
  }
}

template <typename T>
void apply_span(const Worker<T>& worker, const TensorList& list, const Schedule::Span& span) {
  if (span.last_tensor - span.first_tensor == 1) {
    worker.apply_backwards(without_directions<T>(list, span.first_tensor), span.first_chunk, span.last_chunk);
    return;
  }
  for (int64_t i = span.last_tensor - 1; i >= span.first_tensor; --i) {
    const auto tensor = without_directions<T>(list, i);
    worker.apply_backwards(tensor, 0, tensor.chunks);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Scalars
// ---------------------------------------------------------------------------------------------------------------

PathSums reduced(const TensorList& list, int64_t tensor) {
  const TensorRecord& record = list.tensors[tensor];
  const auto* partial_sums = static_cast<const PartialSums<double>*>(list.partial_sums) + record.first_chunk;
  PartialSums<double> total{};
  for (int64_t i = 0; i < chunks_of(record.numel); ++i) {
    total.path_sq += partial_sums[i].path_sq;
    total.step_sq += partial_sums[i].step_sq;
  }
  const int64_t step = step_after(*record.step);
  return {total.path_sq, expected_path_sq(list.groups[record.group], step, record.numel, total.step_sq)};
}

void adapt_own(const TensorList& list, int64_t tensor, const PathSums& sums) {
  const TensorRecord& record = list.tensors[tensor];
  *record.lr_scale =
      adapted_scale(*record.lr_scale, sums.path_sq, sums.expected_path_sq, list.groups[record.group]);
}

void count_step(const TensorList& list, int64_t tensor) { *list.tensors[tensor].step += 1.0f; }

double order_free_sum(const PathSums* sums, int64_t count, double PathSums::*member) {
  double largest = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const double value = sums[i].*member;
    if (!std::isfinite(value)) return value;
    largest = std::max(largest, value);
  }
  const double scale = fixed_point_scale(largest, count);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += to_fixed_point(sums[i].*member, scale);
  return from_fixed_point(total, scale);
}

void adapt_global(const TensorList& list) {
  reduce(list);
  const double path_sq = order_free_sum(list.sums, list.count, &PathSums::path_sq);
  const double expected = order_free_sum(list.sums, list.count, &PathSums::expected_path_sq);
  adapt_own(list, 0, {path_sq, expected});
  for (int64_t i = 0; i < list.count; ++i) count_step(list, i);
}

// ---------------------------------------------------------------------------------------------------------------
// Whole steps
// ---------------------------------------------------------------------------------------------------------------

// Measure everything, adapt, then apply everything (not under `deferred`, where measure has).
template <typename T>
void step_in_two_passes(const Worker<T>& worker, const TensorList& list, const Schedule& schedule) {
  const std::vector<Schedule::Span>& spans = schedule.spans();
  const auto count = static_cast<int64_t>(spans.size());
  Shares to_measure(schedule.threads()), to_apply(schedule.threads());
  to_measure.deal(0, count);
  to_apply.deal(0, count);
  Barrier barrier;
  run_on_team(schedule.threads(), [&](int member, int size) {
    to_measure.work(member, [&](int64_t i) { measure_span(worker, list, spans[i]); });
    barrier.arrive_and_wait(size, [&] {
      if (list.variant == Variant::kGlobal) {
        adapt_global(list);
      } else {
        for (int64_t i = 0; i < list.count; ++i) {
          adapt_own(list, i, reduced(list, i));
          count_step(list, i);
        }
      }
    });
    if (list.deferred) return;
    to_apply.work_backwards(member, [&](int64_t i) { apply_span(worker, list, spans[i]); });
  });
}

// Local and Smoothed: tensor by tensor, so that apply finds all of a small tensor still in the cache. A large one is
// applied while the next is measured, see Note [Kept directions].
template <typename T>
void step_tensor_by_tensor(const Worker<T>& worker, const TensorList& list, const Schedule& schedule) {
  const auto adapt_and_count = [&](int64_t tensor) {
    adapt_own(list, tensor, reduced(list, tensor));
    count_step(list, tensor);
  };
  const KeptDirections<T> directions(list, schedule);
  const std::vector<int64_t>& shared = schedule.shared_tensors();
  const auto shared_count = static_cast<int64_t>(shared.size());
  const auto shared_tensor = [&](int64_t i) {
    return i < shared_count ? directions.shared(shared[static_cast<size_t>(i)]) : InFlight<T>{};
  };
  Shares to_measure(schedule.threads()), to_apply(schedule.threads());
  to_measure.deal(0, shared_tensor(0).chunks);
  Shares tasks(1);  // one queue: largest tensors first keeps the members busy to the end
  tasks.deal(0, static_cast<int64_t>(schedule.tasks().size()));
  Barrier barrier;

  const auto step_shared = [&](int member, int size) {
    InFlight<T> waiting;  // measured, to be applied while the next one is measured
    for (int64_t i = 0; i < shared_count; ++i) {
      const InFlight<T> measured = shared_tensor(i), next = shared_tensor(i + 1);
      const bool waits = measured.kept_chunks > 0 && next.chunks > 0;
      to_measure.work(member, [&](int64_t chunk) { worker.apply_and_measure(waiting, measured, chunk); });
      barrier.arrive_and_wait(size, [&] {
        adapt_and_count(measured.tensor);
        // Nobody is at work on either: all have measured this tensor and applied the one before it.
        to_apply.deal(0, waits ? 0 : measured.chunks);
        to_measure.deal(0, waits ? measured.chunks : next.chunks);
      });
      waiting = waits ? measured : InFlight<T>{};
      to_apply.work_backwards(member, [&](int64_t chunk) { worker.apply_backwards(measured, chunk, chunk + 1); });
    }
    // The steps of own tensors go where these are still being read.
    if (shared_count > 0) barrier.arrive_and_wait(size, [] {});
  };

  const auto step_own = [&](int member) {
    InFlight<T> waiting;
    const auto apply_waiting = [&] {
      if (waiting.chunks > 0) worker.apply_backwards(waiting, 0, waiting.chunks);
      waiting = {};
    };
    tasks.work(member, [&](int64_t task) {
      const Schedule::Range& range = schedule.tasks()[static_cast<size_t>(task)];
      for (int64_t i = range.first; i < range.last; ++i) {
        const InFlight<T> measured = directions.own(member, schedule.own_tensors()[static_cast<size_t>(i)]);
        for (int64_t chunk = 0; chunk < std::max(waiting.chunks, measured.chunks); ++chunk) {
          worker.apply_and_measure(waiting, measured, chunk);
        }
        adapt_and_count(measured.tensor);
        waiting = measured;
        if (waiting.kept_chunks == 0) apply_waiting();
      }
    });
    apply_waiting();
  };

  run_on_team(schedule.threads(), [&](int member, int size) {
    step_shared(member, size);
    step_own(member);
  });
}

int64_t total_elements(const TensorRecord* tensors, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += tensors[i].numel;
  return total;
}

}  // namespace

bool supports(DType param, DType grad, DType path) {
  return best_kernels().measure(param, grad, path, MeasureMode::kPlain, false) != nullptr;
}

Schedule::Schedule(const TensorRecord* tensors, int64_t count, int threads)
    : Schedule(tensors, count, threads, kMaxKeptBytesPerElement * total_elements(tensors, count)) {}

Schedule::Schedule(const TensorRecord* tensors, int64_t count, int threads, int64_t max_kept_bytes)
    : threads_(std::max(threads, 1)), max_kept_bytes_(max_kept_bytes) {
  const int64_t total = total_elements(tensors, count);
  // Few enough elements for one task: a second thread would cost more than it saves.
  if (total <= kTaskElements) threads_ = 1;

  for (int64_t i = 0; i < count;) {
    int64_t elements = tensors[i].numel, last = i + 1;
    if (elements >= kTaskElements) {
      for (int64_t chunk = 0; chunk < chunks_of(elements); ++chunk) spans_.push_back({i, i + 1, chunk, chunk + 1});
    } else {
      while (last < count && elements + tensors[last].numel <= kTaskElements) elements += tensors[last++].numel;
      spans_.push_back({i, last, 0, chunks_of(tensors[i].numel)});
    }
    i = last;
  }

  // A tensor is shared where handing it to one thread could leave the others idle for long.
  const int64_t max_own = std::max(kCachedElements, total / (8 * threads_));
  for (int64_t i = 0; i < count; ++i) {
    const bool shared = threads_ > 1 && tensors[i].numel > max_own;
    (shared ? shared_tensors_ : own_tensors_).push_back(i);
  }
  for (auto* indices : {&shared_tensors_, &own_tensors_}) {
    std::stable_sort(indices->begin(), indices->end(),
                     [&](int64_t a, int64_t b) { return tensors[a].numel > tensors[b].numel; });
  }
  const auto own_count = static_cast<int64_t>(own_tensors_.size());
  for (int64_t first = 0; first < own_count;) {
    int64_t elements = 0, last = first;
    while (last < own_count && (last == first || elements < kTaskElements)) {
      elements += tensors[own_tensors_[static_cast<size_t>(last++)]].numel;
    }
    tasks_.push_back({first, last});
    first = last;
  }
}

void measure(const TensorList& list, const Schedule& schedule) {
  if (skipped(list)) return;
  with_worker(list, [&](const auto& worker) {
    Shares shares(schedule.threads());
    shares.deal(0, static_cast<int64_t>(schedule.spans().size()));
    run_on_team(schedule.threads(), [&](int member, int) {
      shares.work(member, [&](int64_t i) { measure_span(worker, list, schedule.spans()[static_cast<size_t>(i)]); });
    });
  });
}

void reduce(const TensorList& list) {
  if (skipped(list)) return;
  for (int64_t i = 0; i < list.count; ++i) list.sums[i] = reduced(list, i);
}

void adapt(const TensorList& list, const PathSums* sums) {
  if (skipped(list)) return;
  for (int64_t i = 0; i < list.count; ++i) {
    if (sums != nullptr) adapt_own(list, i, sums[i]);
    count_step(list, i);
  }
}

void apply(const TensorList& list, const Schedule& schedule) {
  if (skipped(list) || list.deferred) return;
  with_worker(list, [&](const auto& worker) {
    Shares shares(schedule.threads());
    shares.deal(0, static_cast<int64_t>(schedule.spans().size()));
    run_on_team(schedule.threads(), [&](int member, int) {
      shares.work_backwards(member,
                            [&](int64_t i) { apply_span(worker, list, schedule.spans()[static_cast<size_t>(i)]); });
    });
  });
}

void step(const TensorList& list, const Schedule& schedule) {
  if (skipped(list) || list.count == 0) return;
  with_worker(list, [&](const auto& worker) {
    if (list.variant == Variant::kGlobal || list.deferred) {
      step_in_two_passes(worker, list, schedule);
    } else {
      step_tensor_by_tensor(worker, list, schedule);
    }
  });
}

}  // namespace cpu
}  // namespace clara
