// Threads and their memory. Who computes what never depends on how many threads there are.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <initializer_list>

#include "tensor.h"

namespace gradmem {
namespace {

// f(i) for every i < tasks, on as many threads as PyTorch uses.
template <class F>
inline void parallel_for(Index tasks, int threads, F f) {
  if (threads <= 1 || tasks <= 1) {
    for (Index i = 0; i < tasks; ++i) f(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (Index i = 0; i < tasks; ++i) f(i);
}

// Memory of a thread, cut into arrays that start at whole cache lines; kept for its next task. Not initialised.
class Scratch {
 public:
  // Makes room for so many bytes in so many arrays; what was there before is lost.
  void reserve(std::size_t bytes, int arrays) {
    const std::size_t wanted = bytes + (arrays + 1) * LINE;
    if (wanted > size_) {
      std::free(memory_);
      memory_ = static_cast<char*>(std::malloc(wanted));
      size_ = memory_ == nullptr ? 0 : wanted;
      if (memory_ == nullptr) std::abort();
    }
    next_ = memory_;
  }

  template <class T>
  T* take(Index count) {
    char* start = next_ + (LINE - reinterpret_cast<std::size_t>(next_) % LINE) % LINE;
    next_ = start + count * sizeof(T);
    return reinterpret_cast<T*>(start);
  }

  ~Scratch() { std::free(memory_); }

 private:
  static constexpr std::size_t LINE = 64;
  char* memory_ = nullptr;
  char* next_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace
}  // namespace gradmem
