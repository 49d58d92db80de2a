// The scores warpgroup: S = Q·Kᵀ on the tensor cores, softmax, P into shared memory for the output warpgroups.
#pragma once

#include "kernels/sm90/dense_decode/load.h"
#include "kernels/sm90/dense_decode/traits.h"
#include "kernels/sm90/primitives/online_softmax.h"

namespace flash_mla::sm90 {

template <typename Traits>
struct ScoresMainloop {
    using Element = typename Traits::Element;
    using SharedStorage = typename Traits::SharedStorage;

    using Scores = decltype(cute::partition_fragment_C(typename Traits::MmaScoresSharedQ{},
                                                       cute::Shape<cute::Int<kBlockM>, cute::Int<kPageSize>>{}));
    static constexpr int kNumScores = decltype(cute::size(Scores{}))::value;  // per thread
    static constexpr int kRegisterSteps = QRegisters<Traits>::kNumSteps;

    DenseDecodeParams const& params;
    KMaps const& maps;
    SharedStorage& shared;
    BlockPosition<Traits> at = {};
    QRegisters<Traits> q = {};

    __device__ void run() {
        if (thread_in_warpgroup_now() == 0) BlockLoader<Traits>{params, maps, shared}.load_first_blocks();
        load_q(0);
        int index = 0;
        for (; !shared.pieces.wait(index).is_end(); ++index) {
            OnlineSoftmax softmax;
            write_all_probabilities(index, softmax);
            write_stats(index, softmax);
        }
        write_empty_pieces();
    }

private:
    __device__ void write_all_probabilities(int index, OnlineSoftmax& softmax) {
        int num_keys[kRowsPerThread];  // that a row sees, from the current block on
        count_keys(shared.pieces.get(index), num_keys);
        cute::cp_async_wait<0>();
        cutlass::arch::fence_view_async_shared();
        sync_warpgroup();
        int blocks_left = shared.pieces.get(index).num_blocks();
#pragma unroll 1
        do {
            Scores scores;
            issue_scores(scores);
            // All but the last chunk are through: the output of the block before may take over the tensor cores.
            cute::warpgroup_wait<1>();
            if (Traits::kTensorBound && blocks_left != shared.pieces.get(index).num_blocks()) {
                warp_arrive(shared.barriers.p_ready[at.slot() ^ 1]);
            }
            cute::warpgroup_wait<0>();
            cute::warpgroup_fence_operand(scores);
            // The page looked up meanwhile is there for who sees p_ready.
            cute::cp_async_wait<0>();
            --blocks_left;
            if (blocks_left == 0) {
                sync_warpgroup();
                load_q(index + 1);
            }
            write_probabilities(scores, num_keys, softmax);
            if (!Traits::kTensorBound || blocks_left == 0) warp_arrive(shared.barriers.p_ready[at.slot()]);
            at.advance();
        } while (blocks_left > 0);
    }

    // Starts the gather of the query rows of a piece, if there is one.
    __device__ void load_q(int index) {
        Piece const& piece = shared.pieces.wait(index);
        if (piece.is_end()) return;
        load_q_shared<Traits>(params, shared, piece, thread_in_warpgroup_now());
        q.load(params, piece, thread_in_warpgroup_now());
    }

    __device__ static void sync_warpgroup() {
        cutlass::arch::NamedBarrier::sync(128, warpgroup_barrier(WarpgroupRole::kScores));
    }

    __device__ void count_keys(Piece const& piece, int (&num_keys)[kRowsPerThread]) const {
        int const thread = thread_in_warpgroup_now();
#pragma unroll
        for (int h = 0; h < kRowsPerThread; ++h) {
            int const token = query_row(params, piece.place, fragment_row(thread, h)).token;
            int const visible = params.causal ? min(piece.seqlen - params.seqlen_q + token + 1, piece.seqlen) : piece.seqlen;
            num_keys[h] = visible - piece.begin_block * kPageSize;
        }
    }

