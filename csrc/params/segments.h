// How a tile's keys are summed where the bits of a result must not depend on the rest of its batch: as a tree that
// follows from the number of KV blocks and, on GPUs of a model, of query rows. flash_mla/schedule.py is the host twin;
// tests compare the two.
//
// A tile of n blocks has S segments, a power of two; segment i is the blocks i·n/S to (i + 1)·n/S. Each is a softmax of
// its own, from its first key on. Their results, outputs that have not been divided by their sums (fold.h), are folded
// in three levels: chains of r0 segments, chains of r1 such chains, and one of r2 of those:
//
//   r2 = min(S, 4)    r1 = min(S / r2, 4)    r0 = S / (r2 · r1)
//
// A chain is folded from its first member to its last, so its begin may be folded before the rest is there.
//
//   S = 32    ((s0 + s1) + (s2 + s3) + (s4 + s5) + (s6 + s7)) + ((s8 + s9) + ...) + (... ) + (... + (s30 + s31))
//
// A worker folds what it has of a tile as far as that goes: begins of chains, and whole nodes of the tree. Where it has
// the whole tile the result is its own. What several workers have is folded by a kernel of its own, which finds out
// from the plan who has folded what (Run).
//
// Scratch for that is a slot per granule: a tile has at most G of them, whole nodes of the tree, 128 (segments), 16, 4
// or 1 (the tile). A worker's work begins and ends between granules. G follows from the shape of the batch.
//
// Places in the plan count in 128ths of a tile, whatever S and G are.
#pragma once

#include "params/query_rows.h"

namespace flash_mla {

// In which order the results of a tile's KV blocks are summed.
enum class Summation { kByWorkers, kBySegments };

inline constexpr int kMaxSegments = 128;
inline constexpr int kFoldLevels = 3;
inline constexpr int kDenseMinSegment = 16;  // blocks
inline constexpr int kDenseLongTile = 128, kDenseMinSegmentOfLongTile = 32;
inline constexpr int kSwappedMinSegment = 1;
inline constexpr int kSwappedMinSegmentOf32Rows = 4;
inline constexpr int kMaxScratchBytes = 64000000;

// All numbers of segments and granules are powers of two.
inline constexpr int kMaxSegmentBits = 7;

constexpr int min_segment_blocks(int num_blocks, int rows_per_tile) {
    if (rows_per_tile == kBlockM) return num_blocks >= kDenseLongTile ? kDenseMinSegmentOfLongTile : kDenseMinSegment;
    return rows_per_tile > 16 ? kSwappedMinSegmentOf32Rows : kSwappedMinSegment;
}
// log2 of S: the most segments that are not too short, doubled as long as there are fewer than 128 for all lanes, which
// is about one for each CTA. With 32 rows there are no 32: chains of them in registers would have two members, and
// slots be read and written after every second segment.
constexpr int segment_bits_of(int num_blocks, int rows_per_tile, int num_lanes) {
    int const min_blocks = min_segment_blocks(num_blocks, rows_per_tile);
    int bits = 0;
    for (int i = 0; i < kMaxSegmentBits; ++i)
        bits += num_blocks >= 2 * min_blocks << i && num_lanes << i < kMaxSegments;
    bool const is_tile_of_32 = rows_per_tile > 16 && rows_per_tile < kBlockM;
    return is_tile_of_32 && bits == 5 ? 4 : bits;
}
// The most segments that any tile has.
constexpr int max_segments(int rows_per_tile, int num_lanes) {
    return 1 << segment_bits_of(kMaxSegments * kDenseMinSegmentOfLongTile, rows_per_tile, num_lanes);
}
constexpr int segment_begin(int segment, int segment_bits, int num_blocks) {
    return int(uint64_t(segment) * uint64_t(num_blocks) >> segment_bits);
}

// log2 of the radix of a level, the innermost first.
constexpr int level_bits(int level, int segment_bits) {
    int const top = segment_bits < 2 ? segment_bits : 2;
    int const middle = segment_bits - top < 2 ? segment_bits - top : 2;
    return level == 2 ? top : level == 1 ? middle : segment_bits - top - middle;
}
// log2 of the segments in a member of a level's chains: of those up to the level before, in all.
constexpr int member_bits(int level, int segment_bits) {
    return level == 0   ? 0
           : level == 1 ? level_bits(0, segment_bits)
           : level == 2 ? segment_bits - level_bits(2, segment_bits)
                        : segment_bits;
}
// The innermost level whose chains have several members: those before it only pass values on.
constexpr int first_folding_level(int segment_bits) { return segment_bits > 4 ? 0 : segment_bits > 2 ? 1 : 2; }

// What lies below a granule, where a tile has at most so many.
constexpr int levels_in_granule(int num_granules) {
    return num_granules >= 128 ? 0 : num_granules >= 16 ? 1 : num_granules >= 4 ? 2 : 3;
}
constexpr int granule_bits_of(int num_granules, int segment_bits) {
    int const bits = num_granules >= 128 ? 7 : num_granules >= 16 ? 4 : num_granules >= 4 ? 2 : 0;
    return segment_bits < bits ? segment_bits : bits;
}
// The segment at a place of the plan; the first one of the granule, where a plan for other lengths ends within one.
constexpr int segment_at(int place_128ths, int segment_bits, int num_granules) {
    int const bits = granule_bits_of(num_granules, segment_bits);
    return place_128ths << bits >> kMaxSegmentBits << (segment_bits - bits);
}

// The segments of a tile that one worker has, and of these one. In one word, as the slot of a piece.
struct SegmentOfWorker {
    int index, begin, end;

