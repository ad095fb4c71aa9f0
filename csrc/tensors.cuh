// Access to tensors for the registrations in <op>.cu, through torch's stable ABI (2.11 and later) alone.
//
// Schemas, fakes and gradients are defined in Python (moetrain/ops/<op>.py); here a tensor becomes a pointer
// and sizes. With MOETRAIN_ON_HOST the same registrations serve CPU tensors (tests/ops/bindings_on_host.cpp),
// so that tests run them too.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#ifndef MOETRAIN_ON_HOST
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common.cuh"

namespace moetrain {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the device of a tensor current for its lifetime, and holds that device's current stream.
#ifdef MOETRAIN_ON_HOST
struct DeviceScope {
  cudaStream_t stream = nullptr;

  explicit DeviceScope(const Tensor&) {}
};
inline bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }
inline void check_launch() {
  const std::string failure = std::exchange(on_host::failure, {});
  STD_TORCH_CHECK(failure.empty(), failure);
}
#define REGISTER(library) STABLE_TORCH_LIBRARY_IMPL(moetrain, CPU, library)
#else
struct DeviceScope {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit DeviceScope(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};
inline bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }
inline void check_launch() { STD_CUDA_KERNEL_LAUNCH_CHECK(); }
#define REGISTER(library) STABLE_TORCH_LIBRARY_IMPL(moetrain, CUDA, library)
#endif

inline Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }
inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
}

template <typename T>
const T* in(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
const T* in(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? in<T>(*tensor) : nullptr;
}
template <typename T>
T* out(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline void expect(const Tensor& tensor, ScalarType type, int64_t dims, const char* name) {
  STD_TORCH_CHECK(on_device(tensor) && tensor.scalar_type() == type && tensor.dim() == dims, name,
                  ": wrong device, type or number of dims");
}
inline void expect(const std::optional<Tensor>& tensor, ScalarType type, int64_t dims, const char* name) {
  if (tensor.has_value()) expect(*tensor, type, dims, name);
}

// Calls `action` with a value of the tensor's element type.
template <typename Action>
void with_type(const Tensor& tensor, Action action) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return action(bf16{});
    case ScalarType::Float: return action(float{});
    case ScalarType::Double: return action(double{});
    default: STD_TORCH_CHECK(false, "rows are bfloat16, float32 or float64");
  }
}

// The type that elements of the tensor are summed in.
inline ScalarType wide(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace moetrain
