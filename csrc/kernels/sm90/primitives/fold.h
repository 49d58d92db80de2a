// Folding two partial results of a row: float32 outputs that are divided by their sums, and log2-sum-exp2. Every
// rounding is spelled out, so that the bits are the same in whichever kernel this is compiled into.
#pragma once

#include <cmath>

#include "kernels/sm90/primitives/approximations.h"

namespace flash_mla::sm90 {

// Of what has been folded so far and of what comes next.
struct FoldWeights {
    float folded, next;

    __device__ static FoldWeights of(float folded) { return {folded, __fsub_rn(1.f, folded)}; }
};

// log2_sum: that of what has been folded so far, and then that of both; -inf for no keys.
__device__ inline FoldWeights fold_log2_sums(float& log2_sum, float next) {
    bool const is_empty = log2_sum == -INFINITY && next == -INFINITY;
    // NaN in either one stays: it comes back through the differences.
    float const largest = is_empty ? 0.f : fmaxf(log2_sum, next);
    float const power_folded = exp2_approx(__fsub_rn(log2_sum, largest));
    float const power_next = exp2_approx(__fsub_rn(next, largest));
    float const sum = __fadd_rn(power_folded, power_next);
    if (is_empty) return FoldWeights::of(0.f);
    log2_sum = __fadd_rn(log2_approx(sum), largest);
    float const inverse = reciprocal_approx(sum);  // of 1 to 2
    return FoldWeights::of(__fmul_rn(power_folded, inverse));
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

// Scratch that one thread reads after it, or another one across a barrier of the CTA, has written there in the same
// kernel: not through the cache for constant data, and not before what stands before.
__device__ inline float load_scratch(float const* source) {
    float value;
    asm volatile("ld.global.f32 %0, [%1];\n" : "=f"(value) : "l"(source) : "memory");
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
