// Launch arithmetic: number of blocks, and the rows or the tile of each. Plain C++ without CUDA, so that
// tests/ops/test_launch_arithmetic.py can check under a host compiler the functions that the kernels call.
//
// Grids depend on shapes alone, never on the number of multiprocessors: a sum in stages then has the same
// bits on every chip. Everything that is multiplied by a width is int64: T * D exceeds 2^31 at
// T = 512k, D = 4096.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOETRAIN_BOTH __host__ __device__
#else
#define MOETRAIN_BOTH
#endif

namespace moetrain {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;                      // in every kernel where one warp takes one row
constexpr int kThreads = kWarp * kWarpsPerBlock;
// Beyond this, a block takes several items with the stride of the grid; gridDim.x is limited to 2^31 - 1.
constexpr int64_t kMaxBlocks = int64_t(1) << 20;
constexpr int kSharedBytes = 48 * 1024;                // of a block, without cudaFuncSetAttribute

MOETRAIN_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MOETRAIN_BOTH constexpr int64_t round_up(int64_t a, int64_t multiple) {
  return ceil_div(a, multiple) * multiple;
}

// Blocks for `items` work items, one per warp; at least one block, since CUDA refuses an empty grid.
MOETRAIN_BOTH constexpr int64_t warp_blocks(int64_t items) {
  const int64_t blocks = ceil_div(items, kWarpsPerBlock);
  return blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

// Half-open range of integers.
struct Range {
  int64_t begin, end;
};

// Rows of expert e. ends[e] is the end of its rows, which begin at the end of the expert before.
MOETRAIN_BOTH inline Range rows_of(const int32_t* ends, int64_t e) {
  return {e == 0 ? 0 : ends[e - 1], ends[e]};
}

// ---- router: a block takes consecutive tokens, and writes one partial sum per expert ----

constexpr int kRouterBlocks = 512;
constexpr int64_t kRouterTokens = 16;                  // of a block, at least: two per warp

struct RouterGrid {
  int64_t per_block;                                   // tokens
  int64_t blocks;

  MOETRAIN_BOTH Range tokens_of(int64_t block, int64_t tokens) const {
    const int64_t begin = block * per_block, end = begin + per_block;
    return {begin, end < tokens ? end : tokens};
  }
};

MOETRAIN_BOTH inline RouterGrid router_grid(int64_t tokens) {
  int64_t per_block = ceil_div(tokens, kRouterBlocks);
  per_block = per_block < kRouterTokens ? kRouterTokens : per_block;
  const int64_t blocks = ceil_div(tokens, per_block);
  return {per_block, blocks < 1 ? 1 : blocks};
}

// Experts per lane: the smallest instantiated number that covers all experts; 0 if none does.
MOETRAIN_BOTH constexpr int experts_per_lane(int64_t experts) {
  for (int values = 1; values <= 32; values *= 2) {
    if (experts <= int64_t(values) * kWarp) return values;
  }
  return 0;
}

// Shared memory of a block: the probability sums of each warp (padded to whole lanes), the counts of the
// block, and for each warp its sums of lse^2 and of entropy and its numbers of tokens and of used slots.
MOETRAIN_BOTH constexpr int64_t router_shared_bytes(int64_t experts) {
  return 4 * (kWarpsPerBlock * int64_t(experts_per_lane(experts)) * kWarp + round_up(experts, 4) +
              4 * kWarpsPerBlock);
}

// ---- route plan: a warp takes a *unit* of consecutive slots; units stay in order: the sort is stable ----

constexpr int64_t kUnit = 1024;                        // slots: 32 steps of a warp

struct PlanGrid {
  int64_t units;
  int warps;                                           // per block: as many as have room for their counters
  int64_t blocks;
  int64_t shared_bytes;
};

MOETRAIN_BOTH inline PlanGrid plan_grid(int64_t slots, int64_t physical) {
  const int64_t room = kSharedBytes / (4 * (physical < 1 ? 1 : physical));
  const int warps = room < 1 ? 0 : room < kWarpsPerBlock ? int(room) : kWarpsPerBlock;
  const int64_t units = ceil_div(slots, kUnit);
  return {units, warps, warps == 0 ? 0 : ceil_div(units, warps), int64_t(4) * warps * physical};
}

// ---- peers (moetrain/ops/peer_memory.py) ----

constexpr int kMaxPeers = 64;                          // positions that one launch writes to or waits for
constexpr int64_t kPushBlocks = 16;                    // few, to leave the chip to matrix products

// ---- gradient of the expert matrices: one block per tile of one expert's matrix ----

constexpr int kTile = 64;

struct GradTile {
  int64_t expert, row, column;                         // of the first element
};

MOETRAIN_BOTH constexpr int64_t grad_tiles(int64_t experts, int64_t rows, int64_t columns) {
  return experts * ceil_div(rows, kTile) * ceil_div(columns, kTile);
}

// The tiles of an expert are consecutive, by row of tiles, then by column: a row of tiles shares columns of
// `a` in cache.
MOETRAIN_BOTH inline GradTile grad_tile(int64_t block, int64_t rows, int64_t columns) {
  const int64_t across = ceil_div(columns, kTile), down = ceil_div(rows, kTile);
  return {block / (across * down), block / across % down * kTile, block % across * kTile};
}

}  // namespace moetrain
