// The row of every used slot, without a wait of the host (moetrain/ops/route_plan.py): a stable counting
// sort.
//
//   count        occurrences of each physical id in each unit (1024 consecutive slots)
//   scan units   per id: where the rows of a unit begin among those of the id; the number of rows of the id
//   scan ids     where the rows of each id begin and end, rounded up to the alignment
//   place        row of each slot: begin of its id + begin of its unit + rank inside the unit
//
// Only whole numbers are added, and shared counters belong to one warp, so the order of execution changes
// nothing.
#pragma once

#include "common.cuh"

namespace moetrain {

__device__ __forceinline__ bool is_physical(int64_t id, int64_t physical) { return id >= 0 && id < physical; }

// counts[id * units + unit]
__global__ void __launch_bounds__(kThreads)
    plan_count_kernel(const int64_t* __restrict__ ids, int32_t* __restrict__ counts, int64_t slots,
                      int physical, int64_t units) {
  DYNAMIC_SHARED(shared);
  int32_t* counter = reinterpret_cast<int32_t*>(shared) + int64_t(warp_in_block()) * physical;
  const int64_t unit = warp_id();
  if (unit >= units) return;                                   // whole warps: no block barrier follows
  for (int id = lane_id(); id < physical; id += kWarp) counter[id] = 0;
  __syncwarp();
  const int64_t begin = unit * kUnit, end = begin + kUnit < slots ? begin + kUnit : slots;
  for (int64_t slot = begin + lane_id(); slot < end; slot += kWarp) {
    const int64_t id = ids[slot];
    if (is_physical(id, physical)) atomicAdd(counter + id, 1);
  }
  __syncwarp();
  for (int id = lane_id(); id < physical; id += kWarp) counts[int64_t(id) * units + unit] = counter[id];
}

__device__ __forceinline__ int32_t warp_inclusive_scan(int32_t value) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t below = __shfl_up_sync(kAllLanes, value, step);
    if (lane_id() >= step) value += below;
  }
  return value;
}

// Exclusive scan over the units of each id, in place; totals[id] is their sum.
__global__ void __launch_bounds__(kThreads)
    plan_scan_units_kernel(int32_t* __restrict__ counts, int64_t* __restrict__ totals, int physical,
                           int64_t units) {
  for (int64_t id = warp_id(); id < physical; id += warp_count()) {
    int32_t before = 0;
    for (int64_t first = 0; first < units; first += kWarp) {
      const int64_t unit = first + lane_id();
      const int32_t count = unit < units ? counts[id * units + unit] : 0;
      const int32_t through = warp_inclusive_scan(count);
      if (unit < units) counts[id * units + unit] = before + through - count;
      before += __shfl_sync(kAllLanes, through, kWarp - 1);
    }
    if (lane_id() == 0) totals[id] = before;
  }
}

// One block. ends[id]: where the rows of the id end, the gap of alignment included. begins[id]: where they
// begin.
__global__ void __launch_bounds__(kThreads)
    plan_scan_ids_kernel(const int64_t* __restrict__ totals, int32_t* __restrict__ begins,
                         int32_t* __restrict__ ends, int physical, int alignment) {
  DYNAMIC_SHARED(shared);
  int32_t* of_warp = reinterpret_cast<int32_t*>(shared);       // [kWarpsPerBlock]
  int32_t before = 0;
  for (int first = 0; first < physical; first += kThreads) {
    const int id = first + int(threadIdx.x);
    const int32_t rows = id < physical ? int32_t(round_up(totals[id], alignment)) : 0;
    const int32_t through = warp_inclusive_scan(rows);
    if (lane_id() == kWarp - 1) of_warp[warp_in_block()] = through;
    __syncthreads();
    int32_t lower = 0, all = 0;
    for (int warp = 0; warp < kWarpsPerBlock; warp++) {
      if (warp < warp_in_block()) lower += of_warp[warp];
      all += of_warp[warp];
    }
    if (id < physical) {
      ends[id] = before + lower + through;
      begins[id] = before + lower + through - rows;
    }
    before += all;
    __syncthreads();                                           // before of_warp is overwritten
  }
}

