// Barriers between the warps of a CTA.
#pragma once

#include <cutlass/arch/barrier.h>

namespace flash_mla::sm90 {

using Barrier = cutlass::arch::ClusterBarrier;
using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;  // also counts bytes that copies deliver

// One arrival for a whole warp, after everything its lanes did.
__device__ inline void warp_arrive(Barrier const& barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier.arrive();
}

}  // namespace flash_mla::sm90
