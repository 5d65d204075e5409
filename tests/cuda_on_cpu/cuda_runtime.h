// As much of CUDA as csrc/cuda uses, on the CPU, so that sanitizers can watch the kernels.
//
// Each thread of a block is a fiber; blocks run one after the other. ThreadSanitizer takes fibers
// for threads, ordered by nothing but the barriers below: it sees a race whatever the order in
// which they happen to run.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <set>

#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif
#if defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define UNWATCHED __attribute__((no_sanitize("thread")))
#else
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#define UNWATCHED
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define STYLEGAN_FAST_LAUNCH(kernel, grid, block, stream, ...) \
  cuda_on_cpu::launch(reinterpret_cast<void*>(kernel), grid, block, [&] { kernel(__VA_ARGS__); })

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
inline uint3 blockIdx;
inline dim3 blockDim, gridDim;
#define threadIdx (cuda_on_cpu::running->thread)

namespace cuda_on_cpu {

// Set by tests.
inline int multiprocessors = 1;
inline std::function<bool(uint3)> wants_block;  // empty: every block runs
inline std::set<void*> launched;                // the kernels so far

constexpr size_t kStackBytes = 1 << 18;
constexpr int kWarp = 32;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", why);
  std::abort();
}

enum class State { ready, at_block_barrier, at_warp_barrier, done };

// What happened before a barrier is ordered before what comes after it, and no more: the next
// arrivals, some of them earlier than the last to leave, need a token of their own.
struct Barrier {
  char tokens[2];
};

struct Fiber {
  uint3 thread = {};
  State state = State::done;
  int block_barriers = 0, warp_barriers = 0;  // passed so far
  ucontext_t context = {};
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void *fake_stack = nullptr, *tsan = nullptr;
};

inline Fiber scheduler;
inline std::deque<Fiber> fibers;
inline Fiber* running = &scheduler;
inline const std::function<void()>* kernel_call;
inline unsigned shuffled[1024];
inline char start_token, end_token;
inline Barrier block_barrier, warp_barriers[1024 / kWarp];

UNWATCHED inline void switch_to(Fiber* next) {
  Fiber* const self = running;
  running = next;
  __sanitizer_start_switch_fiber(&self->fake_stack, next->stack, next->stack_bytes);
  __tsan_switch_to_fiber(next->tsan, 1);
  swapcontext(&self->context, &next->context);
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
}

UNWATCHED inline void wait_at(State state, Barrier* barrier, int* passed) {
  char* const token = barrier->tokens + (*passed)++ % 2;
  running->state = state;
  __tsan_release(token);
  switch_to(&scheduler);
  __tsan_acquire(token);
}

UNWATCHED inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
  for (;;) {
    __tsan_acquire(&start_token);
    (*kernel_call)();
    __tsan_release(&end_token);
    running->state = State::done;
    switch_to(&scheduler);
  }
}

UNWATCHED inline void add_fiber() {
  const unsigned x = fibers.size();
  Fiber* const fiber = &fibers.emplace_back();
  fiber->thread.x = x;
  fiber->stack_bytes = kStackBytes;
  void* const stack =
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED || getcontext(&fiber->context) != 0) fail("no fiber");
  fiber->stack = stack;
  fiber->context.uc_stack.ss_sp = stack;
  fiber->context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber->context, fiber_main, 0);
  fiber->tsan = __tsan_create_fiber(0);
}

// Lets go on the threads [begin, end) that have not returned if all of them are at this barrier.
UNWATCHED inline bool release(State barrier, unsigned begin, unsigned end) {
  bool waiting = false;
  for (unsigned t = begin; t < end; ++t) {
    if (fibers[t].state == State::done) continue;
    if (fibers[t].state != barrier) return false;
    waiting = true;
  }
  for (unsigned t = begin; waiting && t < end; ++t) {
    if (fibers[t].state == barrier) fibers[t].state = State::ready;
  }
  return waiting;
}

UNWATCHED inline void run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) fibers[t].state = State::ready;
  __tsan_release(&start_token);
  for (bool is_over = false; !is_over;) {
    is_over = true;
    for (unsigned t = 0; t < threads; ++t) {
      if (fibers[t].state == State::ready) switch_to(&fibers[t]);
      is_over = is_over && fibers[t].state == State::done;
    }
    if (is_over) break;
    bool released = release(State::at_block_barrier, 0, threads);
    for (unsigned t = 0; t < threads; t += kWarp) {
      released |= release(State::at_warp_barrier, t, std::min(t + kWarp, threads));
    }
    if (!released) fail("threads of one block wait at different barriers");
  }
  __tsan_acquire(&end_token);
}

inline void launch(void* kernel, dim3 grid, dim3 block, const std::function<void()>& call) {
  if (grid.x - 1 >= INT32_MAX || grid.y - 1 >= 65535 || grid.z - 1 >= 65535 ||
      block.x - 1 >= 1024)
    fail("no GPU takes such a grid");
  launched.insert(kernel);
  scheduler.tsan = __tsan_get_current_fiber();
  while (fibers.size() < block.x) add_fiber();
  kernel_call = &call;
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        if (!wants_block || wants_block(blockIdx)) run_block(block.x);
      }
    }
  }
}

}  // namespace cuda_on_cpu

using std::max;
using std::min;

inline void __syncthreads() {
  using namespace cuda_on_cpu;
  wait_at(State::at_block_barrier, &block_barrier, &running->block_barriers);
}

inline unsigned __shfl_xor_sync(unsigned mask, unsigned value, int lane_mask) {
  using namespace cuda_on_cpu;
  if (mask != ~0u) fail("only whole warps shuffle");
  const auto wait = [] {
    Barrier* const barrier = warp_barriers + threadIdx.x / kWarp;
    wait_at(State::at_warp_barrier, barrier, &running->warp_barriers);
  };
  shuffled[threadIdx.x] = value;
  wait();
  const unsigned result = shuffled[threadIdx.x ^ lane_mask];
  wait();
  return result;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = cuda_on_cpu::multiprocessors, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}
