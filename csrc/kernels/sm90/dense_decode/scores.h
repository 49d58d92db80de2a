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
    static constexpr int kStepsPerHalf = Traits::kChunksPerHalf * Traits::kStepsPerChunk;

    DenseDecodeParams const& params;
    SharedStorage& shared;
    int thread;  // in the warpgroup
    BlockPosition<Traits> at = {};
    uint32_t stats_phase = 0;
    QRegisters<Traits> q = {};

    struct RowLimits {
        int visible[kRowsPerThread];  // keys before this index are seen
        int visible_to_all;           // by every row of the tile
    };

    __device__ void run() {
        int index = 0;
        load_q(index);
        for (;; ++index) {
            Piece const& piece = shared.pieces.wait(index);
            if (piece.batch == PieceQueue::kEnd) break;
            OnlineSoftmax softmax;
            write_all_probabilities(piece, index, softmax);
            write_stats(piece, softmax);
        }
        write_empty_pieces();
    }

private:
    __device__ void write_all_probabilities(Piece const& piece, int index, OnlineSoftmax& softmax) {
        RowLimits const limits = row_limits(piece);
        q.finish();
        cute::cp_async_wait<0>();
        cutlass::arch::fence_view_async_shared();
        sync_warpgroup();
        int block = piece.begin_block;
        int const last = piece.end_block - 1;
        bool previous_is_held = false;
#pragma unroll 1
        for (; block <= last; ++block) {
            Scores scores;
            issue_scores(scores, [&] {
                if (Traits::kTensorBound && previous_is_held) warp_arrive(shared.barriers.p_ready[at.slot() ^ 1]);
            });
            cute::warpgroup_wait<0>();
            cute::warpgroup_fence_operand(scores);
            if (block == last) {
                sync_warpgroup();
                load_q(index + 1);
            }
            write_probabilities(scores, block, limits, softmax);
            previous_is_held = block != last;
            if (!Traits::kTensorBound || block == last) warp_arrive(shared.barriers.p_ready[at.slot()]);
            at.advance();
        }
    }

    // Starts the gather of the query rows of a piece, if there is one.
    __device__ void load_q(int index) {
        Piece const& piece = shared.pieces.wait(index);
        if (piece.batch == PieceQueue::kEnd) return;
        load_q_shared<Traits>(params, shared, piece, thread);
        q.load(params, piece, thread);
    }

    __device__ static void sync_warpgroup() {
        cutlass::arch::NamedBarrier::sync(128, warpgroup_barrier(WarpgroupRole::kScores));
    }

    __device__ RowLimits row_limits(Piece const& piece) const {
        RowLimits limits;
#pragma unroll
        for (int h = 0; h < kRowsPerThread; ++h) {
            int const token = query_row(params, piece.place, fragment_row(thread, h)).token;
            limits.visible[h] = params.causal ? min(piece.seqlen - params.seqlen_q + token + 1, piece.seqlen) : piece.seqlen;
        }
        limits.visible_to_all = params.causal ? piece.seqlen - params.seqlen_q + 1 : piece.seqlen;
        return limits;
    }

    // Calls near_end when all but the last chunk is in the tensor cores.
    template <typename NearEnd>
    __device__ void issue_scores(Scores& scores, NearEnd&& near_end) {
        using namespace cute;
        Element* latent = &shared.latent[at.stage()][0][0];
        Element* rope = &shared.rope_or_p[at.slot()][0];
        Element* q_shared = &shared.q[0][0];
        // Without this the descriptors of all steps are kept in registers across blocks.
        asm volatile("" : "+l"(latent), "+l"(rope), "+l"(q_shared));

        typename Traits::MmaScoresRegisterQ mma_registers;
        typename Traits::MmaScoresSharedQ mma_shared;
        auto const thread_mma = mma_shared.get_slice(thread);
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
        shared.barriers.latent_full[at.stage()][0].wait(at.stage_phase());
        warpgroup_arrive();
#pragma unroll
        for (int step = 0; step < kStepsPerHalf; ++step) {
            cute::gemm(mma_registers, r_q(_, _, step), r_latent(_, _, step), scores);
            mma_registers.accumulate_ = GMMA::ScaleOut::One;
        }
        shared.barriers.latent_full[at.stage()][1].wait(at.stage_phase());
        warpgroup_arrive();
#pragma unroll
        for (int step = kStepsPerHalf; step < kRegisterSteps; ++step) {
            cute::gemm(mma_registers, r_q(_, _, step), r_latent(_, _, step), scores);
        }
#pragma unroll
        for (int step = 0; step < Traits::kStepsPerChunk; ++step) {
            cute::gemm(mma_shared, r_q_shared(_, _, step), r_latent(_, _, kRegisterSteps + step), scores);
        }
        near_end();
        shared.barriers.rope_full[at.slot()].wait(at.slot_phase());
        warpgroup_arrive();
#pragma unroll
        for (int step = 0; step < Traits::kStepsPerChunk; ++step) {
            cute::gemm(mma_shared, r_q_shared(_, _, Traits::kStepsPerChunk + step), r_rope(_, _, step), scores);
        }
        warpgroup_commit_batch();
        warpgroup_fence_operand(scores);
    }
    // Turns the scores of `block` into P, which the output warpgroups see once p_ready is signalled.
    __device__ void write_probabilities(Scores& scores, int block, RowLimits const& limits, OnlineSoftmax& softmax) {
        int const first_key = block * kPageSize;
        if (first_key + kPageSize > limits.visible_to_all) {
#pragma unroll
            for (int i = 0; i < kNumScores; ++i) {
                int const key = first_key + fragment_column(thread, i / 4) + i % 2;
                if (key >= limits.visible[i / 2 % 2]) scores[i] = OnlineSoftmax::kMinusInfinity;
            }
        }
        float rescale[kRowsPerThread];
        bool const must_rescale = softmax.raise(scores, params.softmax_scale_log2, rescale);

        int const warp = thread / 32, lane = thread % 32, slot = at.slot();
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
    __device__ void write_stats(Piece const& piece, OnlineSoftmax const& softmax) {
        shared.barriers.stats_empty.wait(stats_phase ^ 1);
        stats_phase ^= 1;
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
        int const lane = blockIdx.x % params.grid.num_lanes;
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
