// CUDA implementations of router and router_backward (moetrain/ops/router.py).
#include "router.cuh"
#include "tensors.cuh"

namespace moetrain {

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

static Routed router(const Tensor& logits_in, const std::optional<Tensor>& bias_in,
                     const std::optional<Tensor>& given_in, const std::optional<Tensor>& valid_in,
                     int64_t slots, bool is_sigmoid, bool renormalised, double scale, int64_t groups,
                     int64_t kept_groups, bool top2) {
  const DeviceScope scope(logits_in);
  const Tensor logits = dense(logits_in);
  const auto bias = dense(bias_in), given = dense(given_in), valid = dense(valid_in);
  expect(logits, ScalarType::Float, 2, "logits");
  expect(bias, ScalarType::Float, 1, "bias");
  expect(given, ScalarType::Long, 2, "ids");
  expect(valid, ScalarType::Bool, 1, "valid");
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  STD_TORCH_CHECK(experts_per_lane(experts) > 0 && slots >= 1 && slots <= kWarp && slots <= experts,
                  "router: at most 1024 experts and 32 slots a token, and no more slots than experts");
  STD_TORCH_CHECK(
      groups >= 1 && groups <= kWarp && experts % groups == 0 && kept_groups >= 1 && kept_groups <= groups,
      "router: at most 32 groups of equal size");
  STD_TORCH_CHECK(!bias.has_value() || bias->size(0) == experts, "router: bias is [E]");
  STD_TORCH_CHECK(!valid.has_value() || valid->size(0) == tokens, "router: valid is [T]");
  STD_TORCH_CHECK(!given.has_value() || (given->size(0) == tokens && given->size(1) == slots),
                  "router: ids are [T, K]");

  const auto whole = ScalarType::Long, real = ScalarType::Float;
  const int64_t blocks = router_grid(tokens).blocks;
  const Tensor ids = empty(logits, {tokens, slots}, whole), weights = empty(logits, {tokens, slots}, real);
  const Tensor lse = empty(logits, {tokens}, real);
  const Tensor block_sums = empty(logits, {experts + 2, blocks}, real);
  const Tensor block_counts = empty(logits, {experts + 2, blocks}, ScalarType::Int);
  const Tensor counts = empty(logits, {experts}, whole), prob_sum = empty(logits, {experts}, real);
  const Tensor lse2 = empty(logits, {}, real), entropy = empty(logits, {}, real);
  const Tensor valid_tokens = empty(logits, {}, whole), used = empty(logits, {}, whole);
  const RouterRule rule{int(experts), int(slots), is_sigmoid ? kSigmoid : kSoftmax, renormalised,
                        float(scale), int(groups), int(kept_groups), top2};
  launch_router({in<float>(logits), in<float>(bias), in<int64_t>(given), in<bool>(valid), tokens},
                {out<int64_t>(ids), out<float>(weights), out<float>(lse), out<float>(block_sums),
                 out<int32_t>(block_counts)},
                rule,
                {out<float>(prob_sum), out<float>(lse2), out<float>(entropy), out<int64_t>(counts),
                 out<int64_t>(valid_tokens), out<int64_t>(used)},
                scope.stream);
  check_launch();
  return {weights, lse, prob_sum, lse2, entropy, ids, counts, valid_tokens, used};
}

static Tensor router_backward(const std::optional<Tensor>& d_weights_in,
                              const std::optional<Tensor>& slopes_in, const std::optional<Tensor>& d_lse2,
                              const std::optional<Tensor>& d_entropy, const Tensor& logits_in,
                              const Tensor& ids_in, const Tensor& lse_in,
                              const std::optional<Tensor>& valid_in, bool is_sigmoid, bool renormalised,
                              double scale) {
  const DeviceScope scope(logits_in);
  const Tensor logits = dense(logits_in), ids = dense(ids_in), lse = dense(lse_in);
  const auto d_weights = dense(d_weights_in), slopes = dense(slopes_in), valid = dense(valid_in);
  expect(logits, ScalarType::Float, 2, "logits");
  expect(ids, ScalarType::Long, 2, "ids");
  expect(lse, ScalarType::Float, 1, "lse");
  expect(d_weights, ScalarType::Float, 2, "d_weights");
  expect(slopes, ScalarType::Float, 1, "slopes");
  expect(d_lse2, ScalarType::Float, 0, "d_lse2");
  expect(d_entropy, ScalarType::Float, 0, "d_entropy");
  expect(valid, ScalarType::Bool, 1, "valid");
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  STD_TORCH_CHECK(
      experts_per_lane(experts) > 0 && ids.size(0) == tokens && ids.size(1) <= kWarp && lse.size(0) == tokens,
      "router_backward: sizes");
  const Tensor d_logits = empty(logits, {tokens, experts}, ScalarType::Float);
  const RouterRule rule{int(experts), int(ids.size(1)), is_sigmoid ? kSigmoid : kSoftmax, renormalised,
                        float(scale), 1, 1, false};
  launch_router_backward({in<float>(d_weights), in<float>(slopes), in<float>(d_lse2), in<float>(d_entropy)},
                         in<float>(logits), in<int64_t>(ids), in<float>(lse), in<bool>(valid),
                         out<float>(d_logits), tokens, rule, scope.stream);
  check_launch();
  return d_logits;
}

REGISTER(library) {
  library.impl("router", TORCH_BOX(&router));
  library.impl("router_backward", TORCH_BOX(&router_backward));
}

}  // namespace moetrain
