// Softmax over keys that arrive block by block, for the two rows a thread holds of a 64×N score fragment.
//
// Scores are used in the log2 domain. The reference of a row, which is subtracted from its scores, is raised to their
// maximum only when one exceeds it by more than kSlackLog2: until then probabilities may reach 2^kSlackLog2, which
// costs no precision in any of the formats, and neither need the lanes of a row agree on a new one nor the output be
// rescaled.
#pragma once

#include <cmath>

#include <cute/tensor.hpp>

#include "kernels/sm90/primitives/approximations.h"
#include "kernels/sm90/primitives/fragment.h"

namespace flash_mla::sm90 {

struct OnlineSoftmax {
    static constexpr float kSlackLog2 = 8.f;
    static constexpr float kMinusInfinity = -INFINITY;

    float reference[kRowsPerThread] = {kMinusInfinity, kMinusInfinity};  // log2 domain; -inf before the first key
    float row_sum[kRowsPerThread] = {0.f, 0.f};                          // this thread's columns only

    // Raises the references where this block of scores asks for it. Returns whether any row of the warp had its own
    // raised; then rescale[h] is what earlier output of row h must be multiplied with.
    template <typename Scores>
    __device__ bool raise(Scores const& score, float scale_log2, float (&rescale)[kRowsPerThread]) {
        float largest[kRowsPerThread];
        bool within = true;
#pragma unroll
        for (int h = 0; h < kRowsPerThread; ++h) {
            largest[h] = kMinusInfinity;
#pragma unroll
            for (int i = 2 * h; i < kNumScores<Scores>; i += 4)
                largest[h] = fmaxf(largest[h], fmaxf(score[i], score[i + 1]));
            // Not a number, and so not within, as long as there was no key.
            within &= fmaf(largest[h], scale_log2, -reference[h]) <= kSlackLog2;
        }
        if (__all_sync(~0u, within)) return false;
#pragma unroll
        for (int h = 0; h < kRowsPerThread; ++h) {
            largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 1));
            largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 2));
            float const raised = largest[h] * scale_log2;
            bool const raises = raised - reference[h] > kSlackLog2;
            rescale[h] = raises ? exp2_approx(reference[h] - raised) : 1.f;
            reference[h] = raises ? raised : reference[h];
            row_sum[h] *= rescale[h];
        }
        return true;
    }

    // Turns the scores of one tile of 8 columns into probabilities in place.
    template <typename Scores>
    __device__ void exponentiate(Scores& score, int tile, float scale_log2) {
#pragma unroll
        for (int h = 0; h < kRowsPerThread; ++h) {
            float const offset = reference[h] == kMinusInfinity ? 0.f : -reference[h];
            int const i = 4 * tile + 2 * h;
            score[i] = exp2_approx(fmaf(score[i], scale_log2, offset));
            score[i + 1] = exp2_approx(fmaf(score[i + 1], scale_log2, offset));
            row_sum[h] += score[i] + score[i + 1];
        }
    }

    // The whole row's sum, and its log2-sum-exp2: -inf for a row that saw no key.
    __device__ float total(int h) const {
        float sum = row_sum[h] + __shfl_xor_sync(~0u, row_sum[h], 1);
        return sum + __shfl_xor_sync(~0u, sum, 2);
    }
    __device__ float log2_sum(int h, float total) const {
        return total == 0.f ? kMinusInfinity : log2f(total) + reference[h];
    }

private:
    template <typename Scores>
    static constexpr int kNumScores = decltype(cute::size(Scores{}))::value;
};

}  // namespace flash_mla::sm90
