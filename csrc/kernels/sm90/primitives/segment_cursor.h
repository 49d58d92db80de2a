// What one CTA has to do where bits do not depend on the batch: the segments of its worker's granules (segments.h).
#pragma once

#include "kernels/sm90/primitives/pieces.h"
#include "params/segments.h"

namespace flash_mla::sm90 {

// Asked for anew each time, so that nothing that follows from it occupies registers between.
__device__ inline int num_granules_now(WorkerGrid const& grid) {
    int num_granules;
    asm volatile("mov.b32 %0, %1;\n" : "=r"(num_granules) : "r"(grid.num_granules));
    return num_granules;
}

// Runs through the segments in order, as PieceCursor does through pieces; the slot of a piece is a SegmentOfWorker, or
// kWholeTile where the tile has no other. To the swapped kernel a piece is all segments that the worker has of a tile,
// and its slot says the first. Here too lengths are read here and now.
template <int kRowsPerTile, int kLanesInCluster>
class SegmentCursor {
    static constexpr bool kTakesAll = kRowsPerTile < kBlockM;

public:
    SegmentCursor() = default;
    __device__ explicit SegmentCursor(WorkerRow const& row) : at_{row.begin_batch, row.begin_tile, 0}, segment_(0) {}
    __device__ explicit SegmentCursor(DenseDecodeParams const& params) : SegmentCursor(read_row(params)) {}

    // Returns false when there is none left.
    __device__ bool next(DenseDecodeParams const& params, Piece& piece) {
        for (;;) {
            WorkerRow const row = read_row(params);
            if (!at_.is_in(row, params)) return false;
            if (enter<ThroughL1>(params, row, piece)) return true;
            segment_ = 0;
            at_.advance(params.grid);
        }
    }

    // Of the tile that comes next, in the worker's stretch.
    __device__ int index() const { return at_.index; }

    // The first segment, as it seems to be before the kernel before has ended. Returns false if it is none for this
    // lane.
    __device__ bool look_ahead(DenseDecodeParams const& params, WorkerRow const& row, Piece& piece) {
        return at_.is_in(row, params) && enter<PastL1>(params, row, piece);
    }

private:
    // The next piece of the current tile, if there is one for this worker and lane.
    template <typename Load>
    __device__ bool enter(DenseDecodeParams const& params, WorkerRow const& row, Piece& piece) {
        WorkerGrid const& grid = params.grid;
        int const seqlen = max(Load::load(params.cache_seqlens + at_.batch), 0);
        int const num_blocks = num_blocks_of(seqlen);
        int const segment_bits = segment_bits_of(num_blocks, kRowsPerTile, grid.num_lanes);
        // Bounds for plans that are not of this kind.
        int const begin_place = at_.index == 0 ? min(max(row.begin_block, 0), kMaxSegments) : 0;
        int const end_place = at_.index == row.num_pieces - 1 ? min(row.end_block, kMaxSegments) : kMaxSegments;
        int const num_granules = num_granules_now(grid);
        int const first_segment = segment_at(begin_place, segment_bits, num_granules);
        int const end_segment = segment_at(end_place, segment_bits, num_granules);
        int const segment = max(segment_, first_segment);
        piece.place = tile_place(grid, at_.tile, lane_now());
        int const lane_in_cluster = kLanesInCluster == 1 ? 0 : int(cute::block_rank_in_cluster());
        bool const has_rows = (piece.place.m_tile - lane_in_cluster) * kRowsPerTile < params.rows_per_head_kv;
        if (segment >= end_segment || !has_rows) return false;
        piece.batch = at_.batch;
        piece.begin_block = segment_begin(segment, segment_bits, num_blocks);
        segment_ = kTakesAll ? end_segment : segment + 1;
        piece.end_block = segment_begin(segment_, segment_bits, num_blocks);
        piece.seqlen = seqlen;
        piece.slot =
            segment_bits == 0 ? Piece::kWholeTile : SegmentOfWorker{segment, first_segment, end_segment}.packed();
        return true;
    }

    TileOfWorker at_;
    int segment_;
};

template <Summation kSummation, int kRowsPerTile, int kLanesInCluster>
using PiecesOf = std::conditional_t<kSummation == Summation::kBySegments, SegmentCursor<kRowsPerTile, kLanesInCluster>,
                                    PieceCursor<kRowsPerTile, kLanesInCluster>>;

// The segment that a piece is, or its first one.
__device__ inline SegmentOfWorker segment_of(Piece const& piece) {
    return piece.is_partial() ? SegmentOfWorker::unpacked(piece.slot) : SegmentOfWorker{0, 0, 1};
}

// A segment's way through the tree, and where in scratch the values on it wait.
struct SegmentFold {
    DenseDecodeParams const& params;
    Piece const& piece;
    SegmentOfWorker segment;
    int segment_bits;
    FoldPath path;

    __device__ SegmentFold(DenseDecodeParams const& params, Piece const& piece, SegmentOfWorker const& segment,
                           int segment_bits)
        : params(params),
          piece(piece),
          segment(segment),
          segment_bits(segment_bits),
          path(fold_path(segment, segment_bits)) {}

    __device__ bool is_last_of_worker() const { return segment.is_last(); }
    // Of what has been folded at a level from a segment on.
    __device__ int slot(int level, int first) const {
        WorkerGrid const& grid = params.grid;
        int const num_granules = num_granules_now(grid);
        if (num_granules == 1 || level + 1 < levels_in_granule(num_granules))
            return (worker_now() * grid.num_lanes + lane_now()) * levels_with_slots(num_granules) + level;
        int const granule = first >> (segment_bits - granule_bits_of(num_granules, segment_bits));
        return granule_slot(grid, piece.batch * params.num_heads_kv + piece.place.head_kv, piece.place.m_tile, granule);
    }
    // First segment of the chain of a level.
    __device__ int chain(int level) const {
        int const bits = member_bits(level + 1, segment_bits);
        return segment.index >> bits << bits;
    }
    // Whether the begin of that chain waits there, from members before that of this segment.
    __device__ bool has_waiting(int level) const {
        int const member_begin = segment.index >> member_bits(level, segment_bits) << member_bits(level, segment_bits);
        return chain(level) < member_begin && chain(level) >= segment.begin;
    }
    __device__ int waiting_slot(int level) const { return slot(level, chain(level)); }
    __device__ int end_slot() const { return slot(path.end_level, path.first); }
};

}  // namespace flash_mla::sm90
