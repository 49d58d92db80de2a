// The two consumer warpgroups: scores, softmax and output of a piece. What becomes of it: merge.h, or fold_segments.h
// where bits do not depend on the batch.
#pragma once

#include <cute/arch/copy_sm80.hpp>
#include <cutlass/arch/barrier.h>

#include "kernels/sm90/primitives/dependent_launch.h"
#include "kernels/sm90/primitives/early_block.h"
#include "kernels/sm90/primitives/fragment.h"
#include "kernels/sm90/primitives/online_softmax.h"
#include "kernels/sm90/primitives/swizzled_operand.h"
#include "kernels/sm90/swapped_decode/rows.h"
#include "kernels/sm90/swapped_decode/traits.h"

namespace flash_mla::sm90 {

template <typename Traits>
struct SwappedConsumer {
    using Element = typename Traits::Element;
    using SharedStorage = typename Traits::SharedStorage;
    using Scores = decltype(cute::partition_fragment_C(typename Traits::MmaScores{},
                                                       cute::Shape<cute::_64, cute::Int<Traits::kRows>>{}));
    using Outputs = decltype(cute::partition_fragment_C(
        typename Traits::MmaOutput{}, cute::Shape<typename Traits::Columns, cute::Int<Traits::kRows>>{}));

    static constexpr int kRows = Traits::kRows;
    static constexpr int kRowTiles = Traits::kRowTiles, kOwnRowTiles = Traits::kOwnRowTiles;
    static constexpr int kOwnRows = 2 * kOwnRowTiles;  // rows of a thread's scores after the exchange
    static constexpr int kOwnScores = 4 * kOwnRowTiles;
    static constexpr float kMinusInfinity = OnlineSoftmax::kMinusInfinity;
    static constexpr auto kAdds = cute::GMMA::ScaleOut::One, kBegins = cute::GMMA::ScaleOut::Zero;
    static constexpr int kHeadDimRopeBytes = (kHeadDim - kHeadDimV) * sizeof(Element);

    DenseDecodeParams const& params;
    DecodeMaps const& maps;
    SharedStorage& shared;
    int group, thread;  // thread of the group
    uint32_t block_count = 0;
    uint32_t rows_count = 0;    // tiles whose query rows have come
    int num_pieces = 0;         // of the worker
    float reference[kOwnRows];  // log2 domain; -inf before the first key
    float row_sum[kOwnRows];    // of this thread's tokens

protected:
    __device__ int warp() const { return thread / 32; }
    __device__ int lane() const { return thread % 32; }
    // Of the CTA in its cluster. Asked anew each time, like the size of the cluster, so that nothing that follows from
    // these occupies a register between.
    __device__ static int rank() { return int(cute::block_rank_in_cluster()); }
    __device__ int num_ctas() const {
        int num_ctas;
        asm volatile("mov.b32 %0, %1;\n" : "=r"(num_ctas) : "r"(params.grid.split_ctas));
        return num_ctas;
    }
    // Alone, a CTA has nobody to wait for, and stores are all it takes.
    __device__ bool is_alone() const { return num_ctas() == 1; }
    __device__ static void sync_consumers() { cutlass::arch::NamedBarrier::sync(Traits::kConsumerThreads, 1); }
    __device__ void sync_group() const { cutlass::arch::NamedBarrier::sync(128, 2 + group); }
    // The i-th of the rows whose softmax this thread takes part in.
    __device__ int own_row(int i) const {
        return group * kRows / Traits::kNumGroups + fragment_column(thread, i / 2) + i % 2;
    }

    // Enters the first piece, mostly the one that was found before the kernel before had ended. Its query rows the
    // producer has asked for, where a map describes them. Returns whether there is one.
    __device__ bool begin(typename Traits::Pieces& pieces, Piece& piece) {
        EarlyPiece<typename Traits::Pieces> const early(params);
        wait_for_previous_kernel();
        allow_dependent_launch();
        shared.barriers.sources_known.wait(0);
        WorkerRow const& row = shared.sources.row;
        num_pieces = row.num_pieces;
        pieces = early.pieces, piece = early.piece;
        bool has_piece = true;
        if (!early.is_from(shared.sources)) {
            pieces = typename Traits::Pieces(row);
            has_piece = next_with_keys(pieces, piece);
        }
        if (has_piece && !maps.has_q) gather_q(piece);
        return has_piece;
    }

