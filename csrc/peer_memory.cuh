// Copies of rows into the memory of peers, and signals (moetrain/ops/peer_memory.py).
//
//   push     a few blocks write rows to all destinations; each begins with another, to keep all links busy
//   put      stores an epoch at one place of each pad, with release semantics at system scope
//   wait     loads, with acquire semantics at system scope, until all places hold that epoch; past the limit,
//            prints who waited for whom, and traps
//
// Whoever waits spins: its block must not keep the one from running that it waits for (other device, or other
// stream with room).
#pragma once

#include "common.cuh"

#ifndef MOETRAIN_ON_HOST
#include <cstdio>
#endif

namespace moetrain {

struct PushTo {
  uint8_t* area[kMaxPeers];
  int64_t begin[kMaxPeers + 1];                                // first row of each destination, and the end
  int64_t shift[kMaxPeers];                                    // from the number of a row to its place there
};

struct PutTo {
  int64_t* at[kMaxPeers];
};

struct WaitFor {
  int32_t place[kMaxPeers];
  int32_t rank[kMaxPeers + 1];                                 // of each peer; last, the rank that waits
  char what[128];
};

// ---- memory order and time beyond the device ----

__device__ __forceinline__ void store_release(int64_t* at, int64_t value) {
#ifdef MOETRAIN_ON_HOST
  *at = value;
#else
  asm volatile("fence.acq_rel.sys;\n\tst.release.sys.global.s64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
#endif
}

__device__ __forceinline__ int64_t load_acquire(const int64_t* at) {
#ifdef MOETRAIN_ON_HOST
  return *at;
#else
  int64_t value;
  asm volatile("ld.acquire.sys.global.s64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
#endif
}

__device__ __forceinline__ uint64_t nanoseconds() {
#ifdef MOETRAIN_ON_HOST
  return on_host::nanoseconds();
#else
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
#endif
}

__device__ __forceinline__ void report_timeout(const WaitFor& waits, int peer, int peers, int64_t epoch,
                                               int64_t limit_ms) {
#ifdef MOETRAIN_ON_HOST
  on_host::fail("rank " + std::to_string(waits.rank[peers]) + " waited " + std::to_string(limit_ms) +
                " ms for rank " + std::to_string(waits.rank[peer]) + ": " + waits.what + ", epoch " +
                std::to_string(epoch));
#else
  printf("moetrain: rank %d waited %lld ms for rank %d: %s, epoch %lld\n", waits.rank[peers],
         static_cast<long long>(limit_ms), waits.rank[peer], waits.what, static_cast<long long>(epoch));
  __nanosleep(1000000);                                        // lets other threads print their timeouts
  __trap();
#endif
}

// ---- kernels ----

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    push_kernel(const Unit* __restrict__ rows, const PushTo to, int peers, int first, int64_t units) {
  constexpr int kAtOnce = 4;
  for (int step = 0; step < peers; step++) {
    const int peer = int((unsigned(first) + blockIdx.x + unsigned(step)) % unsigned(peers));
    Unit* area = reinterpret_cast<Unit*>(to.area[peer]) + to.shift[peer] * units;
    for (int64_t row = to.begin[peer] + warp_id(); row < to.begin[peer + 1]; row += warp_count()) {
      const Unit* source = rows + row * units;
      Unit* target = area + row * units;
      for (int64_t unit = lane_id(); unit < units; unit += kAtOnce * kWarp) {
        Unit held[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
          if (unit + i * kWarp < units) held[i] = source[unit + i * kWarp];
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
          if (unit + i * kWarp < units) target[unit + i * kWarp] = held[i];
        }
      }
    }
  }
}

__global__ inline void put_kernel(const PutTo to, int peers, int64_t epoch) {
  if (int(threadIdx.x) < peers) store_release(to.at[threadIdx.x], epoch);
}

__global__ inline void wait_kernel(const int64_t* pad, const WaitFor waits, int peers, int64_t epoch,
                                   int64_t limit_ms) {
  const int peer = int(threadIdx.x);
  if (peer >= peers) return;
  const uint64_t begin = nanoseconds(), limit = uint64_t(limit_ms) * 1000000u;
  while (load_acquire(pad + waits.place[peer]) < epoch) {
    if (nanoseconds() - begin > limit) return report_timeout(waits, peer, peers, epoch, limit_ms);
  }
}

// ---- launches ----

template <typename Unit>
void launch_push_units(const void* rows, const PushTo& to, int peers, int first, int64_t row_bytes,
                       cudaStream_t stream) {
  LAUNCH(push_kernel<Unit>, kPushBlocks, kThreads, 0, stream, static_cast<const Unit*>(rows), to, peers,
         first, row_bytes / int64_t(sizeof(Unit)));
}

// sent: number of rows of each destination. there: the row of its area at which they begin.
inline void launch_push(const void* rows, uint8_t* const* areas, const int64_t* sent, const int64_t* there,
                        int peers, int first, int64_t row_bytes, cudaStream_t stream) {
  PushTo to{};
  bool wide = row_bytes % 16 == 0 && aligned(rows, 16), words = row_bytes % 4 == 0 && aligned(rows, 4);
  for (int peer = 0; peer < peers; peer++) {
    to.area[peer] = areas[peer];
    to.begin[peer + 1] = to.begin[peer] + sent[peer];
    to.shift[peer] = there[peer] - to.begin[peer];
    wide &= aligned(areas[peer], 16), words &= aligned(areas[peer], 4);
  }
  if (to.begin[peers] == 0 || row_bytes == 0) return;
  const auto launch = wide    ? launch_push_units<Pack<uint32_t, 4>>
                      : words ? launch_push_units<uint32_t>
                              : launch_push_units<uint8_t>;
  launch(rows, to, peers, first, row_bytes, stream);
}

inline void launch_put(int64_t* const* pads, int64_t place, int64_t epoch, int peers, cudaStream_t stream) {
  PutTo to{};
  for (int peer = 0; peer < peers; peer++) to.at[peer] = pads[peer] + place;
  LAUNCH(put_kernel, 1, kMaxPeers, 0, stream, to, peers, epoch);
}

inline void launch_wait(const int64_t* pad, const WaitFor& waits, int peers, int64_t epoch, int64_t limit_ms,
                        cudaStream_t stream) {
  LAUNCH(wait_kernel, 1, kMaxPeers, 0, stream, pad, waits, peers, epoch, limit_ms);
}

}  // namespace moetrain
