// Permute and unpermute (moetrain/ops/permute.py).
//
//   permute     out[rows[t, k]] = x[t]            a token is read once, and written to each of its rows
//   unpermute   out[t] = sum over k of in[rows[t, k]], in slot order, in float32 or better
//
// One warp per token. A row of the plan that no slot points to (the tail behind the used rows, a gap of
// alignment) is set to zero by permute, so that its output is never uninitialised; unpermute never reads it.
#pragma once

#include "common.cuh"

namespace moetrain {

// Unit: the bytes that a lane moves with one instruction; a row has `units` of them. The element type does
// not matter.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    permute_kernel(const Unit* __restrict__ x, const int64_t* __restrict__ slots,
                   const int64_t* __restrict__ rows, Unit* __restrict__ out, int64_t tokens,
                   int64_t slots_per_token, int64_t num_rows, int64_t units) {
  constexpr int kAtOnce = 4;
  const int lane = lane_id();
  const int64_t row_groups = ceil_div(num_rows, kWarp);
  for (int64_t item = warp_id(); item < tokens + row_groups; item += warp_count()) {
    if (item < tokens) {
      const Unit* source = x + item * units;
      const int64_t* targets = rows + item * slots_per_token;
      for (int64_t first = lane; first < units; first += kAtOnce * kWarp) {
        Unit held[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
          if (first + i * kWarp < units) held[i] = source[first + i * kWarp];
        }
        for (int64_t k = 0; k < slots_per_token; k++) {
          const int64_t row = targets[k];
          if (row < 0 || row >= num_rows) continue;
          Unit* target = out + row * units;
#pragma unroll
          for (int i = 0; i < kAtOnce; i++) {
            if (first + i * kWarp < units) target[first + i * kWarp] = held[i];
          }
        }
      }
      continue;
    }
    // Rows that no slot points to: the lanes look at 32 rows, and the warp sets those without a slot to zero.
    const int64_t row = (item - tokens) * kWarp + lane;
    bool empty = false;
    if (row < num_rows) {
      const int64_t slot = slots[row];
      empty = slot < 0 || slot >= tokens * slots_per_token || rows[slot] != row;
    }
    unsigned found = __ballot_sync(kAllLanes, empty);
    while (found != 0) {
      const int64_t cleared = (item - tokens) * kWarp + (__ffs(int(found)) - 1);
      found &= found - 1;
      for (int64_t unit = lane; unit < units; unit += kWarp) out[cleared * units + unit] = Unit{};
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    unpermute_kernel(const T* __restrict__ in, const int64_t* __restrict__ rows, T* __restrict__ out,
                     int64_t tokens, int64_t slots_per_token, int64_t num_rows, int64_t width) {
  constexpr int kAtOnce = 4;                                   // slots whose loads are in flight together
  using Packed = Pack<T, N>;
  const int64_t packs = width / N;
  for (int64_t token = warp_id(); token < tokens; token += warp_count()) {
    const int64_t* sources = rows + token * slots_per_token;
    for (int64_t pack = lane_id(); pack < packs; pack += kWarp) {
      Wide<T> sum[N] = {};
      for (int64_t k = 0; k < slots_per_token; k += kAtOnce) {
        Packed held[kAtOnce];
        bool used[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
          const int64_t row = k + i < slots_per_token ? sources[k + i] : -1;
          used[i] = row >= 0 && row < num_rows;
          if (used[i]) held[i] = reinterpret_cast<const Packed*>(in + row * width)[pack];
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
          if (!used[i]) continue;
#pragma unroll
          for (int n = 0; n < N; n++) sum[n] += widen(held[i].at[n]);
        }
      }
      Packed result;
#pragma unroll
      for (int n = 0; n < N; n++) result.at[n] = narrow<T>(sum[n]);
      reinterpret_cast<Packed*>(out + token * width)[pack] = result;
    }
  }
}

template <typename Unit>
void launch_permute_units(const void* x, const int64_t* slots, const int64_t* rows, void* out, int64_t tokens,
                          int64_t slots_per_token, int64_t num_rows, int64_t row_bytes, cudaStream_t stream) {
  LAUNCH(permute_kernel<Unit>, warp_blocks(tokens + ceil_div(num_rows, kWarp)), kThreads, 0, stream,
         static_cast<const Unit*>(x), slots, rows, static_cast<Unit*>(out), tokens, slots_per_token, num_rows,
         row_bytes / int64_t(sizeof(Unit)));
}

inline void launch_permute(const void* x, const int64_t* slots, const int64_t* rows, void* out,
                           int64_t tokens, int64_t slots_per_token, int64_t num_rows, int64_t row_bytes,
                           cudaStream_t stream) {
  if (num_rows == 0 || row_bytes == 0) return;
  const auto fits = [&](int bytes) {
    return row_bytes % bytes == 0 && aligned(x, bytes) && aligned(out, bytes);
  };
  const auto launch = fits(16)  ? launch_permute_units<Pack<uint32_t, 4>>
                      : fits(4) ? launch_permute_units<uint32_t>
                      : fits(2) ? launch_permute_units<uint16_t>
                                : launch_permute_units<uint8_t>;
  launch(x, slots, rows, out, tokens, slots_per_token, num_rows, row_bytes, stream);
}

template <typename T>
void launch_unpermute(const T* in, const int64_t* rows, T* out, int64_t tokens, int64_t slots_per_token,
                      int64_t num_rows, int64_t width, cudaStream_t stream) {
  if (tokens == 0 || width == 0) return;
  if (width % kPack<T> == 0 && aligned(in, 16) && aligned(out, 16)) {
    LAUNCH((unpermute_kernel<T, kPack<T>>), warp_blocks(tokens), kThreads, 0, stream, in, rows, out, tokens,
           slots_per_token, num_rows, width);
  } else {
    LAUNCH((unpermute_kernel<T, 1>), warp_blocks(tokens), kThreads, 0, stream, in, rows, out, tokens,
           slots_per_token, num_rows, width);
  }
}

}  // namespace moetrain
