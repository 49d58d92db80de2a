#pragma once

#include <cuda_runtime_api.h>

#include "params/append_kv.h"

namespace flash_mla {

// Copies tokens into their slots, bit by bit. At least one token; no synchronisation with the host.
cudaError_t launch_append_kv(AppendKvParams const& params, cudaStream_t stream);

}  // namespace flash_mla