__global__ void __launch_bounds__(kThreads)
    plan_place_kernel(const int64_t* __restrict__ ids, const int32_t* __restrict__ before,
                      const int32_t* __restrict__ begins, int64_t* __restrict__ slots_of_rows,
                      int64_t* __restrict__ rows_of_slots, int64_t slots, int physical, int64_t units,
                      int64_t max_rows) {
  DYNAMIC_SHARED(shared);
  int32_t* next =
      reinterpret_cast<int32_t*>(shared) + int64_t(warp_in_block()) * physical;  // next row of each id
  const int64_t unit = warp_id();
  if (unit >= units) return;
  for (int id = lane_id(); id < physical; id += kWarp)
    next[id] = begins[id] + before[int64_t(id) * units + unit];
  __syncwarp();
  const int64_t begin = unit * kUnit, end = begin + kUnit < slots ? begin + kUnit : slots;
  const unsigned lower_lanes = (1u << lane_id()) - 1u;
  for (int64_t first = begin; first < end; first += kWarp) {   // the same number of iterations for every lane
    const int64_t slot = first + lane_id();
    const int64_t given = slot < end ? ids[slot] : -1;
    const int id = is_physical(given, physical) ? int(given) : -1;
    const unsigned same = __match_any_sync(kAllLanes, id);
    const int rank = __popc(same & lower_lanes);
    const int64_t row = id < 0 ? -1 : int64_t(next[id]) + rank;
    __syncwarp();                                              // all lanes have read next[id]
    if (id >= 0 && rank == 0) next[id] += __popc(same);
    __syncwarp();
    if (slot >= end) continue;
    const bool placed = row >= 0 && row < max_rows;
    rows_of_slots[slot] = placed ? row : -1;
    if (placed) slots_of_rows[row] = slot;
  }
}

// Bytes of scratch memory: the begin of each id, then its counts by unit.
inline int64_t plan_scratch_bytes(int64_t slots, int64_t physical) {
  return 4 * physical * (plan_grid(slots, physical).units + 1);
}

// rows_of_slots [slots], slots_of_rows [max_rows] (-1 where a row has no slot), totals and ends [physical].
inline void launch_route_plan(const int64_t* ids, int64_t* slots_of_rows, int64_t* rows_of_slots,
                              int64_t* totals, int32_t* ends, void* scratch, int64_t slots, int64_t physical,
                              int64_t max_rows, int64_t alignment, cudaStream_t stream) {
  if (physical == 0) return;
  const PlanGrid grid = plan_grid(slots, physical);
  int32_t* begins = static_cast<int32_t*>(scratch);
  int32_t* counts = begins + physical;
  if (max_rows > 0) cudaMemsetAsync(slots_of_rows, 0xff, size_t(max_rows) * sizeof(int64_t), stream);
  if (grid.units > 0) {
    LAUNCH(plan_count_kernel, grid.blocks, grid.warps * kWarp, grid.shared_bytes, stream, ids, counts, slots,
           int(physical), grid.units);
  }
  LAUNCH(plan_scan_units_kernel, warp_blocks(physical), kThreads, 0, stream, counts, totals, int(physical),
         grid.units);
  LAUNCH(plan_scan_ids_kernel, 1, kThreads, kWarpsPerBlock * sizeof(int32_t), stream, totals, begins, ends,
         int(physical), int(alignment));
  if (grid.units > 0) {
    LAUNCH(plan_place_kernel, grid.blocks, grid.warps * kWarp, grid.shared_bytes, stream, ids, counts, begins,
           slots_of_rows, rows_of_slots, slots, int(physical), grid.units, max_rows);
  }
}

}  // namespace moetrain
