// Where the query rows of a tile live. The rows of one request and kv head are its tokens × the heads of the group,
// token by token; tiles are 64 of them, and a tile of the plan has one such per lane.
#pragma once

#include <cmath>

#include "params/dense_decode.h"

namespace flash_mla {

struct TilePlace {
    int head_kv, m_tile;  // beyond the last row of the kv head: this lane has nothing to do
};
constexpr TilePlace tile_place(WorkerGrid const& grid, int tile, int lane) {
    return {tile / grid.lane_groups, tile % grid.lane_groups * grid.num_lanes + lane};
}

struct QueryRow {
    int token, head_q;
    bool exists;
};
constexpr QueryRow query_row(DenseDecodeParams const& params, TilePlace const& place, int row_in_tile,
                             int rows_per_tile = kBlockM) {
    int const row = place.m_tile * rows_per_tile + row_in_tile;
    int const token = row / params.heads_per_group;
    int const head_q = place.head_kv * params.heads_per_group + row - token * params.heads_per_group;
    return {token, head_q, row < params.rows_per_head_kv};
}

// Elements from the begin of out to a row, of lse to its value, and rows from the begin of the partial results.
constexpr int64_t out_offset(DenseDecodeParams const& params, int batch, QueryRow const& at) {
    return batch * params.out_batch_stride + at.token * params.out_token_stride + at.head_q * params.out_head_stride;
}
constexpr int64_t lse_offset(DenseDecodeParams const& params, int batch, QueryRow const& at) {
    return (int64_t(batch) * params.num_heads_q + at.head_q) * params.seqlen_q + at.token;
}
// What lse holds for a row with this log2-sum-exp2, -inf if it saw no key.
constexpr float natural_lse(float log2_sum) {
    constexpr float kLn2 = 0.693147180559945309417f;
    return log2_sum == -INFINITY ? INFINITY : log2_sum * kLn2;
}
constexpr int64_t partial_row(WorkerGrid const& grid, int slot, int lane, int row_in_tile, int rows_per_tile) {
    return int64_t(slot * grid.num_lanes + lane) * rows_per_tile + row_in_tile;
}

// Partial outputs of the dense kernel, as its threads hold them: boxes of 8 rows and 32 columns, a quad for each row,
// and of each thread 8 numbers: the pairs of columns 8·i + 2·j, for its number j in the quad and i from 0 to 3. They
// are 16-bit floating point numbers, times a power of two for all that a thread has of a row: of each half of the
// columns, then.
inline constexpr int kBoxRows = 8, kBoxColumns = 32, kBoxThreads = 32, kNumbersPerThread = 8;
inline constexpr int kScalesPerRow = 8;

constexpr int box_offset(int row, int column) {  // in numbers, from the begin of the tile to a box
    int const box = row / kBoxRows * (kHeadDimV / kBoxColumns) + column / kBoxColumns;
    return box * kBoxThreads * kNumbersPerThread;
}
constexpr int scale_of(int column, int j) { return column / (kHeadDimV / 2) * 4 + j; }  // of those of the row

}  // namespace flash_mla
