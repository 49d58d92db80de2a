// Merges the partial results of tiles that several workers share into out and lse.
#pragma once

#include <cuda_runtime_api.h>

#include "params/dense_decode.h"

namespace flash_mla {

// Follows the decode kernel in the same stream.
cudaError_t launch_split_kv_combine(DenseDecodeParams const& params, int num_sms, ElementType type,
                                    cudaStream_t stream);

}  // namespace flash_mla
