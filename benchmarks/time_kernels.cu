// Times the CUDA kernels without Python, so that differently tuned builds of them (csrc/cuda/tuning.h) can be compared
// within minutes; benchmarks/tune_kernels.sh compiles and runs them.
//
//   time_kernels NAME MODEL...    one line per model and type of parameters; NAME says how it was built
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../csrc/cuda/cuda_backend.h"
#include "../csrc/cuda/launch.h"

namespace {

using clara::DType;

void check(cudaError_t error) { clara::cuda::check(error, "time_kernels", 0); }

struct Shape {
  int64_t rows, inner;
};

std::vector<Shape> gpt2(int layers, int64_t width) {
  std::vector<Shape> shapes = {{50257, width}, {1024, width}};
  for (int i = 0; i < layers; ++i) {
    for (int64_t size : {width, width, 3 * width, width, width, width, 4 * width, width}) shapes.push_back({1, size});
    for (Shape shape : {Shape{width, 3 * width}, Shape{width, width}, Shape{width, 4 * width}, Shape{4 * width, width}}) {
      shapes.push_back(shape);
    }
  }
  return shapes;
}

std::vector<Shape> shapes_of(const std::string& model) {
  if (model == "gpt2-small") return gpt2(12, 768);
  if (model == "gpt2-xl") return gpt2(48, 1600);
  if (model == "one-350m") return {{1, 350'000'000}};
  if (model == "small-1000x64") return std::vector<Shape>(1000, {1, 64});
  std::fprintf(stderr, "no model '%s'\n", model.c_str());
  std::exit(2);
}

constexpr int64_t kNoise = 1 << 16;

// Device memory of small positive numbers, not all alike: zeros can be faster than data.
class Memory {
 public:
  Memory(int64_t count, DType dtype) {
    const int64_t bytes = count * (dtype == DType::kFloat32 ? 4 : 2);
    check(cudaMalloc(&data_, static_cast<size_t>(std::max<int64_t>(bytes, 1))));
    static const std::vector<char> noise[2] = {make_noise(DType::kFloat32), make_noise(DType::kBFloat16)};
    const std::vector<char>& block = noise[dtype != DType::kFloat32];
    for (int64_t done = 0; done < bytes;) {  // what is there already, again
      const int64_t length = std::min(bytes - done, done == 0 ? static_cast<int64_t>(block.size()) : done);
      const void* source = done == 0 ? static_cast<const void*>(block.data()) : data_;
      check(cudaMemcpy(static_cast<char*>(data_) + done, source, static_cast<size_t>(length), cudaMemcpyDefault));
      done += length;
    }
  }
  ~Memory() { cudaFree(data_); }
  Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  void* data() const { return data_; }

 private:
  static std::vector<char> make_noise(DType dtype) {
    std::vector<char> bytes;
    for (int64_t i = 0; i < kNoise; ++i) {
      const float value = 0.01f + 0.02f * static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX);
      const __nv_bfloat16 narrow = __float2bfloat16(value);
      const char* from = dtype == DType::kFloat32 ? reinterpret_cast<const char*>(&value)
                                                  : reinterpret_cast<const char*>(&narrow);
      bytes.insert(bytes.end(), from, from + (dtype == DType::kFloat32 ? 4 : 2));
    }
    return bytes;
  }
  void* data_ = nullptr;
};

// Median milliseconds, with the L2 cache overwritten before each run.
float timed(const std::function<void()>& run, void* scratch, size_t scratch_bytes) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 34; ++i) {
    check(cudaMemsetAsync(scratch, i, scratch_bytes, nullptr));
    check(cudaEventRecord(start, nullptr));
    run();
    check(cudaEventRecord(end, nullptr));
    check(cudaEventSynchronize(end));
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, start, end));
    if (i >= 3) times.push_back(milliseconds);
  }
  check(cudaEventDestroy(start));
  check(cudaEventDestroy(end));
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

