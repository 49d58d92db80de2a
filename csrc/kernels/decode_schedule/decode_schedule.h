#pragma once

#include <cuda_runtime_api.h>

#include "params/decode_schedule.h"

namespace flash_mla {

// The largest batch whose running costs fit the scheduler's shared memory.
inline constexpr int kMaxScheduleBatch = 24 * 1024;

// Divides the KV blocks of all requests over the workers. One CTA, no synchronisation with the host.
cudaError_t launch_decode_schedule(DecodeScheduleParams const& params, cudaStream_t stream);

// The same for a grid whose results do not depend on the batch: boundaries are those of granules.
cudaError_t launch_granule_schedule(DecodeScheduleParams const& params, cudaStream_t stream);

}  // namespace flash_mla
