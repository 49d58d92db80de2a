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

    using MmaSharedQ = typename Traits::MmaScoresSharedQ;
    using Scores = decltype(cute::partition_fragment_C(typename Traits::MmaScoresSharedQ{},
                                                       cute::Shape<cute::Int<kBlockM>, cute::Int<kPageSize>>{}));
    static constexpr int kNumScores = decltype(cute::size(Scores{}))::value;  // per thread
    static constexpr int kRegisterSteps = QRegisters<Traits>::kNumSteps;
    static constexpr int kFirstRowsStage = Traits::kNumStages - 1;
    static constexpr int kLatentSteps = Traits::kLatentChunks * Traits::kStepsPerChunk;
    // P of the block before is stored after so many steps for which Q is in registers, a quarter at a time: late enough
    // for the RoPE columns, whose place it takes, to be multiplied, early enough to be through before the last step.
    static constexpr int kStepsBeforeStore = 4, kStepsPerStore = 2, kNumStores = kPageSize / 16;
    static_assert(kStepsBeforeStore + (kNumStores - 1) * kStepsPerStore < kRegisterSteps);

    // P of a block as the operand of the outputs, packed; undefined until computed.
    struct Probabilities {
        uint32_t word[kNumScores / 2];
        __device__ Probabilities() {}
    };

    DenseDecodeParams const& params;
    DecodeMaps const& maps;
    SharedStorage& shared;
    BlockPosition<Traits> at = {};
    QRegisters<Traits> q;

    // likely: of the tile of the first piece, as it seemed to be before the kernel before had ended.
    __device__ void run(Piece const& likely) {
        load_first_q(likely);
        while (!next_piece().is_end()) {
            OnlineSoftmax softmax;
            write_all_probabilities(softmax);
            write_stats(softmax);
            load_next_q();
        }
        if (at.count == 0) leave_stage(kFirstRowsStage);
        write_empty_pieces();
    }