    // In two groups of wgmma: the latent columns, the RoPE columns.
    __device__ void issue_scores(Scores& scores) {
        using namespace cute;
        Element* latent = &shared.latent[at.stage()][0][0];
        Element* rope = &shared.rope_or_p[at.slot()][0];
        Element* q_shared = &shared.q[0][0];
        // Without this the descriptors of all steps are kept in registers across blocks.
        asm volatile("" : "+l"(latent), "+l"(rope), "+l"(q_shared));

        typename Traits::MmaScoresRegisterQ mma_registers;
        typename Traits::MmaScoresSharedQ mma_shared;
        auto const thread_mma = mma_shared.get_slice(0);
        Tensor const s_q = make_tensor(make_smem_ptr(q_shared), typename Traits::template LayoutRows<Traits::kQSharedChunks * Traits::kChunkColumns>{});
        Tensor const s_latent = make_tensor(make_smem_ptr(latent), typename Traits::template LayoutRows<kHeadDimV>{});
        Tensor const s_rope = make_tensor(make_smem_ptr(rope), typename Traits::template LayoutRows<Traits::kChunkColumns>{});
        Tensor const r_q = make_tensor(make_rmem_ptr(reinterpret_cast<Element*>(q.word)),
                                       Layout<Shape<Shape<_2, _2, _2>, _1, Int<kRegisterSteps>>,
                                              Stride<Stride<_1, _2, _4>, _0, _8>>{});
        Tensor const r_q_shared = thread_mma.partition_fragment_A(s_q);     // (MMA, 1, k)
        Tensor const r_latent = thread_mma.partition_fragment_B(s_latent);  // (MMA, 1, k)
        Tensor const r_rope = thread_mma.partition_fragment_B(s_rope);      // (MMA, 1, k)

        mma_registers.accumulate_ = GMMA::ScaleOut::Zero;
        warpgroup_fence_operand(scores);
        shared.barriers.latent_full[at.stage()].wait(at.stage_phase());
        warpgroup_arrive();
#pragma unroll
        for (int step = 0; step < kRegisterSteps; ++step) {
            cute::gemm(mma_registers, r_q(_, _, step), r_latent(_, _, step), scores);
            mma_registers.accumulate_ = GMMA::ScaleOut::One;
        }
#pragma unroll
        for (int step = 0; step < Traits::kStepsPerChunk; ++step) {
            cute::gemm(mma_shared, r_q_shared(_, _, step), r_latent(_, _, kRegisterSteps + step), scores);
        }
        warpgroup_commit_batch();
        if (thread_in_warpgroup_now() == 0) {
            BlockLoader<Traits>{params, maps, shared}.look_up(at.later(Traits::kNumStages));
        }
        __syncwarp();
        shared.barriers.rope_full[at.slot()].wait(at.slot_phase());
        warpgroup_arrive();
#pragma unroll
        for (int step = 0; step < Traits::kStepsPerChunk; ++step) {
            cute::gemm(mma_shared, r_q_shared(_, _, Traits::kStepsPerChunk + step), r_rope(_, _, step), scores);
        }
        warpgroup_commit_batch();
        warpgroup_fence_operand(scores);
    }

