// The tile scheduler: lengths -> one stretch of work per worker.
//
//   cost(tile)  = num_blocks + split_overhead_blocks         a request has tiles_per_request tiles of equal cost
//   start(i)    = sum of the costs of the requests before i
//   quota       = max(ceil(total / num_workers), split_overhead_blocks + min_blocks_per_split)
//   boundary(w) = the place on the line at cost min(w * quota, total); inside a tile's overhead it moves to the
//                 tile's begin, so no worker exceeds quota + split_overhead_blocks
//
// That leaves most workers with the end of one tile and the begin of another. Where whole tiles, or as many equal
// pieces of every tile as there are workers for, are even enough, each worker gets such instead:
//
//   more tiles than workers: worker w begins at tile w * num_tiles / num_workers
//   else: num_workers / num_tiles workers per tile, and pieces of ceil(num_blocks / workers per tile) blocks, but at
//   least
//         min_blocks_per_split; a tile of at most split_overhead_blocks + min_blocks_per_split blocks is not split
//
// Every boundary is found on its own by bisection over start(), so nothing here is sequential but one block scan.
//
// One CTA of 1024 threads. Shared memory: start[batch_size + 1] (int64), boundaries[num_workers + 1], the running count
// of boundaries that cut a tile [num_workers + 1], and 32 warp totals for the scans.
#include "kernels/decode_schedule/decode_schedule.h"

#include "kernels/decode_schedule/work_line.h"

namespace flash_mla {
namespace {

struct Boundary {
    int batch, tile, block;

