// The scores warpgroup: S = Q·Kᵀ on the tensor cores, softmax, P into shared memory for the output warpgroups,
// for one half of a block's keys after the other.
#pragma once

#include "kernels/sm90/dense_decode/load.h"
#include "kernels/sm90/dense_decode/segment_scratch.h"
#include "kernels/sm90/dense_decode/traits.h"
#include "kernels/sm90/primitives/online_softmax.h"
#include "kernels/sm90/primitives/swizzled_operand.h"

namespace flash_mla::sm90 {

template <typename Traits>
struct ScoresMainloop {
    using Element = typename Traits::Element;
    using SharedStorage = typename Traits::SharedStorage;

    using MmaSharedQ = typename Traits::MmaScoresSharedQ;
    using Scores = decltype(cute::partition_fragment_C(
        typename Traits::MmaScoresSharedQ{}, cute::Shape<cute::Int<kBlockM>, cute::Int<Traits::kKeysPerHalf>>{}));
    static constexpr int kNumScores = decltype(cute::size(Scores{}))::value;  // per thread
    static constexpr int kRegisterSteps = QRegisters<Traits>::kNumSteps;

    DenseDecodeParams const& params;
    KMaps const& maps;
    SharedStorage& shared;
    BlockPosition<Traits> at = {};
    QRegisters<Traits> q;

    __device__ void run() {
        load_first_q();
        while (!next_piece().is_end()) {
            OnlineSoftmax softmax;
            write_all_probabilities(softmax);
            write_stats(softmax);
        }
        // The gather that followed the last piece goes to shared memory, which must not end before.
        cute::cp_async_wait<0>();
        write_empty_pieces();
    }

private:
    __device__ BlockLoader<Traits> loader() const { return {params, maps, shared}; }
    __device__ static bool is_look_up_warp() { return thread_in_warpgroup_now() / 32 == Traits::kLookUpWarp; }
    __device__ Piece const& next_piece() const { return shared.pieces.wait(shared.pieces.next_scores); }

    __device__ void write_all_probabilities(OnlineSoftmax& softmax) {
        uint32_t blocks_left = next_piece().num_blocks();
        if (at.count > 0) q.finish();
        cute::cp_async_wait<0>();
        cutlass::arch::fence_view_async_shared();
        sync_warpgroup();
        if (thread_in_warpgroup_now() == 0) {
            ++shared.pieces.next_scores;
            if (at.count == 0)
                TransactionBarrier::invalidate(
                    reinterpret_cast<uint64_t*>(&shared.rows_staged));  // its place is wanted
        }
        sync_warpgroup();

        Scores low, high;
#pragma unroll 1
        do {
            --blocks_left;
            issue_low_and_begin_high(low, high);
            if (is_look_up_warp()) loader().look_up(at.later(Traits::kNumStages));
            bool const is_masked = num_keys_of_all(blocks_left) < kPageSize;
            cute::warpgroup_wait<1>();
            cute::warpgroup_fence_operand(low);
            if (is_masked) mask(low, 0, blocks_left);
            write_probabilities(low, 0, softmax,
                                [&](int tile) { issue_high(high, steps_before(tile), steps_before(tile + 1)); });
            release_probabilities(0);
            issue_high(high, steps_before(kTiles), kRegisterSteps);
            cute::warpgroup_wait<0>();
            cute::warpgroup_fence_operand(high);
            // The page looked up meanwhile is there for who sees p_ready.
            cute::cp_async_wait<0>();
            if (is_masked) mask(high, 1, blocks_left);
            write_probabilities(high, 1, softmax, [](int) {});
            release_probabilities(1);
            at.advance();
        } while (blocks_left > 0);
        sync_warpgroup();
        load_next_q();
    }

    __device__ void load_first_q() {
        // Asked for before the length is known; again where there turn out to be no keys.
        Piece likely = likely_first_piece(params);
        if (!likely.is_end()) {
            for (uint32_t phase = 0;; phase ^= 1) {
                q.stage(params, shared, likely);
                Piece const& piece = next_piece();
                shared.rows_staged.wait(phase);
                if (piece.is_end() || piece.is_of_tile(likely)) break;
                cute::cp_async_wait<0>();
                likely = piece;
            }
        }
        q.load_staged(shared);
    }

