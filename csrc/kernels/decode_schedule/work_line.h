// What the tile schedulers share: the line of work of a batch, finding places on it, and writing a plan down.
//
// One CTA of 1024 threads. Shared memory: start[batch_size + 1] (int64), 32 warp totals for the scans,
// boundaries[num_workers + 1] and the running count of boundaries that cut a tile [num_workers + 1].
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params/decode_schedule.h"

namespace flash_mla {

inline constexpr int kThreads = 1024;
inline constexpr int kWarps = kThreads / 32;

// Inclusive scan of one value per thread over the CTA.
template <typename T>
__device__ T scan_inclusive(T value, T* warp_totals) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int delta = 1; delta < 32; delta *= 2) {
        T const below = __shfl_up_sync(~0u, value, delta);
        if (lane >= delta) value += below;
    }
    if (lane == 31) warp_totals[warp] = value;
    __syncthreads();
    if (warp == 0) {
        T total = warp_totals[lane];
        for (int delta = 1; delta < kWarps; delta *= 2) {
            T const below = __shfl_up_sync(~0u, total, delta);
            if (lane >= delta) total += below;
        }
        warp_totals[lane] = total;
    }
    __syncthreads();
    T const result = warp > 0 ? value + warp_totals[warp - 1] : value;
    __syncthreads();
    return result;
}

// The request whose stretch of the line holds cost x.
__device__ inline int find_request(int64_t const* start, int batch_size, int64_t x) {
    int low = 0, high = batch_size;  // start[low] <= x < start[high]
    while (high - low > 1) {
        int const middle = (low + high) / 2;
        (start[middle] <= x ? low : high) = middle;
    }
    return low;
}

// A place on the line; the end of a tile is the begin of the next.
struct Boundary {
    int batch, tile;
    int place;  // in the tile, in units of the scheduler: blocks, or 128ths of it

    __device__ bool cuts_a_tile() const { return place > 0; }
    __device__ bool operator==(Boundary const& o) const {
        return batch == o.batch && tile == o.tile && place == o.place;
    }
};

struct ScheduleMemory {
    int64_t* start;  // cost of the requests before each, and of all
    int64_t* warp_totals;
    Boundary* boundaries;  // where worker w begins and worker w - 1 ends
    int* num_cuts;         // of boundaries 0 to w

    __device__ ScheduleMemory(int64_t* begin, DecodeScheduleParams const& params)
        : start(begin),
          warp_totals(start + params.batch_size + 1),
          boundaries(reinterpret_cast<Boundary*>(warp_totals + kWarps)),
          num_cuts(reinterpret_cast<int*>(boundaries + params.grid.num_workers + 1)) {}

    static size_t bytes(DecodeScheduleParams const& params) {
        return sizeof(int64_t) * (params.batch_size + 1 + kWarps) +
               (sizeof(Boundary) + sizeof(int)) * (params.grid.num_workers + 1);
    }
};

// Fills in start. Returns the cost of all requests.
__device__ inline int64_t lay_out_line(DecodeScheduleParams const& params, ScheduleMemory const& memory) {
    WorkerGrid const& grid = params.grid;
    int64_t carry = 0;
    if (threadIdx.x == 0) memory.start[0] = 0;
    for (int base = 0; base < params.batch_size; base += kThreads) {
        int const i = base + threadIdx.x;
        int64_t cost = 0;
        if (i < params.batch_size) {
            int64_t const blocks = num_blocks_of(max(params.cache_seqlens[i], 0));
            cost = (blocks + grid.split_overhead_blocks) * grid.tiles_per_request;
        }
        int64_t const end = carry + scan_inclusive(cost, memory.warp_totals);
        if (i < params.batch_size) memory.start[i + 1] = end;
        __syncthreads();
        carry = memory.start[min(base + kThreads, params.batch_size)];
    }
    return carry;
}

