// The tile scheduler where bits do not depend on the batch: the line of work, its costs and its fair or even division
// are those of decode_schedule.cu, but a tile may be cut between granules only (segments.h). A boundary of a fair
// division moves to the nearest such place, an even one counts granules. Places count in 128ths of a tile.
#include "kernels/decode_schedule/decode_schedule.h"
#include "kernels/decode_schedule/work_line.h"

namespace flash_mla {
namespace {

__global__ void __launch_bounds__(kThreads, 1) granule_schedule_kernel(DecodeScheduleParams const params) {
    extern __shared__ int64_t shared[];
    ScheduleMemory const memory(shared, params);
    int64_t const* const start = memory.start;
    WorkerGrid const& grid = params.grid;
    int const batch_size = params.batch_size;
    int64_t const total = lay_out_line(params, memory), quota = quota_of(grid, total);
    int64_t const num_tiles = int64_t(batch_size) * grid.tiles_per_request;
    int64_t const workers_per_tile = num_tiles > 0 ? grid.num_workers / num_tiles : 1;  // or 0

    auto tile_cost_of = [&](int batch) { return (start[batch + 1] - start[batch]) / grid.tiles_per_request; };
    auto num_blocks_in = [&](int batch) { return int(tile_cost_of(batch)) - grid.split_overhead_blocks; };
    auto granule_bits_in = [&](int batch) {
        int const segment_bits = segment_bits_of(num_blocks_in(batch), grid.rows_per_tile, grid.num_lanes);
        return granule_bits_of(grid.num_granules, segment_bits);
    };
    // Where a granule of the tile begins; behind its last one, the next tile.
    auto place_of = [&](int64_t tile, int64_t granule, int granule_bits) -> Boundary {
        bool const is_behind_tile = granule >> granule_bits;
        tile += is_behind_tile;
        int const batch = int(tile / grid.tiles_per_request);
        return {batch, int(tile - int64_t(batch) * grid.tiles_per_request),
                is_behind_tile ? 0 : int(granule << kMaxSegmentBits >> granule_bits)};
    };
    // The boundary between granules that is nearest to part / whole of the tile.
    auto place_near = [&](int64_t tile, int64_t part, int64_t whole) -> Boundary {
        int const granule_bits = granule_bits_in(int(tile / grid.tiles_per_request));
        int64_t const granule = whole > 0 ? ((part << (granule_bits + 1)) + whole) / (2 * whole) : 0;
        return place_of(tile, granule, granule_bits);
    };
    auto even_boundary = [&](int w) -> Boundary {
        int64_t const tile = workers_per_tile == 0 ? w * num_tiles / grid.num_workers : w / workers_per_tile;
        if (tile >= num_tiles) return {batch_size, 0, 0};
        if (workers_per_tile == 0) return place_of(tile, 0, 0);
        int const batch = int(tile / grid.tiles_per_request), granule_bits = granule_bits_in(batch);
        bool const is_short = num_blocks_in(batch) <= grid.split_overhead_blocks + grid.min_blocks_per_split;
        // As many granules for each worker as the busiest must have: the first ones have work, and most of them whole
        // chains.
        int64_t const num_granules = int64_t(1) << granule_bits;
        int64_t const share = is_short ? num_granules : (num_granules + workers_per_tile - 1) / workers_per_tile;
        return place_of(tile, min((w - tile * workers_per_tile) * share, num_granules), granule_bits);
    };
    auto cost_before = [&](Boundary const& at) {
        if (at.batch == batch_size) return total;
        int64_t const within = int64_t(at.place) * num_blocks_in(at.batch) >> kMaxSegmentBits;
        return start[at.batch] + at.tile * tile_cost_of(at.batch) +
               (at.cuts_a_tile() ? within + grid.split_overhead_blocks : 0);
    };
    bool const is_even = is_even_enough(grid, quota, num_tiles, even_boundary, cost_before);

    auto find_boundary = [&](int w) -> Boundary {
        if (is_even) return even_boundary(w);
        int64_t const x = w * quota;
        if (x >= total) return {batch_size, 0, 0};
        int const batch = find_request(start, batch_size, x);
        int64_t const tile_cost = tile_cost_of(batch), in_request = x - start[batch];
        int64_t const tile = in_request / tile_cost;
        int64_t const block = max(in_request - tile * tile_cost - grid.split_overhead_blocks, int64_t(0));
        return place_near(int64_t(batch) * grid.tiles_per_request + tile, block, num_blocks_in(batch));
    };
    place_boundaries(grid, memory, find_boundary);
    // A granule has no other worker.
    write_rows(params, memory.boundaries, [](int) { return kMaxSegments; }, [](int w, Boundary const&) { return w; });

    // Pieces before request i: its predecessors' tiles, and one more for every boundary that cuts one of them.
    for (int i = threadIdx.x; i <= batch_size; i += kThreads) {
        int low = 0, high = grid.num_workers + 1;  // the first boundary that is not before request i
        while (low < high) {
            int const middle = (low + high) / 2;
            if (memory.boundaries[middle].batch < i) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        params.num_splits[i] = i * grid.tiles_per_request + (low > 0 ? memory.num_cuts[low - 1] : 0);
    }
}

}  // namespace

cudaError_t launch_granule_schedule(DecodeScheduleParams const& params, cudaStream_t stream) {
    return launch_scheduler(granule_schedule_kernel, params, stream);
}

}  // namespace flash_mla
