// Barriers between the warps of a CTA.
#pragma once

#include <cutlass/arch/barrier.h>

namespace flash_mla::sm90 {

using Barrier = cutlass::arch::ClusterBarrier;
using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;  // also counts bytes that copies deliver

// A value that is the same in all lanes, in a uniform register: that is where a reduction leaves it.
__device__ inline uint32_t uniform(uint32_t value) { return __reduce_max_sync(~0u, value); }

// Eight arrivals for a whole warp, after everything its lanes did: by the first lane of each quad, which is the one
// that stores and loads what there is to say about the quad's rows of a fragment. So each such access is ordered by the
// thread that made it.
inline constexpr int kQuadsPerWarp = 8;
__device__ inline void quads_arrive(Barrier const& barrier) {
    __syncwarp();
    if (threadIdx.x % 4 == 0) barrier.arrive();
}

}  // namespace flash_mla::sm90
