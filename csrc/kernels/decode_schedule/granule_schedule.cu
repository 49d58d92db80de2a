// The tile scheduler where bits do not depend on the batch: the line of work, its costs and its fair or even division
// are those of decode_schedule.cu, but a tile may be cut between granules only (segments.h). A boundary moves to the
// nearest such place; the end of a tile is the begin of the next.
//
// One CTA of 1024 threads. Shared memory: start[batch_size + 1] (int64), 32 warp totals for the scans, boundaries
// [num_workers + 1] and the running count of boundaries that cut a tile [num_workers + 1].
#include "kernels/decode_schedule/decode_schedule.h"
#include "kernels/decode_schedule/work_line.h"

namespace flash_mla {
namespace {

struct GranuleBoundary {
    int batch, tile, place;  // 64ths of the tile, not all of it

    __device__ bool operator==(GranuleBoundary const& o) const {
        return batch == o.batch && tile == o.tile && place == o.place;
    }
};

__global__ void __launch_bounds__(kThreads, 1) granule_schedule_kernel(DecodeScheduleParams const params) {
    extern __shared__ int64_t start[];  // [batch_size + 1]
    WorkerGrid const& grid = params.grid;
    int const batch_size = params.batch_size;
    int64_t* const warp_totals = start + batch_size + 1;
    auto* const boundaries = reinterpret_cast<GranuleBoundary*>(warp_totals + kWarps);  // [num_workers + 1]
    int* const num_cuts = reinterpret_cast<int*>(boundaries + grid.num_workers + 1);    // [num_workers + 1]

    int64_t carry = 0;
    if (threadIdx.x == 0) start[0] = 0;
    for (int base = 0; base < batch_size; base += kThreads) {
        int const i = base + threadIdx.x;
        int64_t cost = 0;
        if (i < batch_size) {
            int64_t const blocks = num_blocks_of(params.cache_seqlens[i]);
            cost = (blocks + grid.split_overhead_blocks) * grid.tiles_per_request;
        }
        int64_t const end = carry + scan_inclusive(cost, warp_totals);
        if (i < batch_size) start[i + 1] = end;
        __syncthreads();
        carry = start[min(base + kThreads, batch_size)];
    }

    int64_t const total = carry;
    int64_t const fair_share = (total + grid.num_workers - 1) / grid.num_workers;
    int64_t const quota = max(fair_share, int64_t(grid.split_overhead_blocks + grid.min_blocks_per_split));
    int64_t const num_tiles = int64_t(batch_size) * grid.tiles_per_request;
    int64_t const workers_per_tile = num_tiles > 0 ? grid.num_workers / num_tiles : 1;  // or 0

    auto tile_cost_of = [&](int batch) { return (start[batch + 1] - start[batch]) / grid.tiles_per_request; };
    auto num_blocks_in = [&](int batch) { return int(tile_cost_of(batch)) - grid.split_overhead_blocks; };
    // The boundary between granules that is nearest to part / whole of the tile.
    auto place_near = [&](int64_t tile, int64_t part, int64_t whole) -> GranuleBoundary {
        int batch = int(tile / grid.tiles_per_request);
        int const segment_bits = segment_bits_of(num_blocks_in(batch), min_segment_blocks(grid.rows_per_tile));
        int const granule_bits = granule_bits_of(grid.num_granules, segment_bits);
        int64_t const granule = whole > 0 ? ((part << (granule_bits + 1)) + whole) / (2 * whole) : 0;
        bool const is_behind_tile = granule >> granule_bits;
        tile += is_behind_tile;
        batch = int(tile / grid.tiles_per_request);
        return {batch, int(tile - int64_t(batch) * grid.tiles_per_request),
                is_behind_tile ? 0 : int(granule << kMaxSegmentBits >> granule_bits)};
    };
    auto even_boundary = [&](int w) -> GranuleBoundary {
        int64_t const tile = workers_per_tile == 0 ? w * num_tiles / grid.num_workers : w / workers_per_tile;
        if (tile >= num_tiles) return {batch_size, 0, 0};
        if (workers_per_tile == 0) return place_near(tile, 0, 1);
        int const num_blocks = num_blocks_in(int(tile / grid.tiles_per_request));
        bool const is_short = num_blocks <= grid.split_overhead_blocks + grid.min_blocks_per_split;
        int64_t const worker_of_tile = w - tile * workers_per_tile;
        return is_short ? place_near(tile, worker_of_tile > 0, 1) : place_near(tile, worker_of_tile, workers_per_tile);
    };
    auto cost_before = [&](GranuleBoundary const& at) {
        if (at.batch == batch_size) return total;
        int64_t const within = int64_t(at.place) * num_blocks_in(at.batch) >> kMaxSegmentBits;
        return start[at.batch] + at.tile * tile_cost_of(at.batch) +
               (at.place > 0 ? within + grid.split_overhead_blocks : 0);
    };
    bool is_uneven = false;
    for (int w = threadIdx.x; w < grid.num_workers; w += kThreads) {
        int64_t const cost = cost_before(even_boundary(w + 1)) - cost_before(even_boundary(w));
        is_uneven |= cost > quota + grid.split_overhead_blocks + grid.split_overhead_blocks / 2;
    }
    bool const is_even = !__syncthreads_or(is_uneven);

    auto find_boundary = [&](int w) -> GranuleBoundary {
        if (is_even) return even_boundary(w);
        int64_t const x = w * quota;
        if (x >= total) return {batch_size, 0, 0};
        int const batch = find_request(start, batch_size, x);
        int64_t const tile_cost = tile_cost_of(batch), in_request = x - start[batch];
        int64_t const tile = in_request / tile_cost;
        int64_t const block = max(in_request - tile * tile_cost - grid.split_overhead_blocks, int64_t(0));
        return place_near(int64_t(batch) * grid.tiles_per_request + tile, block, num_blocks_in(batch));
    };
    int cuts_before = 0;
    for (int base = 0; base <= grid.num_workers; base += kThreads) {
        int const w = base + threadIdx.x;
        bool cut = false;
        if (w <= grid.num_workers) {
            boundaries[w] = find_boundary(w);
            cut = boundaries[w].place > 0;
        }
        int const count = cuts_before + scan_inclusive(int(cut), reinterpret_cast<int*>(warp_totals));
        if (w <= grid.num_workers) num_cuts[w] = count;
        __syncthreads();
        cuts_before = num_cuts[min(base + kThreads - 1, grid.num_workers)];
    }

    auto* const rows = reinterpret_cast<WorkerRow*>(params.metadata);
    for (int w = threadIdx.x; w < params.num_plan_rows; w += kThreads) {
        GranuleBoundary const begin = w < grid.num_workers ? boundaries[w] : GranuleBoundary{batch_size, 0, 0};
        GranuleBoundary const end = w < grid.num_workers ? boundaries[w + 1] : begin;
        WorkerRow row{begin.batch, begin.tile, begin.place, begin.batch, begin.tile, begin.place, 0, w};
        if (!(begin == end)) {
            bool const cuts_a_tile = end.place > 0, first_tile = end.tile == 0;
            row.end_batch = cuts_a_tile || !first_tile ? end.batch : end.batch - 1;
            row.end_tile = cuts_a_tile ? end.tile : (first_tile ? grid.tiles_per_request : end.tile) - 1;
            row.end_block = cuts_a_tile ? end.place : kMaxSegments;
            row.num_pieces =
                (row.end_batch - row.begin_batch) * grid.tiles_per_request + row.end_tile - row.begin_tile + 1;
        }
        rows[w] = row;
    }

    // Pieces before request i: its predecessors' tiles, and one more for every boundary that cuts one of them.
    for (int i = threadIdx.x; i <= batch_size; i += kThreads) {
        int low = 0, high = grid.num_workers + 1;  // the first boundary that is not before request i
        while (low < high) {
            int const middle = (low + high) / 2;
            if (boundaries[middle].batch < i) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        params.num_splits[i] = i * grid.tiles_per_request + (low > 0 ? num_cuts[low - 1] : 0);
    }
}

}  // namespace

cudaError_t launch_granule_schedule(DecodeScheduleParams const& params, cudaStream_t stream) {
    size_t const shared_bytes = sizeof(int64_t) * (params.batch_size + 1 + kWarps) +
                                (sizeof(GranuleBoundary) + sizeof(int)) * (params.grid.num_workers + 1);
    if (shared_bytes > 48 * 1024) {
        cudaError_t const status = cudaFuncSetAttribute(granule_schedule_kernel,
                                                        cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (status != cudaSuccess) return status;
    }
    granule_schedule_kernel<<<1, kThreads, shared_bytes, stream>>>(params);
    return cudaGetLastError();
}

}  // namespace flash_mla
