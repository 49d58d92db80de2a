// Where the dense decode keeps what it folds (segments.h): outputs as vectors, and the statistics of their rows.
// Each value is read by the thread that wrote it. What there is to do the scores warpgroup finds out: registers are too
// dear in the others.
#pragma once

#include "kernels/sm90/primitives/fold.h"
#include "kernels/sm90/primitives/fragment.h"
#include "kernels/sm90/primitives/segment_cursor.h"

namespace flash_mla::sm90 {

// The first vector that this lane has of 8 rows; those of 16 more columns follow.
__device__ inline float4* slot_vectors(DenseDecodeParams const& params, int slot, int row, int first_column) {
    int const vector = (slot * (kBlockM / kVectorRows) + row / kVectorRows) * (kHeadDimV / kVectorColumns);
    return reinterpret_cast<float4*>(params.out_partial) + (vector + first_column / kVectorColumns) * 32 +
           thread_in_warpgroup_now() % 32;
}
__device__ inline RowStatistics* slot_statistics(DenseDecodeParams const& params, int slot, int row) {
    return params.statistics_partial + (slot * kBlockM + row);
}

// The way of a segment's outputs.
struct alignas(32) FoldWay {
    static constexpr int kOut = -1;
    static constexpr int kStays = 1 << kFoldLevels;

    int folds;                  // the levels to fold at, a bit each, and kStays: the next segment is of the same tile
    int slot[kFoldLevels + 1];  // by level; the last one is where the result goes, or kOut

    __device__ bool folds_at(int level) const { return folds >> level & 1; }
};
// What the scores warpgroup finds out for the output warpgroups: the way with the first block, so that what waits can
// be on its way before its weights are known, and these with the row sums.
struct FoldSteps {
    FoldWay way[2];                                 // segments take turns
    float next_above_folded[kFoldLevels][kBlockM];  // FoldWeights of a row
};
struct NoFoldSteps {};

}  // namespace flash_mla::sm90
