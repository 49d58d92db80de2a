// Where the query rows of a tile live. The rows of one request and kv head are its tokens × the heads of the group,
// token by token; tiles are 64 of them, and a tile of the plan has one such per lane.
#pragma once

#include "params/dense_decode.h"

namespace flash_mla {

struct TilePlace {
    int head_kv, m_tile;  // m_tile >= grid.m_tiles: this lane has nothing to do
};
constexpr TilePlace tile_place(WorkerGrid const& grid, int tile, int lane) {
    return {tile / grid.lane_groups, tile % grid.lane_groups * grid.num_lanes + lane};
}

struct QueryRow {
    int token, head_q;
    bool exists;
};
constexpr QueryRow query_row(DenseDecodeParams const& params, TilePlace const& place, int row_in_tile) {
    int const row = place.m_tile * kBlockM + row_in_tile;
    int const token = row / params.heads_per_group;
    int const head_q = place.head_kv * params.heads_per_group + row - token * params.heads_per_group;
    return {token, head_q, row < params.rows_per_head_kv};
}

}  // namespace flash_mla