    // Writes what pieces without keys get on the way.
    __device__ bool next_with_keys(typename Traits::Pieces& pieces, Piece& piece) const {
        // Behind the last one there is nothing to be read again.
        while (pieces.index() < num_pieces && pieces.next(params, piece)) {
            if (!piece.is_empty()) return true;
            write_empty(piece);
        }
        return false;
    }

    __device__ void forget_keys() {
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) reference[i] = kMinusInfinity, row_sum[i] = 0.f;
    }

    // What this CTA has of a piece, whose query rows are on their way. Calls on_last_scores when all has been done but
    // for the outputs of the last block.
    template <typename OnLastScores>
    __device__ void add_blocks(Piece const& piece, BlockRange const& blocks, Outputs& outputs,
                               OnLastScores const& on_last_scores) {
        cute::clear(outputs);
        forget_keys();
        wait_for_q();
#pragma unroll 1
        for (int block = blocks.begin; block < blocks.end; ++block) {
            add_block(
                piece, block, outputs, block == blocks.begin, kAdds, [] {},
                [&] {
                    if (block + 1 == blocks.end) on_last_scores();
                });
            ++block_count;
        }
        if (blocks.begin >= blocks.end) {
            sync_consumers();  // all have seen that the query rows have come, before the next ones are asked for
            on_last_scores();
        }
    }

    // Nobody reads the rows before any more.
    __device__ void load_q(Piece const& piece) const {
        if (!maps.has_q) return gather_q(piece);
        if (thread_now() == 0) copy_rows<Traits>(maps, shared, piece, shared.barriers.rows_full);
        __syncwarp();
    }

    // A warp per row, 16 bytes a lane, swizzled as wgmma expects.
    __device__ void gather_q(Piece const& piece) const {
        constexpr int kVectorsPerRow = kHeadDim / 8;
        int const thread = thread_in_warpgroup_now();  // what follows from it occupies no registers between pieces
#pragma unroll 2
        for (int row = group * 4 + thread / 32; row < kRows; row += 4 * Traits::kNumGroups) {
            // Rows that do not exist read another one: what becomes of them is never stored.
            QueryRow const at = query_row_of<Traits>(params, piece, row);
            Element const* const source =
                static_cast<Element const*>(params.q) + piece.batch * params.q_batch_stride +
                (at.exists ? at.token * params.q_token_stride + at.head_q * params.q_head_stride : 0);
            uint32_t const target = shared_address(shared.q) + row * 128;
#pragma unroll
            for (int vector = thread % 32; vector < kVectorsPerRow; vector += 32) {
                uint32_t const offset = vector / 8 * kRows * 128 + ((vector ^ row) % 8) * 16;
                copy_16_bytes_async(target + offset, source + vector * 8);
            }
        }
        cute::cp_async_fence();
    }
    __device__ void wait_for_q() {
        if (maps.has_q) {
            if (rows_count == 0) shared.barriers.early_rows.wait(0);
            shared.barriers.rows_full.wait(rows_count % 2);
        } else {
            cute::cp_async_wait<0>();
            cutlass::arch::fence_view_async_shared();
            sync_consumers();
        }
        ++rows_count;
    }

    // is_first: the first one of what has references of its own. kept: whether to add to the outputs or to begin them.
    // Calls functions while the tensor cores compute scores, and outputs.
    template <typename DuringScores, typename DuringOutputs>
    __device__ void add_block(Piece const& piece, int block, Outputs& outputs, bool is_first, cute::GMMA::ScaleOut kept,
                              DuringScores const& during_scores, DuringOutputs const& during_outputs) {
        uint32_t const stage = block_count % Traits::kNumStages;
        if (block_count == 0) wait_for_early_block();
        shared.barriers.block_full[stage].wait(block_count / Traits::kNumStages % 2);
        Scores partial_scores;
        multiply_q(stage, partial_scores, during_scores);
        float scores[kOwnScores];
        exchange(partial_scores, scores);
        int const num_keys = piece.seqlen - block * kPageSize;
        if (num_keys - (params.causal ? params.seqlen_q - 1 : 0) < kPageSize) mask(piece, num_keys, scores);
        if (num_keys < kPageSize) clear_keys_from(num_keys, stage);
        if (is_first || !try_probabilities(scores)) {
            raise_references(scores);
            write_probabilities(scores);
            cutlass::arch::fence_view_async_shared();
            sync_consumers();
            if (!is_first && (shared.must_rescale[0] | shared.must_rescale[1])) rescale(outputs);
        }
        multiply_v(stage, outputs, kept, during_outputs);
        if (lane() == 0) shared.barriers.block_empty[stage].arrive();
    }