void time_model(const char* name, const std::string& model, DType dtype, double copy_rate, void* scratch,
                size_t scratch_bytes) {
  std::vector<Memory> memory;
  const auto allocate = [&](int64_t count, DType type) {
    memory.emplace_back(count, type);
    return memory.back().data();
  };
  std::vector<clara::TensorRecord> records;
  std::vector<const void*> grads;
  int64_t elements = 0, sampled = 0;
  for (const Shape& shape : shapes_of(model)) {
    clara::TensorRecord record{};
    record.numel = shape.rows * shape.inner;
    record.run = record.kept = 1;
    const int64_t run = std::min<int64_t>(shape.inner & -shape.inner, 1024);
    if (record.numel >= 65536 && run >= 64) {
      record.run = static_cast<int32_t>(run);
      record.kept = record.run / 16;
    }
    record.param = allocate(record.numel, dtype);
    grads.push_back(allocate(record.numel, dtype));
    record.exp_avg = allocate(record.numel, DType::kFloat32);
    record.exp_avg_sq = allocate(record.numel, DType::kFloat32);
    record.path = allocate(clara::path_numel(record), DType::kFloat32);
    float* scalars = static_cast<float*>(allocate(2 + clara::kWalkScalars, DType::kFloat32));
    record.step = scalars;
    record.lr_scale = scalars + 1;
    for (int i = 0; i < clara::kWalkScalars; ++i) record.walk[i] = scalars + 2 + i;
    records.push_back(record);
    elements += record.numel;
    sampled += clara::path_numel(record);
  }

  clara::GroupOptions options{};
  options.lr = 1e-7;
  options.beta1 = 0.9;
  options.beta2 = 0.999;
  options.log_beta1 = std::log(0.9);
  options.log_beta2 = std::log(0.999);
  options.eps = 1e-8;
  options.smoothing = 0.05;
  options.damping = 0.5;
  options.clip_low = 0.5;
  options.clip_high = 1.05;
  options.scale_low = 1e-8;
  options.scale_high = 1e8;
  options.adapt_lr = 1.0;

  clara::TensorList list{};
  list.count = static_cast<int64_t>(records.size());
  const clara::cuda::ChunkCounts chunks = clara::cuda::number_chunks(records.data(), list.count);
  list.tensors = records.data();
  list.grads = grads.data();
  list.groups = &options;
  list.group_count = 1;
  list.chunk_count = chunks.chunks;
  list.path_chunk_count = chunks.path_chunks;
  list.param_dtype = list.grad_dtype = dtype;

  const clara::cuda::Layout offsets = clara::cuda::layout(list.count, chunks);
  std::vector<char> table(static_cast<size_t>(offsets.table_bytes));
  clara::cuda::write_table(records.data(), list.count, table.data());
  void* device_memory = allocate(offsets.bytes / 4 + 1, DType::kFloat32);
  check(cudaMemcpy(device_memory, table.data(), table.size(), cudaMemcpyHostToDevice));
  auto* sums = static_cast<clara::PathSums*>(allocate(clara::kPathSums * 2 * list.count, DType::kFloat32));
  const clara::cuda::Placement where = {0, nullptr, device_memory};

  const float step = timed([&] { clara::cuda::step(list, where); }, scratch, scratch_bytes);
  const float measure = timed([&] { clara::cuda::measure(list, sums, where); }, scratch, scratch_bytes);
  const float update = timed([&] { clara::cuda::update(list, where); }, scratch, scratch_bytes);
  const int64_t width = dtype == DType::kFloat32 ? 4 : 2;
  const double update_bytes = static_cast<double>(elements * (3 * width + 16));
  const double measure_bytes = static_cast<double>(sampled * (width + 16));
  const auto share = [&](double bytes, float milliseconds) { return 100.0 * bytes / copy_rate / (milliseconds * 1e-3); };
  std::printf("%-28s %-14s %-8s  step %8.4f ms %5.1f%%  measure %8.4f ms %5.1f%%  update %8.4f ms %5.1f%%\n", name,
              model.c_str(), dtype == DType::kFloat32 ? "float32" : "bfloat16", step,
              share(update_bytes + measure_bytes, step), measure, share(measure_bytes, measure), update,
              share(update_bytes, update));
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: time_kernels NAME MODEL...\n");
    return 2;
  }
  constexpr size_t kScratch = size_t{1} << 28, kCopy = size_t{1} << 30;
  void *scratch, *source, *target;
  check(cudaMalloc(&scratch, kScratch));
  check(cudaMalloc(&source, kCopy));
  check(cudaMalloc(&target, kCopy));
  check(cudaMemset(source, 1, kCopy));
  const float copy = timed([&] { check(cudaMemcpyAsync(target, source, kCopy, cudaMemcpyDeviceToDevice, nullptr)); },
                           scratch, kScratch);
  const double copy_rate = 2.0 * kCopy / (copy * 1e-3);
  check(cudaFree(source));
  check(cudaFree(target));
  std::printf("%-28s copy %.0f GB/s\n", argv[1], copy_rate / 1e9);
  for (int i = 2; i < argc; ++i) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      time_model(argv[1], argv[i], dtype, copy_rate, scratch, kScratch);
    }
  }
  return 0;
}