    __device__ bool cuts_a_tile() const { return block > 0; }
    __device__ bool operator==(Boundary const& o) const {
        return batch == o.batch && tile == o.tile && block == o.block;
    }
};

__global__ void __launch_bounds__(kThreads, 1) decode_schedule_kernel(DecodeScheduleParams const params) {
    extern __shared__ int64_t start[];  // [batch_size + 1]
    WorkerGrid const& grid = params.grid;
    int64_t* const warp_totals = start + params.batch_size + 1;
    auto* const boundaries = reinterpret_cast<Boundary*>(warp_totals + kWarps);       // [num_workers + 1]
    int* const num_cuts = reinterpret_cast<int*>(boundaries + grid.num_workers + 1);  // [num_workers + 1]

    int64_t carry = 0;
    if (threadIdx.x == 0) start[0] = 0;
    for (int base = 0; base < params.batch_size; base += kThreads) {
        int const i = base + threadIdx.x;
        int64_t cost = 0;
        if (i < params.batch_size) {
            int64_t const blocks = num_blocks_of(params.cache_seqlens[i]);
            cost = (blocks + grid.split_overhead_blocks) * grid.tiles_per_request;
        }
        int64_t const end = carry + scan_inclusive(cost, warp_totals);
        if (i < params.batch_size) start[i + 1] = end;
        __syncthreads();
        carry = start[min(base + kThreads, params.batch_size)];
    }

    int64_t const total = carry;
    int64_t const fair_share = (total + grid.num_workers - 1) / grid.num_workers;
    int64_t const quota = max(fair_share, int64_t(grid.split_overhead_blocks + grid.min_blocks_per_split));

    int64_t const num_tiles = int64_t(params.batch_size) * grid.tiles_per_request;
    int64_t const workers_per_tile = num_tiles > 0 ? grid.num_workers / num_tiles : 1;  // or 0
    auto place_of = [&](int64_t tile, int block) -> Boundary {
        int const batch = int(tile / grid.tiles_per_request);
        return {batch, int(tile - int64_t(batch) * grid.tiles_per_request), block};
    };
    auto tile_cost_of = [&](int batch) { return (start[batch + 1] - start[batch]) / grid.tiles_per_request; };
    // Blocks of a piece, where every tile is cut evenly.
    auto even_piece = [&](int num_blocks) {
        if (num_blocks <= grid.split_overhead_blocks + grid.min_blocks_per_split) return num_blocks;
        return max(int((num_blocks + workers_per_tile - 1) / workers_per_tile), grid.min_blocks_per_split);
    };
    auto even_boundary = [&](int w) -> Boundary {
        if (workers_per_tile == 0) return place_of(w * num_tiles / grid.num_workers, 0);
        int64_t const tile = min(w / workers_per_tile, num_tiles);
        if (tile == num_tiles) return {params.batch_size, 0, 0};
        int const num_blocks = int(tile_cost_of(place_of(tile, 0).batch)) - grid.split_overhead_blocks;
        int const block = int(w - tile * workers_per_tile) * even_piece(num_blocks);
        return block > 0 && block >= num_blocks ? place_of(tile + 1, 0) : place_of(tile, block);
    };
    auto cost_before = [&](Boundary const& at) {
        if (at.batch == params.batch_size) return total;
        return start[at.batch] + at.tile * tile_cost_of(at.batch) +
               (at.block > 0 ? at.block + grid.split_overhead_blocks : 0);
    };
    bool is_uneven = false;
    for (int w = threadIdx.x; w < grid.num_workers; w += kThreads) {
        int64_t const cost = cost_before(even_boundary(w + 1)) - cost_before(even_boundary(w));
        is_uneven |= cost > quota + grid.split_overhead_blocks + grid.split_overhead_blocks / 2;
    }
    bool const is_even = !__syncthreads_or(is_uneven);

    // Where worker w begins and worker w - 1 ends.
    auto find_boundary = [&](int w) -> Boundary {
        if (is_even) return even_boundary(w);
        int64_t const x = w * quota;
        if (x >= total) return {params.batch_size, 0, 0};
        int const batch = find_request(start, params.batch_size, x);
        int64_t const tile_cost = tile_cost_of(batch), in_request = x - start[batch];
        int const tile = int(in_request / tile_cost);
        int const offset = int(in_request - tile * tile_cost);
        return {batch, tile, max(offset - grid.split_overhead_blocks, 0)};
    };
    // Who ends the tile that a boundary cuts.
    auto last_worker_of = [&](Boundary const& at) -> int {
        int64_t const tile_cost = tile_cost_of(at.batch);
        if (is_even) {
            int const num_blocks = int(tile_cost) - grid.split_overhead_blocks, piece = even_piece(num_blocks);
            int64_t const tile = int64_t(at.batch) * grid.tiles_per_request + at.tile;
            return int(tile * workers_per_tile) + (num_blocks - 1) / piece;
        }
        return int((start[at.batch] + (at.tile + 1) * tile_cost - 1) / quota);
    };
    int cuts_before = 0;
    for (int base = 0; base <= grid.num_workers; base += kThreads) {
        int const w = base + threadIdx.x;
        bool cut = false;
        if (w <= grid.num_workers) {
            boundaries[w] = find_boundary(w);
            cut = boundaries[w].cuts_a_tile();
        }
        int const count = cuts_before + scan_inclusive(int(cut), reinterpret_cast<int*>(warp_totals));
        if (w <= grid.num_workers) num_cuts[w] = count;
        __syncthreads();
        cuts_before = num_cuts[min(base + kThreads - 1, grid.num_workers)];
    }

    auto* const rows = reinterpret_cast<WorkerRow*>(params.metadata);
    for (int w = threadIdx.x; w < params.num_plan_rows; w += kThreads) {
        Boundary const begin = w < grid.num_workers ? boundaries[w] : Boundary{params.batch_size, 0, 0};
        Boundary const end = w < grid.num_workers ? boundaries[w + 1] : begin;
        WorkerRow row{begin.batch, begin.tile, begin.block, begin.batch, begin.tile, begin.block, 0, w};
        if (!(begin == end)) {
            if (end.cuts_a_tile()) {
                row.end_batch = end.batch, row.end_tile = end.tile, row.end_block = end.block;
                row.last_worker = last_worker_of(end);
            } else {
                bool const first_tile = end.tile == 0;
                row.end_batch = first_tile ? end.batch - 1 : end.batch;
                row.end_tile = first_tile ? grid.tiles_per_request - 1 : end.tile - 1;
                row.end_block = num_blocks_of(params.cache_seqlens[row.end_batch]);
            }
            row.num_pieces =
                (row.end_batch - row.begin_batch) * grid.tiles_per_request + row.end_tile - row.begin_tile + 1;
        }
        rows[w] = row;
    }

    // Pieces before request i: its predecessors' tiles, and one more for every boundary that cuts one of them.
    for (int i = threadIdx.x; i <= params.batch_size; i += kThreads) {
        int64_t boundaries_before = start[i] > 0 ? (start[i] - 1) / quota : 0;
        if (is_even) boundaries_before = max(i * grid.tiles_per_request * workers_per_tile - 1, int64_t(0));
        params.num_splits[i] = i * grid.tiles_per_request + num_cuts[min(boundaries_before, int64_t(grid.num_workers))];
    }
}

}  // namespace

cudaError_t launch_decode_schedule(DecodeScheduleParams const& params, cudaStream_t stream) {
    if (params.grid.is_invariant()) return launch_granule_schedule(params, stream);
    size_t const shared_bytes = sizeof(int64_t) * (params.batch_size + 1 + kWarps) +
                                (sizeof(Boundary) + sizeof(int)) * (params.grid.num_workers + 1);
    if (shared_bytes > 48 * 1024) {
        cudaError_t const status = cudaFuncSetAttribute(decode_schedule_kernel,
                                                        cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (status != cudaSuccess) return status;
    }
    decode_schedule_kernel<<<1, kThreads, shared_bytes, stream>>>(params);
    return cudaGetLastError();
}

}  // namespace flash_mla
