// Paged decode of Multi-head Latent Attention for few query rows: the operands are swapped, so that tokens fill the 64
// rows of wgmma and query rows are its N, 16 or 32.
//
//   Sᵀ = scale · K·Qᵀ     K (64 tokens, 576)       Q (16 or 32 query rows, 576)
//   Pᵀ = softmax(Sᵀ)      over the tokens, down the columns
//   Oᵀ = Vᵀ·Pᵀ            Vᵀ (512 columns, 64 tokens)
//
// A worker of the plan is a cluster of split_ctas CTAs per lane. They share out the KV blocks of each piece, and each
// merges its part of the output columns from all of them: partial results go through distributed shared memory, not
// through the L2, and only what several clusters have is left to the combine kernel. One CTA per SM, persistent over
// the pieces of its worker.
//
// clang-format off
// Warps
//   2 consumer warpgroups   take turns at the blocks: S, softmax and O of all columns, in 64 registers with 16 rows. At the
//                           end of a piece each gets the sum of both for half of the columns
//   1 producer warp         looks up pages, copies KV blocks by TMA, a third at a time
//
// Shared memory (bytes, with 16 rows)
//   ring       8 × 24576    thirds of KV blocks: 3 chunks (64 tokens × 64 columns, 128-byte swizzle), the last one RoPE.
//                           Between two pieces the first four hold results: what the groups exchange, and the output of all
//                           CTAs for the columns that this one merges, as the accumulators hold it
//   q             18432     query rows
//   p          2 × 2048     P (row, token), of each group
//   the rest                statistics of the rows, weights, barriers
//
// Barriers (mbarriers)   arrivals                        waited for by
//   third_full[g][place] the producer + 24576 B          group g, whose block it is
//   third_empty[place]   4 warps of that group           the producer
//   may_send             one thread of every CTA         consumers, before they send: the place of the results is free
//   received             bytes from every CTA            consumers, before they merge
// clang-format on
// Where bits do not depend on the batch (Summation::kBySegments) a piece is a segment, and what a CTA has merged of it
// is folded with what waits in scratch (segments.h).
//
// Consumers have a hardware barrier for all and one per group. The cluster waits for itself once, at the start. All
// that ordinary stores put where wgmma comes next passes a proxy fence before a barrier.
//
// One block: Sᵀ (36 steps, as its thirds come), P by the references as they are and a vote of the group whether these
// still do; if not, as in a first block, references are raised and P is written again; Oᵀ; empty. The groups know
// nothing of each other meanwhile, so that one computes while the other waits for a barrier or for exponentials.
//
// Numerics as in the dense decode (online_softmax.h); a row has references of each group's own until their
// sums are added; in a cluster sums and outputs are added in the order of the ranks.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "kernels/sm90/primitives/dependent_launch.h"
#include "kernels/sm90/swapped_decode/consumer.h"
#include "kernels/sm90/swapped_decode/producer.h"

namespace flash_mla::sm90 {

template <typename Traits>
__device__ void init_swapped_barriers(typename Traits::Barriers& barriers, int num_ctas) {
    for (auto& of_group : barriers.third_full) {
        for (auto& full : of_group) full.init(1);
    }
    for (auto& empty : barriers.third_empty) empty.init(4);
    barriers.may_send.init(num_ctas);
    barriers.received.init(1);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kNumThreads, 1)
    swapped_decode_kernel(__grid_constant__ DenseDecodeParams const params, __grid_constant__ CUtensorMap const map) {
    extern __shared__ __align__(1024) char shared_bytes[];
    auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);
    if (threadIdx.x == Traits::kConsumerThreads) {
        init_swapped_barriers<Traits>(shared.barriers, params.grid.split_ctas);
        cutlass::arch::fence_barrier_init();
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&map));
    }
    // Other CTAs are waited for where something is first sent to them.
    cute::cluster_arrive_relaxed();
    __syncthreads();
    wait_for_previous_kernel();
    allow_dependent_launch();

    int const rank = cute::block_rank_in_cluster();
    int const group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (group == Traits::kNumGroups) {
        if constexpr (Traits::kMovesRegisters) cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
        if (threadIdx.x == Traits::kConsumerThreads) SwappedProducer<Traits>{params, map, shared, rank}.run();
        __syncwarp();
        cute::cluster_wait();
    } else {
        if constexpr (Traits::kMovesRegisters) cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
        SwappedConsumer<Traits>{params, shared, group, int(threadIdx.x % 128), rank}.run();
    }
    // A CTA waits for all that is sent to it, so none is sent anything after its end.
}

}  // namespace flash_mla::sm90
