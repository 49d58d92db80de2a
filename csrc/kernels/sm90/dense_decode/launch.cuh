// Host side of the dense decode: picks the variant, describes the cache to the copy engine, launches.
#pragma once

#include <mutex>

#include "kernels/sm90/dense_decode/dense_decode.h"
#include "kernels/sm90/dense_decode/kernel.cuh"
#include "kernels/sm90/primitives/tensor_map.h"

namespace flash_mla::sm90 {

template <typename Traits>
cudaError_t find_k_maps(KMaps* maps, DenseDecodeParams const& params) {
    constexpr int64_t kElementBytes = sizeof(typename Traits::Element), kRowBytes = kHeadDim * kElementBytes;
    constexpr auto kType = Traits::kIsBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    constexpr uint32_t kColumns = Traits::kChunkColumns;
    // A stride that is never used must still be a valid one.
    TensorMapAxis const token{uint64_t(kPageSize), params.k_token_stride * kElementBytes, uint32_t(kPageSize)};
    TensorMapAxis const head{uint64_t(params.num_heads_kv),
                             params.num_heads_kv > 1 ? params.k_head_stride * kElementBytes : kRowBytes, 1};
    TensorMapAxis const page{uint64_t(params.num_blocks),
                             params.num_blocks > 1 ? params.k_block_stride * kElementBytes : kRowBytes, 1};
    TensorMapAxis const chunk_column{kColumns, kElementBytes, kColumns};
    TensorMapAxis const chunk{Traits::kLatentChunks, kColumns * kElementBytes, Traits::kChunksPerHalf};
    TensorMapAxis const column{uint64_t(kHeadDim), kElementBytes, kColumns};
    cudaError_t const error =
        find_tensor_map<5>(&maps->latent, {kType, params.k_cache, {{chunk_column, token, chunk, head, page}}});
    if (error != cudaSuccess) return error;
    return find_tensor_map<4>(&maps->rope, {kType, params.k_cache, {{column, token, head, page}}});
}

// Raises a kernel's shared-memory limit, once per device.
template <auto* kKernel>
cudaError_t allow_shared_memory(size_t bytes) {
    constexpr int kMaxDevices = 64;
    static std::once_flag done[kMaxDevices];
    static cudaError_t status[kMaxDevices];
    int device = 0;
    if (cudaError_t const error = cudaGetDevice(&device); error != cudaSuccess) return error;
    if (device >= kMaxDevices) return cudaErrorInvalidDevice;
    std::call_once(done[device], [&] {
        status[device] = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    });
    return status[device];
}

template <typename Traits>
cudaError_t launch_variant(DenseDecodeParams const& params, cudaStream_t stream) {
    KMaps maps;
    if (cudaError_t const error = find_k_maps<Traits>(&maps, params); error != cudaSuccess) return error;
    constexpr size_t kSharedBytes = sizeof(typename Traits::SharedStorage);
    static_assert(kSharedBytes <= 227 * 1024);
    if (cudaError_t const error = allow_shared_memory<dense_decode_kernel<Traits>>(kSharedBytes); error != cudaSuccess)
        return error;
    cudaLaunchAttribute attributes[] = {dependent_launch_attribute(), {}};
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {Traits::kClusterSize, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(params.grid.num_lanes, params.grid.num_workers);
    config.blockDim = dim3(Traits::kNumThreads);
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    return cudaLaunchKernelEx(&config, dense_decode_kernel<Traits>, params, maps);
}

template <typename Element>
cudaError_t launch_for_element(DenseDecodeParams const& params, cudaStream_t stream) {
    return cluster_size(params.grid) == 2 ? launch_variant<DenseDecodeTraits<Element, 2>>(params, stream)
                                          : launch_variant<DenseDecodeTraits<Element, 1>>(params, stream);
}

}  // namespace flash_mla::sm90