    // RoPE columns, which both groups need, come with those of the first.
    __device__ void wait_for_early_block() const {
        shared.barriers.early_block[0].wait(0);
        if (group == 1) shared.barriers.early_block[1].wait(0);
    }

    // This group's share of the columns: half of the latent ones and half of RoPE.
    template <typename During>
    __device__ void multiply_q(uint32_t stage, Scores& scores, During const& during) const {
        using namespace cute;
        typename Traits::MmaScores mma;
        constexpr int kLatentSteps = Traits::kChunksPerGroup * 4, kRopeSteps = 4 / Traits::kNumGroups;
        ColumnwiseOperand const latent(shared_address(shared.block[stage][group * Traits::kChunksPerGroup]));
        ColumnwiseOperand const rope(shared_address(shared.block[stage][Traits::kLatentChunks]) + rope_offset());
        ColumnwiseOperandOf<kRows> const q(shared_address(shared.q) + group * kLatentSteps / 4 * kRows * 128);
        ColumnwiseOperandOf<kRows> const q_rope(shared_address(shared.q) + Traits::kLatentChunks * kRows * 128 +
                                                rope_offset());
        warpgroup_fence_operand(scores);
        warpgroup_arrive();
        mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
        for (int k = 0; k < kLatentSteps; ++k) {
            cute::gemm(mma, latent.step(k), q.step(k), scores);
            mma.accumulate_ = GMMA::ScaleOut::One;
        }
#pragma unroll
        for (int k = 0; k < kRopeSteps; ++k) cute::gemm(mma, rope.step(k), q_rope.step(k), scores);
        warpgroup_commit_batch();
        during();
        warpgroup_wait<0>();
        warpgroup_fence_operand(scores);
    }
    // Of this group's RoPE columns in their chunk, in bytes.
    __device__ uint32_t rope_offset() const { return group * kHeadDimRopeBytes / Traits::kNumGroups; }

    // Each group has the scores of all rows for its columns; it keeps one half of the rows and gives away the other.
    __device__ void exchange(Scores const& partial, float (&scores)[kOwnScores]) const {
        int const thread = thread_in_warpgroup_now();
#pragma unroll
        for (int tile = 0; tile < kOwnRowTiles; ++tile) {
            float given[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float const low = partial[4 * tile + i], high = partial[4 * (tile + kOwnRowTiles) + i];
                scores[4 * tile + i] = group == 0 ? low : high;
                given[i] = group == 0 ? high : low;
            }
            shared.exchanged[group][tile][thread] = float4{given[0], given[1], given[2], given[3]};
        }
        sync_consumers();
#pragma unroll
        for (int tile = 0; tile < kOwnRowTiles; ++tile) {
            float4 const other = shared.exchanged[group ^ 1][tile][thread];
            scores[4 * tile] += other.x, scores[4 * tile + 1] += other.y;
            scores[4 * tile + 2] += other.z, scores[4 * tile + 3] += other.w;
        }
    }

