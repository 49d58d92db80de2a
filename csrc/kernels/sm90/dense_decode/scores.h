// The scores warpgroup: S = Q·Kᵀ on the tensor cores, softmax, P into shared memory for the output warpgroups.
#pragma once

#include "kernels/sm90/dense_decode/load.h"
#include "kernels/sm90/dense_decode/traits.h"
#include "kernels/sm90/primitives/online_softmax.h"
#include "kernels/sm90/primitives/swizzled_operand.h"

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
        loader().load_first_blocks([&] { load_next_q(); });
        while (!next_piece().is_end()) {
            OnlineSoftmax softmax;
            write_all_probabilities(softmax);
            write_stats(softmax);
        }
        write_empty_pieces();
    }

private:
    __device__ BlockLoader<Traits> loader() const { return {params, maps, shared}; }
    __device__ Piece const& next_piece() const { return shared.pieces.wait(shared.pieces.next_scores); }

    __device__ void write_all_probabilities(OnlineSoftmax& softmax) {
        Piece const& piece = next_piece();
        int num_keys[kRowsPerThread];  // that a row sees, from the current block on
        count_keys(piece, num_keys);
        // What is left but the last one; a bit tells the first block, in the same register.
        constexpr uint32_t kFirst = 1u << 31;
        uint32_t blocks_left = (piece.num_blocks() - 1) | kFirst;
        q.finish();
        cute::cp_async_wait<0>();
        cutlass::arch::fence_view_async_shared();
        sync_warpgroup();
        if (thread_in_warpgroup_now() == 0) ++shared.pieces.next_scores;

        Scores scores;
#pragma unroll 1
        for (; (blocks_left & ~kFirst) != 0; blocks_left = (blocks_left & ~kFirst) - 1) {
            finish_scores(scores, (blocks_left & kFirst) == 0);
            write_probabilities(scores, num_keys, softmax);
            if (!Traits::kTensorBound) warp_arrive(shared.barriers.p_ready[at.slot()]);
            at.advance();
        }
        finish_scores(scores, (blocks_left & kFirst) == 0);
        sync_warpgroup();
        load_next_q();
        write_probabilities(scores, num_keys, softmax);
        warp_arrive(shared.barriers.p_ready[at.slot()]);
        at.advance();
    }

    // Completes the scores of the current block.
    __device__ void finish_scores(Scores& scores, bool previous_is_held) {
        issue_latent_scores(scores);
        if (thread_in_warpgroup_now() < 32) loader().look_up(at.later(Traits::kNumStages));
        issue_rope_scores(scores);
        if constexpr (Traits::kTensorBound) {
            // The output of the block before may begin: by the time it does, the tensor cores are nearly through with
            // these scores, and then busy with the output while the softmax is computed.
            cute::warpgroup_wait<1>();
            if (previous_is_held) warp_arrive(shared.barriers.p_ready[at.slot() ^ 1]);
        }
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(scores);
        // The page looked up meanwhile is there for who sees p_ready.
        cute::cp_async_wait<0>();
    }

    // Starts the gather of the query rows of the next piece, if there is one.
    __device__ void load_next_q() {
        Piece const& piece = next_piece();
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
            int const visible =
                params.causal ? min(piece.seqlen - params.seqlen_q + token + 1, piece.seqlen) : piece.seqlen;
            num_keys[h] = visible - piece.begin_block * kPageSize;
        }
    }

    // Starts the latent columns' part of the current block's scores.
    __device__ void issue_latent_scores(Scores& scores) {
        SwizzledOperand const latent(shared_address(shared.latent) + at.stage() * sizeof(shared.latent[0]));
        cute::warpgroup_fence_operand(scores);
        shared.barriers.latent_full[at.stage()].wait(at.stage_phase());
        cute::warpgroup_arrive();
        multiply_register_q(scores, latent);
        multiply_shared_q(scores, 0, latent, kRegisterSteps);
        cute::warpgroup_commit_batch();
    }

    // Starts the RoPE columns' part of the current block's scores.
    __device__ void issue_rope_scores(Scores& scores) {
        SwizzledOperand const rope(shared_address(shared.rope_or_p) + at.slot() * sizeof(shared.rope_or_p[0]));
        shared.barriers.rope_full[at.slot()].wait(at.slot_phase());
        cute::warpgroup_arrive();
        multiply_shared_q(scores, Traits::kQSharedChunks - 1, rope, 0);
        cute::warpgroup_commit_batch();
        cute::warpgroup_fence_operand(scores);
    }

    __device__ void multiply_register_q(Scores& scores, SwizzledOperand const& latent) {
        using namespace cute;
        typename Traits::MmaScoresRegisterQ mma;
        mma.accumulate_ = GMMA::ScaleOut::Zero;
        Tensor const r_q = make_tensor(
            make_rmem_ptr(reinterpret_cast<Element*>(q.word)),
            Layout<Shape<Shape<_2, _2, _2>, _1, Int<kRegisterSteps>>, Stride<Stride<_1, _2, _4>, _0, _8>>{});
#pragma unroll
        for (int step = 0; step < kRegisterSteps; ++step) {
            cute::gemm(mma, r_q(_, _, step), latent.step(step), scores);
            mma.accumulate_ = GMMA::ScaleOut::One;
        }
    }

    // One chunk of Q in shared memory by one of K.
    __device__ void multiply_shared_q(Scores& scores, int q_chunk, SwizzledOperand const& k, int first_k_step) {
        typename Traits::MmaScoresSharedQ mma;
        SwizzledOperand const q_shared(shared_address(shared.q));
#pragma unroll
        for (int step = 0; step < Traits::kStepsPerChunk; ++step) {
            cute::gemm(mma, q_shared.step(q_chunk * Traits::kStepsPerChunk + step), k.step(first_k_step + step),
                       scores);
        }
    }

    // Turns scores into P, which the output warpgroups see once p_ready is signalled.
    __device__ void write_probabilities(Scores& scores, int (&num_keys)[kRowsPerThread], OnlineSoftmax& softmax) const {
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
        uint32_t const row_address = shared_address(shared.rope_or_p[slot]) + row * 128;
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
    __device__ void write_stats(OnlineSoftmax const& softmax) {
        int const index = shared.pieces.next_scores - 1;
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
                params.lse_partial[partial_row(params.grid, piece.slot, lane, row)] = lse_log2;
            } else if (at.exists) {
                constexpr float kLn2 = 0.693147180559945309417f;
                params.lse[lse_offset(params, piece.batch, at)] = total == 0.f ? INFINITY : lse_log2 * kLn2;
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
                params.lse_partial[partial_row(params.grid, piece.slot, lane, row)] = -INFINITY;
                continue;
            }
            auto* const out =
                reinterpret_cast<uint4*>(static_cast<Element*>(params.out) + out_offset(params, piece.batch, at));
            for (int i = thread % 32; i < kHeadDimV / 8; i += 32) out[i] = uint4{0, 0, 0, 0};
            params.lse[lse_offset(params, piece.batch, at)] = INFINITY;
        }
    }
};

}  // namespace flash_mla::sm90
