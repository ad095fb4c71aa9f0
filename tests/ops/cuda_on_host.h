// Emulation of CUDA for a host compiler: runs the kernels of csrc/ without a GPU, and finds what one hides.
//
// A block's threads are fibers on one operating system thread. A fiber runs until its next barrier, of the
// block or of its warp, so nothing is atomic or racy by chance: fibers run in the `order` of the run, and
// results that differ between orders show a missing barrier. In order 0 the first warp runs as far as it can
// before the second begins, in order 1 the last warp does; in any other, all threads advance step by step,
// shuffled. It also finds:
//
//   barriers that not all threads reach, or reach at different lines     "divergent"
//   writes behind the shared memory that was asked for                   "shared memory overrun"
//   reads of shared memory before it is written                          it holds NaN and -1
//   loads and stores off their alignment, signed overflow                -fsanitize=undefined
//
// It says nothing about speed, registers, caches or memory ordering beyond barriers.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y = 1, z = 1;
};
inline dim3 threadIdx{}, blockIdx{}, blockDim{}, gridDim{};
using cudaStream_t = void*;
inline void cudaMemsetAsync(void* at, int byte, size_t bytes, cudaStream_t) { std::memset(at, byte, bytes); }

namespace on_host {

constexpr int kLanes = 32;
constexpr size_t kStack = 64 * 1024, kCanary = 256;

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false, finished = false, waits = false;
};

// Barrier of a warp or of a block, with the values that a shuffle exchanges. There are two sets of values:
// late threads still read those of the last barrier while early ones write those of the next.
struct Meeting {
  int members = 0, come = 0;
  uint64_t number = 0;
  int line = 0;
  uint64_t values[2][kLanes];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<unsigned char> shared;
  std::function<void()> body;
  unsigned running = 0;
  jmp_buf scheduler;
};

inline Block* block = nullptr;
inline std::string failure;                            // the first; a run that has one stops
inline int order = 0;                                  // 0: first to last, 1: last to first, otherwise a seed

inline void fail(const std::string& what) {
  if (failure.empty()) failure = what;
}

// A clock that advances by a millisecond whenever it is read.
inline uint64_t nanoseconds() {
  static uint64_t now = 0;
  return now += 1000000;
}

inline void to_scheduler() {
  Fiber& fiber = block->fibers[block->running];
  if (_setjmp(fiber.at) == 0) _longjmp(block->scheduler, 1);
}

// Waits at the barrier until all its threads have come; returns the number of the meeting.
inline uint64_t meet(Meeting& meeting, int line, const char* what) {
  const uint64_t number = meeting.number;
  if (meeting.come == 0) meeting.line = line;
  if (meeting.line != line)
    fail(std::string("divergent ") + what + ": lines " + std::to_string(meeting.line) + " and " +
         std::to_string(line));
  if (++meeting.come == meeting.members) {
    meeting.come = 0;
    meeting.number++;
    to_scheduler();                                    // the others may go first: any order is allowed
    return number;
  }
  block->fibers[block->running].waits = true;
  while (meeting.number == number) to_scheduler();
  block->fibers[block->running].waits = false;
  return number;
}

inline void enter() {
  block->body();
  block->fibers[block->running].finished = true;
  _longjmp(block->scheduler, 1);
}

inline void switch_to(unsigned thread) {
  Fiber& fiber = block->fibers[thread];
  block->running = thread;
  threadIdx.x = thread;
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
}

// Runs each of these threads once, up to its next barrier; returns whether any advanced.
inline bool step(Block& state, const std::vector<unsigned>& turn, size_t begin, size_t end) {
  bool progress = false;
  for (size_t i = begin; i < end; i++) {
    Fiber& fiber = state.fibers[turn[i]];
    if (fiber.finished) continue;
    const bool waited = fiber.waits;
    switch_to(turn[i]);
    progress |= !(waited && fiber.waits);
  }
  return progress;
}