    // Score 4·tile + 2·h + c is that of token fragment_row(thread, h) and row own_row(2·tile + c).
    __device__ void mask(Piece const& piece, int num_keys, float (&scores)[kOwnScores]) const {
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
            int const token = query_row_of<Traits>(params, piece, own_row(i)).token;
            int const end = num_keys - (params.causal ? max(params.seqlen_q - 1 - token, 0) : 0);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (fragment_row(thread, h) >= end) scores[4 * (i / 2) + 2 * h + i % 2] = kMinusInfinity;
            }
        }
    }

    // Whatever the cache holds behind the last key may be NaN, and 0 · NaN is not 0. No other group reads these
    // columns.
    __device__ void clear_keys_from(int num_keys, uint32_t stage) {
#pragma unroll
        for (int chunk = 0; chunk < Traits::kChunksPerGroup; ++chunk) {
            auto* const words = reinterpret_cast<uint4*>(shared.block[stage][group * Traits::kChunksPerGroup + chunk]);
            for (int i = num_keys * 8 + thread; i < kPageSize * 8; i += 128) words[i] = uint4{0, 0, 0, 0};
        }
    }

    // Probabilities by the references as they are. Returns whether these still do, for all rows, after a barrier of all
    // consumers.
    __device__ bool try_probabilities(float const (&scores)[kOwnScores]) {
        bool within = true;
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
            float const largest = fmaxf(scores[4 * (i / 2) + i % 2], scores[4 * (i / 2) + 2 + i % 2]);
            // Not a number, and so not within, as long as there was no key.
            within &= fmaf(largest, params.softmax_scale_log2, -reference[i]) <= OnlineSoftmax::kSlackLog2;
        }
        float previous_sum[kOwnRows];
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) previous_sum[i] = row_sum[i];
        write_probabilities(scores);
        cutlass::arch::fence_view_async_shared();
        bool const all_within = __all_sync(~0u, within);
        if (lane() == 0) shared.exceeds[group][warp()] = !all_within;
        sync_consumers();
        uint2 const exceeds = *reinterpret_cast<uint2 const*>(shared.exceeds);
        if ((exceeds.x | exceeds.y) == 0) return true;
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) row_sum[i] = previous_sum[i];
        return false;
    }

    // Raises the references where these scores ask for it. Tokens are spread over the lanes with the same lane % 4 and
    // over the warps of the group.
    __device__ void raise_references(float const (&scores)[kOwnScores]) {
        float largest[kOwnRows];
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
            float x = fmaxf(scores[4 * (i / 2) + i % 2], scores[4 * (i / 2) + 2 + i % 2]);
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
            largest[i] = x;
        }
        if (lane() < 4) {
#pragma unroll
            for (int tile = 0; tile < kOwnRowTiles; ++tile) {
                *reinterpret_cast<float2*>(&shared.largest[group][warp()][8 * tile + 2 * lane()]) =
                    float2{largest[2 * tile], largest[2 * tile + 1]};
            }
        }
        sync_group();
