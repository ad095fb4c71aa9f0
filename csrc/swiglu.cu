// CUDA implementations of swiglu and swiglu_backward (moetrain/ops/swiglu.py).
#include "swiglu.cuh"
#include "tensors.cuh"

namespace moetrain {

static void check(const Tensor& gate_up, const Tensor& weights, const std::optional<Tensor>& used) {
  STD_TORCH_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "swiglu: gate_up is [R, 2F]");
  expect(weights, wide(gate_up), 1, "weights");
  expect(used, ScalarType::Int, 1, "used");
  STD_TORCH_CHECK(weights.size(0) == gate_up.size(0), "swiglu: one weight a row");
}

static Tensor swiglu(const Tensor& gate_up_in, const Tensor& weights_in, const std::optional<Tensor>& used) {
  const DeviceScope scope(gate_up_in);
  const Tensor gate_up = dense(gate_up_in), weights = dense(weights_in);
  check(gate_up, weights, used);
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  const Tensor hidden = empty(gate_up, {rows, width}, gate_up.scalar_type());
  with_type(gate_up, [&](auto type) {
    using T = decltype(type);
    launch_swiglu<T>(in<T>(gate_up), in<Wide<T>>(weights), in<int32_t>(used), out<T>(hidden), rows, width,
                     scope.stream);
  });
  check_launch();
  return hidden;
}

static std::tuple<Tensor, Tensor, Tensor> swiglu_backward(const Tensor& grad_in, const Tensor& gate_up_in,
                                                          const Tensor& weights_in,
                                                          const std::optional<Tensor>& used) {
  const DeviceScope scope(gate_up_in);
  const Tensor grad = dense(grad_in), gate_up = dense(gate_up_in), weights = dense(weights_in);
  check(gate_up, weights, used);
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  expect(grad, gate_up.scalar_type(), 2, "grad");
  STD_TORCH_CHECK(grad.size(0) == rows && grad.size(1) == width, "swiglu_backward: grad is [R, F]");
  const Tensor hidden = empty(gate_up, {rows, width}, gate_up.scalar_type());
  const Tensor d_gate_up = empty(gate_up, {rows, 2 * width}, gate_up.scalar_type());
  const Tensor d_weights = empty(weights, {rows}, weights.scalar_type());
  with_type(gate_up, [&](auto type) {
    using T = decltype(type);
    launch_swiglu_backward<T>(in<T>(grad), in<T>(gate_up), in<Wide<T>>(weights), in<int32_t>(used),
                              out<T>(hidden), out<T>(d_gate_up), out<Wide<T>>(d_weights), rows, width,
                              scope.stream);
  });
  check_launch();
  return {hidden, d_gate_up, d_weights};
}

REGISTER(library) {
  library.impl("swiglu", TORCH_BOX(&swiglu));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace moetrain
