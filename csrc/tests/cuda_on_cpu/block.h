// The threads of CUDA kernels on a CPU: one block after the other, a block's threads as fibers that take turns where they
// wait for each other. Every second launch has them start in the opposite order, so that results that depend on it are
// found out; so is a barrier that not all threads reach.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

struct Place {
  unsigned x, y, z;
};
inline Place threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

class Block {
 public:
  static constexpr int WARP = 32;

  static Block& get() {
    static Block block;
    return block;
  }

  // The kernel's blocks, each of so many threads.
  void run(Place blocks, unsigned threads, const std::function<void()>& kernel) {
    const std::lock_guard<std::mutex> alone(mutex_);
    kernel_ = &kernel;
    while (fibers_.size() < threads) start_fiber();
    gridDim = blocks, blockDim = {threads, 1, 1};
    backwards_ = !backwards_;
    for (unsigned z = 0; z < blocks.z; ++z)
      for (unsigned y = 0; y < blocks.y; ++y)
        for (unsigned x = 0; x < blocks.x; ++x) {
          blockIdx = {x, y, z};
          run_block(threads);
        }
  }

  // Waits for all threads of the block that have not ended.
  void wait_for_block() {
    const unsigned generation = generation_;
    ++waiting_;
    pass_barrier();
    while (generation == generation_) yield();
  }

  // A value of another lane of the warp, all of whose lanes come here.
  template <class T>
  T exchange(T value, int lane_mask) {
    Warp& warp = warps_[current_ / WARP];
    const int lane = int(current_) % WARP;
    *reinterpret_cast<T*>(warp.values[lane]) = value;
    wait_for_warp(warp);
    const T other = *reinterpret_cast<T*>(warp.values[lane ^ lane_mask]);
    wait_for_warp(warp);
    return other;
  }

 private:
  struct Fiber {
    ucontext_t context;
    jmp_buf here;
    bool started = false, ended = true;
    std::unique_ptr<char[]> stack;
  };
  struct Warp {
    unsigned waiting = 0, generation = 0;
    alignas(16) char values[WARP][16];
  };

  void start_fiber() {
    fibers_.emplace_back(new Fiber);
    Fiber& fiber = *fibers_.back();
    fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::live, 0);
    warps_.resize((fibers_.size() + WARP - 1) / WARP);
  }

  // A fiber's life: one thread of every block.
  static void live() {
    Block& block = get();
    for (;;) {
      (*block.kernel_)();
      block.fibers_[block.current_]->ended = true;
      --block.alive_;
      block.pass_barrier();
      block.progress_ = true;
      block.yield();
    }
  }

  void run_block(unsigned threads) {
    alive_ = threads;
    waiting_ = 0;
    for (Warp& warp : warps_) warp.waiting = 0;
    for (unsigned i = 0; i < threads; ++i) fibers_[i]->ended = false;
    while (alive_ > 0) {
      progress_ = false;
      for (unsigned i = 0; i < threads; ++i) {
        current_ = backwards_ ? threads - 1 - i : i;
        if (!fibers_[current_]->ended) resume(*fibers_[current_]);
      }
      if (!progress_) {
        std::fprintf(stderr, "a barrier of block %u that not all of its threads reach\n", blockIdx.x);
        std::abort();
      }
    }
  }

  // Signal masks need no care: setjmp is the cheap way between fibers, and their contexts are for the start alone.
  void resume(Fiber& fiber) {
    threadIdx = {current_, 0, 0};
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }

  void yield() {
    const unsigned me = current_;
    if (_setjmp(fibers_[me]->here) == 0) _longjmp(scheduler_, 1);
  }

  void pass_barrier() {
    if (waiting_ == 0 || waiting_ < alive_) return;
    waiting_ = 0;
    ++generation_;
    progress_ = true;
  }

  void wait_for_warp(Warp& warp) {
    const unsigned generation = warp.generation;
    if (++warp.waiting == WARP) {
      warp.waiting = 0;
      ++warp.generation;
      progress_ = true;
    }
    while (generation == warp.generation) yield();
  }

  static constexpr std::size_t STACK = 1 << 18;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  const std::function<void()>* kernel_ = nullptr;
  jmp_buf scheduler_;
  unsigned current_ = 0, alive_ = 0, waiting_ = 0, generation_ = 0;
  bool progress_ = false, backwards_ = false;
};

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::Block::get().wait_for_block(); }

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  return cuda_on_cpu::Block::get().exchange(value, lane_mask);
}