#pragma unroll
        for (int tile = 0; tile < kOwnRowTiles; ++tile) {
            float2 x[4];
#pragma unroll
            for (int w = 0; w < 4; ++w)
                x[w] = *reinterpret_cast<float2 const*>(&shared.largest[group][w][8 * tile + 2 * (lane() % 4)]);
            largest[2 * tile] = fmaxf(fmaxf(x[0].x, x[1].x), fmaxf(x[2].x, x[3].x));
            largest[2 * tile + 1] = fmaxf(fmaxf(x[0].y, x[1].y), fmaxf(x[2].y, x[3].y));
        }
        bool raises_any = false;
        float factor[kOwnRows];
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
            float const raised = largest[i] * params.softmax_scale_log2;
            bool const raises = raised - reference[i] > OnlineSoftmax::kSlackLog2;
            factor[i] = raises ? exp2_approx(reference[i] - raised) : 1.f;
            reference[i] = raises ? raised : reference[i];
            row_sum[i] *= factor[i];
            raises_any |= raises;
        }
        raises_any = __any_sync(~0u, raises_any);
        if (warp() == 0) {
            if (lane() == 0) shared.must_rescale[group] = raises_any;
            if (raises_any && lane() < 4) {
#pragma unroll
                for (int i = 0; i < kOwnRows; ++i) shared.rescale[own_row(i)] = factor[i];
            }
        }
    }

    // P to shared memory as (row, token), through stores that transpose 8×8 matrices.
    __device__ void write_probabilities(float const (&scores)[kOwnScores]) {
        uint32_t const p = shared_address(shared.p);
        float const scale = params.softmax_scale_log2;
#pragma unroll
        for (int tile = 0; tile < kOwnRowTiles; ++tile) {
            float probability[4];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                float const at = reference[2 * tile + c], offset = at == kMinusInfinity ? 0.f : -at;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float const x = exp2_approx(fmaf(scores[4 * tile + 2 * h + c], scale, offset));
                    probability[2 * h + c] = x;
                    row_sum[2 * tile + c] += x;
                }
            }
            int const row = group * kRows / Traits::kNumGroups + 8 * tile + lane() % 8;
            uint32_t const address = p + row * 128 + ((2 * warp() + lane() / 8 % 2) ^ row % 8) * 16;
            store_matrix_x2_transposed(address, pack_pair(probability[0], probability[1], Element{}),
                                       pack_pair(probability[2], probability[3], Element{}));
        }
    }

    // Output 4·(tile + kRowTiles·m) + 2·h + c is that of row 8·tile + 2·(lane % 4) + c.
    __device__ void rescale(Outputs& outputs) const {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                int const row = fragment_column(thread, tile) + c;
                bool const raised = shared.must_rescale[row / (kRows / Traits::kNumGroups)];
                float const factor = raised ? shared.rescale[row] : 1.f;
#pragma unroll
                for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) outputs(cute::make_coord(c, h, tile), m, 0) *= factor;
                }
            }
        }
    }

    template <typename During>
    __device__ void multiply_v(uint32_t stage, Outputs& outputs, cute::GMMA::ScaleOut kept,
                               During const& during) const {
        using namespace cute;
        typename Traits::MmaOutput mma;
        RowwiseOperand const v(shared_address(shared.block[stage][group * Traits::kChunksPerGroup]));
        ColumnwiseOperandOf<kRows> const p(shared_address(shared.p));
        warpgroup_fence_operand(outputs);
        warpgroup_arrive();
        mma.accumulate_ = kept;
#pragma unroll
        for (int k = 0; k < kPageSize / 16; ++k) {
#pragma unroll
            for (int m = 0; m < Traits::kChunksPerGroup; ++m)
                cute::gemm(mma, v.step(k, m)(_, 0), p.step(k)(_, 0), outputs(_, m, 0));
            mma.accumulate_ = kAdds;
        }
        warpgroup_commit_batch();
        during();
        warpgroup_wait<0>();
        warpgroup_fence_operand(outputs);
    }

    // Reference and sum of each row, as far as this CTA has seen its keys, to shared memory.
    __device__ void put_statistics() {
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2)
                row_sum[i] += __shfl_xor_sync(~0u, row_sum[i], distance);
            if (lane() < 4) shared.row_sum[warp()][own_row(i)] = row_sum[i];
            if (thread < 4) shared.reference[own_row(i)] = reference[i];
        }
    }
    // For the warp that tells them to the cluster.
    __device__ void leave_statistics() {
        put_statistics();
        shared.barriers.statistics_left.arrive();
    }
    __device__ void share_statistics() {
        put_statistics();
        sync_consumers();
    }
    __device__ RowStatistics statistics(int row) const { return statistics_of(shared, row); }

    // A tile of 8 rows of a chunk of the output, as this thread holds it.
    __device__ static float4 fragment_of(Outputs const& outputs, int chunk_of_group, int tile) {
        auto const at = [&](int c, int h) { return outputs(cute::make_coord(c, h, tile), chunk_of_group, 0); };
        return {at(0, 0), at(1, 0), at(0, 1), at(1, 1)};
    }
    __device__ void store_rows(Piece const& piece, int chunk, int tile, float const (&sum)[4]) const {
        int const first_column = chunk * Traits::kChunkColumns;
        int const row = 8 * tile + lane() / 4;
        QueryRow const at = query_row_of<Traits>(params, piece, row);
        Element* const out = static_cast<Element*>(params.out) + out_offset(params, piece.batch, at) + first_column +
                             16 * warp() + 2 * (lane() % 4);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t const pair = transpose_matrix(pack_pair(sum[2 * h], sum[2 * h + 1], Element{}));
            if (at.exists) *reinterpret_cast<uint32_t*>(out + 8 * h) = pair;
        }
    }

    __device__ void write_empty(Piece const& piece) const {
        if (rank() != 0) return;
        for (int row = group * 4 + warp(); row < kRows; row += 4 * Traits::kNumGroups) {
            QueryRow const at = query_row_of<Traits>(params, piece, row);
            if (!at.exists) return;
            store_lse<Traits>(params, piece, row, kMinusInfinity);
            void* const out =
                piece.is_partial()
                    ? static_cast<void*>(params.out_partial +
                                         partial_row(params.grid, piece.slot, lane_now(), row, kRows) * kHeadDimV)
                    : static_cast<Element*>(params.out) + out_offset(params, piece.batch, at);
            int const num_vectors = kHeadDimV / (piece.is_partial() ? 4 : 8);
            for (int i = lane(); i < num_vectors; i += 32) static_cast<uint4*>(out)[i] = uint4{0, 0, 0, 0};
        }
    }
};

}  // namespace flash_mla::sm90
