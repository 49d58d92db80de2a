#pragma once

#include <cuda_runtime_api.h>

#include "params/segments.h"

namespace flash_mla::sm90 {

// Each variant is instantiated in a file of its own.
template <ElementType kType, Summation kSummation>
cudaError_t launch_swapped_decode(DenseDecodeParams const& params, cudaStream_t stream);

// Of the current device.
cudaError_t ask_cluster_capacity(ClusterCapacity* capacity);

}  // namespace flash_mla::sm90
