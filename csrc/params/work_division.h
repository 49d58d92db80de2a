// How decode work is divided: shared by the tile scheduler, the kernels that follow its plan and the ops that size
// buffers for it. flash_mla/schedule.py is the host twin; tests hold the two together bit for bit.
//
// Work is a line: for every request, for every tile of the request, its KV blocks. A worker takes one stretch of that
// line. The lanes of a worker are CTAs that read the same KV blocks for neighbouring 64-row tiles of query rows.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace flash_mla {

inline constexpr int kPageSize = 64;   // tokens per page, and per KV block
inline constexpr int kBlockM = 64;     // query rows per CTA
inline constexpr int kMaxLanes = 8;    // CTAs that share one stretch of KV blocks
inline constexpr int kHeadDim = 576;   // 512 latent + 64 RoPE
inline constexpr int kHeadDimV = 512;  // the latent part, read again as V

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct WorkerGrid {
    int num_lanes;
    int num_workers;  // that get work; a plan may have more rows
    int tiles_per_request;
    int lane_groups;    // ceil(tiles of one kv head's query rows / num_lanes)
    int rows_per_tile;  // query rows per CTA: kBlockM for the dense decode kernel, fewer for the swapped one
    int split_ctas;     // CTAs of a lane that share out the KV blocks of a stretch, a cluster
    int split_overhead_blocks, min_blocks_per_split;  // the cost model: what starting a piece costs, and the least that
                                                      // is worth a split

    constexpr bool is_swapped() const { return rows_per_tile < kBlockM; }
};

// Lanes share their KV blocks through the L2, so a tile group is as wide as it can be without idling SMs.
constexpr WorkerGrid group_lanes(int num_rows_per_head_kv, int num_heads_kv, int num_sms, int rows_per_tile,
                                 int split_ctas, int split_overhead_blocks, int min_blocks_per_split) {
    int const m_tiles = ceil_div(num_rows_per_head_kv, rows_per_tile);
    int best = 1;
    if (m_tiles > 1) {
        long best_workers = 0, best_groups = 1;
        for (int lanes = 2; lanes <= kMaxLanes && lanes <= m_tiles && lanes * split_ctas <= num_sms; ++lanes) {
            long const workers = num_sms / (lanes * split_ctas), groups = ceil_div(m_tiles, lanes);
            if (workers * best_groups >= best_workers * groups) {
                best = lanes, best_workers = workers, best_groups = groups;
            }
        }
    }
    int const groups = ceil_div(m_tiles, best);
    return {best,       num_sms / (best * split_ctas), num_heads_kv * groups, groups, rows_per_tile,
            split_ctas, split_overhead_blocks,         min_blocks_per_split};
}

// Rows of a plan: as many workers as there are at most.
constexpr int num_plan_rows(int num_rows_per_head_kv, int num_heads_kv, int num_sms) {
    return group_lanes(num_rows_per_head_kv, num_heads_kv, num_sms, kBlockM, 1, 5, 2).num_workers;
}

inline WorkerGrid worker_grid(int batch_size, int num_rows_per_head_kv, int num_heads_kv, int num_sms) {
    auto env = [](char const* name, int value) {
        char const* s = getenv(name);
        return s ? atoi(s) : value;
    };
    int const requests = batch_size * num_heads_kv;
    int rows = num_rows_per_head_kv <= 16 ? 16 : num_rows_per_head_kv <= 32 || requests <= 4 ? 32 : 64;
    rows = env("X_ROWS", rows);
    if (rows == 64) return group_lanes(num_rows_per_head_kv, num_heads_kv, num_sms, kBlockM, 1, 5, 2);
    int const CL[] = {0, 132, 66, env("X_CL3", 43), 30, 26, env("X_CL6", 20), 18, 15};
    int split = 8;
    while (split > 1 && (CL[split] < requests || split == 5 || split == 7)) --split;
    split = env("X_SPLIT", split);
    int const lanes = env("X_LANES", 0);
    WorkerGrid g = group_lanes(num_rows_per_head_kv, num_heads_kv, CL[split] * split, rows, split, env("X_OVER", 2) * split, env("X_MIN", 1) * split);
    if (lanes) { g.num_lanes = lanes; g.num_workers = CL[split] / lanes; g.lane_groups = ceil_div(ceil_div(num_rows_per_head_kv, rows), lanes); g.tiles_per_request = num_heads_kv * g.lane_groups; }
    return g;
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
