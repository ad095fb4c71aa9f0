// Scores, choice, gate weights, counts and sums of a router in one pass over the logits, and their backward
// in another (moetrain/ops/router.py has the formulas).
//
// One warp per token: lane l holds the logits of experts l, 32 + l, 64 + l, ... in registers. Sums over
// tokens run in two stages of fixed shape: a warp over its tokens, a block over its warps, then one warp over
// the blocks of each expert. Only integers are added atomically.
#pragma once

#include "common.cuh"

namespace moetrain {

enum Score : int { kSoftmax = 0, kSigmoid = 1 };

struct RouterRule {
  int experts, slots;                                          // slots per token, at most 32
  int score;
  bool renormalised;
  float scale;
  int groups, kept_groups;                                     // at most 32 groups; 1 means no limit
  bool top2;                                                   // group score: its two best, or its best
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kSoftmaxFloor = 1e-30f;                        // routers/topk.py
constexpr float kSigmoidTiny = 1e-20f;                         // routers/sigmoid.py

// Integer key that sorts like the score: NaN above everything, as torch sorts it, and -0 equal to +0. It is
// never 0, which marks experts that do not exist or have been chosen.
__device__ __forceinline__ uint32_t order_of(float score) {
  if (score != score) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(uint32_t order) {
  return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// Best expert in [begin, end): returns its id, the lowest of equals, and sets `best` to its order.
template <int V>
__device__ __forceinline__ int best_of(const uint32_t (&order)[V], int begin, int end, uint32_t& best) {
  uint32_t mine = 0;
  int id = 0x7fffffff;
#pragma unroll
  for (int v = 0; v < V; v++) {
    const int candidate = v * kWarp + lane_id();
    if (candidate >= begin && candidate < end && order[v] > mine) {
      mine = order[v];
      id = candidate;
    }
  }
  best = __reduce_max_sync(kAllLanes, mine);
  return int(__reduce_min_sync(kAllLanes, mine == best && mine != 0 ? unsigned(id) : 0x7fffffffu));
}

template <int V>
__device__ __forceinline__ void take(uint32_t (&order)[V], int id) {
#pragma unroll
  for (int v = 0; v < V; v++) {
    if (v * kWarp + lane_id() == id) order[v] = 0;
  }
}

// Gives experts outside the best groups the order of -inf. They are chosen last, not never, as in
// ops/gating.py.
template <int V>
__device__ __forceinline__ void keep_best_groups(uint32_t (&order)[V], const RouterRule& rule) {
  const int size = rule.experts / rule.groups;
  uint32_t of_group = 0;                                       // in lane g: order of the score of group g
  for (int group = 0; group < rule.groups; group++) {
    const int begin = group * size, end = begin + size;
    uint32_t best;
    const int first = best_of(order, begin, end, best);
    float good = score_of(best);
    if (rule.top2 && size > 1) {
      uint32_t held[V];
#pragma unroll
      for (int v = 0; v < V; v++) held[v] = order[v];
      take(held, first);
      best_of(held, begin, end, best);
      good += score_of(best);
    }
    if (lane_id() == group) of_group = order_of(good);
  }
  unsigned kept = 0;
  for (int i = 0; i < rule.kept_groups; i++) {
    const uint32_t best = __reduce_max_sync(kAllLanes, of_group);
    const int group = __ffs(int(__ballot_sync(kAllLanes, of_group == best))) - 1;
    kept |= 1u << group;
    if (lane_id() == group) of_group = 0;
  }
  const uint32_t lowest = order_of(-kInfinity);
#pragma unroll
  for (int v = 0; v < V; v++) {
    const int id = v * kWarp + lane_id();
    if (id < rule.experts && !(kept >> (id / size) & 1u)) order[v] = lowest;
  }
}

// Loads the logits of a token; -inf where there is no expert.
template <int V>
__device__ __forceinline__ void load_logits(const float* __restrict__ logits, int experts,
                                            float (&values)[V]) {
#pragma unroll
  for (int v = 0; v < V; v++) {
    const int id = v * kWarp + lane_id();
    values[v] = id < experts ? logits[id] : -kInfinity;
  }
}

// The logit of a missing expert is -inf: its sigmoid is 0.
__device__ __forceinline__ float sigmoid(float logit) { return 1.0f / (1.0f + expf(-logit)); }

template <int V>
__device__ __forceinline__ float sum_of(const float (&values)[V]) {
  float sum = 0;
#pragma unroll
  for (int v = 0; v < V; v++) sum += values[v];
  return warp_sum(sum);
}

struct RouterInput {
  const float* logits;                                         // [T, E]
  const float* bias;                                           // [E], for the choice alone; or null
  const int64_t* ids;                                          // [T, K] decided earlier; null: choose here
  const bool* valid;                                           // [T]; null: all tokens are
  int64_t tokens;
};

struct RouterOutput {
  int64_t* ids;                                                // [T, K]
  float* weights;                                              // [T, K]
  float* lse;                                                  // [T]
  float* sums;                                                 // [E + 2, blocks]: probs, lse^2, entropy
  int32_t* counts;                                             // [E + 2, blocks]: slots, tokens, used slots
};

template <int V>
__global__ void __launch_bounds__(kThreads)
    router_kernel(RouterInput in, RouterOutput out, RouterRule rule, RouterGrid grid) {
  DYNAMIC_SHARED(shared);
  constexpr int kHeld = V * kWarp;
  float* sums = reinterpret_cast<float*>(shared);                                  // [warps][kHeld]
  int32_t* counts = reinterpret_cast<int32_t*>(sums + kWarpsPerBlock * kHeld);     // [E, rounded up to 4]
  float* lse2s = reinterpret_cast<float*>(counts + round_up(rule.experts, 4));     // each [warps]
  float* entropies = lse2s + kWarpsPerBlock;
  int32_t* valids = reinterpret_cast<int32_t*>(entropies + kWarpsPerBlock);
  int32_t* useds = valids + kWarpsPerBlock;

  const int lane = lane_id(), warp = warp_in_block();
  for (int id = int(threadIdx.x); id < rule.experts; id += kThreads) counts[id] = 0;
  __syncthreads();

  float prob_sums[V] = {};
  float entropy = 0, lse2 = 0;
  int32_t valid_tokens = 0, used_slots = 0;
  const Range range = grid.tokens_of(blockIdx.x, in.tokens);
  for (int64_t token = range.begin + warp; token < range.end; token += kWarpsPerBlock) {
    if (in.valid != nullptr && !in.valid[token]) {             // the same in all lanes
      if (lane < rule.slots) {
        out.ids[token * rule.slots + lane] = -1;
        out.weights[token * rule.slots + lane] = 0;
      }
      if (lane == 0) out.lse[token] = 0;
      continue;
    }
    float logits[V], scores[V];
    load_logits(in.logits + token * rule.experts, rule.experts, logits);
    float highest = -kInfinity;
#pragma unroll
    for (int v = 0; v < V; v++) highest = fmaxf(highest, logits[v]);
    highest = warp_max(highest);
#pragma unroll
    for (int v = 0; v < V; v++)
      scores[v] = v * kWarp + lane < rule.experts ? expf(logits[v] - highest) : 0.0f;
    const float total_exp = sum_of(scores);
    const float lse = highest + logf(total_exp);
    if (rule.score == kSoftmax) {
#pragma unroll
      for (int v = 0; v < V; v++) scores[v] /= total_exp;
    } else {
#pragma unroll
      for (int v = 0; v < V; v++) scores[v] = sigmoid(logits[v]);
    }

    int my_id = -1;                                            // in lane k: the expert of slot k
    if (in.ids != nullptr) {
      if (lane < rule.slots) my_id = int(in.ids[token * rule.slots + lane]);
      if (my_id >= rule.experts) my_id = -1;                   // given ids never index outside `counts`
    } else {
      uint32_t order[V];
#pragma unroll
      for (int v = 0; v < V; v++) {
        const int id = v * kWarp + lane;
        order[v] =
            id < rule.experts ? order_of(in.bias == nullptr ? scores[v] : scores[v] + in.bias[id]) : 0u;
      }
      if (rule.kept_groups < rule.groups) keep_best_groups(order, rule);
      for (int slot = 0; slot < rule.slots; slot++) {
        uint32_t best;
        const int id = best_of(order, 0, rule.experts, best);
        take(order, id);
        if (lane == slot) my_id = id;
      }
    }

    float my_weight = 0, total = 0;                            // recomputed from the logit, still in cache
    if (my_id >= 0) {
      const float logit = in.logits[token * rule.experts + my_id];
      my_weight = rule.score == kSoftmax ? expf(logit - highest) / total_exp : sigmoid(logit);
    }
    for (int slot = 0; slot < rule.slots; slot++) total += __shfl_sync(kAllLanes, my_weight, slot);
    if (rule.renormalised)
      my_weight /= rule.score == kSoftmax ? fmaxf(total, kSoftmaxFloor) : total + kSigmoidTiny;
    if (lane < rule.slots) {
      out.ids[token * rule.slots + lane] = my_id;
      out.weights[token * rule.slots + lane] = rule.scale * my_weight;
      if (my_id >= 0) atomicAdd(counts + my_id, 1);
    }
    used_slots += __popc(__ballot_sync(kAllLanes, my_id >= 0));
    valid_tokens += 1;
    if (lane == 0) out.lse[token] = lse;
    lse2 += lse * lse;

    const float scores_sum = rule.score == kSoftmax ? 1.0f : sum_of(scores) + kSigmoidTiny;
#pragma unroll
    for (int v = 0; v < V; v++) {
      const float prob = rule.score == kSoftmax ? scores[v] : scores[v] / scores_sum;
      prob_sums[v] += prob;
      if (prob != 0.0f) entropy -= prob * logf(prob);          // a NaN stays NaN
    }
  }

#pragma unroll
  for (int v = 0; v < V; v++) sums[warp * kHeld + v * kWarp + lane] = prob_sums[v];
  entropy = warp_sum(entropy);
  if (lane == 0) {
    lse2s[warp] = lse2;
    entropies[warp] = entropy;
    valids[warp] = valid_tokens;
    useds[warp] = used_slots;
  }
  __syncthreads();
  for (int row = int(threadIdx.x); row < rule.experts + 2; row += kThreads) {
    const bool expert = row < rule.experts, first = row == rule.experts;
    float sum = 0;
    int32_t count = expert ? counts[row] : 0;
    for (int w = 0; w < kWarpsPerBlock; w++) {
      sum += expert ? sums[w * kHeld + row] : first ? lse2s[w] : entropies[w];
      if (!expert) count += first ? valids[w] : useds[w];
    }
    out.sums[int64_t(row) * grid.blocks + blockIdx.x] = sum;
    out.counts[int64_t(row) * grid.blocks + blockIdx.x] = count;
  }
}

struct RouterSums {
  float *prob, *lse2, *entropy;                                // [E], and two scalars
  int64_t *counts, *tokens, *used;                             // [E], and two scalars; used: used slots
};

// Second stage: one warp sums a row over the blocks.
__global__ void __launch_bounds__(kThreads)
    router_reduce_kernel(const float* __restrict__ sums, const int32_t* __restrict__ counts, RouterSums out,
                         int experts, int64_t blocks) {
  for (int64_t row = warp_id(); row < experts + 2; row += warp_count()) {
    float sum = 0;
    int64_t count = 0;
    for (int64_t block = lane_id(); block < blocks; block += kWarp) {
      sum += sums[row * blocks + block];
      count += counts[row * blocks + block];
    }
    sum = warp_sum(sum);
    count = warp_sum(count);
    if (lane_id() != 0) continue;
    *(row < experts ? out.prob + row : row == experts ? out.lse2 : out.entropy) = sum;
    *(row < experts ? out.counts + row : row == experts ? out.tokens : out.used) = count;
  }
}

struct RouterGrads {                                           // null where the output has no gradient
  const float* weights;                                        // [T, K]
  const float* prob_sum;                                       // [E]: slopes of a balance loss
  const float* lse2;                                           // scalar
  const float* entropy;                                        // scalar
};

template <int V>
__global__ void __launch_bounds__(kThreads)
    router_backward_kernel(RouterGrads grads, const float* __restrict__ all_logits,
                           const int64_t* __restrict__ ids, const float* __restrict__ lses,
                           const bool* __restrict__ valid, float* __restrict__ d_logits, int64_t tokens,
                           RouterRule rule) {
  const int lane = lane_id();
  const float d_lse2 = grads.lse2 == nullptr ? 0.0f : *grads.lse2;
  const float d_entropy = grads.entropy == nullptr ? 0.0f : *grads.entropy;
  for (int64_t token = warp_id(); token < tokens; token += warp_count()) {
    float* out = d_logits + token * rule.experts;
    if (valid != nullptr && !valid[token]) {
      for (int id = lane; id < rule.experts; id += kWarp) out[id] = 0;
      continue;
    }
    const float lse = lses[token];
    float logits[V], scores[V], direct[V] = {};                // direct: of the scores through the weights
    load_logits(all_logits + token * rule.experts, rule.experts, logits);
    if (rule.score == kSoftmax) {
#pragma unroll
      for (int v = 0; v < V; v++) scores[v] = v * kWarp + lane < rule.experts ? expf(logits[v] - lse) : 0.0f;
    } else {
#pragma unroll
      for (int v = 0; v < V; v++) scores[v] = sigmoid(logits[v]);
    }

    if (grads.weights != nullptr) {
      const int my_id = lane < rule.slots ? int(ids[token * rule.slots + lane]) : -1;
      const float my_grad = my_id < 0 ? 0.0f : grads.weights[token * rule.slots + lane];
      float my_score = 0, total = 0, dot = 0;
      if (my_id >= 0) {
        const float logit = all_logits[token * rule.experts + my_id];
        my_score = rule.score == kSoftmax ? expf(logit - lse) : sigmoid(logit);
      }
      for (int slot = 0; slot < rule.slots; slot++) {          // in slot order
        total += __shfl_sync(kAllLanes, my_score, slot);
        dot += __shfl_sync(kAllLanes, my_score * my_grad, slot);
      }
      float factor = rule.scale, common = 0;
      if (rule.renormalised) {
        const bool clamped = rule.score == kSoftmax && total < kSoftmaxFloor;
        const float divisor = rule.score == kSigmoid ? total + kSigmoidTiny : clamped ? kSoftmaxFloor : total;
        factor /= divisor;
        common = clamped ? 0.0f : dot / divisor;
      }
      for (int slot = 0; slot < rule.slots; slot++) {
        const int id = __shfl_sync(kAllLanes, my_id, slot);
        const float grad = factor * (__shfl_sync(kAllLanes, my_grad, slot) - common);
#pragma unroll
        for (int v = 0; v < V; v++) {
          if (v * kWarp + lane == id) direct[v] += grad;
        }
      }
    }

    // Through the probabilities: the scores of a softmax; for a sigmoid, the scores over their sum.
    const float scores_sum = rule.score == kSoftmax ? 1.0f : sum_of(scores) + kSigmoidTiny;
    float weighted = 0;
    float through[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
      const int id = v * kWarp + lane;
      const float prob = scores[v] / scores_sum;
      float grad = grads.prob_sum != nullptr && id < rule.experts ? grads.prob_sum[id] : 0.0f;
      if (prob != 0.0f) grad -= d_entropy * (logf(prob) + 1.0f);
      if (rule.score == kSoftmax) grad += direct[v];
      through[v] = grad;
      weighted += prob * grad;
    }
    weighted = warp_sum(weighted);
#pragma unroll
    for (int v = 0; v < V; v++) {
      const int id = v * kWarp + lane;
      if (id >= rule.experts) continue;
      float grad = d_lse2 * 2.0f * lse;
      if (rule.score == kSoftmax) {
        grad = scores[v] * (through[v] - weighted + grad);
      } else {
        if (d_lse2 != 0.0f) grad *= expf(logits[v] - lse);
        const float d_score = direct[v] + (through[v] - weighted) / scores_sum;
        grad += d_score * scores[v] * (1.0f - scores[v]);
      }
      out[id] = grad;
    }
  }
}

// Calls `action` with the number of experts per lane as a type.
template <int V>
struct Held {
  static constexpr int value = V;
};

template <typename Action>
void with_experts_per_lane(int64_t experts, Action action) {
  switch (experts_per_lane(experts)) {
    case 1: return action(Held<1>{});
    case 2: return action(Held<2>{});
    case 4: return action(Held<4>{});
    case 8: return action(Held<8>{});
    case 16: return action(Held<16>{});
    case 32: return action(Held<32>{});
  }
}

inline void launch_router(RouterInput in, RouterOutput out, RouterRule rule, RouterSums sums,
                          cudaStream_t stream) {
  const RouterGrid grid = router_grid(in.tokens);
  with_experts_per_lane(rule.experts, [&](auto held) {
    LAUNCH(router_kernel<decltype(held)::value>, grid.blocks, kThreads, router_shared_bytes(rule.experts),
           stream, in, out, rule, grid);
  });
  LAUNCH(router_reduce_kernel, warp_blocks(rule.experts + 2), kThreads, 0, stream, out.sums, out.counts, sums,
         rule.experts, grid.blocks);
}

inline void launch_router_backward(RouterGrads grads, const float* logits, const int64_t* ids,
                                   const float* lse, const bool* valid, float* d_logits, int64_t tokens,
                                   RouterRule rule, cudaStream_t stream) {
  if (tokens == 0) return;
  with_experts_per_lane(rule.experts, [&](auto held) {
    LAUNCH(router_backward_kernel<decltype(held)::value>, warp_blocks(tokens), kThreads, 0, stream, grads,
           logits, ids, lse, valid, d_logits, tokens, rule);
  });
}

}  // namespace moetrain
