// What one CTA has to do: the pieces of its worker's stretch, as seen from its lane.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "params/query_rows.h"

namespace flash_mla::sm90 {

// The CTA's worker and lane, read anew where they are asked for: registers are dearer.
__device__ inline int worker_now() {
    int worker;
    asm volatile("mov.u32 %0, %%ctaid.y;\n" : "=r"(worker));
    return worker;
}
__device__ inline int lane_now() {
    int lane;
    asm volatile("mov.u32 %0, %%ctaid.x;\n" : "=r"(lane));
    return lane;
}

// Brings this worker's row of the plan and the lengths to the L2, where who wrote them may be writing still. By one
// warp.
__device__ inline void prefetch_plan(DenseDecodeParams const& params) {
    constexpr int kLengthsPerLine = 32;
    int const lane = threadIdx.x % 32;
    auto prefetch = [](void const* address) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(address) : "memory"); };
    if (lane == 0) prefetch(params.metadata + worker_now());
    if (lane * kLengthsPerLine < params.batch_size) prefetch(params.cache_seqlens + lane * kLengthsPerLine);
}

struct Piece {
    static constexpr int kWholeTile = -1;
    static constexpr int kEnd = -1;

    int batch;  // or kEnd: there are no more
    TilePlace place;
    int begin_block, end_block;
    int seqlen;
    int slot;  // of the partial result, or kWholeTile

    __device__ bool is_end() const { return batch == kEnd; }
    __device__ int num_blocks() const { return end_block - begin_block; }
    __device__ bool is_partial() const { return slot != kWholeTile; }
    __device__ bool is_empty() const { return begin_block >= end_block; }
    __device__ bool is_of_tile(Piece const& other) const {
        return batch == other.batch && place.head_kv == other.place.head_kv && place.m_tile == other.place.m_tile;
    }
};

// How the plan and the lengths are read. Past the L1, which would keep what is old, as long as the kernel before may
// write them.
struct ThroughL1 {
    template <typename Value>
    __device__ static Value load(Value const* from) {
        return __ldg(from);
    }
};
struct PastL1 {
    template <typename Value>
    __device__ static Value load(Value const* from) {
        return __ldcg(from);
    }
};

// This worker's row of the plan.
template <typename Load = ThroughL1>
__device__ WorkerRow read_row(DenseDecodeParams const& params) {
    auto const* const words = reinterpret_cast<int4 const*>(params.metadata + worker_now());
    int4 const begin = Load::load(words), end = Load::load(words + 1);
    return {begin.x, begin.y, begin.z, begin.w, end.x, end.y, end.z, end.w};
}

// Whether there is such a tile: not in a plan for other shapes.
__device__ inline bool has_tile(DenseDecodeParams const& params, int batch, int tile) {
    return uint32_t(batch) < uint32_t(params.batch_size) && uint32_t(tile) < uint32_t(params.grid.tiles_per_request);
}

// A piece of the tile in which this worker begins, known before any length: the first one, unless that has no keys.
__device__ inline Piece likely_first_piece(DenseDecodeParams const& params) {
    WorkerRow const row = read_row<PastL1>(params);
    bool const exists = row.num_pieces > 0 && has_tile(params, row.begin_batch, row.begin_tile);
    Piece piece;
    piece.batch = exists ? row.begin_batch : Piece::kEnd;
    piece.place = tile_place(params.grid, row.begin_tile, lane_now());
    // Now: the compiler would divide when it is asked for, and nothing else is left to do.
    asm volatile("" : "+r"(piece.batch), "+r"(piece.place.head_kv), "+r"(piece.place.m_tile));
    return piece;
}

// A tile of a worker's stretch of the plan, and which of them it is.
struct TileOfWorker {
    int batch, tile, index;

    __device__ bool is_in(WorkerRow const& row, DenseDecodeParams const& params) const {
        return index < row.num_pieces && has_tile(params, batch, tile);
    }
    __device__ void advance(WorkerGrid const& grid) {
        ++index;
        if (++tile == grid.tiles_per_request) {
            tile = 0;
            ++batch;
        }
    }
};

// The next piece that has keys.
template <typename Cursor>
__device__ bool next_with_keys(Cursor& pieces, DenseDecodeParams const& params, Piece& piece) {
    while (pieces.next(params, piece)) {
        if (!piece.is_empty()) return true;
    }
    return false;
}

// Runs through the pieces in order. Lengths are read here and now: the plan only divides, so one made for other lengths
// still gives right results.
//
// kLanesInCluster lanes stay together: where the first one has rows, the others take part in its loads.
template <int kRowsPerTile, int kLanesInCluster>
class PieceCursor {
public:
    PieceCursor() = default;
    __device__ explicit PieceCursor(WorkerRow const& row) : at_{row.begin_batch, row.begin_tile, 0} {}
    __device__ explicit PieceCursor(DenseDecodeParams const& params) : PieceCursor(read_row(params)) {}

    // Returns false when there is none left. The row is read again for every piece: it stays in the L1, and registers
    // are dearer.
    template <typename Load = ThroughL1>
    __device__ bool next(DenseDecodeParams const& params, Piece& piece) {
        for (;;) {
            WorkerRow const row = read_row<Load>(params);
            if (!at_.is_in(row, params)) return false;
            if (enter<Load>(params, row, piece)) return true;
        }
    }

    // Of the tile that comes next, in the worker's stretch.
    __device__ int index() const { return at_.index; }

    // The first piece, as it seems to be before the kernel before has ended. Returns false if it is none for this lane.
    __device__ bool look_ahead(DenseDecodeParams const& params, WorkerRow const& row, Piece& piece) {
        return at_.is_in(row, params) && enter<PastL1>(params, row, piece);
    }

private:
    template <typename Load>
    __device__ bool enter(DenseDecodeParams const& params, WorkerRow const& row, Piece& piece) {
        WorkerGrid const& grid = params.grid;
        int const worker = worker_now(), lane = lane_now();
        bool const continued = at_.index == 0 && row.begin_block > 0;
        bool const continues = at_.index == row.num_pieces - 1 && row.last_worker != worker;
        int const seqlen = max(Load::load(params.cache_seqlens + at_.batch), 0);
        int const num_blocks = num_blocks_of(seqlen);
        piece.batch = at_.batch;
        piece.place = tile_place(grid, at_.tile, lane);
        piece.begin_block = continued ? min(row.begin_block, num_blocks) : 0;
        piece.end_block = continues ? min(row.end_block, num_blocks) : num_blocks;
        piece.seqlen = seqlen;
        piece.slot = continued || continues ? partial_slot(worker, at_.index == 0) : Piece::kWholeTile;

        at_.advance(grid);
        int const lane_in_cluster = kLanesInCluster == 1 ? 0 : int(cute::block_rank_in_cluster());
        return (piece.place.m_tile - lane_in_cluster) * kRowsPerTile < params.rows_per_head_kv;
    }

    TileOfWorker at_;
};

}  // namespace flash_mla::sm90
