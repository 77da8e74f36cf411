// Runs CUDA kernels on a CPU, for tests: every thread of a block is a coroutine that gives way at each shuffle, so a warp
// meets there as it does on a device. Lanes of a warp that disagree on the next shuffle, or leave others behind, are an
// error. Supplies the few names that vis/csrc/*.cuh use.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulation {

inline dim3 thread, block, grid;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

struct Coroutine {
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  int meetings = 0; // shuffles so far
  bool done = false;
  static constexpr size_t kStack = 64 * 1024;
};

constexpr int kLanes = 32;
inline std::vector<Coroutine> threads;
inline ucontext_t scheduler;
inline int current = 0;
inline const std::function<void()>* body = nullptr;
inline uint64_t slots[2][1024]; // what each thread offers at even and at odd meetings

inline void enter() {
  (*body)();
  threads[current].done = true;
  swapcontext(&threads[current].context, &scheduler);
}

inline void run_block(int count) {
  threads.resize(count);
  for (Coroutine& one : threads) {
    one.meetings = 0;
    one.done = false;
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = one.stack.get();
    one.context.uc_stack.ss_size = Coroutine::kStack;
    one.context.uc_link = nullptr;
    makecontext(&one.context, enter, 0);
  }
  for (int left = count; left > 0;) {
    for (current = 0; current < count; ++current) {
      Coroutine& one = threads[current];
      if (!one.done) {
        thread = dim3(static_cast<unsigned>(current), 0, 0);
        swapcontext(&scheduler, &one.context);
        left -= one.done;
      }
    }
    for (int i = 0; i < count; ++i) {
      if (threads[i].meetings != threads[i - i % kLanes].meetings || threads[i].done != threads[i - i % kLanes].done) {
        fail("lanes of a warp have parted");
      }
    }
  }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int count, const Arguments&... arguments) {
  const std::function<void()> run = [&] { kernel(arguments...); };
  body = &run;
  grid = blocks;
  for (block.y = 0; block.y < blocks.y; ++block.y) {
    for (block.x = 0; block.x < blocks.x; ++block.x) {
      run_block(count);
    }
  }
  body = nullptr;
}

// The value that the lane `source(lane)` of this warp offers at this meeting.
template <typename V, typename Source>
V exchange(V value, const Source& source) {
  const int me = current, side = threads[me].meetings++ & 1;
  std::memcpy(&slots[side][me], &value, sizeof(V));
  swapcontext(&threads[me].context, &scheduler);
  const int lane = me % kLanes, from = source(lane);
  if (from < 0 || from >= kLanes) {
    fail("a shuffle reads outside of the warp");
  }
  V result;
  std::memcpy(&result, &slots[side][me - lane + from], sizeof(V));
  return result;
}

} // namespace emulation

#define threadIdx (emulation::thread)
#define blockIdx (emulation::block)
#define gridDim (emulation::grid)

template <typename V>
V __shfl_sync(unsigned mask, V value, int source, int width) {
  if (mask != 0xffffffffu || width < 1 || (width & (width - 1)) != 0 || source < 0 || source >= width) {
    emulation::fail("shuffle with a part of the warp, or from outside of the group");
  }
  return emulation::exchange(value, [=](int lane) { return lane / width * width + source; });
}

template <typename V>
V __shfl_xor_sync(unsigned mask, V value, int lanes) {
  if (mask != 0xffffffffu) {
    emulation::fail("shuffle with a part of the warp");
  }
  return emulation::exchange(value, [=](int lane) { return lane ^ lanes; });
}

template <typename V>
V atomicAdd(V* target, V addend) {
  const V before = *target;
  *target += addend;
  return before;
}

inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

inline float4 atomicAdd(float4* target, float4 addend) {
  if (reinterpret_cast<uintptr_t>(target) % sizeof(float4) != 0) {
    emulation::fail("misaligned addition");
  }
  const float4 before = *target;
  *target = {before.x + addend.x, before.y + addend.y, before.z + addend.z, before.w + addend.w};
  return before;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline int min(int a, int b) {
  return a < b ? a : b;
}
