// Where the dense decode keeps what it folds (segments.h): outputs as rows of 512, and their log2-sum-exp2. Each value
// is read by the thread that wrote it. The scores warpgroup also leaves here, under the barriers of the row sums, what
// the output warpgroups are to do: registers are too dear there to find out themselves.
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

// Of a row: fold what is in the slot with what there is so far. One per level, and one more for the end of the way.
struct alignas(16) FoldStep {
    static constexpr int kOut = -1;

    FoldWeights weights;  // none at the end
    int slot;             // at the end: where the result goes, or kOut
    int folds;            // at the end: the levels to fold at, a bit each
};
static_assert(sizeof(FoldStep) == kFoldStepFloats * sizeof(float));

__device__ inline FoldStep* fold_step(DenseDecodeParams const& params, int level, int row) {
    int const cta = worker_now() * params.grid.num_lanes + lane_now();
    return reinterpret_cast<FoldStep*>(params.fold_steps) + ((cta * (kFoldLevels + 1) + level) * kBlockM + row);
}
__device__ inline FoldStep load_fold_step(DenseDecodeParams const& params, int level, int row) {
    FoldStep step;
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=f"(step.weights.folded), "=f"(step.weights.next), "=r"(step.slot), "=r"(step.folds)
                 : "l"(fold_step(params, level, row))
                 : "memory");
    return step;
}

}  // namespace flash_mla::sm90
