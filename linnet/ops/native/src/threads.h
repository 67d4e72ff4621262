// Work sharing on the thread pool that torch already runs (its OpenMP library).
#pragma once

#include <cstdint>
#include <cstdlib>

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace linnet {

// Denormals off while one lives: exp(-s n) of steep heads falls below 1e-38, and each vector
// operation on such numbers costs over a hundred cycles.
class NoDenormals {
#if defined(__x86_64__)
  unsigned saved_ = _mm_getcsr();

 public:
  NoDenormals() { _mm_setcsr(saved_ | 0x8040); }
  ~NoDenormals() { _mm_setcsr(saved_); }
#endif
};

// Scratch memory of one thread, aligned to cache lines.
class Scratch {
  float* data_;

 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64))) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }
};

// Calls work(task, scratch) for every task, the next free thread taking the next task.
template <typename Work>
void for_each_task(int64_t num_tasks, int num_threads, int64_t scratch_floats, const Work& work) {
  const int threads = int(num_tasks < num_threads ? num_tasks : num_threads);
#pragma omp parallel num_threads(threads > 0 ? threads : 1)
  {
    NoDenormals guard;
    Scratch scratch(scratch_floats);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < num_tasks; task++) work(task, scratch.get());
  }
}

}  // namespace linnet
