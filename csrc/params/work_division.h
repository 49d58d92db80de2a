// How decode work is divided: shared by the tile scheduler, the kernels that follow its plan and the ops that size
// buffers for it. flash_mla/schedule.py is the host twin; tests hold the two together bit for bit.
//
// Work is a line: for every request, for every tile of the request, its KV blocks. A worker takes one stretch of that
// line. The lanes of a worker are CTAs that read the same KV blocks for neighbouring 64-row tiles of query rows.
#pragma once

#include <cstdint>

namespace flash_mla {

inline constexpr int kPageSize = 64;   // tokens per page, and per KV block
inline constexpr int kBlockM = 64;     // query rows per CTA
inline constexpr int kMaxLanes = 8;    // CTAs that share one stretch of KV blocks
inline constexpr int kHeadDim = 576;   // 512 latent + 64 RoPE
inline constexpr int kHeadDimV = 512;  // the latent part, read again as V

// The cost model, in blocks: what starting a piece costs, and the least that is worth a split.
inline constexpr int kSplitOverheadBlocks = 5;
inline constexpr int kMinBlocksPerSplit = 2;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct WorkerGrid {
    int num_lanes;
    int num_workers;
    int tiles_per_request;
    int m_tiles;      // 64-row tiles of one kv head's query rows
    int lane_groups;  // ceil(m_tiles / num_lanes)
};

// Lanes share their KV blocks through the L2, so a tile group is as wide as it can be without idling SMs.
constexpr WorkerGrid worker_grid(int num_rows_per_head_kv, int num_heads_kv, int num_sms) {
    int const m_tiles = ceil_div(num_rows_per_head_kv, kBlockM);
    int best = 1;
    if (m_tiles > 1) {
        long best_workers = 0, best_groups = 1;
        for (int lanes = 2; lanes <= kMaxLanes && lanes <= m_tiles && lanes <= num_sms; ++lanes) {
            long const workers = num_sms / lanes, groups = ceil_div(m_tiles, lanes);
            if (workers * best_groups >= best_workers * groups) {
                best = lanes, best_workers = workers, best_groups = groups;
            }
        }
    }
    int const groups = ceil_div(m_tiles, best);
    return {best, num_sms / best, num_heads_kv * groups, m_tiles, groups};
}

// CTAs that neighbour each other in a worker form a cluster and load each KV block once for both.
constexpr int cluster_size(WorkerGrid const& grid) { return grid.num_lanes % 2 == 0 ? 2 : 1; }

// One row of tile_scheduler_metadata: the stretch of one worker. It names no addresses and no position of its own, so
// a plan may be copied into any buffer.
struct alignas(32) WorkerRow {
    int begin_batch, begin_tile, begin_block;  // first piece
    int end_batch, end_tile, end_block;        // last piece; end_block is exclusive
    int num_pieces;                            // tiles touched; 0 for a worker without work
    int last_worker;                           // who finishes the tile of the last piece
};
inline constexpr int kWorkerRowInts = sizeof(WorkerRow) / sizeof(int);

// Where partial results of a worker's first piece live, and of its last one where that is another.
constexpr int partial_slot(int worker, bool first_piece) { return 2 * worker + (first_piece ? 0 : 1); }
constexpr int num_partial_slots(int num_workers) { return 2 * num_workers; }

}  // namespace flash_mla
