// Host side of the tensor copies: encodes a tensor map through the driver's entry point, without linking the driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>

namespace flash_mla::sm90 {

struct TensorMapAxis {
    uint64_t extent;       // elements
    int64_t stride_bytes;  // ignored for axis 0, which is contiguous
    uint32_t box;          // elements copied at once

    bool operator==(TensorMapAxis const& other) const {
        return extent == other.extent && stride_bytes == other.stride_bytes && box == other.box;
    }
};

// All that a map depends on.
template <int kRank>
struct TensorMapSource {
    CUtensorMapDataType type;
    void const* base;
    std::array<TensorMapAxis, kRank> axes;

    bool operator==(TensorMapSource const& other) const {
        return type == other.type && base == other.base && axes == other.axes;
    }

    struct Hash {
        size_t operator()(TensorMapSource const& source) const {
            constexpr size_t kFactor = 0x9e3779b97f4a7c15;
            size_t hash = reinterpret_cast<size_t>(source.base) + source.type;
            for (TensorMapAxis const& axis : source.axes) {
                hash = (hash ^ hash >> 32) * kFactor + axis.extent;
                hash = hash * kFactor + size_t(axis.stride_bytes) + axis.box;
            }
            return hash;
        }
    };
};

// A map of 16-bit elements whose boxes land in shared memory with the 128-byte swizzle.
template <int kRank>
cudaError_t encode_tensor_map(CUtensorMap* map, TensorMapSource<kRank> const& source) {
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
        extents[i] = source.axes[i].extent;
        boxes[i] = source.axes[i].box;
        steps[i] = 1;
        if (i > 0) strides[i - 1] = source.axes[i].stride_bytes;
    }
    CUresult const status = encode(map, source.type, kRank, const_cast<void*>(source.base), extents, strides, boxes,
                                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The same, encoded once: layers and steps come with the same caches again, and mostly with queries in the same places.
// A map holds an address and numbers, nothing of the memory there or of a device, so it cannot become stale.
template <int kRank>
cudaError_t find_tensor_map(CUtensorMap* map, TensorMapSource<kRank> const& source) {
    constexpr size_t kMaxMaps = 1024;  // more than layers of a model; bounds what callers with ever new addresses leave
    using Maps = std::unordered_map<TensorMapSource<kRank>, CUtensorMap, typename TensorMapSource<kRank>::Hash>;
    thread_local Maps maps;
    auto found = maps.find(source);
    if (found == maps.end()) {
        CUtensorMap encoded;
        if (cudaError_t const error = encode_tensor_map(&encoded, source); error != cudaSuccess) return error;
        if (maps.size() == kMaxMaps) maps.clear();
        found = maps.emplace(source, encoded).first;
    }
    *map = found->second;
    return cudaSuccess;
}

}  // namespace flash_mla::sm90
