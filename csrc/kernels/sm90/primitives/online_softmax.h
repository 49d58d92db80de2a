// Softmax over keys that arrive block by block, for the two rows a thread holds of a 64×N score fragment.
//
// Scores are used in the log2 domain. The reference maximum of a row is raised only when a new score exceeds it by
// more than kSlackLog2: until then probabilities may reach 2^kSlackLog2, which costs no precision in any of the
// formats, and the accumulated output need not be rescaled.
#pragma once

#include <cmath>

#include <cute/tensor.hpp>

#include "kernels/sm90/primitives/fragment.h"

namespace flash_mla::sm90 {

__device__ inline float exp2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
    return result;
}

struct OnlineSoftmax {
    static constexpr float kSlackLog2 = 8.f;
    static constexpr float kMinusInfinity = -INFINITY;

    float row_max[kRowsPerThread] = {kMinusInfinity, kMinusInfinity};  // reference, in units of the raw scores
    float row_sum[kRowsPerThread] = {0.f, 0.f};                        // this thread's columns only

    // Turns scores into probabilities in place. rescale[h] is what earlier output and sums of row h must be multiplied
    // with; returns whether any lane of the warp has one that is not 1.
    template <typename Scores>
    __device__ bool update(Scores& score, float scale_log2, float (&rescale)[kRowsPerThread]) {
        constexpr int kNumScores = decltype(cute::size(score))::value;
        bool raised = false;
#pragma unroll
        for (int h = 0; h < kRowsPerThread; ++h) {
            float block_max = kMinusInfinity;
#pragma unroll
            for (int i = 2 * h; i < kNumScores; i += 4) block_max = fmaxf(block_max, fmaxf(score[i], score[i + 1]));
            block_max = fmaxf(block_max, __shfl_xor_sync(~0u, block_max, 1));
            block_max = fmaxf(block_max, __shfl_xor_sync(~0u, block_max, 2));
            // With no key seen yet row_max is -inf and any real score raises it.
            bool const raise = (block_max - row_max[h]) * scale_log2 > kSlackLog2;
            rescale[h] = raise ? exp2_approx((row_max[h] - block_max) * scale_log2) : 1.f;
            row_max[h] = raise ? block_max : row_max[h];
            raised |= raise;

            float const reference = row_max[h] == kMinusInfinity ? 0.f : row_max[h] * scale_log2;
            float sum = 0.f;
#pragma unroll
            for (int i = 2 * h; i < kNumScores; i += 4) {
                score[i] = exp2_approx(fmaf(score[i], scale_log2, -reference));
                score[i + 1] = exp2_approx(fmaf(score[i + 1], scale_log2, -reference));
                sum += score[i] + score[i + 1];
            }
            row_sum[h] = row_sum[h] * rescale[h] + sum;
        }
        return __any_sync(~0u, raised);
    }

    // The whole row's sum, and its log2-sum-exp2: -inf for a row that saw no key.
    __device__ float total(int h) const {
        float sum = row_sum[h] + __shfl_xor_sync(~0u, row_sum[h], 1);
        return sum + __shfl_xor_sync(~0u, sum, 2);
    }
    __device__ float log2_sum(int h, float total, float scale_log2) const {
        return total == 0.f ? kMinusInfinity : log2f(total) + row_max[h] * scale_log2;
    }
};

}  // namespace flash_mla::sm90
