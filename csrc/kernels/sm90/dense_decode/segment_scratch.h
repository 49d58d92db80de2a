// Where the dense decode keeps what it folds (segments.h): outputs as rows of 512, their log2-sum-exp2, and the weights
// of the folds, which the scores warpgroup leaves to the output warpgroups under the barriers of the row sums. Each
// value is read by the thread that wrote it, but for the weights.
#pragma once

#include "kernels/sm90/primitives/fold.h"
#include "kernels/sm90/primitives/segment_cursor.h"

namespace flash_mla::sm90 {

__device__ inline float* slot_outputs(DenseDecodeParams const& params, int slot, int row) {
    return params.out_partial + (int64_t(slot) * kBlockM + row) * kHeadDimV;
}
__device__ inline float* slot_log2_sum(DenseDecodeParams const& params, int slot, int row) {
    return params.lse_partial + (slot * kBlockM + row);
}
__device__ inline float2* fold_weights_of_row(DenseDecodeParams const& params, int level, int row) {
    int const cta = worker_now() * params.grid.num_lanes + lane_now();
    return reinterpret_cast<float2*>(params.fold_weights) + ((cta * kFoldLevels + level) * kBlockM + row);
}

}  // namespace flash_mla::sm90
