#pragma once

#include <cuda_runtime_api.h>

#include "params/segments.h"

namespace flash_mla::sm90 {

template <ElementType kType, Summation kSummation>
cudaError_t launch_dense_decode(DenseDecodeParams const& params, cudaStream_t stream);

template <>
cudaError_t launch_dense_decode<ElementType::kBFloat16, Summation::kByWorkers>(DenseDecodeParams const& params,
                                                                               cudaStream_t stream);
template <>
cudaError_t launch_dense_decode<ElementType::kBFloat16, Summation::kBySegments>(DenseDecodeParams const& params,
                                                                                cudaStream_t stream);
template <>
cudaError_t launch_dense_decode<ElementType::kFloat16, Summation::kByWorkers>(DenseDecodeParams const& params,
                                                                              cudaStream_t stream);
template <>
cudaError_t launch_dense_decode<ElementType::kFloat16, Summation::kBySegments>(DenseDecodeParams const& params,
                                                                               cudaStream_t stream);

template <Summation kSummation>
cudaError_t launch_dense_decode(DenseDecodeParams const& params, ElementType type, cudaStream_t stream) {
    return type == ElementType::kBFloat16 ? launch_dense_decode<ElementType::kBFloat16, kSummation>(params, stream)
                                          : launch_dense_decode<ElementType::kFloat16, kSummation>(params, stream);
}
inline cudaError_t launch_dense_decode(DenseDecodeParams const& params, ElementType type, cudaStream_t stream) {
    return params.grid.is_invariant() ? launch_dense_decode<Summation::kBySegments>(params, type, stream)
                                      : launch_dense_decode<Summation::kByWorkers>(params, type, stream);
}

}  // namespace flash_mla::sm90
