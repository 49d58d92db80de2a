// How a tile's keys are summed where the bits of a result must not depend on the rest of its batch: as a tree that
// follows from the number of KV blocks alone. flash_mla/schedule.py is the host twin; tests compare the two.
//
// A tile of n blocks has S segments, a power of two; segment i is the blocks i·n/S to (i + 1)·n/S. Each is a softmax of
// its own, from its first key on. Their results are folded in three levels: chains of r0 segments, chains of r1 such
// chains, and one of r2 of those; r2 = min(S, 2), r1 = min(S / r2, 4), r0 = S / (r2 · r1). A chain is folded from its
// first member to its last, into one slot. So a worker that has several segments in a row needs a slot per level.
//
//   S = 64    ((s0 + s1 + ... s7) + (s8 + ...) + (s16 + ...) + (s24 + ...)) + ((s32 + ...) + ...)
//
// Workers are given granules, whole nodes of the tree: at most G in a tile, 64 (segments), 8 (chains of segments),
// 2 (halves) or 1 (the tile), so that nobody needs a sum that another began. G follows from the shape of the batch. The
// values of granules, where there are several, are folded by a kernel of their own.
//
// Places in the plan count in 64ths of a tile, whatever S and G are.
#pragma once

#include "params/query_rows.h"

namespace flash_mla {

// In which order the results of a tile's KV blocks are summed.
enum class Summation { kByWorkers, kBySegments };

inline constexpr int kMaxSegments = 64;
inline constexpr int kFoldLevels = 3;
inline constexpr int kDenseMinSegment = 16;    // blocks
inline constexpr int kSwappedMinSegment = 8;   // blocks, of a whole cluster
inline constexpr int kInvariantSplitCtas = 2;  // CTAs of a cluster of the swapped kernel
inline constexpr int kMaxScratchBytes = 64000000;

// All numbers of segments and granules are powers of two.
inline constexpr int kMaxSegmentBits = 6;

constexpr int min_segment_blocks(int rows_per_tile) {
    return rows_per_tile < kBlockM ? kSwappedMinSegment : kDenseMinSegment;
}
// log2 of S, the largest with segments of at least min_blocks.
constexpr int segment_bits_of(int num_blocks, int min_blocks) {
    int bits = 0;
    for (int i = 1; i <= kMaxSegmentBits; ++i) bits += num_blocks >= min_blocks << i;
    return bits;
}
constexpr int segment_begin(int segment, int segment_bits, int num_blocks) {
    return int(uint32_t(segment) * uint32_t(num_blocks) >> segment_bits);
}

// log2 of the radix of a level, the innermost first.
constexpr int level_bits(int level, int segment_bits) {
    int const top = segment_bits < 1 ? segment_bits : 1;
    int const middle = segment_bits - top < 2 ? segment_bits - top : 2;
    return level == 2 ? top : level == 1 ? middle : segment_bits - top - middle;
}

// What lies below a granule, where a tile has at most so many.
constexpr int levels_in_granule(int num_granules) {
    return num_granules >= 64 ? 0 : num_granules >= 8 ? 1 : num_granules >= 2 ? 2 : 3;
}
constexpr int granule_bits_of(int num_granules, int segment_bits) {
    int const bits = num_granules >= 64 ? 6 : num_granules >= 8 ? 3 : num_granules >= 2 ? 1 : 0;
    return segment_bits < bits ? segment_bits : bits;
}
// The first segment at or behind a place of the plan, which in a plan for other lengths may lie within a granule.
constexpr int segment_at(int place_64ths, int segment_bits, int num_granules) {
    int const bits = granule_bits_of(num_granules, segment_bits);
    return place_64ths << bits >> kMaxSegmentBits << (segment_bits - bits);
}

// What becomes of the value of a segment: folded with what waits at some of the levels, then left at the last one.
struct FoldPath {
    int folds;      // bit per level
    int end_level;  // where it waits; the number of levels where it is the whole node above them

    constexpr bool folds_at(int level) const { return folds >> level & 1; }
};
// The path through the first levels of a tree with 2^segment_bits leaves.
constexpr FoldPath fold_path(int segment, int segment_bits, int num_levels) {
    FoldPath path{0, num_levels};
    int index = segment;
    for (int level = 0; level < num_levels; ++level) {
        int const bits = level_bits(level, segment_bits), last = (1 << bits) - 1, member = index & last;
        path.folds |= int(member > 0) << level;
        if (member < last) {
            path.end_level = level;
            break;
        }
        index >>= bits;
    }
    return path;
}

// Scratch: slots of rows_per_tile rows. First those of the CTAs (or their clusters) for the levels within a granule,
// then those of the granules of all tiles. What is folded last within a granule waits in the granule's own slot.
constexpr int levels_with_slots(int num_granules) {
    return num_granules == 1 ? kFoldLevels : num_granules >= 8 ? 0 : levels_in_granule(num_granules) - 1;
}
constexpr int num_level_slots(WorkerGrid const& grid) {
    return grid.num_workers * grid.num_lanes * levels_with_slots(grid.num_granules);
}
constexpr int64_t num_slots(WorkerGrid const& grid, int64_t batch_size) {
    int64_t const granules = grid.num_granules == 1 ? 0 : grid.num_granules;
    return num_level_slots(grid) + batch_size * grid.tiles_per_request * grid.num_lanes * granules;
}
// What the scores warpgroup of the dense kernel leaves to its output warpgroups: a FoldStep per row for each level and
// for the end.
inline constexpr int kFoldStepFloats = 4;
constexpr int num_fold_steps(WorkerGrid const& grid) {
    return grid.is_swapped() ? 0 : grid.num_workers * grid.num_lanes * (kFoldLevels + 1) * kBlockM;
}
constexpr DecodeScratch invariant_scratch(WorkerGrid const& grid, int64_t batch_size) {
    return {num_slots(grid, batch_size) * grid.rows_per_tile, num_fold_steps(grid) * kFoldStepFloats};
}
constexpr int64_t invariant_scratch_bytes(WorkerGrid const& grid, int64_t batch_size) {
    return invariant_scratch(grid, batch_size).bytes();
}

constexpr int granule_slot(WorkerGrid const& grid, int head_kv_of_batch, int m_tile, int granule) {
    int const m_tiles = grid.lane_groups * grid.num_lanes;
    return num_level_slots(grid) + (head_kv_of_batch * m_tiles + m_tile) * grid.num_granules + granule;
}

// One kernel and one size of clusters for as many query rows, whatever the batch; and the smallest granules whose
// values there is room for.
constexpr WorkerGrid invariant_grid(int batch_size, int num_rows_per_head_kv, int num_heads_kv,
                                    ClusterCapacity const& capacity) {
    WorkerGrid grid = dense_grid(num_rows_per_head_kv, num_heads_kv, capacity.num_sms());
    if (num_rows_per_head_kv <= kMaxSwappedRows) {
        int const split_ctas = capacity.num_clusters[kInvariantSplitCtas] > 0 ? kInvariantSplitCtas : 1;
        grid = swapped_grid_of(split_ctas, num_rows_per_head_kv, num_heads_kv, capacity);
    }
    constexpr int kNumGranules[] = {64, 8, 2, 1};
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
