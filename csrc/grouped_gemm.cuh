// Gradient of the expert matrices, accumulated in float32 (moetrain/ops/grouped_gemm.py):
//
//   acc[e] += a[rows of e].T @ b[rows of e]           a [R, I], b [R, O], acc [e, I, O] float32
//
// grouped_mm returns the type of its operands. To add its bfloat16 result to a float32 gradient costs a pass
// over all matrices, and rounds. Here one block owns one 64 x 64 tile of one expert's gradient and adds to it
// once, so no atomics are needed; the matrix of an expert without rows is not touched. bfloat16 runs on the
// tensor cores (wmma), float32 as plain multiply-adds without tf32. Loads are not pipelined: simple and
// correct comes first. Whether this kernel or grouped_mm and an addition is faster has to be measured
// (tools/bench/ops.py).
#pragma once

#include "common.cuh"

namespace moetrain {

constexpr int kGradThreads = 128;
constexpr int kStep = 32;                              // rows that a block multiplies at a time
// Elements from row to row in shared memory. The 16 extra bytes shift each row to other banks.
constexpr int kPitch = kTile + 8;
constexpr int kResultPitch = kTile + 4;

// Shared memory of the operands. The tensor cores also store their result there, in place of the operands.
template <typename T>
constexpr int kGradShared = 2 * kStep * kPitch * sizeof(T);
template <>
constexpr int kGradShared<bf16> = kTile * kResultPitch * sizeof(float);
static_assert(kGradShared<bf16> >= 2 * kStep * kPitch * int(sizeof(bf16)));

// Loads a block of rows and columns into shared memory, with zeros outside the matrix. `columns` is a
// multiple of N.
template <typename T, int N>
__device__ __forceinline__ void load_block(const T* __restrict__ from, T* into, int64_t first_row,
                                           int64_t end_row, int64_t first_column, int64_t columns) {
  constexpr int kAcross = kTile / N;
  for (int i = int(threadIdx.x); i < kStep * kAcross; i += kGradThreads) {
    const int row = i / kAcross, column = i % kAcross * N;
    Pack<T, N> pack{};
    if (first_row + row < end_row && first_column + column < columns) {
      pack = *reinterpret_cast<const Pack<T, N>*>(from + (first_row + row) * columns + first_column + column);
    }
    *reinterpret_cast<Pack<T, N>*>(into + row * kPitch + column) = pack;
  }
}

// Four warps, each of which computes a 32 x 32 quarter of the tile.
__global__ void __launch_bounds__(kGradThreads)
    grouped_wgrad_bf16_kernel(const bf16* __restrict__ a, const bf16* __restrict__ b,
                              const int32_t* __restrict__ ends, float* __restrict__ acc, int64_t rows,
                              int64_t columns) {
  using namespace nvcuda;
  DYNAMIC_SHARED(shared);
  bf16* a_block = reinterpret_cast<bf16*>(shared);
  bf16* b_block = a_block + kStep * kPitch;
  float* result = reinterpret_cast<float*>(shared);

  const GradTile tile = grad_tile(blockIdx.x, rows, columns);
  const Range range = rows_of(ends, tile.expert);
  if (range.begin >= range.end) return;                        // all threads of the block alike
  const int warp_row = warp_in_block() / 2 * 32, warp_column = warp_in_block() % 2 * 32;

  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums[2][2];
  for (auto& line : sums)
    for (auto& sum : line) wmma::fill_fragment(sum, 0.0f);
  for (int64_t first = range.begin; first < range.end; first += kStep) {
    load_block<bf16, 8>(a, a_block, first, range.end, tile.row, rows);
    load_block<bf16, 8>(b, b_block, first, range.end, tile.column, columns);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      // a is stored [row, i]: as the left operand [i, row] it is column-major.
      wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::col_major> left[2];
      wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::row_major> right[2];
      for (int i = 0; i < 2; i++) {
        wmma::load_matrix_sync(
            left[i], reinterpret_cast<__nv_bfloat16*>(a_block + k * kPitch + warp_row + 16 * i), kPitch);
        wmma::load_matrix_sync(
            right[i], reinterpret_cast<__nv_bfloat16*>(b_block + k * kPitch + warp_column + 16 * i), kPitch);
      }
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) wmma::mma_sync(sums[i][j], left[i], right[j], sums[i][j]);
    }
    __syncthreads();                                           // before the operands are overwritten
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++)
      wmma::store_matrix_sync(result + (warp_row + 16 * i) * kResultPitch + warp_column + 16 * j, sums[i][j],
                              kResultPitch, wmma::mem_row_major);
  __syncthreads();
  float* out = acc + (tile.expert * rows + tile.row) * columns + tile.column;
  for (int i = int(threadIdx.x); i < kTile * kTile; i += kGradThreads) {
    const int row = i / kTile, column = i % kTile;
    if (tile.row + row >= rows || tile.column + column >= columns) continue;
    out[row * columns + column] += result[row * kResultPitch + column];
  }
}

// 128 threads, each of which computes 8 rows x 4 columns of the tile.
__global__ void __launch_bounds__(kGradThreads)
    grouped_wgrad_float_kernel(const float* __restrict__ a, const float* __restrict__ b,
                               const int32_t* __restrict__ ends, float* __restrict__ acc, int64_t rows,
                               int64_t columns) {
  DYNAMIC_SHARED(shared);
  float* a_block = reinterpret_cast<float*>(shared);
  float* b_block = a_block + kStep * kPitch;

  const GradTile tile = grad_tile(blockIdx.x, rows, columns);
  const Range range = rows_of(ends, tile.expert);
  if (range.begin >= range.end) return;
  const int first_row = int(threadIdx.x) / 16 * 8, first_column = int(threadIdx.x) % 16 * 4;

  float sums[8][4] = {};
  for (int64_t first = range.begin; first < range.end; first += kStep) {
    load_block<float, 4>(a, a_block, first, range.end, tile.row, rows);
    load_block<float, 4>(b, b_block, first, range.end, tile.column, columns);
    __syncthreads();
    for (int k = 0; k < kStep; k++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          sums[i][j] =
              fmaf(a_block[k * kPitch + first_row + i], b_block[k * kPitch + first_column + j], sums[i][j]);
        }
      }
    }
    __syncthreads();
  }
  float* out = acc + (tile.expert * rows + tile.row) * columns + tile.column;
#pragma unroll
  for (int i = 0; i < 8; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int row = first_row + i, column = first_column + j;
      if (tile.row + row < rows && tile.column + column < columns) out[row * columns + column] += sums[i][j];
    }
  }
}

// The caller has checked that widths are multiples of 16 bytes and pointers aligned to 16.
inline void launch_grouped_wgrad(const bf16* a, const bf16* b, const int32_t* ends, float* acc,
                                 int64_t experts, int64_t rows, int64_t columns, cudaStream_t stream) {
  const int64_t tiles = grad_tiles(experts, rows, columns);
  if (tiles == 0) return;
  LAUNCH(grouped_wgrad_bf16_kernel, tiles, kGradThreads, kGradShared<bf16>, stream, a, b, ends, acc, rows,
         columns);
}

inline void launch_grouped_wgrad(const float* a, const float* b, const int32_t* ends, float* acc,
                                 int64_t experts, int64_t rows, int64_t columns, cudaStream_t stream) {
  const int64_t tiles = grad_tiles(experts, rows, columns);
  if (tiles == 0) return;
  LAUNCH(grouped_wgrad_float_kernel, tiles, kGradThreads, kGradShared<float>, stream, a, b, ends, acc, rows,
         columns);
}

}  // namespace moetrain
