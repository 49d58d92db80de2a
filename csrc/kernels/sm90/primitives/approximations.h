// Powers, logarithms and reciprocals as the hardware has them: one instruction each, the same bits in every kernel.
#pragma once

namespace flash_mla::sm90 {

__device__ inline float exp2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
    return result;
}

__device__ inline float log2_approx(float x) {
    float result;
    asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
    return result;
}

__device__ inline float reciprocal_approx(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
    return result;
}

}  // namespace flash_mla::sm90
