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
//         least so many, and a tile up to some length is not split (even_cuts)
//
// Every boundary is found on its own by bisection over start(), so nothing here is sequential but one block scan.
#include "kernels/decode_schedule/decode_schedule.h"

#include "kernels/decode_schedule/work_line.h"

namespace flash_mla {
namespace {

__global__ void __launch_bounds__(kThreads, 1) decode_schedule_kernel(DecodeScheduleParams const params) {
    extern __shared__ int64_t shared[];
    ScheduleMemory const memory(shared, params);
    int64_t const* const start = memory.start;
    WorkerGrid const& grid = params.grid;
    int64_t const total = lay_out_line(params, memory), quota = quota_of(grid, total);

    int64_t const num_tiles = int64_t(params.batch_size) * grid.tiles_per_request;
    int64_t const workers_per_tile = num_tiles > 0 ? grid.num_workers / num_tiles : 1;  // or 0
    auto place_of = [&](int64_t tile, int block) -> Boundary {
        int const batch = int(tile / grid.tiles_per_request);
        return {batch, int(tile - int64_t(batch) * grid.tiles_per_request), block};
    };
    auto tile_cost_of = [&](int batch) { return (start[batch + 1] - start[batch]) / grid.tiles_per_request; };
    // Blocks of a piece, where every tile is cut evenly.
    EvenCuts const cuts = even_cuts(grid, total - num_tiles * grid.split_overhead_blocks);
    auto even_piece = [&](int num_blocks) {
        if (num_blocks <= cuts.longest_whole) return num_blocks;
        return max(int((num_blocks + workers_per_tile - 1) / workers_per_tile), cuts.least_part);
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
               (at.cuts_a_tile() ? at.place + grid.split_overhead_blocks : 0);
    };
    bool const is_even = is_even_enough(grid, quota, num_tiles, even_boundary, cost_before);

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
    auto last_worker_of = [&](int, Boundary const& at) -> int {
        int64_t const tile_cost = tile_cost_of(at.batch);
        if (is_even) {
            int const num_blocks = int(tile_cost) - grid.split_overhead_blocks, piece = even_piece(num_blocks);
            int64_t const tile = int64_t(at.batch) * grid.tiles_per_request + at.tile;
            return int(tile * workers_per_tile) + (num_blocks - 1) / piece;
        }
        return int((start[at.batch] + (at.tile + 1) * tile_cost - 1) / quota);
    };
    place_boundaries(grid, memory, find_boundary);
    write_rows(
        params, memory.boundaries, [&](int batch) { return num_blocks_of(max(params.cache_seqlens[batch], 0)); },
        last_worker_of);

    // Pieces before request i: its predecessors' tiles, and one more for every boundary that cuts one of them.
    for (int i = threadIdx.x; i <= params.batch_size; i += kThreads) {
        int64_t boundaries_before = start[i] > 0 ? (start[i] - 1) / quota : 0;
        if (is_even) boundaries_before = max(i * grid.tiles_per_request * workers_per_tile - 1, int64_t(0));
        params.num_splits[i] =
            i * grid.tiles_per_request + memory.num_cuts[min(boundaries_before, int64_t(grid.num_workers))];
    }
}

}  // namespace

cudaError_t launch_decode_schedule(DecodeScheduleParams const& params, cudaStream_t stream) {
    if (params.grid.is_invariant()) return launch_granule_schedule(params, stream);
    return launch_scheduler(decode_schedule_kernel, params, stream);
}

}  // namespace flash_mla
