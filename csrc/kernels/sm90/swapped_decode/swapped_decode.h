#pragma once

#include <cuda_runtime_api.h>

#include "params/dense_decode.h"

namespace flash_mla::sm90 {

template <ElementType kType>
cudaError_t launch_swapped_decode(DenseDecodeParams const& params, cudaStream_t stream);

template <>
cudaError_t launch_swapped_decode<ElementType::kBFloat16>(DenseDecodeParams const& params, cudaStream_t stream);
template <>
cudaError_t launch_swapped_decode<ElementType::kFloat16>(DenseDecodeParams const& params, cudaStream_t stream);

inline cudaError_t launch_swapped_decode(DenseDecodeParams const& params, ElementType type, cudaStream_t stream) {
    return type == ElementType::kBFloat16 ? launch_swapped_decode<ElementType::kBFloat16>(params, stream)
                                          : launch_swapped_decode<ElementType::kFloat16>(params, stream);
}

// Of the current device.
cudaError_t ask_cluster_capacity(ClusterCapacity* capacity);

}  // namespace flash_mla::sm90
