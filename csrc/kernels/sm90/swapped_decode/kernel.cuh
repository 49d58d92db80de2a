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
//   2 consumer warpgroups   each: half of the columns of S, exchanged for the other half of its rows; their softmax;
//                           O for one half of the latent columns, in registers
//   1 producer warp         looks up pages, copies KV blocks and the first query rows by TMA
//   1 statistics warp       tells the cluster what its rows have seen and weighs what each CTA sends, while the outputs
//                           are on their way; where bits do not depend on the batch, three warps without work instead
//
// Shared memory (bytes, 16 rows)
//   block      2 × 73728    KV blocks: 8 latent chunks (64 tokens × 64 columns, 128-byte swizzle) and RoPE
//   q              18432    query rows; with 32 rows in the place of received
//   received       32768    output of all CTAs for the columns that this one merges, in 16 bits, as the accumulators hold
//                           it
//   p               2048    P (row, token)
//   exchanged       4096    scores for the other group
//   the rest               statistics of the rows, weights, barriers
//
// Barriers (mbarriers)   arrivals                        waited for by
//   early_block[group]   the producer + 40960 B, with    the group, the second one both: what seemed to be the first
//                        RoPE, and 32768 B; no bytes     block is there; the producer, before it replaces it
//                        where there seems to be none
//   early_rows           the producer + 18432 B; no      consumers; the producer, before it replaces them
//                        bytes where there seems to be
//                        no piece
//   sources_known        the producer                    consumers, statistics: what the plan and the lengths say of the
//                        first piece is there
//   rows_full            for the first piece the         consumers
//                        producer, with bytes only where
//                        the early rows are not its own;
//                        then a consumer + 18432 B
//   block_full[stage]    the producer + 73728 B; no      consumers
//                        bytes where an early block is
//                        the first one
//   block_empty[stage]   8 consumer warps                the producer
//   may_send             one thread of every CTA         who sends: the place of the results is free in every CTA
//   statistics_left      256 consumer threads            the statistics warp: all but the last outputs is done
//   received_statistics  the statistics warp, bytes      the statistics warp
//                        from every CTA
//   weighed              the statistics warp's lanes     consumers, before they merge
//   received             the statistics warp, bytes      consumers, before they merge; the statistics warp, before the
//                        from every CTA with blocks      next piece
// clang-format on
// Where bits do not depend on the batch (Summation::kBySegments) a piece is all segments that a worker has of a tile,
// and a CTA is alone: it folds them as it goes (fold_segments.h). With 16 rows what waits for that takes the place of
// what a cluster's CTAs receive, and 16384 bytes more; and registers, of which consumers get 224 each, and the
// producer's warpgroup keeps 56.
//
// Before the kernel before has ended, a CTA finds out with which piece and blocks it will probably begin, and has the
// blocks brought to the L2; as soon as it has ended, query rows and first block are asked for, and then it is found out
// whether they are the right ones (early_block.h). One thread does that for all: plan and lengths are in a few lines of
// the L2, which hands out a line to one after the other.
//
// Query rows that no map describes (q_map.h) consumers gather themselves, once the first piece is known, without
// early_rows and rows_full.
//
// Consumers have a hardware barrier for all and one per group. The cluster waits for itself once, at the start. All
// that ordinary stores put where wgmma comes next passes a proxy fence before a barrier.
//
// One block: full, Sᵀ (both groups, 18 steps each), exchange, P by the references as they are and a vote whether these
// still do; if not, as in a first block, references are raised and P is written again; Oᵀ; empty. Nothing overlaps here
// but the copies: where rows are few the memory is the limit, and a block takes the CTA less time than it takes to
// come.
//
// Numerics as in the dense decode (online_softmax.h); in a cluster sums and outputs are added in the order of the
// ranks.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "kernels/sm90/primitives/dependent_launch.h"
#include "kernels/sm90/swapped_decode/fold_segments.h"
#include "kernels/sm90/swapped_decode/merge.h"
#include "kernels/sm90/swapped_decode/producer.h"

namespace flash_mla::sm90 {

template <typename Traits>
__device__ void init_swapped_barriers(typename Traits::Barriers& barriers, int num_ctas) {
    for (int stage = 0; stage < Traits::kNumStages; ++stage) {
        barriers.block_full[stage].init(1);
        barriers.block_empty[stage].init(Traits::kConsumerThreads / 32);
    }
    for (auto& half : barriers.early_block) half.init(1);
    barriers.early_rows.init(1);
    barriers.sources_known.init(1);
    barriers.rows_full.init(1);
    barriers.may_send.init(num_ctas);
    barriers.statistics_left.init(Traits::kConsumerThreads);
    barriers.received_statistics.init(1);
    barriers.weighed.init(32);
    barriers.received.init(1);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kNumThreads, 1)
    swapped_decode_kernel(__grid_constant__ DenseDecodeParams const params, __grid_constant__ DecodeMaps const maps) {
    extern __shared__ __align__(1024) char shared_bytes[];
    auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);
    if (threadIdx.x == 0 && maps.has_q)
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&maps.q));
    if (threadIdx.x == Traits::kConsumerThreads) {
        init_swapped_barriers<Traits>(shared.barriers, params.grid.split_ctas);
        cutlass::arch::fence_barrier_init();
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&maps.latent));
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&maps.rope));
    }
    cute::cluster_arrive_relaxed();
    __syncthreads();

    int const rank = cute::block_rank_in_cluster();
    int const group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    constexpr bool kFolds = Traits::kSummation == Summation::kBySegments;
    if (group == Traits::kNumGroups) {
        if constexpr (kFolds) cutlass::arch::warpgroup_reg_dealloc<Traits::kLoadingRegisters>();
        int const warp = __shfl_sync(~0u, threadIdx.x / 32, 0) - Traits::kConsumerThreads / 32;
        if (warp == 0) {
            if (threadIdx.x % 32 == 0) SwappedProducer<Traits>{params, maps, shared, rank}.run();
            __syncwarp();
            cute::cluster_wait();
        } else {
            cute::cluster_wait();
            if constexpr (!kFolds) StatisticsWarp<Traits>{params, shared, rank}.run();
        }
    } else {
        if constexpr (kFolds) cutlass::arch::warpgroup_reg_alloc<Traits::kFoldingRegisters>();
        cute::cluster_wait();
        using Consumer = std::conditional_t<kFolds, FoldingConsumer<Traits>, MergingConsumer<Traits>>;
        Consumer consumer{{params, maps, shared, group, int(threadIdx.x % 128)}};
        consumer.run();
    }
    // A CTA waits for all that is sent to it, so none is sent anything after its end.
}

}  // namespace flash_mla::sm90
