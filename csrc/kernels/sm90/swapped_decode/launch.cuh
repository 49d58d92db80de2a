// Host side of the swapped decode: picks the variant, describes the cache to the copy engine, launches.
#pragma once

#include "kernels/sm90/primitives/element_type.h"
#include "kernels/sm90/primitives/k_maps.h"
#include "kernels/sm90/primitives/kernel_attributes.h"
#include "kernels/sm90/swapped_decode/kernel.cuh"
#include "kernels/sm90/swapped_decode/swapped_decode.h"

namespace flash_mla::sm90 {

template <typename Traits>
cudaError_t launch_swapped_variant(DenseDecodeParams const& params, cudaStream_t stream) {
    CUtensorMap map;
    if (cudaError_t const error = find_k_thirds_map<Traits::kIsBFloat16>(&map, params); error != cudaSuccess)
        return error;
    constexpr size_t kSharedBytes = sizeof(typename Traits::SharedStorage);
    if (cudaError_t const error = allow_shared_memory<swapped_decode_kernel<Traits>>(kSharedBytes);
        error != cudaSuccess)
        return error;
    cudaLaunchAttribute attributes[] = {dependent_launch_attribute(), {}};
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {1, 1, unsigned(params.grid.split_ctas)};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(params.grid.num_lanes, params.grid.num_workers, params.grid.split_ctas);
    config.blockDim = dim3(Traits::kNumThreads);
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    return cudaLaunchKernelEx(&config, swapped_decode_kernel<Traits>, params, map);
}

// Clusters of so many CTAs that a GPU runs at once.
template <typename Traits>
cudaError_t count_clusters(int* num_clusters, int split_ctas) {
    constexpr size_t kSharedBytes = sizeof(typename Traits::SharedStorage);
    if (cudaError_t const error = allow_shared_memory<swapped_decode_kernel<Traits>>(kSharedBytes);
        error != cudaSuccess)
        return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {1, 1, unsigned(split_ctas)};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1, 1, split_ctas);
    config.blockDim = dim3(Traits::kNumThreads);
    config.dynamicSmemBytes = kSharedBytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaOccupancyMaxActiveClusters(num_clusters, swapped_decode_kernel<Traits>, &config);
}

template <ElementType kType, Summation kSummation>
cudaError_t launch_swapped_decode(DenseDecodeParams const& params, cudaStream_t stream) {
    using Element = ElementOf<kType>;
    return params.grid.rows_per_tile == 16
               ? launch_swapped_variant<SwappedDecodeTraits<Element, 16, kSummation>>(params, stream)
               : launch_swapped_variant<SwappedDecodeTraits<Element, 32, kSummation>>(params, stream);
}

}  // namespace flash_mla::sm90
