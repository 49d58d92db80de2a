// Host side of the swapped decode: picks the variant, describes the cache to the copy engine, launches.
#pragma once

#include "kernels/sm90/primitives/element_type.h"
#include "kernels/sm90/primitives/kernel_attributes.h"
#include "kernels/sm90/swapped_decode/kernel.cuh"
#include "kernels/sm90/swapped_decode/swapped_decode.h"

namespace flash_mla::sm90 {

template <typename Traits>
constexpr size_t kSwappedSharedBytes = sizeof(typename Traits::SharedStorage);

template <typename Traits>
cudaError_t allow_launch() {
    constexpr auto* kKernel = swapped_decode_kernel<Traits>;
    cudaError_t const error = allow_shared_memory<kKernel>(kSwappedSharedBytes<Traits>);
    return error == cudaSuccess && Traits::kMaxCtas > 8 ? allow_large_clusters<kKernel>() : error;
}

template <typename Traits>
cudaError_t launch_swapped_variant(DenseDecodeParams const& params, cudaStream_t stream) {
    DecodeMaps maps;
    cudaError_t const found = find_decode_maps<Traits::kIsBFloat16>(&maps, params, kHeadDim / kKChunkColumns);
    if (found != cudaSuccess) return found;
    if (cudaError_t const error = allow_launch<Traits>(); error != cudaSuccess) return error;
    cudaLaunchAttribute attributes[] = {dependent_launch_attribute(), {}};
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {1, 1, unsigned(params.grid.split_ctas)};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(params.grid.num_lanes, params.grid.num_workers, params.grid.split_ctas);
    config.blockDim = dim3(Traits::kNumThreads);
    config.dynamicSmemBytes = kSwappedSharedBytes<Traits>;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    return cudaLaunchKernelEx(&config, swapped_decode_kernel<Traits>, params, maps);
}

// Clusters of so many CTAs that a GPU runs at once.
template <typename Traits>
cudaError_t count_clusters(int* num_clusters, int split_ctas) {
    if (cudaError_t const error = allow_launch<Traits>(); error != cudaSuccess) return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {1, 1, unsigned(split_ctas)};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1, 1, split_ctas);
    config.blockDim = dim3(Traits::kNumThreads);
    config.dynamicSmemBytes = kSwappedSharedBytes<Traits>;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaError_t const error = cudaOccupancyMaxActiveClusters(num_clusters, swapped_decode_kernel<Traits>, &config);
    if (error != cudaErrorInvalidClusterSize) return error;
    cudaGetLastError();  // a part of a GPU may have none that are so large
    *num_clusters = 0;
    return cudaSuccess;
}

template <ElementType kType, Summation kSummation>
cudaError_t launch_swapped_decode(DenseDecodeParams const& params, cudaStream_t stream) {
    using Element = ElementOf<kType>;
    return params.grid.rows_per_tile == 16
               ? launch_swapped_variant<SwappedDecodeTraits<Element, 16, kSummation>>(params, stream)
               : launch_swapped_variant<SwappedDecodeTraits<Element, 32, kSummation>>(params, stream);
}

}  // namespace flash_mla::sm90
