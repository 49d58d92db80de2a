// Folding two partial results of a row: float32 outputs that have not been divided by their sums, and the statistics
// that they are relative to. Every rounding is spelled out, so that the bits are the same in whichever kernel this is
// compiled into.
#pragma once

#include <cmath>

#include "kernels/sm90/primitives/approximations.h"
#include "params/dense_decode.h"

namespace flash_mla::sm90 {

// By how much the reference of what comes next is above that of what has been folded so far: infinite where one of them
// has seen no key, NaN where neither has.
__device__ inline float next_above_folded(RowStatistics const& folded, RowStatistics const& next) {
    return __fsub_rn(next.reference, folded.reference);
}

// Of what has been folded so far and of what comes next: one of them is 1, the other the power of two by which its
// reference is lower, so that what has seen no key weighs nothing; where neither has, both weigh 1, and their sums are
// 0 still.
struct FoldWeights {
    float folded, next;

    __device__ static FoldWeights of(float next_above_folded) {
        return {exp2_approx(fminf(-next_above_folded, 0.f)), exp2_approx(fminf(next_above_folded, 0.f))};
    }
    __device__ float lesser() const { return fminf(folded, next); }
};

// statistics: those of what has been folded so far, and then of both. A sum that is NaN stays, whatever it weighs.
__device__ inline FoldWeights fold_statistics(RowStatistics& statistics, RowStatistics const& next) {
    FoldWeights const weights = FoldWeights::of(next_above_folded(statistics, next));
    statistics.reference = fmaxf(statistics.reference, next.reference);
    statistics.sum = __fmaf_rn(statistics.sum, weights.folded, __fmul_rn(next.sum, weights.next));
    return weights;
}

// What weighs nothing has no influence, whatever it is.
__device__ inline float fold_outputs(float folded, float next, FoldWeights const& weights) {
    float both;
    asm volatile(
        "{\n"
        ".reg .pred has_folded, has_next;\n"
        ".reg .f32 part, sum;\n"
        "setp.neu.f32 has_folded, %3, 0f00000000;\n"
        "setp.neu.f32 has_next, %4, 0f00000000;\n"
        "mul.rn.f32 part, %4, %2;\n"
        "selp.f32 part, part, 0f00000000, has_next;\n"
        "fma.rn.f32 sum, %3, %1, part;\n"
        "selp.f32 %0, sum, part, has_folded;\n"
        "}\n"
        : "=f"(both)
        : "f"(folded), "f"(next), "f"(weights.folded), "f"(weights.next));
    return both;
}
// The same where both weigh something.
__device__ inline float fold_weighing_outputs(float folded, float next, FoldWeights const& weights) {
    return __fmaf_rn(weights.folded, folded, __fmul_rn(weights.next, next));
}

// What the outputs of a row are multiplied with at the end: 0 for one that saw no key.
__device__ inline float inverse_of(float sum) { return sum == 0.f ? 0.f : reciprocal_approx(sum); }
// A row that saw no key is 0, whatever the values of the keys it did not see.
__device__ inline float normalized(float output, float inverse_sum) {
    return inverse_sum == 0.f ? 0.f : __fmul_rn(output, inverse_sum);
}
__device__ inline float folded_log2_sum(RowStatistics const& statistics) {
    return statistics.sum == 0.f ? -INFINITY : __fadd_rn(log2_approx(statistics.sum), statistics.reference);
}

// Scratch that one thread reads after it, or another one across a barrier of the CTA, has written there in the same
// kernel: not through the cache for constant data, and not before what stands before.
__device__ inline RowStatistics load_scratch(RowStatistics const* source) {
    RowStatistics value;
    asm volatile("ld.global.v2.f32 {%0, %1}, [%2];\n"
                 : "=f"(value.reference), "=f"(value.sum)
                 : "l"(source)
                 : "memory");
    return value;
}
__device__ inline float4 load_scratch(float4 const* source) {
    float4 value;
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];\n"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "l"(source)
                 : "memory");
    return value;
}

}  // namespace flash_mla::sm90