inline void run_block(Block& state, unsigned threads, size_t shared_bytes) {
  block = &state;
  if (state.fibers.size() != threads) state.fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : state.fibers) fiber.started = fiber.finished = fiber.waits = false;
  state.warps.assign((threads + kLanes - 1) / kLanes, {});
  for (size_t warp = 0; warp < state.warps.size(); warp++) {
    state.warps[warp].members = int(std::min<size_t>(kLanes, threads - warp * kLanes));
  }
  state.all = {};
  state.all.members = int(threads);
  state.shared.assign(shared_bytes + 128 + kCanary, 0xff);     // floats are NaN, whole numbers -1

  std::vector<unsigned> turn(threads);
  std::iota(turn.begin(), turn.end(), 0u);
  if (order == 1) std::reverse(turn.begin(), turn.end());
  const size_t together = order > 1 ? threads : kLanes;        // threads that advance before others begin
  std::mt19937 random{unsigned(order)};
  for (bool progress = true; progress && failure.empty();) {
    if (order > 1) std::shuffle(turn.begin(), turn.end(), random);
    progress = false;
    for (size_t first = 0; first < threads; first += together) {
      while (step(state, turn, first, std::min<size_t>(first + together, threads)) && failure.empty()) {
        progress = true;
        if (order > 1) break;                                  // shuffle again
      }
    }
  }
  for (const Fiber& fiber : state.fibers) {
    if (!fiber.finished) fail("divergent: a thread waits at a barrier that others never reach");
  }
}

inline unsigned char* shared_memory() {                // alignment of DYNAMIC_SHARED on a device
  const auto at = reinterpret_cast<uintptr_t>(block->shared.data());
  return block->shared.data() + (128 - at % 128) % 128;
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, uint64_t blocks, unsigned threads, size_t shared_bytes, Arguments... arguments) {
  static Block state;
  if (blocks == 0 || blocks >= uint64_t(1) << 31 || threads == 0 || threads > 1024)
    return fail("no such grid");
  if (shared_bytes > 48 * 1024) return fail("more shared memory than a block may have");
  state.body = [=] { kernel(arguments...); };
  blockDim.x = threads;
  gridDim.x = unsigned(blocks);
  for (uint64_t i = 0; i < blocks && failure.empty(); i++) {
    blockIdx.x = unsigned(order == 1 ? blocks - 1 - i : i);
    run_block(state, threads, shared_bytes);
    for (unsigned char* at = shared_memory() + shared_bytes; at < state.shared.data() + state.shared.size();
         at++) {
      if (*at != 0xff) return fail("shared memory overrun");
    }
  }
}

template <typename T>
T exchange(T value, int line, const char* what, const std::function<T(const uint64_t*, int)>& pick) {
  Meeting& warp = block->warps[block->running / kLanes];
  if (warp.members != kLanes) fail(std::string(what) + " in a warp that is not full");
  const int lane = int(block->running % kLanes);
  uint64_t bits = 0;
  static_assert(sizeof(T) <= 8);
  std::memcpy(&bits, &value, sizeof(T));
  warp.values[warp.number & 1][lane] = bits;
  const uint64_t number = meet(warp, line, what);
  return pick(warp.values[number & 1], lane);
}

template <typename T>
T as(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T shuffle(T value, int line, const std::function<int(int)>& source) {
  return exchange<T>(value, line, "shuffle", [&](const uint64_t* values, int lane) {
    const int from = source(lane);
    return as<T>(values[from >= 0 && from < kLanes ? from : lane]);
  });
}

inline unsigned vote(uint64_t value, int line, const std::function<unsigned(const uint64_t*, int)>& pick) {
  return unsigned(exchange<uint64_t>(value, line, "vote", [&](const uint64_t* values, int lane) -> uint64_t {
    return pick(values, lane);
  }));
}

inline unsigned lanes_where(const std::function<bool(int)>& holds) {
  unsigned lanes = 0;
  for (int lane = 0; lane < kLanes; lane++) lanes |= unsigned(holds(lane)) << lane;
  return lanes;
}

inline unsigned reduce(unsigned value, int line, const std::function<unsigned(unsigned, unsigned)>& better) {
  return vote(value, line, [&](const uint64_t* values, int) {
    unsigned best = unsigned(values[0]);
    for (int lane = 1; lane < kLanes; lane++) best = better(best, unsigned(values[lane]));
    return best;
  });
}

}  // namespace on_host

