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
//   output low (160)   O for columns 0–255; one of its warps loads the first blocks; copies that half of later latent
//                      columns to where V was, and RoPE columns to where P was
//   output high (160)  the same for columns 256–511, but for RoPE
//
// Shared memory (bytes)
//   latent   3 × 65536   K's latent columns and V: 8 chunks (64 tokens × 64 columns, 128-byte swizzle) per stage
//   rope_or_p 2 × 8192   K's RoPE columns, and once they are multiplied P (64 × 64) of the block before; P of the last
//                        block of a piece where its own RoPE columns and P of the block before were
//   q            16384   the last 64 of Q's latent columns and its RoPE columns
//   the rest      2048   rescale factors and flags, 1 / row sum, page orders, pieces, barriers; 420 of it are free
//
// Barriers (mbarriers)   arrivals                           waited for by
//   first_rows[i]        the warps of scores, 73728 B       scores; for the first of them also who loads the first blocks
//                        together; no bytes where there is
//                        nothing to bring
//   next_rows            the same; no bytes where the next  scores
//                        piece has no other rows
//   first_pages          who looks up the first blocks      who looks up the next, and who copies RoPE columns first
//   rows_asked           the warps of scores                who loads the first blocks: these come behind the rows,
//                                                           which have a longer way before them
//   early_block          who loads the first blocks         the same: what seemed to be the first block is there
//                        + 73728 B
//   block_full[stage]    who starts the copies of latent    scores
//                        and of RoPE columns + 73728 B;
//                        no bytes where an early block is
//                        the first one
//   p_ready[turn]        the quads of scores                output: P, rescale factors and the page of the third next
//                                                           block are there
//   p_consumed[turn]     the quads of output                who copies RoPE columns to where P was; scores, before they
//                                                           store P of the last block of a piece
//   consumed[stage][h]   4 warps of the output half h, of   who copies that half
//                        every CTA; of scores for the last
//                        block of a piece and, at first, for
//                        the last stage
//   stats_full           the quads of scores                output
//   stats_empty          the quads of output                scores
//   pieces.full[i]       who looks up pages                 scores, output
// clang-format on
// The scores warpgroup has a hardware barrier of its own, at the begin of a piece and in each S, when its RoPE columns
// are multiplied; an output warpgroup has one for clearing keys. Output warpgroups begin a piece when its query rows
// are in registers (kRowsBarrier), and scores wait for the outputs of its last block before they bring the next ones
// through its stage (kLastOutputsBarrier). All that ordinary stores put where wgmma or a copy comes next passes a proxy
// fence before its barrier. What lanes read or write for their rows is read or written by the first lane of each quad,
// which itself arrives at the barrier that orders it.
//
// Before the kernel before has ended, a CTA finds out with which piece and blocks it will probably begin, and has a
// part of the first block brought to the L2; as soon as it has ended this block and the query rows are asked for, and
// then it is found out whether they are the right ones (early_block.h).
//
// One block: S of block i+1 is issued, and P of block i stored meanwhile; once all of it is, the tensor cores have
// some ten steps left, and P of block i is released, so that O of block i runs under the softmax of block i+1.
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
        barriers.block_full[stage].init(Traits::kHalvesPerCta + 1);
        for (auto& consumed : barriers.consumed[stage]) consumed.init(4 * Traits::kClusterSize);
    }
    for (auto& p_ready : barriers.p_ready) p_ready.init(4 * kQuadsPerWarp);
    for (auto& p_consumed : barriers.p_consumed) p_consumed.init(8 * kQuadsPerWarp);
    barriers.stats_full.init(4 * kQuadsPerWarp);
    barriers.stats_empty.init(8 * kQuadsPerWarp);
    barriers.early_block.init(1);
    barriers.rows_asked.init(4);
    for (auto& first_rows : barriers.first_rows) first_rows.init(4);
    barriers.next_rows.init(4);
    barriers.first_pages.init(1);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kNumThreads, 1)
    dense_decode_kernel(__grid_constant__ DenseDecodeParams const params, __grid_constant__ DecodeMaps const maps) {
    using SharedStorage = typename Traits::SharedStorage;
    extern __shared__ __align__(1024) char shared_bytes[];
    auto& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
    int const thread = threadIdx.x % 128, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    auto const role = static_cast<WarpgroupRole>(warp / 4);
    bool const is_first_loader = warp == Traits::kFirstLoader / 32;
    if (role != WarpgroupRole::kScores) cutlass::arch::warpgroup_reg_dealloc<Traits::kOutputRegisters>();
    if (threadIdx.x == 0) {
        init_barriers<Traits>(shared.barriers);
        cutlass::arch::fence_barrier_init();
    }
    if (threadIdx.x == Traits::kFirstLoader) {
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&maps.latent));
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&maps.rope));
        shared.pieces.init();
    }
    if (threadIdx.x == 0 && maps.has_q)
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&maps.q));
    if (is_first_loader) prefetch_plan(params);
    __syncwarp();
    cute::cluster_arrive();
    BlockLoader<Traits> const loader{params, maps, shared};
    // A cluster's barrier also where a CTA is alone: __syncthreads has to stand in one place.
    auto const begin = [] {
        cute::cluster_wait();
        wait_for_previous_kernel();
        allow_dependent_launch();
    };

    if (role == WarpgroupRole::kScores) {
        cutlass::arch::warpgroup_reg_alloc<Traits::kScoresRegisters>();
        Piece const likely = likely_first_piece(params);
        begin();
        ScoresMainloop<Traits>{params, maps, shared}.run(likely);
    } else {
        if (is_first_loader) {
            typename BlockLoader<Traits>::Early const early(params);
            int page[BlockLoader<Traits>::kNumEarly];
            if (thread == 0) loader.look_ahead(early, page);
            __syncwarp();
            begin();
            if (thread == 0) loader.load_first_blocks(early, page);
            __syncwarp();
        } else {
            begin();
        }
        OutputMainloop<Traits>{params, maps, shared, role, thread}.run();
    }
    // A CTA waits for all that the other one of its cluster sends to it: for the bytes of each block, and for what is
    // announced of each stage, also where nothing follows. So nothing comes after its end, and it need not wait for the
    // other's, which would be until all results are stored: a cluster's barrier releases them.
}

}  // namespace flash_mla::sm90
