#pragma once

#include <cuda_runtime_api.h>

#include "params/dense_decode.h"

namespace flash_mla::sm90 {

template <ElementType kElementType>
cudaError_t launch_dense_decode(DenseDecodeParams const& params, cudaStream_t stream);

}  // namespace flash_mla::sm90