// The most that a worker should have.
__device__ inline int64_t quota_of(WorkerGrid const& grid, int64_t total) {
    int64_t const fair_share = (total + grid.num_workers - 1) / grid.num_workers;
    return max(fair_share, int64_t(grid.split_overhead_blocks + grid.min_blocks_per_split));
}

// Whether no worker has much more than its quota, if its boundaries are these.
template <typename BoundaryOf, typename CostBefore>
__device__ bool is_even_enough(WorkerGrid const& grid, int64_t quota, int64_t num_tiles, BoundaryOf const& boundary_of,
                               CostBefore const& cost_before) {
    int64_t const most = quota + even_slack(grid, quota, num_tiles);
    bool is_uneven = false;
    for (int w = threadIdx.x; w < grid.num_workers; w += kThreads) {
        int64_t const cost = cost_before(boundary_of(w + 1)) - cost_before(boundary_of(w));
        is_uneven |= cost > most;
    }
    return !__syncthreads_or(is_uneven);
}

// Fills in the boundaries and their running count.
template <typename BoundaryOf>
__device__ void place_boundaries(WorkerGrid const& grid, ScheduleMemory const& memory, BoundaryOf const& boundary_of) {
    int cuts_before = 0;
    for (int base = 0; base <= grid.num_workers; base += kThreads) {
        int const w = base + threadIdx.x;
        bool cut = false;
        if (w <= grid.num_workers) {
            memory.boundaries[w] = boundary_of(w);
            cut = memory.boundaries[w].cuts_a_tile();
        }
        int const count = cuts_before + scan_inclusive(int(cut), reinterpret_cast<int*>(memory.warp_totals));
        if (w <= grid.num_workers) memory.num_cuts[w] = count;
        __syncthreads();
        cuts_before = memory.num_cuts[min(base + kThreads - 1, grid.num_workers)];
    }
}

// Writes a row per worker. end_of_tile(batch) is the place where a tile ends, last_worker_of(w, boundary) who finishes
// the tile that the boundary cuts, at which worker w ends.
template <typename EndOfTile, typename LastWorkerOf>
__device__ void write_rows(DecodeScheduleParams const& params, Boundary const* boundaries, EndOfTile const& end_of_tile,
                           LastWorkerOf const& last_worker_of) {
    WorkerGrid const& grid = params.grid;
    auto* const rows = reinterpret_cast<WorkerRow*>(params.metadata);
    for (int w = threadIdx.x; w < params.num_plan_rows; w += kThreads) {
        Boundary const begin = w < grid.num_workers ? boundaries[w] : Boundary{params.batch_size, 0, 0};
        Boundary const end = w < grid.num_workers ? boundaries[w + 1] : begin;
        WorkerRow row{begin.batch, begin.tile, begin.place, begin.batch, begin.tile, begin.place, 0, w};
        if (!(begin == end)) {
            if (end.cuts_a_tile()) {
                row.end_batch = end.batch, row.end_tile = end.tile, row.end_block = end.place;
                row.last_worker = last_worker_of(w, end);
            } else {
                bool const first_tile = end.tile == 0;
                row.end_batch = first_tile ? end.batch - 1 : end.batch;
                row.end_tile = first_tile ? grid.tiles_per_request - 1 : end.tile - 1;
                row.end_block = end_of_tile(row.end_batch);
            }
            row.num_pieces =
                (row.end_batch - row.begin_batch) * grid.tiles_per_request + row.end_tile - row.begin_tile + 1;
        }
        rows[w] = row;
    }
}

inline cudaError_t launch_scheduler(void (*kernel)(DecodeScheduleParams), DecodeScheduleParams const& params,
                                    cudaStream_t stream) {
    size_t const shared_bytes = ScheduleMemory::bytes(params);
    if (shared_bytes > 48 * 1024) {
        cudaError_t const status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (status != cudaSuccess) return status;
    }
    kernel<<<1, kThreads, shared_bytes, stream>>>(params);
    return cudaGetLastError();
}

}  // namespace flash_mla
