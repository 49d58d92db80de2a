// How decode work is divided: shared by the tile scheduler, the kernels that follow its plan and the ops that size
// buffers for it. flash_mla/schedule.py is the host twin; tests hold the two together bit for bit.
//
// Work is a line: for every request, for every tile of the request, its KV blocks. A worker takes one stretch of that
// line. The lanes of a worker are CTAs that read the same KV blocks for neighbouring tiles of query rows; in the
// swapped kernel a worker has one lane, a cluster that shares out the blocks.
#pragma once

#include <cstdint>

namespace flash_mla {

inline constexpr int kPageSize = 64;      // tokens per page, and per KV block
inline constexpr int kBlockM = 64;        // query rows per CTA of the dense decode kernel
inline constexpr int kMaxLanes = 8;       // CTAs that share one stretch of KV blocks
inline constexpr int kHeadDim = 576;      // 512 latent + 64 RoPE
inline constexpr int kHeadDimV = 512;     // the latent part, read again as V
inline constexpr int kMaxSplitCtas = 16;  // CTAs of a cluster that shares out KV blocks
// With tiles of 32 rows results of no more fit their place.
constexpr int max_split_ctas(int rows_per_tile) { return rows_per_tile <= 16 ? kMaxSplitCtas : 8; }

// Query rows of a kv head that the swapped kernel serves: of a request alone, or where bits do not depend on the batch;
// and of several requests, since tiles of 64 rows in the dense kernel, half empty, take less time than tiles of 32.
inline constexpr int kMaxSwappedRows = 32, kMaxSwappedRowsOfMany = 16;

// The cost model, in KV blocks: what starting a piece costs, and the least that is worth a split. The swapped kernel's
// are per CTA of a cluster.
inline constexpr int kDenseSplitOverhead = 3;
inline constexpr int kDenseMinSplit = 2;
// Where at most half of the dense kernel's workers would have a block each, it is worth a worker: partial results are
// few then. A tile of so many blocks still takes no longer than its parts and their merging.
inline constexpr int kDenseWholeTileOfFew = 2;
// What a worker with whole tiles may have above its quota; where some SMs are enough a third of it and this.
inline constexpr int kDenseWholeSlack = 8, kDenseWholeSlackOfSome = 4;
inline constexpr int kSwappedSplitOverhead = 3;
inline constexpr int kSwappedSplitOverheadOfMore = 4;  // with tiles of 32 rows
// Where bits do not depend on the batch.
inline constexpr int kDenseSegmentsSplitOverhead = 5, kSegmentsSplitOverhead = 2;
inline constexpr int kSwappedMinSplit = 2;
// Where tiles are divided evenly, a block for each CTA is worth a cluster, and a tile with up to so many is not cut.
inline constexpr int kSwappedWholeTile = 2;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
// KV blocks of a request with so many tokens, from 0 on.
constexpr int num_blocks_of(int seqlen) { return seqlen / kPageSize + (seqlen % kPageSize != 0); }

// CTAs that a GPU runs at once, one per SM: how many clusters of each size. A cluster has its SMs in one part of the
// GPU, so that the larger they are, the more SMs stay idle.
struct ClusterCapacity {
    int num_clusters[kMaxSplitCtas + 1];  // by size, from 1

    constexpr int num_sms() const { return num_clusters[1]; }
};

struct WorkerGrid {
    int num_lanes;
    int num_workers;        // that get work; a plan may have more rows
    int tiles_per_request;  // tiles of a plan: groups of num_lanes tiles of query rows
    int lane_groups;        // of one kv head
    int rows_per_tile;      // query rows per CTA: kBlockM for the dense decode kernel, fewer for the swapped one
    int split_ctas;         // CTAs, a cluster, that share out the KV blocks of a lane
    int split_overhead_blocks, min_blocks_per_split;
    int num_granules = 0;  // of a tile at most, where bits do not depend on the batch (segments.h); otherwise 0