#define LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  ((void)(stream),                                                 \
   on_host::launch(kernel, uint64_t(blocks), unsigned(threads), size_t(shared_bytes), __VA_ARGS__))
#define DYNAMIC_SHARED(name) unsigned char* name = on_host::shared_memory()

#define __syncthreads() on_host::meet(on_host::block->all, __LINE__, "__syncthreads")
#define __syncwarp() \
  on_host::meet(on_host::block->warps[on_host::block->running / 32], __LINE__, "__syncwarp")
#define __shfl_sync(mask, value, lane_) on_host::shuffle((value), __LINE__, [=](int) { return int(lane_); })
#define __shfl_xor_sync(mask, value, bits) \
  on_host::shuffle((value), __LINE__, [=](int lane__) { return lane__ ^ int(bits); })
#define __shfl_up_sync(mask, value, by) \
  on_host::shuffle((value), __LINE__, [=](int lane__) { return lane__ - int(by); })
#define __ballot_sync(mask, holds) \
  on_host::vote((holds) ? 1 : 0, __LINE__, [](const uint64_t* values, int) { \
    return on_host::lanes_where([&](int lane) { return values[lane] != 0; }); \
  })
#define __match_any_sync(mask, value) \
  on_host::vote(uint64_t(int64_t(value)), __LINE__, [](const uint64_t* values, int mine) { \
    return on_host::lanes_where([&](int lane) { return values[lane] == values[mine]; }); \
  })
#define __reduce_max_sync(mask, value) \
  on_host::reduce((value), __LINE__, [](unsigned a, unsigned b) { return a > b ? a : b; })
#define __reduce_min_sync(mask, value) \
  on_host::reduce((value), __LINE__, [](unsigned a, unsigned b) { return a < b ? a : b; })

inline int32_t atomicAdd(int32_t* at, int32_t value) { return std::exchange(*at, *at + value); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __uint_as_float(uint32_t bits) { return on_host::as<float>(bits); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// ---- tensor cores: lane 0 of a warp holds the whole 16 x 16 matrices ----

struct __nv_bfloat16 {
  uint16_t bits;
};

namespace nvcuda::wmma {

struct accumulator {};
struct matrix_a {};
struct matrix_b {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  float at[16][16];
};

inline bool first_lane() { return on_host::block->running % 32 == 0; }

template <typename Use, typename T, typename Layout>
void fill_fragment(fragment<Use, 16, 16, 16, T, Layout>& matrix, float value) {
  for (auto& line : matrix.at)
    for (float& element : line) element = value;
}

template <typename Use, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, __nv_bfloat16, Layout>& matrix, const __nv_bfloat16* from,
                      unsigned pitch) {
  if (reinterpret_cast<uintptr_t>(from) % 32 != 0 || pitch % 8 != 0)
    on_host::fail("wmma: pointer or pitch off its alignment");
  if (!first_lane()) return;
  constexpr bool across = std::is_same_v<Layout, row_major>;
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) {
      matrix.at[i][j] = __uint_as_float(uint32_t(from[across ? i * pitch + j : j * pitch + i].bits) << 16);
    }
}

template <typename A, typename B, typename C>
void mma_sync(C& out, const A& a, const B& b, const C& c) {
  if (!first_lane()) return;
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) {
      float sum = c.at[i][j];
      for (int k = 0; k < 16; k++) sum += a.at[i][k] * b.at[k][j];
      out.at[i][j] = sum;
    }
}

template <typename T>
void store_matrix_sync(float* into, const fragment<accumulator, 16, 16, 16, T>& matrix, unsigned pitch,
                       layout_t) {
  if (reinterpret_cast<uintptr_t>(into) % 32 != 0 || pitch % 4 != 0)
    on_host::fail("wmma: pointer or pitch off its alignment");
  if (!first_lane()) return;
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) into[i * pitch + j] = matrix.at[i][j];
}

}  // namespace nvcuda::wmma
