// Paged decode of Multi-head Latent Attention, dense: one or a few query tokens per request against its latent cache.
//
//   S = scale · Q·Kᵀ      Q (64 rows, 576)   K (64 tokens, 576)
//   P = softmax(S)        masked to the request's tokens, and bottom-right causal where asked
//   O = P·V               V = the first 512 columns of K
//
// The query rows of a request and kv head (tokens × heads of the group) are packed into tiles of 64. A CTA runs
// through the pieces of its worker's stretch of the plan (pieces.h): persistent, one CTA per SM, 384 threads. Where
// tiles of a request come in pairs, two CTAs form a cluster, and each copies half of the latent columns to both.
//
// clang-format off
// Warpgroups (registers)
//   scores (184)       S, softmax, P to shared memory, log-sum-exp. Holds most of Q in registers. One of its warps looks
//                      up pages and announces the pieces to the others
//   output low (160)   O for columns 0–255; one of its warps loads the first blocks; copies that half of the next latent
//                      columns to where V was, and the next RoPE columns
//   output high (160)  the same for columns 256–511, but for RoPE
//
// Shared memory (bytes)
//   latent   3 × 65536   K's latent columns and V: 8 chunks (64 tokens × 64 columns, 128-byte swizzle) per stage
//   rope     2 × 8192    K's RoPE columns, until they are multiplied
//   p            8192    P (64 × 64), each half of its columns from the softmax of these keys until their O is done
//   q            10240   Q's RoPE columns and its last latent k-step; free for the next piece after the last S of a piece
//   the rest      1016   rescale factors and flags, 1 / row sum, page orders, pieces, barriers: 8 more would not fit
//
// Barriers (mbarriers)   arrivals                           waited for by
//   rows_staged          4 warps of scores + 65536 B        scores, before they read the first query rows: then its place
//                                                           is wanted for 1 / row sum
//   latent_full[stage]   who starts the copies + 65536 B    scores
//   rope_full[place]     who starts the copy + 8192 B       scores
//   p_ready[k]           the quads of scores                output: P of half k of the keys and rescale factors are
//                                                           there; with the first half the RoPE columns are multiplied,
//                                                           with the second the next page is looked up
//   p_consumed[k]        the quads of output                scores, before they store P or rescale factors
//   consumed[stage][h]   4 warps of the output half h, of   who copies that half
//                        every CTA; at first of scores,
//                        for the query rows in the last stage
//   stats_full           the quads of scores                output
//   stats_empty          the quads of output                scores
//   pieces.full[i]       who looks up pages                 scores, output
// clang-format on
// The scores warpgroup has a hardware barrier of its own, around the query rows; an output warpgroup has one for
// clearing keys; and they wait by kFirstRowsBarrier until the first query rows, which pass through the last stage (the
// 64th through the place of P), are in registers. All that ordinary stores put where wgmma or a copy comes next passes
// a proxy fence before its barrier. What lanes read or write for their rows is read or written by the first lane of
// each quad, which itself arrives at the barrier that orders it.
//
// One block is two halves of 32 keys, each with scores, references, P and outputs of its own. All of S of the first
// half is issued and a part of the second; the rest of it goes between the exponentials of the first half, the last
// steps after its P is released, so that O follows on the tensor cores without a gap. The softmax of the second half
// runs under O of the first, that O under S of the next block.
//
// Numerics: scores in float32, softmax in the log2 domain with a lazily raised maximum (online_softmax.h), P in the
// input type, O in float32. A row that sees no key gives 0 and +inf. Keys behind the last one are cleared from V.
//
// The ops guarantee: shapes and strides as dense_decode.h says, 16-byte aligned rows, a plan with one row per worker.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "kernels/sm90/dense_decode/output.h"
#include "kernels/sm90/dense_decode/scores.h"
#include "kernels/sm90/primitives/dependent_launch.h"

namespace flash_mla::sm90 {

template <typename Traits>
__device__ void init_barriers(typename Traits::Barriers& barriers) {
    for (int stage = 0; stage < Traits::kNumStages; ++stage) {
        barriers.latent_full[stage].init(Traits::kHalvesPerCta);
        for (auto& consumed : barriers.consumed[stage]) consumed.init(4 * Traits::kClusterSize);
    }
    for (auto& rope_full : barriers.rope_full) rope_full.init(1);
    for (auto& p_ready : barriers.p_ready) p_ready.init(4 * kQuadsPerWarp);
    for (auto& p_consumed : barriers.p_consumed) p_consumed.init(8 * kQuadsPerWarp);
    barriers.stats_full.init(4 * kQuadsPerWarp);
    barriers.stats_empty.init(8 * kQuadsPerWarp);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kNumThreads, 1)
    dense_decode_kernel(__grid_constant__ DenseDecodeParams const params, __grid_constant__ KMaps const maps) {
    using SharedStorage = typename Traits::SharedStorage;
    extern __shared__ __align__(1024) char shared_bytes[];
    auto& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
    int const thread = threadIdx.x % 128, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    auto const role = static_cast<WarpgroupRole>(warp / 4);
    bool const is_first_loader = warp == Traits::kFirstLoader / 32;
    if (role != WarpgroupRole::kScores) cutlass::arch::warpgroup_reg_dealloc<Traits::kOutputRegisters>();
    if (threadIdx.x == 0) {
        init_barriers<Traits>(shared.barriers);
        shared.rows_staged.init(4);
        cutlass::arch::fence_barrier_init();
    }
    if (threadIdx.x == Traits::kFirstLoader) {
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&maps.latent));
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&maps.rope));
        shared.pieces.init();
    }
    if (is_first_loader) prefetch_plan(params);
    __syncwarp();
    if constexpr (Traits::kClusterSize > 1) cute::cluster_arrive();
    wait_for_previous_kernel();
    allow_dependent_launch();
    if (is_first_loader) BlockLoader<Traits>{params, maps, shared}.begin();
    if constexpr (Traits::kClusterSize > 1) {
        cute::cluster_wait();
    } else {
        __syncthreads();
    }

    if (role == WarpgroupRole::kScores) {
        cutlass::arch::warpgroup_reg_alloc<Traits::kScoresRegisters>();
        ScoresMainloop<Traits>{params, maps, shared}.run();
    } else {
        OutputMainloop<Traits>{params, maps, shared, role, thread}.run();
    }
    // Nobody leaves while another CTA may still write into its shared memory.
    if constexpr (Traits::kClusterSize > 1) cute::cluster_sync();
}

}  // namespace flash_mla::sm90
