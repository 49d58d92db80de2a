// A place in a ring of shared-memory stages, and the mbarrier parity that goes with it.
#pragma once

#include <cutlass/arch/barrier.h>

namespace flash_mla::sm90 {

using Barrier = cutlass::arch::ClusterBarrier;
using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;  // also counts bytes that copies deliver

template <int kNumStages>
struct RingPosition {
    int stage = 0;
    uint32_t phase = 0;

    __device__ void advance() {
        if (++stage == kNumStages) {
            stage = 0;
            phase ^= 1;
        }
    }
    __device__ RingPosition next() const {
        RingPosition position = *this;
        position.advance();
        return position;
    }
};

// One arrival for a whole warp, after everything its lanes did.
__device__ inline void warp_arrive(Barrier const& barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier.arrive();
}

}  // namespace flash_mla::sm90
