// Paged decode of Multi-head Latent Attention for few query rows, with the operands swapped.
#pragma once

#include "kernels/sm90/primitives/dependent_launch.h"
#include "kernels/sm90/swapped_decode/consumer.h"
#include "kernels/sm90/swapped_decode/producer.h"

namespace flash_mla::sm90 {

template <typename Traits>
__device__ void init_swapped_barriers(typename Traits::Barriers& barriers, int num_ctas) {
    for (int stage = 0; stage < Traits::kNumStages; ++stage) {
        barriers.block_full[stage].init(1);
        barriers.block_empty[stage].init(Traits::kConsumerThreads / 32);
    }
    barriers.may_send.init(num_ctas);
    barriers.received.init(1);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kNumThreads, 1)
    swapped_decode_kernel(__grid_constant__ DenseDecodeParams const params, __grid_constant__ KMaps const maps) {
    extern __shared__ __align__(1024) char shared_bytes[];
    auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);
    if (threadIdx.x == Traits::kConsumerThreads) {
        init_swapped_barriers<Traits>(shared.barriers, params.grid.split_ctas);
        cutlass::arch::fence_barrier_init();
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&maps.latent));
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&maps.rope));
    }
    // Other CTAs are waited for where something is first sent to them.
    cute::cluster_arrive_relaxed();
    __syncthreads();
    wait_for_previous_kernel();
    allow_dependent_launch();

    int const rank = cute::block_rank_in_cluster();
    int const group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (group == Traits::kNumGroups) {
        SwappedProducer<Traits>{params, maps, shared, rank}.run();
        cute::cluster_wait();
    } else {
        SwappedConsumer<Traits>{params, shared, group, int(threadIdx.x % 128), rank}.run();
    }
    // A CTA waits for all that is sent to it, so none is sent anything after its end.
}

}  // namespace flash_mla::sm90