    // Starts the gather of the query rows of the next piece, or of any where there is none.
    __device__ void load_next_q() {
        Piece const& piece = next_piece();
        load_q_shared<Traits>(params, shared, piece, thread_in_warpgroup_now());
        q.load(params, piece, thread_in_warpgroup_now());
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
    __device__ int num_keys_of_all(uint32_t blocks_left) const { return num_keys(current_piece(), 0, blocks_left); }

    __device__ void mask(Scores& scores, int half, uint32_t blocks_left) const {
        int const thread = thread_in_warpgroup_now();
        Piece const& piece = current_piece();
#pragma unroll
        for (int h = 0; h < kRowsPerThread; ++h) {
            int const token = query_row(params, piece.place, fragment_row(thread, h)).token;
            int const end = num_keys(piece, token, blocks_left) - half * Traits::kKeysPerHalf;
#pragma unroll
            for (int i = 2 * h; i < kNumScores; i += 4) {
                int const key = fragment_column(thread, i / 4);
                if (key >= end) scores[i] = OnlineSoftmax::kMinusInfinity;
                if (key + 1 >= end) scores[i + 1] = OnlineSoftmax::kMinusInfinity;
            }
        }
    }

#ifndef FM_BEGIN
#define FM_BEGIN 12
#endif
#ifndef FM_PART
#define FM_PART 3
#endif
    static constexpr uint32_t kHalfBytes = Traits::kKeysPerHalf * 128;  // of the rows of a chunk
    static constexpr int kTiles = Traits::kKeysPerHalf / 8;             // of a half of the keys
    // How much of the second half's scores is issued before a tile of the first half is made to P.
    static constexpr int kBeginSteps = FM_BEGIN, kStepsPerTile = FM_PART;
    static constexpr int steps_before(int tile) { return kBeginSteps + kStepsPerTile * tile; }
    static_assert(steps_before(kTiles) <= kRegisterSteps);

    // Starts the scores of the first half of the keys, and the begin of those of the second.
    __device__ void issue_low_and_begin_high(Scores& low, Scores& high) {
        auto const& rope_full = shared.barriers.rope_full[at.rope_place()];
        auto const& latent_full = shared.barriers.latent_full[at.stage()];
        bool const has_rope = rope_full.try_wait(at.rope_phase()), has_latent = latent_full.try_wait(at.stage_phase());
        if (!has_rope) rope_full.wait(at.rope_phase());
        if (!has_latent) latent_full.wait(at.stage_phase());
        cute::warpgroup_fence_operand(low);
        cute::warpgroup_fence_operand(high);
        SwizzledOperand<128> const latent_low(latent_address(0)), latent_high(latent_address(1));
        SwizzledOperand<32> const q_last_step(shared_address(shared.q_last_step));
        cute::warpgroup_arrive();
        // The place of the RoPE columns is wanted first.
        multiply_rope(low, 0);
        multiply_rope(high, 1);
        cute::gemm(MmaSharedQ{}, q_last_step.step(0), latent_low.step(kRegisterSteps), low);
        multiply_register_q(low, latent_low, 0, kRegisterSteps);
        cute::warpgroup_commit_batch();
        cute::warpgroup_arrive();
        cute::gemm(MmaSharedQ{}, q_last_step.step(0), latent_high.step(kRegisterSteps), high);
        multiply_register_q(high, latent_high, 0, kBeginSteps);
        cute::warpgroup_commit_batch();
        cute::warpgroup_fence_operand(low);
        cute::warpgroup_fence_operand(high);
    }
    __device__ void issue_high(Scores& high, int begin, int end) {
        if (begin == end) return;
        SwizzledOperand<128> const latent(latent_address(1));
        cute::warpgroup_arrive();
        multiply_register_q(high, latent, begin, end);
        cute::warpgroup_commit_batch();
    }
    __device__ uint32_t latent_address(int half) const {
        return shared_address(shared.latent) + at.stage() * sizeof(shared.latent[0]) + half * kHalfBytes;
    }
    __device__ void multiply_rope(Scores& scores, int half) {
        SwizzledOperand<128> const q_rope(shared_address(shared.q_rope));
        SwizzledOperand<128> const rope(shared_address(shared.rope) + at.rope_place() * sizeof(shared.rope[0]) +
                                        half * kHalfBytes);
        MmaSharedQ mma;
        mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
#pragma unroll
        for (int step = 0; step < Traits::kStepsPerChunk; ++step) {
            cute::gemm(mma, q_rope.step(step), rope.step(step), scores);
            mma.accumulate_ = cute::GMMA::ScaleOut::One;
        }
    }

    __device__ void multiply_register_q(Scores& scores, SwizzledOperand<128> const& latent, int begin, int end) {
        using namespace cute;
        typename Traits::MmaScoresRegisterQ mma;
        Tensor const r_q = make_tensor(
            make_rmem_ptr(reinterpret_cast<Element*>(q.word)),
            Layout<Shape<Shape<_2, _2, _2>, _1, Int<kRegisterSteps>>, Stride<Stride<_1, _2, _4>, _0, _8>>{});
#pragma unroll
        for (int step = 0; step < kRegisterSteps; ++step) {
            if (begin <= step && step < end) cute::gemm(mma, r_q(_, _, step), latent.step(step), scores);
        }
    }

    // Turns the scores of one half of the keys into P, in shared memory, and says what O must be rescaled with before.
    // Calls `before_tile` before each tile of 8 columns.
    template <typename BeforeTile>
    __device__ void write_probabilities(Scores& scores, int half, OnlineSoftmax& softmax, BeforeTile&& before_tile) {
        float rescale[kRowsPerThread];
        bool const must_rescale = softmax.raise(scores, params.softmax_scale_log2, rescale);
        if (must_rescale) store_rescale(half, rescale);
        shared.barriers.p_consumed[half].wait(at.p_phase() ^ 1);
        int const thread = thread_in_warpgroup_now(), warp = thread / 32, lane = thread % 32;
        if (lane == 0) shared.must_rescale[half][warp] = must_rescale;
        int const row = 16 * warp + lane % 16;
        uint32_t const row_address = shared_address(shared.p) + row * 128;
#pragma unroll
        for (int pair = 0; pair < kTiles / 2; ++pair) {  // two tiles
            uint32_t word[4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int const tile = 2 * pair + i;
                before_tile(tile);
                softmax.exponentiate(scores, tile, params.softmax_scale_log2);
                word[2 * i] = pack_pair(scores[4 * tile], scores[4 * tile + 1], Element{});
                word[2 * i + 1] = pack_pair(scores[4 * tile + 2], scores[4 * tile + 3], Element{});
            }
            int const first_tile = half * kTiles + 2 * pair;
            store_matrix_x4(row_address + (((first_tile + lane / 16) ^ (row % 8)) * 16), word);
        }
    }

    // There is one place for the factors, and the half before may need it still: a rare wait.
    __device__ void store_rescale(int half, float const (&rescale)[kRowsPerThread]) const {
        int const thread = thread_in_warpgroup_now();
        shared.barriers.p_consumed[half ^ 1].wait(half == 0 ? at.p_phase() ^ 1 : at.p_phase());
        if (thread % 4 != 0) return;
        shared.rescale[fragment_row(thread, 0)] = rescale[0];
        shared.rescale[fragment_row(thread, 1)] = rescale[1];
    }

    __device__ void release_probabilities(int half) const {
        cutlass::arch::fence_view_async_shared();
        quads_arrive(shared.barriers.p_ready[half]);
    }

    // Row statistics of a piece: 1 / sum for the output warpgroups, log-sum-exp to global memory.
    __device__ void write_stats(OnlineSoftmax const& softmax) {
        uint32_t const index = shared.pieces.next_scores - 1;
        Piece const& piece = current_piece();
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
            if constexpr (Traits::kSummation == Summation::kBySegments) {
                fold_log2_sum(piece, at, row, lse_log2);
                continue;
            }
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

    // Of one row of a segment, on its way through the tree; also of rows that do not exist, so that all lanes of the
    // output warpgroups go the same way.
    __device__ void fold_log2_sum(Piece const& piece, QueryRow const& at, int row, float log2_sum) const {
        SegmentFold const fold(params, piece, kBlockM);
        int const end_slot = fold.ends_tile ? FoldStep::kOut : fold.slot(fold.path.end_level);
        *fold_step(params, kFoldLevels, row) = {{0.f, 0.f}, end_slot, fold.path.folds};
#pragma unroll 1
        for (int level = 0; level < kFoldLevels; ++level) {
            if (!fold.path.folds_at(level)) continue;
            float folded = load_scratch(slot_log2_sum(params, fold.slot(level), row));
            FoldWeights const weights = fold_log2_sums(folded, log2_sum);
            *fold_step(params, level, row) = {weights, fold.slot(level), 0};
            log2_sum = folded;
        }
        if (!fold.ends_tile) {
            *slot_log2_sum(params, end_slot, row) = log2_sum;
        } else if (at.exists) {
            params.lse[lse_offset(params, piece.batch, at)] = natural_lse(log2_sum);
        }
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
