// SwiGLU with the routing weight folded in, and its backward in one pass (moetrain/ops/swiglu.py).
//
//   forward    a = silu(g) * u * w                       h = [g | u], one weight w per row
//   backward   from d = dL/da:  dw = <d, silu(g) u>,   du = d w silu(g),   dg = d w u silu'(g); recomputes a
//
// One warp per row; arithmetic in float32 (float64 for float64), rounded once. Rows from *used* on hold what
// the matrix product before left there: they are not read, and their results are zeros.
#pragma once

#include "common.cuh"

namespace moetrain {

template <typename T>
struct Swiglu {
  T silu, slope;                                               // silu(g) and its derivative

  __device__ __forceinline__ explicit Swiglu(T gate) {
    const T sigmoid = reciprocal(T(1) + exponential(-gate));
    silu = gate * sigmoid;
    slope = sigmoid * (T(1) + gate * (T(1) - sigmoid));
  }
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const T* __restrict__ gate_up, const Wide<T>* __restrict__ weights,
                  const int32_t* __restrict__ used, T* __restrict__ hidden, int64_t rows, int64_t width) {
  using Packed = Pack<T, N>;
  const int64_t packs = width / N, live = used == nullptr ? rows : *used;
  for (int64_t row = warp_id(); row < rows; row += warp_count()) {
    Packed* out = reinterpret_cast<Packed*>(hidden + row * width);
    if (row >= live) {
      for (int64_t pack = lane_id(); pack < packs; pack += kWarp) out[pack] = Packed{};
      continue;
    }
    const Packed* gates = reinterpret_cast<const Packed*>(gate_up + row * 2 * width);
    const Packed* ups = reinterpret_cast<const Packed*>(gate_up + (row * 2 + 1) * width);
    const Wide<T> weight = weights[row];
#pragma unroll 2
    for (int64_t pack = lane_id(); pack < packs; pack += kWarp) {
      const Packed gate = gates[pack], up = ups[pack];
      Packed result;
#pragma unroll
      for (int n = 0; n < N; n++) {
        result.at[n] = narrow<T>(Swiglu<Wide<T>>(widen(gate.at[n])).silu * widen(up.at[n]) * weight);
      }
      out[pack] = result;
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(const T* __restrict__ grad, const T* __restrict__ gate_up,
                           const Wide<T>* __restrict__ weights, const int32_t* __restrict__ used,
                           T* __restrict__ hidden, T* __restrict__ d_gate_up, Wide<T>* __restrict__ d_weights,
                           int64_t rows, int64_t width) {
  using Packed = Pack<T, N>;
  const int64_t packs = width / N, live = used == nullptr ? rows : *used;
  for (int64_t row = warp_id(); row < rows; row += warp_count()) {
    Packed* out = reinterpret_cast<Packed*>(hidden + row * width);
    Packed* d_gates = reinterpret_cast<Packed*>(d_gate_up + row * 2 * width);
    Packed* d_ups = reinterpret_cast<Packed*>(d_gate_up + (row * 2 + 1) * width);
    if (row >= live) {
      for (int64_t pack = lane_id(); pack < packs; pack += kWarp)
        out[pack] = d_gates[pack] = d_ups[pack] = Packed{};
      if (lane_id() == 0) d_weights[row] = 0;
      continue;
    }
    const Packed* grads = reinterpret_cast<const Packed*>(grad + row * width);
    const Packed* gates = reinterpret_cast<const Packed*>(gate_up + row * 2 * width);
    const Packed* ups = reinterpret_cast<const Packed*>(gate_up + (row * 2 + 1) * width);
    const Wide<T> weight = weights[row];
    Wide<T> d_weight = 0;
    for (int64_t pack = lane_id(); pack < packs; pack += kWarp) {
      const Packed d = grads[pack], gate = gates[pack], up = ups[pack];
      Packed result, d_gate, d_up;
#pragma unroll
      for (int n = 0; n < N; n++) {
        const Swiglu<Wide<T>> at(widen(gate.at[n]));
        const Wide<T> u = widen(up.at[n]), unweighted = at.silu * u, d_unweighted = widen(d.at[n]) * weight;
        d_weight += widen(d.at[n]) * unweighted;
        result.at[n] = narrow<T>(unweighted * weight);
        d_up.at[n] = narrow<T>(d_unweighted * at.silu);
        d_gate.at[n] = narrow<T>(d_unweighted * u * at.slope);
      }
      out[pack] = result;
      d_gates[pack] = d_gate;
      d_ups[pack] = d_up;
    }
    d_weight = warp_sum(d_weight);
    if (lane_id() == 0) d_weights[row] = d_weight;
  }
}

template <typename T>
void launch_swiglu(const T* gate_up, const Wide<T>* weights, const int32_t* used, T* hidden, int64_t rows,
                   int64_t width, cudaStream_t stream) {
  if (rows == 0 || width == 0) return;
  const bool packed = width % kPack<T> == 0 && aligned(gate_up, 16) && aligned(hidden, 16);
  const auto launch = [&](auto kernel) {
    LAUNCH(kernel, warp_blocks(rows), kThreads, 0, stream, gate_up, weights, used, hidden, rows, width);
  };
  packed ? launch(swiglu_kernel<T, kPack<T>>) : launch(swiglu_kernel<T, 1>);
}

template <typename T>
void launch_swiglu_backward(const T* grad, const T* gate_up, const Wide<T>* weights, const int32_t* used,
                            T* hidden, T* d_gate_up, Wide<T>* d_weights, int64_t rows, int64_t width,
                            cudaStream_t stream) {
  if (rows == 0) return;                               // a width of 0 still has gradients of weights: zeros
  const bool packed = width % kPack<T> == 0 && aligned(grad, 16) && aligned(gate_up, 16) &&
                      aligned(hidden, 16) && aligned(d_gate_up, 16);
  const auto launch = [&](auto kernel) {
    LAUNCH(kernel, warp_blocks(rows), kThreads, 0, stream, grad, gate_up, weights, used, hidden, d_gate_up,
           d_weights, rows, width);
  };
  packed ? launch(swiglu_backward_kernel<T, kPack<T>>) : launch(swiglu_backward_kernel<T, 1>);
}

}  // namespace moetrain
