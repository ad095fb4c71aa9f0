// CUDA implementation of route_plan (moetrain/ops/route_plan.py).
#include "route_plan.cuh"
#include "tensors.cuh"

namespace moetrain {

static std::tuple<Tensor, Tensor, Tensor, Tensor> route_plan(const Tensor& physical_in, int64_t num_physical,
                                                             int64_t max_rows, int64_t alignment) {
  const DeviceScope scope(physical_in);
  const Tensor physical = dense(physical_in);
  expect(physical, ScalarType::Long, 2, "physical");
  const int64_t tokens = physical.size(0), slots = physical.size(1);
  STD_TORCH_CHECK(num_physical >= 1 && plan_grid(0, num_physical).warps >= 1,
                  "route_plan: 1 to 12288 physical ids");
  STD_TORCH_CHECK(max_rows >= 0 && alignment >= 1, "route_plan: max_rows and alignment");
  STD_TORCH_CHECK(tokens * slots + alignment * num_physical < std::numeric_limits<int32_t>::max(),
                  "route_plan: rows are counted in int32");
  const Tensor slots_of_rows = empty(physical, {max_rows}, ScalarType::Long);
  const Tensor rows_of_slots = empty(physical, {tokens, slots}, ScalarType::Long);
  const Tensor counts = empty(physical, {num_physical}, ScalarType::Long);
  const Tensor ends = empty(physical, {num_physical}, ScalarType::Int);
  const Tensor scratch =
      empty(physical, {plan_scratch_bytes(tokens * slots, num_physical)}, ScalarType::Byte);
  launch_route_plan(in<int64_t>(physical), out<int64_t>(slots_of_rows), out<int64_t>(rows_of_slots),
                    out<int64_t>(counts), out<int32_t>(ends), scratch.mutable_data_ptr(), tokens * slots,
                    num_physical, max_rows, alignment, scope.stream);
  check_launch();
  return {slots_of_rows, rows_of_slots, counts, ends};
}

REGISTER(library) { library.impl("route_plan", TORCH_BOX(&route_plan)); }

}  // namespace moetrain
