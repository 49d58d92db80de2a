// The scores warpgroup: S = Q·Kᵀ on the tensor cores, softmax, P into shared memory for the output warpgroups. It also
// looks up which KV block comes next; the output warpgroups start its copies when they have freed a stage.
#pragma once

#include "kernels/sm90/dense_decode/load.h"
#include "kernels/sm90/dense_decode/traits.h"
#include "kernels/sm90/primitives/online_softmax.h"

namespace flash_mla::sm90 {

template <typename Traits>
struct ScoresMainloop {
    using Element = typename Traits::Element;
    using SharedStorage = typename Traits::SharedStorage;
    using Ring = RingPosition<Traits::kNumStages>;

    static constexpr int kNumScores = kBlockM * kPageSize / 128;  // per thread
    static constexpr int kStepsPerChunk = Traits::kChunkColumns / 16;

    DenseDecodeParams const& params;
    CUtensorMap const& k_map;
    SharedStorage& shared;
    int thread;  // in the warpgroup
    Ring ring = {};
    uint32_t stats_phase = 0;
    int next_page = 0;  // of the first thread: see LoadCursor

    struct RowLimits {
        int visible[kRowsPerThread];  // keys before this index are seen
        int visible_to_all;           // by every row of the tile
    };

    using Scores = decltype(cute::partition_fragment_C(typename Traits::MmaScores{},
                                                       cute::Shape<cute::Int<kBlockM>, cute::Int<kPageSize>>{}));

    __device__ void run() {
        if (thread == 0) load_first_blocks();
        PieceCursor pieces(params);
        load_next_q(pieces);
        Piece piece;
        while (pieces.next(params, piece)) {
            OnlineSoftmax softmax;
            if (!piece.is_empty()) write_all_probabilities(piece, pieces, softmax);
            write_stats(piece, softmax);
        }
    }

private:
    __device__ void load_first_blocks() {
        next_page = shared.loads.begin(params);
        for (int stage = 0; stage < Traits::kNumStages; ++stage) {
            LoadOrder const order = shared.loads.next(params, next_page);
            if (order.head_kv == LoadOrder::kNothing) return;
            load_chunks<Traits>(params, k_map, shared, stage, order, 0, Traits::kNumChunks);
        }
    }

    __device__ void write_all_probabilities(Piece const& piece, PieceCursor const& pieces, OnlineSoftmax& softmax) {
        RowLimits const limits = row_limits(piece);
        cute::cp_async_wait<0>();
        cutlass::arch::fence_view_async_shared();
        sync_warpgroup();
        if constexpr (Traits::kLookahead) {
            run_with_lookahead(piece, limits, softmax);
        } else {
            Scores scores;
            for (int block = piece.begin_block; block < piece.end_block; ++block) {
                issue_scores(scores, ring);
                finish<0>(scores, block, limits, softmax);
            }
        }
        sync_warpgroup();
        load_next_q(pieces);
    }

    // Two sets of scores alternate: while one is in the tensor cores, the other is in the softmax.
    __device__ void run_with_lookahead(Piece const& piece, RowLimits const& limits, OnlineSoftmax& softmax) {
        Scores even, odd;
        int block = piece.begin_block;
        int const last = piece.end_block - 1;
        issue_scores(even, ring);
        for (; block + 2 <= last; block += 2) {
            issue_scores(odd, ring.next());
            finish<1>(even, block, limits, softmax);
            issue_scores(even, ring.next());
            finish<1>(odd, block + 1, limits, softmax);
        }
        if (block < last) {
            issue_scores(odd, ring.next());
            finish<1>(even, block, limits, softmax);
            finish<0>(odd, last, limits, softmax);
        } else {
            finish<0>(even, last, limits, softmax);
        }
    }

    template <int kStillInFlight>
    __device__ void finish(Scores& scores, int block, RowLimits const& limits, OnlineSoftmax& softmax) {
        cute::warpgroup_wait<kStillInFlight>();
        fence_scores(scores);
        write_probabilities(scores, block, limits, softmax);
    }

    // Starts the gather of the query rows that come next, if any.
    __device__ void load_next_q(PieceCursor pieces) {
        Piece piece;
        if (pieces.next_with_keys(params, piece)) load_q<Traits>(params, shared, piece, thread);
    }

    __device__ static void sync_warpgroup() {
        cutlass::arch::NamedBarrier::sync(128, warpgroup_barrier(WarpgroupRole::kScores));
    }

    __device__ static void fence_scores(Scores& scores) {
        cute::warpgroup_fence_operand(scores);
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

    __device__ void issue_scores(Scores& scores, Ring const& at) {
        using namespace cute;
        typename Traits::MmaScores mma;
        auto const thread_mma = mma.get_slice(thread);
        Element* q = &shared.q[0][0];
        Element* k = &shared.kv[at.stage][0][0];
        asm volatile("" : "+l"(q), "+l"(k));
        Tensor const s_q = make_tensor(make_smem_ptr(q), typename Traits::LayoutQ{});
        Tensor const s_k = make_tensor(make_smem_ptr(k), typename Traits::LayoutK{});
        Tensor const r_q = thread_mma.partition_fragment_A(s_q);                       // (MMA, 1, k)
        Tensor const r_k = thread_mma.partition_fragment_B(s_k);                       // (MMA, 1, k)

        auto const issue_chunk = [&](int chunk) {
            shared.barriers.kv_full[at.stage][chunk].wait(at.phase);
            warpgroup_arrive();
#pragma unroll
            for (int k = 0; k < kStepsPerChunk; ++k) {
                int const step = chunk * kStepsPerChunk + k;
                cute::gemm(mma, r_q(_, _, step), r_k(_, _, step), scores);
                mma.accumulate_ = GMMA::ScaleOut::One;
            }
        };
        mma.accumulate_ = GMMA::ScaleOut::Zero;
        fence_scores(scores);
#pragma unroll
        for (int chunk = 0; chunk < Traits::kNumChunks; ++chunk) issue_chunk(chunk);
        warpgroup_commit_batch();
        fence_scores(scores);
    }

    // Consumes the scores of `block`, whose stage is the ring's current one, and moves on to the next.
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
        bool const must_rescale = softmax.update(scores, params.softmax_scale_log2, rescale);

        int const warp = thread / 32, lane = thread % 32;
        if (must_rescale && lane % 4 == 0) {
            shared.rescale[ring.stage][fragment_row(thread, 0)] = rescale[0];
            shared.rescale[ring.stage][fragment_row(thread, 1)] = rescale[1];
        }
        if (lane == 0) shared.must_rescale[ring.stage][warp] = must_rescale;
        if (thread == 0) shared.order[ring.stage] = shared.loads.next(params, next_page);

        // P overwrites RoPE columns that all four warps must have read.
        sync_warpgroup();
        int const row = 16 * warp + lane % 16;
        uint32_t const row_address = cute::cast_smem_ptr_to_uint(shared.p(ring.stage)) + row * 128;
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
        warp_arrive(shared.barriers.p_ready[ring.stage]);
        ring.advance();
    }

    // Row statistics: 1 / sum for the output warpgroups, log-sum-exp to global memory.
    __device__ void write_stats(Piece const& piece, OnlineSoftmax const& softmax) {
        shared.barriers.stats_empty.wait(stats_phase ^ 1);
        stats_phase ^= 1;
#pragma unroll
        for (int h = 0; h < kRowsPerThread; ++h) {
            float const total = softmax.total(h);
            float const lse_log2 = softmax.log2_sum(h, total, params.softmax_scale_log2);
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
};

}  // namespace flash_mla::sm90