    constexpr bool is_invariant() const { return num_granules > 0; }
    constexpr bool is_swapped() const { return rows_per_tile < kBlockM; }
};

// How tiles are cut evenly: in parts of so many blocks at least, and not at all up to some length.
struct EvenCuts {
    int least_part, longest_whole;
};
constexpr EvenCuts even_cuts(WorkerGrid const& grid, int64_t total_blocks) {
    int const least_part = grid.min_blocks_per_split;
    if (grid.is_invariant()) return {least_part, grid.split_overhead_blocks + least_part};
    if (grid.is_swapped()) return {grid.split_ctas, kSwappedWholeTile * grid.split_ctas};
    if (2 * total_blocks <= grid.num_workers) return {1, kDenseWholeTileOfFew};
    return {least_part, 2 * least_part - 1};
}

// How many blocks more than its quota the busiest worker may have where tiles are divided evenly. Where the dense
// kernel has whole tiles there is nothing to merge, which is worth more; and up to 64 rows memory is the limit, which
// two thirds of the SMs reach too.
constexpr int64_t even_slack(WorkerGrid const& grid, int64_t quota, int64_t num_tiles) {
    bool const takes_whole_tiles = grid.num_workers < 2 * num_tiles;
    if (grid.is_swapped() || grid.is_invariant() || !takes_whole_tiles)
        return grid.split_overhead_blocks + grid.split_overhead_blocks / 2;
    int64_t const of_some = quota / 3 + kDenseWholeSlackOfSome;
    bool const is_for_some = grid.num_lanes == 1 && num_tiles <= grid.num_workers;
    return is_for_some && of_some > kDenseWholeSlack ? of_some : kDenseWholeSlack;
}

// Tiles of 64 rows. Lanes share their KV blocks through the L2, so a tile group is as wide as it can be without idling
// SMs, or one in 32 of them.
constexpr WorkerGrid dense_grid(int num_rows_per_head_kv, int num_heads_kv, int num_sms) {
    int const m_tiles = ceil_div(num_rows_per_head_kv, kBlockM);
    int chosen = 1;
    if (m_tiles > 1) {
        long best_workers = 0, best_groups = 1;
        for (int lanes = 2; lanes <= kMaxLanes && lanes <= m_tiles && lanes <= num_sms; ++lanes) {
            long const workers = num_sms / lanes, groups = ceil_div(m_tiles, lanes);
            int const enough = lanes % 2 == 0 ? 31 : 32;  // pairs load KV once
            if (32 * workers * best_groups >= enough * best_workers * groups) chosen = lanes;
            if (workers * best_groups > best_workers * groups) best_workers = workers, best_groups = groups;
        }
    }
    int const groups = ceil_div(m_tiles, chosen);
    return {chosen, num_sms / chosen, num_heads_kv * groups, groups, kBlockM, 1, kDenseSplitOverhead, kDenseMinSplit};
}

// Tiles of 16 or 32 rows, with clusters of a given size.
constexpr int swapped_rows_per_tile(int num_rows_per_head_kv) { return num_rows_per_head_kv <= 16 ? 16 : 32; }
constexpr WorkerGrid swapped_grid_of(int split_ctas, int num_rows_per_head_kv, int num_heads_kv,
                                     ClusterCapacity const& capacity) {
    int const rows_per_tile = swapped_rows_per_tile(num_rows_per_head_kv);
    int const overhead = rows_per_tile == 16 ? kSwappedSplitOverhead : kSwappedSplitOverheadOfMore;
    return {1,
            capacity.num_clusters[split_ctas],
            num_heads_kv,
            1,
            rows_per_tile,
            split_ctas,
            overhead * split_ctas,
            kSwappedMinSplit * split_ctas};
}

// Whether at least nineteen of twenty SMs have work where each takes whole requests.
constexpr bool fill_sms_whole(int64_t num_requests, int num_sms) {
    int64_t const places = (num_requests + num_sms - 1) / num_sms * num_sms;
    return 20 * (places - num_requests) <= places;
}

// A request gets as large a cluster as leaves one for every other request, but two of two CTAs rather than one of
// three; where there are none for all, one of two, unless whole requests fill the GPU. One of 16 only where tiles that
// are divided evenly get three quarters of the CTAs that they would get with 8, as fewer of those fit the GPU. The
// results of 8 column chunks are merged by all CTAs of a cluster; with 16 rows there is room for uneven shares too.
constexpr WorkerGrid swapped_grid(int64_t num_requests, int num_rows_per_head_kv, int num_heads_kv,
                                  ClusterCapacity const& capacity) {
    int const rows_per_tile = swapped_rows_per_tile(num_rows_per_head_kv);
    int split_ctas = capacity.num_clusters[2] == 0 || fill_sms_whole(num_requests, capacity.num_sms()) ? 1 : 2;
    constexpr int kSizes[] = {2, 3, 4, 5, 6, 8};
    for (int const size : kSizes) {
        bool const is_possible = (size & (size - 1)) == 0 || rows_per_tile == 16;
        if (is_possible && capacity.num_clusters[size] >= num_requests) split_ctas = size;
    }
    if (split_ctas == 3 && capacity.num_clusters[2] >= 2 * num_requests) split_ctas = 2;
    auto const even_ctas = [&](int size) { return capacity.num_clusters[size] / num_requests * num_requests * size; };
    if (max_split_ctas(rows_per_tile) >= 16 && even_ctas(16) > 0 && 4 * even_ctas(16) >= 3 * even_ctas(8))
        split_ctas = 16;
    return swapped_grid_of(split_ctas, num_rows_per_head_kv, num_heads_kv, capacity);
}

constexpr WorkerGrid worker_grid(int batch_size, int num_rows_per_head_kv, int num_heads_kv,
                                 ClusterCapacity const& capacity) {
    int64_t const product = int64_t(batch_size) * num_heads_kv;
    int64_t const num_requests = product > 0 ? product : 1;  // a plan for none has workers too
    if (num_rows_per_head_kv <= (num_requests == 1 ? kMaxSwappedRows : kMaxSwappedRowsOfMany))
        return swapped_grid(num_requests, num_rows_per_head_kv, num_heads_kv, capacity);
    return dense_grid(num_rows_per_head_kv, num_heads_kv, capacity.num_sms());
}

// Rows of a plan and of partial results, enough for every batch size.
constexpr int num_plan_rows(int num_rows_per_head_kv, int num_heads_kv, int num_sms) {
    return dense_grid(num_rows_per_head_kv, num_heads_kv, num_sms).num_workers;
}
constexpr int64_t num_partial_rows(int num_rows_per_head_kv, int num_heads_kv, int num_sms) {
    WorkerGrid const grid = dense_grid(num_rows_per_head_kv, num_heads_kv, num_sms);
    return int64_t(2) * grid.num_workers * grid.num_lanes * kBlockM;
}

// Scratch of a decode: rows of partial results, each with its log2-sum-exp2, or where bits do not depend on the batch
// with reference and sum.
struct DecodeScratch {
    int64_t rows;
    int numbers_per_row = kHeadDimV + 1;

