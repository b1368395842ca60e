#include "cpu_backend.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.h"
#include "team.h"

namespace clara::cpu {
namespace {

// Elements that are worth handing to a thread at once.
constexpr int64_t kTaskElements = 16384;
// Elements that one thread steps on its own even where other threads are idle.
constexpr int64_t kOwnElements = 65536;

int64_t chunk_count(const TensorRecord& tensor) { return chunks_of(tensor.numel, kChunk); }
int64_t path_chunk_count(const TensorRecord& tensor) { return chunks_of(path_numel(tensor), kPathChunk); }

bool skipped(const TensorList& list) { return list.found_inf != nullptr && *list.found_inf != 0.0f; }

// ---------------------------------------------------------------------------------------------------------------
// Spans: what a thread takes at once
// ---------------------------------------------------------------------------------------------------------------

// Chunks of one tensor, or all chunks of several small ones that follow each other in the list.
struct Span {
  int64_t first_tensor, last_tensor;
  int64_t first_chunk = 0, last_chunk = std::numeric_limits<int64_t>::max();
};

int64_t numel(const TensorRecord& tensor) { return tensor.numel; }

// elements_of(tensor): how many of them there is work for.
template <typename ElementsOf>
std::vector<Span> tensor_spans(const TensorList& list, ElementsOf elements_of) {
  std::vector<Span> spans;
  for (int64_t i = 0; i < list.count;) {
    int64_t elements = elements_of(list.tensors[i]), last = i + 1;
    while (last < list.count && elements + elements_of(list.tensors[last]) <= kTaskElements) {
      elements += elements_of(list.tensors[last++]);
    }
    spans.push_back({i, last});
    i = last;
  }
  return spans;
}

// Large tensors chunk by chunk; chunk_count(tensor).
template <typename ElementsOf, typename ChunkCount>
std::vector<Span> chunk_spans(const TensorList& list, ElementsOf elements_of, ChunkCount chunk_count) {
  std::vector<Span> spans;
  for (const Span& span : tensor_spans(list, elements_of)) {
    const TensorRecord& first = list.tensors[span.first_tensor];
    const int64_t pieces = elements_of(first) > kTaskElements ? chunk_count(first) : 1;
    for (int64_t i = 0; i < pieces; ++i) {
      spans.push_back(pieces == 1 ? span : Span{span.first_tensor, span.last_tensor, i, i + 1});
    }
  }
  return spans;
}

std::vector<Span> measure_spans(const TensorList& list) { return chunk_spans(list, path_numel, path_chunk_count); }
std::vector<Span> update_spans(const TensorList& list) { return chunk_spans(list, numel, chunk_count); }

// Few elements are one thread's work: a second one would cost more than it saves.
int useful_threads(const TensorList& list, const Placement& where) {
  int64_t elements = 0;
  for (int64_t i = 0; i < list.count && elements <= kTaskElements; ++i) elements += list.tensors[i].numel;
  return elements <= kTaskElements ? 1 : std::max(where.threads, 1);
}

// ---------------------------------------------------------------------------------------------------------------
// Elements
// ---------------------------------------------------------------------------------------------------------------

// The element loops on a list.
class Worker {
 public:
  explicit Worker(const TensorList& list)
      : list_(list),
        loops_(best_kernels().loops(list.param_dtype, list.grad_dtype)),
        chunk_sums_(static_cast<size_t>(list.path_chunk_count)) {}

  void measure(const Span& span) {
    for (int64_t i = span.first_tensor; i < span.last_tensor; ++i) {
      const TensorRecord& tensor = list_.tensors[i];
      ElementSums<double>* sums = chunk_sums_.data() + tensor.first_path_chunk;
      const int64_t last = std::min(span.last_chunk, path_chunk_count(tensor));
      for (int64_t chunk = span.first_chunk; chunk < last; ++chunk) sums[chunk] = loops_.measure(list_, i, chunk);
    }
  }

