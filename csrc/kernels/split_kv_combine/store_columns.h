// Two or four neighbouring columns of an output row, from float32 to the type of the output, at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace flash_mla {

__device__ inline void store_columns(__nv_bfloat16* target, float2 const& x) {
    *reinterpret_cast<__nv_bfloat162*>(target) = __floats2bfloat162_rn(x.x, x.y);
}
__device__ inline void store_columns(__half* target, float2 const& x) {
    *reinterpret_cast<__half2*>(target) = __floats2half2_rn(x.x, x.y);
}
__device__ inline void store_columns(__nv_bfloat16* target, float4 const& x) {
    __nv_bfloat162 const pairs[2] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
    *reinterpret_cast<uint2*>(target) = reinterpret_cast<uint2 const&>(pairs);
}
__device__ inline void store_columns(__half* target, float4 const& x) {
    __half2 const pairs[2] = {__floats2half2_rn(x.x, x.y), __floats2half2_rn(x.z, x.w)};
    *reinterpret_cast<uint2*>(target) = reinterpret_cast<uint2 const&>(pairs);
}

}  // namespace flash_mla