private:
    __device__ BlockLoader<Traits> loader() const { return {params, maps, shared}; }
    __device__ static bool is_look_up_warp() { return thread_in_warpgroup_now() / 32 == Traits::kLookUpWarp; }
    __device__ Piece const& next_piece() const { return shared.pieces.wait(shared.pieces.next_scores); }

    __device__ void write_all_probabilities(OnlineSoftmax& softmax) {
        // A bit tells that this is the first block, in the same register.
        constexpr uint32_t kFirst = 1u << 31;
        uint32_t blocks_left = next_piece().num_blocks() | kFirst;
        sync_warpgroup();
        if (thread_in_warpgroup_now() == 0) {
            shared.first_masked = at.count + first_masked_block(shared.pieces.get(shared.pieces.next_scores));
            ++shared.pieces.next_scores;
        }

        Scores scores;
        Probabilities probabilities;
#pragma unroll 1
        do {
            bool const is_first = blocks_left & kFirst;
            blocks_left = (blocks_left & ~kFirst) - 1;
            // P of the block before has waited in registers until these scores are on their way: so the tensor cores
            // have work while it is stored. Then its output may begin: by the time it does, the tensor cores are nearly
            // through with these scores, and then busy with the output while the softmax is computed.
            issue_scores(scores, !is_first, probabilities);
            if (is_first) {
                if (at.count == 0) {
                    leave_stage(kFirstRowsStage);
                    shared.barriers.first_pages.wait(0);
                }
                if (blocks_left != 0) refill_rope();
                if constexpr (Traits::kSummation == Summation::kBySegments) {
                    if (thread_in_warpgroup_now() == 0) find_way();
                }
            } else {
                release_probabilities();
            }
            if (is_look_up_warp()) loader().look_up(at.later(Traits::kNumStages));
            bool const is_masked = at.count >= shared.first_masked;
            cute::warpgroup_wait<0>();
            cute::warpgroup_fence_operand(scores);
            // The page looked up meanwhile is there for who sees p_ready, and for scores behind their barrier in the
            // next S.
            cute::cp_async_wait<0>();
            if (is_masked) mask(scores, blocks_left);
            compute_probabilities(scores, softmax, is_first, probabilities);
            at.advance();
        } while (blocks_left != 0);
        store_last(probabilities);
        release_probabilities();
    }

    // Warps may have found different likely tiles, and each corrects its own share.
    __device__ void load_first_q(Piece const& likely) {
        auto& first_rows = shared.barriers.first_rows;
        q.begin_loading(params, maps, shared, likely, !likely.is_end(), kFirstRowsStage, first_rows[0]);
        if (thread_in_warpgroup_now() % 32 == 0) shared.barriers.rows_asked.arrive();
        Piece const& piece = next_piece();
        first_rows[0].wait(0);
        bool const was_wrong = !piece.is_end() && !piece.is_of_tile(likely);
        q.begin_loading(params, maps, shared, piece, was_wrong, kFirstRowsStage, first_rows[1]);
        first_rows[1].wait(0);
        q.load_staged(shared, kFirstRowsStage);
    }

    // Where the next piece is of another tile, its query rows pass through the stage of the last block, as soon as the
    // outputs of that are done. Only then may another block come there.
    __device__ void load_next_q() {
        uint32_t const index = shared.pieces.next_scores - 1, stage = at.previous().stage();
        Piece const& next = next_piece();
        bool const stays_in_tile = Traits::kSummation == Summation::kBySegments && current_piece().is_partial() &&
                                   !SegmentOfWorker::unpacked(current_piece().slot).is_last();
        if (stays_in_tile) {
            if (thread_in_warpgroup_now() % 32 == 0) shared.barriers.next_rows.arrive();
            shared.barriers.next_rows.wait(index % 2);
            __syncwarp();
            cutlass::arch::NamedBarrier::arrive(3 * 128, kRowsBarrier);
            return;
        }
        cutlass::arch::NamedBarrier::sync(3 * 128, kLastOutputsBarrier);
        bool const has_other_rows = !next.is_end() && !next.is_of_tile(current_piece());
        q.begin_loading(params, maps, shared, next, has_other_rows, stage, shared.barriers.next_rows);
        shared.barriers.next_rows.wait(index % 2);
        if (has_other_rows) q.load_staged(shared, stage);
        leave_stage(stage);
    }

    // Rows are in registers. By each warp, in place of those that compute the outputs, the stage is announced as
    // consumed.
    __device__ void leave_stage(uint32_t stage) const {
        cutlass::arch::fence_view_async_shared();  // copies come to where these rows were
        __syncwarp();  // a hardware barrier counts warps that execute it, diverged ones twice
        cutlass::arch::NamedBarrier::arrive(3 * 128, kRowsBarrier);
        if (thread_in_warpgroup_now() % 32 != 0) return;
        for (int half = 0; half < 2; ++half) shared.barriers.announce_consumed(stage, half);
    }

    __device__ static void sync_warpgroup() {
        cutlass::arch::NamedBarrier::sync(128, warpgroup_barrier(WarpgroupRole::kScores));
    }

    __device__ Piece const& current_piece() const { return shared.pieces.get(shared.pieces.next_scores - 1); }

    // How many keys a query token sees from the current block on, which as many blocks follow.
    __device__ int num_keys(Piece const& piece, int token, uint32_t blocks_left) const {
        int const seen = params.causal ? min(piece.seqlen - params.seqlen_q + token + 1, piece.seqlen) : piece.seqlen;
        return seen - (piece.end_block - 1 - int(blocks_left)) * kPageSize;
    }
    // The first block of a piece that holds keys which some query token does not see.
    __device__ uint32_t first_masked_block(Piece const& piece) const {
        return max(num_keys(piece, 0, piece.num_blocks() - 1), 0) / kPageSize;
    }

    __device__ void mask(Scores& scores, uint32_t blocks_left) const {
        int const thread = thread_in_warpgroup_now();
        Piece const& piece = current_piece();
#pragma unroll
        for (int h = 0; h < kRowsPerThread; ++h) {
            int const token = query_row(params, piece.place, fragment_row(thread, h)).token;
            int const end = num_keys(piece, token, blocks_left);
#pragma unroll
            for (int i = 2 * h; i < kNumScores; i += 4) {
                int const key = fragment_column(thread, i / 4);
                if (key >= end) scores[i] = OnlineSoftmax::kMinusInfinity;
                if (key + 1 >= end) scores[i + 1] = OnlineSoftmax::kMinusInfinity;
            }
        }
    }

    // Starts the scores of the current block: first the RoPE columns, to whose place P of the block before is stored
    // meanwhile, if it is held. Nothing here branches once the first wgmma is issued: after a branch the next one waits
    // until all before are done.
    __device__ void issue_scores(Scores& scores, bool holds_previous, Probabilities const& probabilities) {
        using namespace cute;
        ColumnwiseOperand const q_latent(shared_address(shared.q[0])),
            q_rope(shared_address(shared.q[Traits::kQSharedChunks - 1])),
            rope(shared_address(shared.rope_or_p[at.rope_place()])),
            latent(shared_address(shared.latent) + at.stage() * sizeof(shared.latent[0]));
        uint32_t const address = probabilities_address(at.rope_place());
        shared.barriers.block_full[at.stage()].wait(at.stage_phase());
        warpgroup_fence_operand(scores);
        warpgroup_arrive();
        MmaSharedQ mma;
        mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
        for (int step = 0; step < Traits::kStepsPerChunk; ++step) {
            gemm(mma, q_rope.step(step), rope.step(step), scores);
            mma.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
#pragma unroll
        for (int step = 0; step < kLatentSteps - kRegisterSteps; ++step)
            gemm(mma, q_latent.step(step), latent.step(kRegisterSteps + step), scores);

        typename Traits::MmaScoresRegisterQ mma_register_q;
        Tensor const r_q = make_tensor(
            make_rmem_ptr(reinterpret_cast<Element*>(q.word)),
            Layout<Shape<Shape<_2, _2, _2>, _1, Int<kRegisterSteps>>, Stride<Stride<_1, _2, _4>, _0, _8>>{});
#pragma unroll
        for (int step = 0; step < kRegisterSteps; ++step) {
            gemm(mma_register_q, r_q(_, _, step), latent.step(step), scores);
            if (step == kStepsBeforeStore) {
                // All warps are through with the RoPE columns: of three batches the first is done.
                warpgroup_commit_batch();
                warpgroup_wait<1>();
                sync_warpgroup();
            }
            int const stored = (step - kStepsBeforeStore) / kStepsPerStore;
            if (step >= kStepsBeforeStore && step % kStepsPerStore == 0 && stored < kNumStores)
                store(stored, holds_previous, address, probabilities);
        }
        warpgroup_commit_batch();
        warpgroup_fence_operand(scores);
    }

    // Copies the RoPE columns of the block after the next to where those of the current one were. This one begins a
    // piece, so no P comes there, and does not end it.
    __device__ void refill_rope() const {
        if (thread_in_warpgroup_now() == 0) loader().load_rope(at.later(2));
    }

    // Turns the scores of the current block into P, and says what O must be rescaled with before: in one of three
    // places, as the two blocks before may need the others still.
    __device__ void compute_probabilities(Scores& scores, OnlineSoftmax& softmax, bool is_first,
                                          Probabilities& probabilities) const {
        int const thread = thread_in_warpgroup_now();
        float rescale[kRowsPerThread];
        // Before the first block outputs are 0.
        bool const must_rescale = softmax.raise(scores, params.softmax_scale_log2, rescale) && !is_first;
        if (must_rescale && thread % 4 == 0) {
            shared.rescale[at.stage()][fragment_row(thread, 0)] = rescale[0];
            shared.rescale[at.stage()][fragment_row(thread, 1)] = rescale[1];
        }
        if (thread % 32 == 0) shared.must_rescale[at.stage()][thread / 32] = must_rescale;
        softmax.exponentiate(scores, params.softmax_scale_log2);
#pragma unroll
        for (int i = 0; i < kNumScores / 2; ++i)
            probabilities.word[i] = pack_pair(scores[2 * i], scores[2 * i + 1], Element{});
    }

    // Where this lane stores its part of the first two tiles of 8 columns of P.
    __device__ uint32_t probabilities_address(uint32_t place) const {
        int const thread = thread_in_warpgroup_now(), lane = thread % 32, row = thread / 32 * 16 + lane % 16;
        return shared_address(shared.rope_or_p[place]) + row * 128 + (lane / 16 ^ row % 8) * 16;
    }
    // Two tiles of 8 columns of P.
    __device__ static void store(int pair, bool stores, uint32_t address, Probabilities const& probabilities) {
        auto const& word = probabilities.word;
        store_matrix_x4_if(stores, address ^ pair * 32,
                           {word[4 * pair], word[4 * pair + 1], word[4 * pair + 2], word[4 * pair + 3]});
    }
    // Of the last block of a piece, when the current one is the next: to where its RoPE columns and then P of the block
    // before were.
    __device__ void store_last(Probabilities const& probabilities) const {
        auto const last = at.previous(), last_but_one = last.previous();
        uint32_t const address = probabilities_address(last.rope_place());
        shared.barriers.p_consumed[last_but_one.p_turn()].wait(last_but_one.p_phase());
#pragma unroll
        for (int pair = 0; pair < kNumStores; ++pair) store(pair, true, address, probabilities);
    }

    // Of the block before the current one.
    __device__ void release_probabilities() const {
        cutlass::arch::fence_view_async_shared();
        quads_arrive(shared.barriers.p_ready[at.previous().p_turn()]);
    }

    // Row statistics of a piece: 1 / sum for the output warpgroups, log-sum-exp to global memory. Of a segment what it
    // is folded with, and its way.
    __device__ void write_stats(OnlineSoftmax const& softmax) {
        uint32_t const index = shared.pieces.next_scores - 1;
        Piece const& piece = current_piece();
        int const thread = thread_in_warpgroup_now();
        shared.barriers.stats_empty.wait(index % 2 ^ 1);
        if constexpr (Traits::kSummation == Summation::kBySegments) sync_warpgroup();  // for the way, of a single block
#pragma unroll
        for (int h = 0; h < kRowsPerThread; ++h) {
            float const total = softmax.total(h);
            if constexpr (Traits::kSummation == Summation::kBySegments) {
                if (thread % 4 == 0) fold_statistics_of(piece, fragment_row(thread, h), {softmax.reference[h], total});
                continue;
            }
            float const lse_log2 = softmax.log2_sum(h, total);
            if (thread % 4 != 0) continue;
            int const row = fragment_row(thread, h);
            shared.inverse_sum[row] = total == 0.f ? 0.f : 1.f / total;
            QueryRow const at = query_row(params, piece.place, row);
            if (piece.is_partial()) {
                int const lane = lane_now();
                params.lse_partial[partial_row(params.grid, piece.slot, lane, row, kBlockM)] = lse_log2;
            } else if (at.exists) {
                constexpr float kLn2 = 0.693147180559945309417f;
                params.lse[lse_offset(params, piece.batch, at)] = total == 0.f ? INFINITY : lse_log2 * kLn2;
            }
        }
        quads_arrive(shared.barriers.stats_full);
    }

    __device__ FoldWay& own_way() const { return shared.fold_steps.way[(shared.pieces.next_scores - 1) % 2]; }
    // Of the current piece, by one thread. The outputs are done with the way that was here, of the piece before the one
    // before: scores have waited for that (stats_empty).
    __device__ void find_way() const {
        Piece const& piece = current_piece();
        SegmentFold const fold(params, piece, segment_of(piece),
                               segment_bits_of(num_blocks_of(piece.seqlen), kBlockM, params.grid.num_lanes));
        FoldWay& way = own_way();
        way.folds = fold.path.folds | (fold.is_last_of_worker() ? 0 : FoldWay::kStays);
        for (int level = 0; level < kFoldLevels; ++level) way.slot[level] = fold.waiting_slot(level);
        way.slot[kFoldLevels] = fold.path.ends_tile() ? FoldWay::kOut : fold.end_slot();
    }

    // Of one row of a segment, on its way through the tree; also of rows that do not exist, so that all lanes of the
    // output warpgroups go the same way.
    __device__ void fold_statistics_of(Piece const& piece, int row, RowStatistics statistics) const {
        FoldSteps& steps = shared.fold_steps;
        FoldWay const& way = own_way();
#pragma unroll 1
        for (int level = 0; level < kFoldLevels; ++level) {
            if (!way.folds_at(level)) continue;
            RowStatistics both = load_scratch(slot_statistics(params, way.slot[level], row));
            steps.next_above_folded[level][row] = next_above_folded(both, statistics);
            fold_statistics(both, statistics);
            statistics = both;
        }
        int const end_slot = way.slot[kFoldLevels];
        if (end_slot != FoldWay::kOut) {
            *slot_statistics(params, end_slot, row) = statistics;
            return;
        }
        shared.inverse_sum[row] = inverse_of(statistics.sum);
        QueryRow const at = query_row(params, piece.place, row);
        if (at.exists) params.lse[lse_offset(params, piece.batch, at)] = natural_lse(folded_log2_sum(statistics));
    }

    // Pieces that pass by the pipeline because they have no keys.
    __device__ void write_empty_pieces() const {
        typename Traits::Pieces pieces(params);
        Piece piece;
        while (pieces.next(params, piece)) {
            if (piece.is_empty()) write_empty(piece);
        }
    }

    __device__ void write_empty(Piece const& piece) const {
        int const thread = thread_in_warpgroup_now(), lane = lane_now();
        for (int row = thread / 32; row < kBlockM; row += 4) {
            QueryRow const at = query_row(params, piece.place, row);
            if (!at.exists && !piece.is_partial()) return;
            void* out = static_cast<Element*>(params.out) + out_offset(params, piece.batch, at);
            if (piece.is_partial()) {
                // The combine reads it whole. Which row of the tile an element belongs to does not matter here.
                int64_t const place = partial_row(params.grid, piece.slot, lane, row, kBlockM);
                out = static_cast<__half*>(params.packed_partial) + place * kHeadDimV;
                params.scale_partial[place * kScalesPerRow + thread % kScalesPerRow] = 0.f;
                params.lse_partial[place] = -INFINITY;
            } else {
                params.lse[lse_offset(params, piece.batch, at)] = INFINITY;
            }
            for (int i = thread % 32; i < kHeadDimV / 8; i += 32) static_cast<uint4*>(out)[i] = uint4{0, 0, 0, 0};
        }
    }
};

}  // namespace flash_mla::sm90
