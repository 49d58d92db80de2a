// Host side of the tensor copies: encodes a tensor map through the driver's entry point, without linking the driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

namespace flash_mla::sm90 {

struct TensorMapAxis {
    uint64_t extent;       // elements
    int64_t stride_bytes;  // ignored for axis 0, which is contiguous
    uint32_t box;          // elements copied at once
};

// A map of 16-bit elements whose boxes land in shared memory with the 128-byte swizzle.
template <int kRank>
cudaError_t encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, void const* base,
                              std::array<TensorMapAxis, kRank> const& axes) {
    static decltype(&cuTensorMapEncodeTiled) const encode = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found{};
        cudaError_t const status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
        return status == cudaSuccess && found == cudaDriverEntryPointSuccess
                   ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)
                   : nullptr;
    }();
    if (encode == nullptr) return cudaErrorInsufficientDriver;

    cuuint64_t extents[kRank], strides[kRank];
    cuuint32_t boxes[kRank], steps[kRank];
    for (int i = 0; i < kRank; ++i) {
        extents[i] = axes[i].extent;
        boxes[i] = axes[i].box;
        steps[i] = 1;
        if (i > 0) strides[i - 1] = axes[i].stride_bytes;
    }
    CUresult const status =
        encode(map, type, kRank, const_cast<void*>(base), extents, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace flash_mla::sm90