  // Of a tensor whose chunks have all been measured.
  PathSums sums(int64_t tensor) const {
    const TensorRecord& record = list_.tensors[tensor];
    const ElementSums<double>* chunks = chunk_sums_.data() + record.first_path_chunk;
    ElementSums<double> total{};
    for (int64_t i = 0; i < path_chunk_count(record); ++i) add(total, chunks[i]);
    return sums_of_all(record, total);
  }

  // After the step has been counted.
  void update(const Span& span) const {
    for (int64_t i = span.first_tensor; i < span.last_tensor; ++i) {
      const int64_t last = std::min(span.last_chunk, chunk_count(list_.tensors[i]));
      for (int64_t chunk = span.first_chunk; chunk < last; ++chunk) loops_.update(list_, i, chunk);
    }
  }

 private:
  const TensorList& list_;
  const Loops loops_;
  std::vector<ElementSums<double>> chunk_sums_;
};

// ---------------------------------------------------------------------------------------------------------------
// Scalars
// ---------------------------------------------------------------------------------------------------------------

Evidence advance_one(const TensorList& list, int64_t tensor, const PathSums& sums) {
  const TensorRecord& record = list.tensors[tensor];
  return advanced(record, sums, list.groups[record.group]);
}

void rescale_one(const TensorList& list, int64_t tensor, const Evidence& evidence) {
  const TensorRecord& record = list.tensors[tensor];
  rescale_tensor(record, evidence, list.groups[record.group]);
}

// See Note [Order-free sums].
double order_free_sum(const std::vector<Evidence>& evidence, double Evidence::*member) {
  double largest = 0.0;
  for (const Evidence& row : evidence) {
    if (!is_finite(row.*member)) return std::numeric_limits<double>::quiet_NaN();
    largest = std::max(largest, std::fabs(row.*member));
  }
  const double scale = fixed_point_scale(largest, static_cast<int64_t>(evidence.size()));
  int64_t total = 0;
  for (const Evidence& row : evidence) total += to_fixed_point(row.*member, scale);
  return from_fixed_point(total, scale);
}

Evidence total(const std::vector<Evidence>& evidence) {
  return {order_free_sum(evidence, &Evidence::path_sq), order_free_sum(evidence, &Evidence::walk_sq),
          order_free_sum(evidence, &Evidence::long_walk_sq), order_free_sum(evidence, &Evidence::step_sq),
          order_free_sum(evidence, &Evidence::step_walk_sq), order_free_sum(evidence, &Evidence::weight),
          order_free_sum(evidence, &Evidence::weight_sq), order_free_sum(evidence, &Evidence::shared_weight)};
}

// ---------------------------------------------------------------------------------------------------------------
// Whole steps
// ---------------------------------------------------------------------------------------------------------------

// One scale for all: two sweeps, because nothing can be updated before everything has been measured.
void step_in_two_sweeps(const TensorList& list, int threads) {
  Worker worker(list);
  const std::vector<Span> to_measure = measure_spans(list), to_update = update_spans(list);
  std::vector<Evidence> evidence(static_cast<size_t>(list.count));
  Shares measuring(threads, static_cast<int64_t>(to_measure.size())), advancing(threads, list.count),
      updating(threads, static_cast<int64_t>(to_update.size()), true);
  Barrier barrier;
  run_team(threads, [&](int member, int size) {
    measuring.work(member, [&](int64_t i) { worker.measure(to_measure[static_cast<size_t>(i)]); });
    barrier.arrive_and_wait(size, [] {});
    advancing.work(member, [&](int64_t i) { evidence[static_cast<size_t>(i)] = advance_one(list, i, worker.sums(i)); });
    barrier.arrive_and_wait(size, [&] { rescale_one(list, 0, total(evidence)); });
    updating.work(member, [&](int64_t i) { worker.update(to_update[static_cast<size_t>(i)]); });
  });
}

// A scale per tensor: tensor by tensor, so that update finds all of a small one still in the cache.
void step_tensor_by_tensor(const TensorList& list, int threads) {
  // Large tensors are shared by all threads where handing each to one thread could leave the others idle for long.
  // Those in the middle are handed out one by one, largest first, which keeps all threads busy to the end; the small
  // ones come last, several at a time.
  int64_t elements = 0;
  for (int64_t i = 0; i < list.count; ++i) elements += list.tensors[i].numel;
  const int64_t max_own = threads == 1 ? elements : std::max(kOwnElements, elements / (8 * threads));
  const auto size = [&](const Span& span) { return list.tensors[span.first_tensor].numel; };
  std::vector<Span> shared, own;
  for (const Span& span : tensor_spans(list, numel)) (size(span) > max_own ? shared : own).push_back(span);
  std::stable_sort(own.begin(), own.end(), [&](const Span& a, const Span& b) { return size(a) > size(b); });

  Worker worker(list);
  const auto adapt = [&](int64_t tensor) { rescale_one(list, tensor, advance_one(list, tensor, worker.sums(tensor))); };
  const auto path_chunks = [&](size_t i) {
    return i < shared.size() ? path_chunk_count(list.tensors[shared[i].first_tensor]) : 0;
  };
  Shares measuring(threads, path_chunks(0)), updating(threads, 0, true);
  Shares stepping(1, static_cast<int64_t>(own.size()));  // one queue for all
  Barrier barrier;
  run_team(threads, [&](int member, int members) {
    for (size_t i = 0; i < shared.size(); ++i) {
      const int64_t tensor = shared[i].first_tensor;
      measuring.work(member, [&](int64_t chunk) { worker.measure({tensor, tensor + 1, chunk, chunk + 1}); });
      barrier.arrive_and_wait(members, [&] {  // all have measured this tensor and updated the one before
        adapt(tensor);
        updating.deal(chunk_count(list.tensors[tensor]));
        measuring.deal(path_chunks(i + 1));
      });
      updating.work(member, [&](int64_t chunk) { worker.update({tensor, tensor + 1, chunk, chunk + 1}); });
    }
    stepping.work(member, [&](int64_t task) {
      const Span& span = own[static_cast<size_t>(task)];
      for (int64_t i = span.first_tensor; i < span.last_tensor; ++i) {
        worker.measure({i, i + 1});
        adapt(i);
        worker.update({i, i + 1});
      }
    });
  });
}

}  // namespace

bool supports(DType param, DType grad) { return best_kernels().loops(param, grad).measure != nullptr; }

void number_chunks(TensorList& list, TensorRecord* records) {
  clara::number_chunks(list, records, kChunk, kPathChunk);
}

void measure(const TensorList& list, PathSums* sums, const Placement& where) {
  if (skipped(list)) return;
  const int threads = useful_threads(list, where);
  const std::vector<Span> spans = measure_spans(list);
  Worker worker(list);
  Shares shares(threads, static_cast<int64_t>(spans.size()));
  run_team(threads, [&](int member, int) {
    shares.work(member, [&](int64_t i) { worker.measure(spans[static_cast<size_t>(i)]); });
  });
  for (int64_t i = 0; i < list.count; ++i) sums[i] = worker.sums(i);
}

void adapt(const TensorList& list, const PathSums* sums, Evidence* evidence, const Placement&) {
  if (skipped(list)) return;
  for (int64_t i = 0; i < list.count; ++i) {
    evidence[i] = advance_one(list, i, sums[i]);
    if (!list.one_scale) rescale_one(list, i, evidence[i]);
  }
}

void update(const TensorList& list, const Placement& where) {
  if (skipped(list)) return;
  const int threads = useful_threads(list, where);
  const std::vector<Span> spans = update_spans(list);
  const Worker worker(list);
  Shares shares(threads, static_cast<int64_t>(spans.size()), true);
  run_team(threads, [&](int member, int) {
    shares.work(member, [&](int64_t i) { worker.update(spans[static_cast<size_t>(i)]); });
  });
}

void step(const TensorList& list, const Placement& where) {
  if (skipped(list) || list.count == 0) return;
  const int threads = useful_threads(list, where);
  list.one_scale ? step_in_two_sweeps(list, threads) : step_tensor_by_tensor(list, threads);
}

}  // namespace clara::cpu
