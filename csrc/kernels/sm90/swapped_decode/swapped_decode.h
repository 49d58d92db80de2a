#pragma once

#include <cuda_runtime_api.h>

#include "params/segments.h"

namespace flash_mla::sm90 {

template <ElementType kType, Summation kSummation>
cudaError_t launch_swapped_decode(DenseDecodeParams const& params, cudaStream_t stream);

template <>
cudaError_t launch_swapped_decode<ElementType::kBFloat16, Summation::kByWorkers>(DenseDecodeParams const& params,
                                                                                 cudaStream_t stream);
template <>
cudaError_t launch_swapped_decode<ElementType::kBFloat16, Summation::kBySegments>(DenseDecodeParams const& params,
                                                                                  cudaStream_t stream);
template <>
cudaError_t launch_swapped_decode<ElementType::kFloat16, Summation::kByWorkers>(DenseDecodeParams const& params,
                                                                                cudaStream_t stream);
template <>
cudaError_t launch_swapped_decode<ElementType::kFloat16, Summation::kBySegments>(DenseDecodeParams const& params,
                                                                                 cudaStream_t stream);

template <Summation kSummation>
cudaError_t launch_swapped_decode(DenseDecodeParams const& params, ElementType type, cudaStream_t stream) {
    return type == ElementType::kBFloat16 ? launch_swapped_decode<ElementType::kBFloat16, kSummation>(params, stream)
                                          : launch_swapped_decode<ElementType::kFloat16, kSummation>(params, stream);
}
inline cudaError_t launch_swapped_decode(DenseDecodeParams const& params, ElementType type, cudaStream_t stream) {
    return params.grid.is_invariant() ? launch_swapped_decode<Summation::kBySegments>(params, type, stream)
                                      : launch_swapped_decode<Summation::kByWorkers>(params, type, stream);
}

// Of the current device.
cudaError_t ask_cluster_capacity(ClusterCapacity* capacity);

}  // namespace flash_mla::sm90
