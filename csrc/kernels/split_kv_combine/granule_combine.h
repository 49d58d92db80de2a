// Folds the values of a tile's granules into out and lse, where there are several (segments.h).
#pragma once

#include <cuda_runtime_api.h>

#include "params/segments.h"

namespace flash_mla {

// Follows the decode kernel in the same stream. Does nothing where granules are whole tiles.
cudaError_t launch_granule_combine(DenseDecodeParams const& params, int num_sms, ElementType type, cudaStream_t stream);

}  // namespace flash_mla