    // Turns scores into P, which the output warpgroups see once p_ready is signalled.
    __device__ void write_probabilities(Scores& scores, int (&num_keys)[kRowsPerThread], OnlineSoftmax& softmax) {
        if (min(num_keys[0], num_keys[1]) < kPageSize) {
            int const thread = thread_in_warpgroup_now();
#pragma unroll
            for (int i = 0; i < kNumScores; ++i) {
                int const key = fragment_column(thread, i / 4) + i % 2;
                if (key >= num_keys[i / 2 % 2]) scores[i] = OnlineSoftmax::kMinusInfinity;
            }
        }
        num_keys[0] -= kPageSize;
        num_keys[1] -= kPageSize;
        float rescale[kRowsPerThread];
        bool const must_rescale = softmax.raise(scores, params.softmax_scale_log2, rescale);

        int const thread = thread_in_warpgroup_now(), warp = thread / 32, lane = thread % 32, slot = at.slot();
        if (must_rescale && lane % 4 == 0) {
            shared.rescale[slot][fragment_row(thread, 0)] = rescale[0];
            shared.rescale[slot][fragment_row(thread, 1)] = rescale[1];
        }
        if (lane == 0) shared.must_rescale[slot][warp] = must_rescale;

        softmax.exponentiate(scores, params.softmax_scale_log2);

        // P overwrites RoPE columns, which all four warps must have read.
        sync_warpgroup();
        int const row = 16 * warp + lane % 16;
        uint32_t const row_address = cute::cast_smem_ptr_to_uint(shared.rope_or_p[slot]) + row * 128;
#pragma unroll
        for (int pair = 0; pair < kPageSize / 16; ++pair) {  // two tiles of 8 columns
            uint32_t word[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                word[i] = pack_pair(scores[8 * pair + 2 * i], scores[8 * pair + 2 * i + 1], Element{});
            }
            store_matrix_x4(row_address + (((2 * pair + lane / 16) ^ (row % 8)) * 16), word);
        }
        cutlass::arch::fence_view_async_shared();
    }

    // Row statistics of a piece: 1 / sum for the output warpgroups, log-sum-exp to global memory.
    __device__ void write_stats(int index, OnlineSoftmax const& softmax) {
        Piece const& piece = shared.pieces.get(index);
        int const thread = thread_in_warpgroup_now();
        shared.barriers.stats_empty.wait(index % 2 ^ 1);
#pragma unroll
        for (int h = 0; h < kRowsPerThread; ++h) {
            float const total = softmax.total(h);
            float const lse_log2 = softmax.log2_sum(h, total);
            if (thread % 4 != 0) continue;
            int const row = fragment_row(thread, h);
            shared.inverse_sum[row] = total == 0.f ? 0.f : 1.f / total;
            QueryRow const at = query_row(params, piece.place, row);
            if (piece.is_partial()) {
                int const lane = blockIdx.x % params.grid.num_lanes;
                params.lse_partial[(int64_t(piece.slot) * params.grid.num_lanes + lane) * kBlockM + row] = lse_log2;
            } else if (at.exists) {
                constexpr float kLn2 = 0.693147180559945309417f;
                params.lse[(int64_t(piece.batch) * params.num_heads_q + at.head_q) * params.seqlen_q + at.token] =
                    total == 0.f ? INFINITY : lse_log2 * kLn2;
            }
        }
        warp_arrive(shared.barriers.stats_full);
    }

    // Pieces that pass by the pipeline because they have no keys.
    __device__ void write_empty_pieces() const {
        PieceCursor pieces(params);
        Piece piece;
        while (pieces.next(params, piece)) {
            if (piece.is_empty()) write_empty(piece);
        }
    }

    __device__ void write_empty(Piece const& piece) const {
        int const thread = thread_in_warpgroup_now(), lane = blockIdx.x % params.grid.num_lanes;
        for (int row = thread / 32; row < kBlockM; row += 4) {
            QueryRow const at = query_row(params, piece.place, row);
            if (!at.exists) return;
            if (piece.is_partial()) {
                // The combine reads no output where the weight is 0.
                params.lse_partial[(int64_t(piece.slot) * params.grid.num_lanes + lane) * kBlockM + row] = -INFINITY;
                continue;
            }
            auto* const out = reinterpret_cast<uint4*>(
                static_cast<Element*>(params.out) + piece.batch * params.out_batch_stride +
                at.token * params.out_token_stride + at.head_q * params.out_head_stride);
            for (int i = thread % 32; i < kHeadDimV / 8; i += 32) out[i] = uint4{0, 0, 0, 0};
            params.lse[(int64_t(piece.batch) * params.num_heads_q + at.head_q) * params.seqlen_q + at.token] = INFINITY;
        }
    }
};

}  // namespace flash_mla::sm90