    constexpr int64_t bytes() const { return rows * numbers_per_row * int64_t(sizeof(float)); }
};

// CTAs that neighbour each other in a worker form a cluster and load each KV block once for both.
constexpr int cluster_size(WorkerGrid const& grid) { return grid.num_lanes % 2 == 0 ? 2 : 1; }

// One row of tile_scheduler_metadata: the stretch of one worker. It names no addresses and no position of its own, so
// a plan may be copied into any buffer.
//
// Where bits do not depend on the batch, the blocks are 128ths of the tile, and last_worker is the worker itself.
struct alignas(32) WorkerRow {
    int begin_batch, begin_tile, begin_block;  // first piece
    int end_batch, end_tile, end_block;        // last piece; end_block is exclusive
    int num_pieces;                            // tiles touched; 0 for a worker without work
    int last_worker;                           // who finishes the tile of the last piece

    constexpr bool operator==(WorkerRow const& other) const {
        return begin_batch == other.begin_batch && begin_tile == other.begin_tile && begin_block == other.begin_block &&
               end_batch == other.end_batch && end_tile == other.end_tile && end_block == other.end_block &&
               num_pieces == other.num_pieces && last_worker == other.last_worker;
    }
};
inline constexpr int kWorkerRowInts = sizeof(WorkerRow) / sizeof(int);

// Where partial results of a worker's first piece live, and of its last one where that is another.
constexpr int partial_slot(int worker, bool first_piece) { return 2 * worker + (first_piece ? 0 : 1); }

}  // namespace flash_mla
