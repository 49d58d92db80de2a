// Paged decode of Multi-head Latent Attention, dense: one or a few query tokens per request against its latent cache.
//
//   S = scale · Q·Kᵀ      Q (64 rows, 576)   K (64 tokens, 576)
//   P = softmax(S)        masked to the request's tokens, and bottom-right causal where asked
//   O = P·V               V = the first 512 columns of K
//
// The query rows of a request and kv head (tokens × heads of the group) are packed into tiles of 64. A CTA runs through
// the pieces of its worker's stretch of the plan (pieces.h): persistent, one CTA per SM, 384 threads, 168 registers each.
//
// Warpgroups
//   scores       S, softmax, P to shared memory, log-sum-exp; gathers the query rows; looks up the page of the KV block
//                that each freed stage takes next ("order")
//   output low   O for columns 0–255; when it has freed its half of a stage, starts the copies that refill it
//   output high  O for columns 256–511; the same, and the RoPE columns
//
// Shared memory (bytes)
//   q                73728   9 chunks (64 rows × 64 columns, 128-byte swizzle); free for the next piece after its last S
//   kv           2 × 73728   ring of 2 stages, 9 chunks each. Chunks 0–7 are K's latent columns and V; chunk 8 is RoPE
//                            until S of the block is done, then P (64 × 64) until O of the block is done
//   statistics               rescale factors, flags and load order per stage, 1 / row sum per piece
//
// Barriers (mbarriers)       arrivals                        waited for by
//   kv_full[stage][chunk]    who starts the copy + 8192 B    scores
//   p_ready[stage]           4 warps of scores               output: P, rescale and order of the stage are there
//   p_read_by_low[stage]     4 warps of output low           output high, before it overwrites P with RoPE
//   stats_full               4 warps of scores               output
//   stats_empty              8 warps of output               scores
// Every warpgroup has a hardware barrier of its own: scores before P overwrites RoPE and around the query rows, output
// before it refills what its four warps read. All that ordinary stores put where wgmma or a copy comes next passes a
// proxy fence before its barrier.
//
// Numerics: scores in float32, softmax in the log2 domain with a lazily raised maximum (online_softmax.h), P in the
// input type, O in float32. A row that sees no key gives 0 and +inf. Keys behind the last one are cleared from V.
//
// The ops guarantee: shapes and strides as dense_decode.h says, 16-byte aligned rows, a plan with one row per worker.
#pragma once

#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>

#include "kernels/sm90/dense_decode/output.h"
#include "kernels/sm90/dense_decode/scores.h"

namespace flash_mla::sm90 {

template <typename Traits>
__device__ void init_barriers(typename Traits::Barriers& barriers) {
    for (auto& halves : barriers.latent_full) {
        for (auto& full : halves) full.init(1);
    }
    for (int slot = 0; slot < Traits::kNumSlots; ++slot) {
        barriers.rope_full[slot].init(1);
        barriers.p_ready[slot].init(4);
        barriers.consumed[slot].init(8 * Traits::kClusterSize);
    }
    barriers.stats_full.init(4);
    barriers.stats_empty.init(8);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kNumThreads, 1)
    dense_decode_kernel(__grid_constant__ DenseDecodeParams const params, __grid_constant__ KMaps const maps) {
    using SharedStorage = typename Traits::SharedStorage;
    extern __shared__ __align__(1024) char shared_bytes[];
    auto& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
    if (threadIdx.x == 0) {
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&maps.latent));
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&maps.rope));
        init_barriers<Traits>(shared.barriers);
        shared.pieces.init();
        cutlass::arch::fence_barrier_init();
    }
    if constexpr (Traits::kClusterSize > 1) {
        cute::cluster_sync();
    } else {
        __syncthreads();
    }
    cutlass::arch::launch_dependent_grids();

    int const thread = threadIdx.x % 128;
    auto const role = static_cast<WarpgroupRole>(__shfl_sync(~0u, threadIdx.x / 128, 0));
    if (role == WarpgroupRole::kScores) {
        cutlass::arch::warpgroup_reg_alloc<Traits::kScoresRegisters>();
        ScoresMainloop<Traits>{params, maps, shared}.run();
    } else {
        cutlass::arch::warpgroup_reg_dealloc<Traits::kOutputRegisters>();
        OutputMainloop<Traits>{params, maps, shared, role, thread}.run();
    }
    // Nobody leaves while another CTA may still write into its shared memory.
    if constexpr (Traits::kClusterSize > 1) cute::cluster_sync();
}

}  // namespace flash_mla::sm90
