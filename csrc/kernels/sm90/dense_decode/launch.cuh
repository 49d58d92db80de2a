// Host side of the dense decode: picks the variant, describes the cache to the copy engine, launches.
#pragma once

#include "kernels/sm90/dense_decode/dense_decode.h"
#include "kernels/sm90/dense_decode/kernel.cuh"
#include "kernels/sm90/primitives/element_type.h"
#include "kernels/sm90/primitives/kernel_attributes.h"

namespace flash_mla::sm90 {

template <typename Traits>
cudaError_t launch_variant(DenseDecodeParams const& params, cudaStream_t stream) {
    DecodeMaps maps;
    cudaError_t const found = find_decode_maps<Traits::kIsBFloat16>(&maps, params, 1);
    if (found != cudaSuccess) return found;
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

template <ElementType kType, Summation kSummation>
cudaError_t launch_dense_decode(DenseDecodeParams const& params, cudaStream_t stream) {
    using Element = ElementOf<kType>;
    return cluster_size(params.grid) == 2 ? launch_variant<DenseDecodeTraits<Element, 2, kSummation>>(params, stream)
                                          : launch_variant<DenseDecodeTraits<Element, 1, kSummation>>(params, stream);
}

}  // namespace flash_mla::sm90
