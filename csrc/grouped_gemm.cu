// CUDA implementation of grouped_wgrad_ (moetrain/ops/grouped_gemm.py). The products themselves are torch's
// grouped_mm.
#include "grouped_gemm.cuh"
#include "tensors.cuh"

namespace moetrain {

static void grouped_wgrad(const Tensor& a_in, const Tensor& b_in, const Tensor& ends_in, const Tensor& acc) {
  const DeviceScope scope(a_in);
  const Tensor a = dense(a_in), b = dense(b_in), ends = dense(ends_in);
  expect(b, a.scalar_type(), 2, "b");
  expect(ends, ScalarType::Int, 1, "offsets");
  expect(acc, ScalarType::Float, 3, "acc");
  const int64_t experts = ends.size(0), rows = a.size(1), columns = b.size(1);
  STD_TORCH_CHECK(a.dim() == 2 && a.size(0) == b.size(0), "grouped_wgrad: a is [R, I], b [R, O]");
  STD_TORCH_CHECK(
      acc.is_contiguous() && acc.size(0) == experts && acc.size(1) == rows && acc.size(2) == columns,
      "grouped_wgrad: acc is [e, I, O], contiguous");
  const int64_t bytes = int64_t(a.element_size());
  STD_TORCH_CHECK(rows * bytes % 16 == 0 && columns * bytes % 16 == 0 && aligned(a.const_data_ptr(), 16) &&
                      aligned(b.const_data_ptr(), 16),
                  "grouped_wgrad: widths and addresses are multiples of 16 bytes");
  STD_TORCH_CHECK(grad_tiles(experts, rows, columns) <= std::numeric_limits<int32_t>::max(),
                  "grouped_wgrad: too many tiles");
  if (a.scalar_type() == ScalarType::BFloat16) {
    launch_grouped_wgrad(in<bf16>(a), in<bf16>(b), in<int32_t>(ends), out<float>(acc), experts, rows, columns,
                         scope.stream);
  } else {
    STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float, "grouped_wgrad: bfloat16 or float32");
    launch_grouped_wgrad(in<float>(a), in<float>(b), in<int32_t>(ends), out<float>(acc), experts, rows,
                         columns, scope.stream);
  }
  check_launch();
}

REGISTER(library) { library.impl("grouped_wgrad_", TORCH_BOX(&grouped_wgrad)); }

}  // namespace moetrain