    constexpr bool is_last() const { return index + 1 == end; }
    constexpr SegmentOfWorker previous() const { return {index - 1, begin, end}; }
    constexpr int packed() const { return index | begin << 8 | end << 16; }
    static constexpr SegmentOfWorker unpacked(int word) { return {word & 255, word >> 8 & 255, word >> 16}; }
};

// What becomes of the value of a segment: folded with what waits at some of the levels, then left at the last one, as
// the begin of a chain or as a member whose chain another worker has begun.
struct FoldPath {
    int folds;      // bit per level
    int end_level;  // where it is left; kFoldLevels where it is the whole tile
    int first;      // segment of what is left

    constexpr bool folds_at(int level) const { return folds >> level & 1; }
    constexpr bool ends_tile() const { return end_level == kFoldLevels; }
    // Otherwise: whether what is left is the begin of a chain, with which what follows will be folded.
    constexpr bool is_begin(int segment_bits) const {
        return (first & ((1 << member_bits(end_level + 1, segment_bits)) - 1)) == 0;
    }
};
constexpr FoldPath fold_path(SegmentOfWorker const& segment, int segment_bits) {
    FoldPath path{0, kFoldLevels, 0};
    int below = 0;  // bits
    for (int level = 0; level < kFoldLevels; ++level) {
        int const bits = level_bits(level, segment_bits), last = (1 << bits) - 1;
        int const member = segment.index >> below & last, chain = segment.index >> (below + bits) << (below + bits);
        if (member > 0 && chain < segment.begin) return {path.folds, level, segment.index >> below << below};
        path.folds |= int(member > 0) << level;
        if (member < last) return {path.folds, level, chain};
        below += bits;
    }
    return path;
}

// Scratch: slots of rows_per_tile rows. First those of the CTAs for levels within a granule, then those of the granules
// of all tiles. What begins where a granule does waits in the granule's slot, so the outermost level within a granule
// needs none of its own; where tiles are granules they have no slots.
constexpr int levels_with_slots(int num_granules) {
    return num_granules == 1 ? kFoldLevels : num_granules >= 16 ? 0 : levels_in_granule(num_granules) - 1;
}
constexpr int num_level_slots(WorkerGrid const& grid) {
    return grid.num_workers * grid.num_lanes * levels_with_slots(grid.num_granules);
}
constexpr int granule_slots_of_tile(WorkerGrid const& grid) {
    int const most = max_segments(grid.rows_per_tile, grid.num_lanes);
    return grid.num_granules == 1 ? 0 : grid.num_granules < most ? grid.num_granules : most;
}
constexpr int64_t num_slots(WorkerGrid const& grid, int64_t batch_size) {
    return num_level_slots(grid) + batch_size * grid.tiles_per_request * grid.num_lanes * granule_slots_of_tile(grid);
}
// A slot is vectors of 32 lanes with 4 numbers each, as the decode kernels' threads hold them. Lane l of the dense
// kernel has row l / 4 of the vector's 8 and columns 2·(l % 4), the next, and 8 more; of the swapped one column l / 4,
// in rows 2·(l % 4) and the next, and the same 8 columns further.
inline constexpr int kVectorNumbers = 128, kVectorRows = 8, kVectorColumns = 16;
constexpr int vectors_of_slot(int rows_per_tile) { return rows_per_tile * kHeadDimV / kVectorNumbers; }

struct VectorPlace {
    int row, column;  // the first ones
};
constexpr VectorPlace vector_place(int vector, int rows_per_tile) {
    constexpr int kVectorsPerRow = kHeadDimV / kVectorColumns;
    if (rows_per_tile == kBlockM)
        return {vector / kVectorsPerRow * kVectorRows, vector % kVectorsPerRow * kVectorColumns};
    // By chunks of 64 columns, tiles of 8 rows in them, and warps.
    int const row_tiles = rows_per_tile / kVectorRows, chunk = vector / 4 / row_tiles;
    return {vector / 4 % row_tiles * kVectorRows, chunk * 64 + vector % 4 * kVectorColumns};
}

constexpr DecodeScratch invariant_scratch(WorkerGrid const& grid, int64_t batch_size) {
    return {num_slots(grid, batch_size) * grid.rows_per_tile, kHeadDimV + 2};
}
constexpr int64_t invariant_scratch_bytes(WorkerGrid const& grid, int64_t batch_size) {
    return invariant_scratch(grid, batch_size).bytes();
}

constexpr int granule_slot(WorkerGrid const& grid, int head_kv_of_batch, int m_tile, int granule) {
    int const m_tiles = grid.lane_groups * grid.num_lanes;
    return num_level_slots(grid) + (head_kv_of_batch * m_tiles + m_tile) * granule_slots_of_tile(grid) + granule;
}

// One kernel, without clusters that share out blocks, for as many query rows, whatever the batch; and the smallest
// granules whose values there is room for.
constexpr WorkerGrid invariant_grid(int batch_size, int num_rows_per_head_kv, int num_heads_kv,
                                    ClusterCapacity const& capacity) {
    WorkerGrid grid = dense_grid(num_rows_per_head_kv, num_heads_kv, capacity.num_sms());
    grid.split_overhead_blocks = kDenseSegmentsSplitOverhead;
    if (num_rows_per_head_kv <= kMaxSwappedRows) {
        grid = swapped_grid_of(1, num_rows_per_head_kv, num_heads_kv, capacity);
        grid.split_overhead_blocks = kSegmentsSplitOverhead;
    }
    constexpr int kNumGranules[] = {128, 16, 4, 1};
    for (int const num_granules : kNumGranules) {
        grid.num_granules = num_granules;
        if (invariant_scratch_bytes(grid, batch_size) <= kMaxScratchBytes) break;
    }
    return grid;
}

constexpr WorkerGrid decode_grid(int batch_size, int num_rows_per_head_kv, int num_heads_kv,
                                 ClusterCapacity const& capacity, bool batch_invariant) {
    return batch_invariant ? invariant_grid(batch_size, num_rows_per_head_kv, num_heads_kv, capacity)
                           : worker_grid(batch_size, num_rows_per_head_kv, num_heads_kv, capacity);
}

}  // namespace flash_mla
