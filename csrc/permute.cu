// CUDA implementations of permute and unpermute (moetrain/ops/permute.py). The padded ops use the same
// kernels.
#include "permute.cuh"
#include "tensors.cuh"

namespace moetrain {

static Tensor permute(const Tensor& x_in, const Tensor& slots_in, const Tensor& rows_in) {
  const DeviceScope scope(x_in);
  const Tensor x = dense(x_in), slots = dense(slots_in), rows = dense(rows_in);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows.size(0), "permute: x is [T, D], rows [T, K]");
  expect(slots, ScalarType::Long, 1, "slots");
  expect(rows, ScalarType::Long, 2, "rows");
  const Tensor result = empty(x, {slots.size(0), x.size(1)}, x.scalar_type());
  launch_permute(x.const_data_ptr(), in<int64_t>(slots), in<int64_t>(rows), result.mutable_data_ptr(),
                 x.size(0), rows.size(1), slots.size(0), x.size(1) * int64_t(x.element_size()), scope.stream);
  check_launch();
  return result;
}

static Tensor unpermute(const Tensor& rows_in, const Tensor& slots, const Tensor& row_of_in) {
  const DeviceScope scope(rows_in);
  const Tensor rows = dense(rows_in), row_of = dense(row_of_in);
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == slots.size(0), "unpermute: rows are [R, D]");
  expect(row_of, ScalarType::Long, 2, "rows");
  const Tensor result = empty(rows, {row_of.size(0), rows.size(1)}, rows.scalar_type());
  with_type(rows, [&](auto type) {
    using T = decltype(type);
    launch_unpermute<T>(in<T>(rows), in<int64_t>(row_of), out<T>(result), row_of.size(0), row_of.size(1),
                        rows.size(0), rows.size(1), scope.stream);
  });
  check_launch();
  return result;
}

REGISTER(library) {
  library.impl("permute", TORCH_BOX(&permute));
  library.impl("unpermute", TORCH_BOX(&unpermute));
  library.impl("permute_padded", TORCH_BOX(&permute));
  library.impl("unpermute_padded", TORCH_BOX(&unpermute));
}

}  // namespace moetrain
