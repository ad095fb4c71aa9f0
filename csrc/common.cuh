// Shared by all kernels: launches, element types, 16-byte packs, reductions over a warp.
//
// A kernel file (<op>.cuh) works on pointers and sizes; <op>.cu registers it with torch. The same kernel file
// compiles under a host compiler with MOETRAIN_ON_HOST, where tests/ops/cuda_on_host.h emulates blocks, warps
// and barriers. That runs and checks the kernels without a GPU. It is why all shared memory is dynamic and
// every launch goes through LAUNCH.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "launch.h"

#ifdef MOETRAIN_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <mma.h>
#define LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(shared_bytes), stream>>>(__VA_ARGS__)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace moetrain {

constexpr unsigned kAllLanes = 0xffffffffu;

// ---- element types, and the types that they are summed in ----

struct bf16 {
  uint16_t bits;
};

template <typename T>
struct WideOf {
  using type = T;
};
template <>
struct WideOf<bf16> {
  using type = float;
};
template <typename T>
using Wide = typename WideOf<T>::type;

__device__ __forceinline__ float widen(bf16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }

template <typename T>
__device__ __forceinline__ T narrow(Wide<T> value) {
  return value;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float value) {
#ifdef MOETRAIN_ON_HOST
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return {uint16_t(0x7fff)};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};  // round to nearest, ties to even
#else
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#endif
}

__device__ __forceinline__ float exponential(float value) { return expf(value); }
__device__ __forceinline__ double exponential(double value) { return exp(value); }

// Reciprocal, to 2 ulp in float32; 0 for infinity.
__device__ __forceinline__ float reciprocal(float value) {
#ifdef MOETRAIN_ON_HOST
  return 1.0f / value;
#else
  return __fdividef(1.0f, value);
#endif
}
__device__ __forceinline__ double reciprocal(double value) { return 1.0 / value; }

// ---- packs: the elements that a lane loads or stores with one instruction ----

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <typename T>
constexpr int kPack = 16 / sizeof(T);

inline bool aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// ---- warps ----

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_in_block() { return int(threadIdx.x) / kWarp; }
__device__ __forceinline__ int64_t warp_id() {
  return int64_t(blockIdx.x) * (blockDim.x / kWarp) + warp_in_block();
}
__device__ __forceinline__ int64_t warp_count() { return int64_t(gridDim.x) * (blockDim.x / kWarp); }

// Sum over the lanes, in a fixed order; every lane gets the same bits.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

}  // namespace moetrain
