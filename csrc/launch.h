// Launch arithmetic: how many blocks, which rows, which tile. Plain C++ without CUDA: a host compiler tests it
// (tests/ops/test_launch_arithmetic.py) and the kernels call the same functions.
//
// Grids depend on shapes alone, never on the number of multiprocessors, so that a sum made in stages has the same bits on
// every chip. Everything that is multiplied by a width is int64: T * H passes 2^31 at T = 512k, H = 4096.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOETRAIN_BOTH __host__ __device__
#else
#define MOETRAIN_BOTH
#endif

namespace moetrain {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;                      // of every kernel that gives a warp a row
constexpr int kThreads = kWarp * kWarpsPerBlock;
constexpr int64_t kMaxBlocks = int64_t(1) << 20;       // grids are strided beyond that; gridDim.x ends at 2^31 - 1
constexpr int kSharedBytes = 48 * 1024;                // what a block may have without asking

MOETRAIN_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MOETRAIN_BOTH constexpr int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

// Blocks for `items` pieces of work, one a warp; at least one, so that no launch has an empty grid.
MOETRAIN_BOTH constexpr int64_t warp_blocks(int64_t items) {
  const int64_t blocks = ceil_div(items, kWarpsPerBlock);
  return blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

// A range of whole numbers, end excluded.
struct Range {
  int64_t begin, end;
};

// Rows of expert e, from the running ends of all experts.
MOETRAIN_BOTH inline Range rows_of(const int32_t* ends, int64_t e) { return {e == 0 ? 0 : ends[e - 1], ends[e]}; }

// ---- router: a block takes a run of tokens, and writes one partial sum an expert ----

constexpr int kRouterBlocks = 512;
constexpr int64_t kRouterTokens = 16;                  // at least, in a block: two a warp

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

// Experts a lane holds: the smallest instantiated number that covers them; 0 where there is none.
MOETRAIN_BOTH constexpr int experts_per_lane(int64_t experts) {
  for (int values = 1; values <= 32; values *= 2) {
    if (experts <= int64_t(values) * kWarp) return values;
  }
  return 0;
}

// Probability sums of every warp (padded to whole lanes), counts of the block, and per warp the sums of squared
// log-sum-exps and entropies and the numbers of tokens and used slots.
MOETRAIN_BOTH constexpr int64_t router_shared_bytes(int64_t experts) {
  return 4 * (kWarpsPerBlock * int64_t(experts_per_lane(experts)) * kWarp + round_up(experts, 4) + 4 * kWarpsPerBlock);
}

// ---- route plan: a warp takes a run of slots, a *unit*; units keep their order, so the sort is stable ----

constexpr int64_t kUnit = 1024;                        // slots: 32 steps of a warp

struct PlanGrid {
  int64_t units;
  int warps;                                           // in a block: as many as find room for their counters
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
constexpr int64_t kPushBlocks = 16;                    // few, so that products keep the chip

// ---- weight gradient: one tile of one expert's matrix a block ----

constexpr int kTile = 64;

struct GradTile {
  int64_t expert, row, column;                         // of the first element
};

MOETRAIN_BOTH constexpr int64_t grad_tiles(int64_t experts, int64_t rows, int64_t columns) {
  return experts * ceil_div(rows, kTile) * ceil_div(columns, kTile);
}

// Tiles of one expert follow each other, column after column: those of a row of tiles share the rows of `a` in cache.
MOETRAIN_BOTH inline GradTile grad_tile(int64_t block, int64_t rows, int64_t columns) {
  const int64_t across = ceil_div(columns, kTile), down = ceil_div(rows, kTile);
  return {block / (across * down), block / across % down * kTile, block % across * kTile};
}

}  // namespace moetrain
