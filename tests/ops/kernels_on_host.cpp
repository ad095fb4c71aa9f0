// Launch functions and launch arithmetic of csrc/, callable from Python through ctypes (kernels_on_host.py).
// Every call returns a description of what went wrong, or null.
#include <algorithm>

#include "common.cuh"
#include "grouped_gemm.cuh"
#include "peer_memory.cuh"
#include "permute.cuh"
#include "route_plan.cuh"
#include "router.cuh"
#include "swiglu.cuh"

using namespace moetrain;

static const char* run(int order, const std::function<void()>& launch) {
  on_host::order = order;
  on_host::failure.clear();
  launch();
  return on_host::failure.empty() ? nullptr : on_host::failure.c_str();
}

extern "C" {

const char* permute(int order, const void* x, const int64_t* slots, const int64_t* rows, void* out,
                    int64_t tokens, int64_t slots_per_token, int64_t num_rows, int64_t row_bytes) {
  return run(order, [=] {
    launch_permute(x, slots, rows, out, tokens, slots_per_token, num_rows, row_bytes, nullptr);
  });
}

const char* push(int order, const void* rows, uint8_t* const* areas, const int64_t* sent,
                 const int64_t* there, int64_t peers, int64_t first, int64_t row_bytes) {
  return run(order,
             [=] { launch_push(rows, areas, sent, there, int(peers), int(first), row_bytes, nullptr); });
}

#define PER_TYPE(suffix, T)                                                                                \
  const char* unpermute_##suffix(int order, const T* in, const int64_t* rows, T* out, int64_t tokens,      \
                                 int64_t slots_per_token, int64_t num_rows, int64_t width) {               \
    return run(order, [=] {                                                                                \
      launch_unpermute<T>(in, rows, out, tokens, slots_per_token, num_rows, width, nullptr);               \
    });                                                                                                    \
  }                                                                                                        \
  const char* swiglu_##suffix(int order, const T* gate_up, const Wide<T>* weights, const int32_t* used,    \
                              T* hidden, int64_t rows, int64_t width) {                                    \
    return run(order, [=] { launch_swiglu<T>(gate_up, weights, used, hidden, rows, width, nullptr); });    \
  }                                                                                                        \
  const char* swiglu_backward_##suffix(int order, const T* grad, const T* gate_up, const Wide<T>* weights, \
                                       const int32_t* used, T* hidden, T* d_gate_up, Wide<T>* d_weights,   \
                                       int64_t rows, int64_t width) {                                      \
    return run(order, [=] {                                                                                \
      launch_swiglu_backward<T>(grad, gate_up, weights, used, hidden, d_gate_up, d_weights, rows, width,   \
                                nullptr);                                                                  \
    });                                                                                                    \
  }
PER_TYPE(bf16, bf16)
PER_TYPE(float, float)
PER_TYPE(double, double)

#define PER_GRAD_TYPE(suffix, T)                                                                         \
  const char* grouped_wgrad_##suffix(int order, const T* a, const T* b, const int32_t* ends, float* acc, \
                                     int64_t experts, int64_t rows, int64_t columns) {                   \
    return run(order, [=] { launch_grouped_wgrad(a, b, ends, acc, experts, rows, columns, nullptr); });  \
  }
PER_GRAD_TYPE(bf16, bf16)
PER_GRAD_TYPE(float, float)

const char* route_plan(int order, const int64_t* ids, int64_t* slots_of_rows, int64_t* rows_of_slots,
                       int64_t* totals, int32_t* ends, void* scratch, int64_t slots, int64_t physical,
                       int64_t max_rows, int64_t alignment) {
  return run(order, [=] {
    launch_route_plan(ids, slots_of_rows, rows_of_slots, totals, ends, scratch, slots, physical, max_rows,
                      alignment, nullptr);
  });
}

const char* router(int order, const float* logits, const float* bias, const int64_t* ids_in,
                   const bool* valid, int64_t* ids, float* weights, float* lse, float* block_sums,
                   int32_t* block_counts, float* sums, int64_t* counts, int64_t tokens,
                   const RouterRule* rule) {
  return run(order, [=] {
    const int experts = rule->experts;
    launch_router({logits, bias, ids_in, valid, tokens}, {ids, weights, lse, block_sums, block_counts}, *rule,
                  {sums, sums + experts, sums + experts + 1, counts, counts + experts, counts + experts + 1},
                  nullptr);
  });
}

const char* router_backward(int order, const float* d_weights, const float* d_prob_sum, const float* d_lse2,
                            const float* d_entropy, const float* logits, const int64_t* ids, const float* lse,
                            const bool* valid, float* d_logits, int64_t tokens, const RouterRule* rule) {
  return run(order, [=] {
    launch_router_backward({d_weights, d_prob_sum, d_lse2, d_entropy}, logits, ids, lse, valid, d_logits,
                           tokens, *rule, nullptr);
  });
}

// ---- launch arithmetic ----

int64_t arithmetic_warp_blocks(int64_t items) { return warp_blocks(items); }
int64_t arithmetic_router_blocks(int64_t tokens) { return router_grid(tokens).blocks; }
void arithmetic_router_tokens(int64_t block, int64_t tokens, int64_t* begin_end) {
  const Range range = router_grid(tokens).tokens_of(block, tokens);
  begin_end[0] = range.begin, begin_end[1] = range.end;
}
int64_t arithmetic_experts_per_lane(int64_t experts) { return experts_per_lane(experts); }
int64_t arithmetic_router_shared(int64_t experts) { return router_shared_bytes(experts); }
void arithmetic_plan(int64_t slots, int64_t physical, int64_t* units_warps_blocks_bytes) {
  const PlanGrid grid = plan_grid(slots, physical);
  const int64_t values[] = {grid.units, grid.warps, grid.blocks, grid.shared_bytes};
  std::copy(values, values + 4, units_warps_blocks_bytes);
}
int64_t arithmetic_plan_scratch(int64_t slots, int64_t physical) {
  return plan_scratch_bytes(slots, physical);
}
int64_t arithmetic_grad_tiles(int64_t experts, int64_t rows, int64_t columns) {
  return grad_tiles(experts, rows, columns);
}
void arithmetic_grad_tile(int64_t block, int64_t rows, int64_t columns, int64_t* expert_row_column) {
  const GradTile tile = grad_tile(block, rows, columns);
  expert_row_column[0] = tile.expert, expert_row_column[1] = tile.row, expert_row_column[2] = tile.column;
}
void arithmetic_rows_of(const int32_t* ends, int64_t expert, int64_t* begin_end) {
  const Range range = rows_of(ends, expert);
  begin_end[0] = range.begin, begin_end[1] = range.end;
}

// ---- kernels that are wrong on purpose: the emulation must say so ----

static void forgets_barrier(int32_t* out) {
  DYNAMIC_SHARED(shared);
  int32_t* values = reinterpret_cast<int32_t*>(shared);
  values[threadIdx.x] = int32_t(threadIdx.x);
  out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}
static void leaves_before_barrier(int32_t* out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
static void splits_barrier(int32_t* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}
static void writes_behind(int32_t* out) {
  DYNAMIC_SHARED(shared);
  reinterpret_cast<int32_t*>(shared)[threadIdx.x + 1] = 0;
  out[threadIdx.x] = 1;
}

const char* wrong(int order, int which, int32_t* out) {
  static void (*const kernels[])(int32_t*) = {forgets_barrier, leaves_before_barrier, splits_barrier,
                                              writes_behind};
  return run(order, [=] { LAUNCH(kernels[which], 1, 64, 64 * 4, nullptr, out); });
}

}
