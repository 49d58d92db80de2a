// The two consumer warpgroups: scores, softmax, output, and merging what the CTAs of a cluster have.
#pragma once

#include <cute/arch/copy_sm80.hpp>
#include <cutlass/arch/barrier.h>

#include "kernels/sm90/primitives/cluster.h"
#include "kernels/sm90/primitives/fragment.h"
#include "kernels/sm90/primitives/online_softmax.h"
#include "kernels/sm90/primitives/swizzled_operand.h"
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
    static constexpr float kLn2 = 0.693147180559945309417f;

    DenseDecodeParams const& params;
    SharedStorage& shared;
    int group, thread;  // thread of the group
    int rank;           // of the CTA in its cluster
    uint32_t block_count = 0, piece_count = 0;
    float reference[kOwnRows];  // log2 domain; -inf before the first key
    float row_sum[kOwnRows];    // of this thread's tokens

    __device__ void run() {
        typename Traits::Pieces pieces(params);
        Piece piece;
        while (pieces.next(params, piece)) {
            if (piece.is_empty()) {
                write_empty(piece);
            } else {
                run_piece(piece);
            }
        }
    }

private:
    __device__ int warp() const { return thread / 32; }
    __device__ int lane() const { return thread % 32; }
    __device__ int num_ctas() const { return params.grid.split_ctas; }
    __device__ static void sync_consumers() { cutlass::arch::NamedBarrier::sync(Traits::kConsumerThreads, 1); }
    __device__ void sync_group() const { cutlass::arch::NamedBarrier::sync(128, 2 + group); }
    __device__ QueryRow query_row_of(Piece const& piece, int row) const { return query_row(params, piece.place, row); }
    // The i-th of the rows whose softmax this thread takes part in.
    __device__ int own_row(int i) const {
        return group * kRows / Traits::kNumGroups + fragment_column(thread, i / 2) + i % 2;
    }

    __device__ void run_piece(Piece const& piece) {
        BlockRange const blocks(piece, rank, num_ctas());
        if (group == 0 && thread == 0) expect_results(blocks.num_active);
        load_q(piece);
        if (piece_count == 0) cute::cluster_wait();
        wait_for_q();
        Outputs outputs;
        cute::clear(outputs);
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) reference[i] = kMinusInfinity, row_sum[i] = 0.f;
        for (int block = blocks.begin; block < blocks.end; ++block) {
            add_block(piece, block, outputs, block + 1 == blocks.end);
            ++block_count;
        }
        if (blocks.begin == blocks.end) allow_sending();
        share_statistics(blocks.num_active);
        send(outputs, blocks.num_active);
        merge(piece, blocks.num_active);
        ++piece_count;
        // The place of what was received is that of the next query rows.
        sync_consumers();
    }

    // A warp per row, 16 bytes a lane, swizzled as wgmma expects.
    __device__ void load_q(Piece const& piece) const {
        constexpr int kVectorsPerRow = kHeadDim / 8;
#pragma unroll 1
        for (int row = group * 4 + warp(); row < kRows; row += 4 * Traits::kNumGroups) {
            Element const* const source = q_row<Element>(params, piece, row);
            uint32_t const target = shared_address(shared.q) + row * 128;
#pragma unroll
            for (int vector = lane(); vector < kVectorsPerRow; vector += 32) {
                uint32_t const offset = vector / 8 * kRows * 128 + ((vector ^ row) % 8) * 16;
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(target + offset),
                             "l"(source + vector * 8)
                             : "memory");
            }
        }
        cute::cp_async_fence();
    }
    __device__ void wait_for_q() const {
        cute::cp_async_wait<0>();
        cutlass::arch::fence_view_async_shared();
        sync_consumers();
    }

    __device__ void add_block(Piece const& piece, int block, Outputs& outputs, bool is_last) {
        uint32_t const stage = block_count % Traits::kNumStages;
        shared.barriers.block_full[stage].wait(block_count / Traits::kNumStages % 2);
        Scores partial_scores;
        multiply_q(stage, partial_scores);
        float scores[kOwnScores];
        exchange(partial_scores, scores);
        int const num_keys = piece.seqlen - block * kPageSize;
        if (num_keys - (params.causal ? params.seqlen_q - 1 : 0) < kPageSize) mask(piece, num_keys, scores);
        if (num_keys < kPageSize) clear_keys_from(num_keys, stage);
        write_probabilities(scores);
        cutlass::arch::fence_view_async_shared();
        sync_consumers();
        if (is_last) allow_sending();
        if (shared.must_rescale[0] | shared.must_rescale[1]) rescale(outputs);
        multiply_v(stage, outputs);
        if (lane() == 0) shared.barriers.block_empty[stage].arrive();
    }

    // This group's share of the columns: half of the latent ones and half of RoPE.
    __device__ void multiply_q(uint32_t stage, Scores& scores) const {
        using namespace cute;
        typename Traits::MmaScores mma;
        auto const slice = mma.get_slice(0);
        int const chunk = group * Traits::kChunksPerGroup;
        Tensor const s_latent = make_tensor(make_smem_ptr(shared.block[stage][chunk]), typename Traits::LayoutLatent{});
        Tensor const s_rope =
            make_tensor(make_smem_ptr(shared.block[stage][Traits::kLatentChunks]), typename Traits::LayoutRope{});
        Tensor const s_q = make_tensor(make_smem_ptr(shared.q), typename Traits::LayoutQ{});
        Tensor const latent = slice.partition_fragment_A(s_latent);
        Tensor const rope = slice.partition_fragment_A(s_rope);
        Tensor const q = slice.partition_fragment_B(s_q);  // (MMA, 1, k-step)
        constexpr int kLatentSteps = Traits::kChunksPerGroup * 4, kRopeSteps = 4 / Traits::kNumGroups;
        int const first_step = group * kLatentSteps, rope_step = group * kRopeSteps;
        warpgroup_fence_operand(scores);
        warpgroup_arrive();
        mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
        for (int k = 0; k < kLatentSteps; ++k) {
            cute::gemm(mma, latent(_, _, k), q(_, _, first_step + k), scores);
            mma.accumulate_ = GMMA::ScaleOut::One;
        }
#pragma unroll
        for (int k = 0; k < kRopeSteps; ++k) {
            cute::gemm(mma, rope(_, _, rope_step + k), q(_, _, Traits::kLatentChunks * 4 + rope_step + k), scores);
        }
        warpgroup_commit_batch();
        warpgroup_wait<0>();
        warpgroup_fence_operand(scores);
    }

    // Each group has the scores of all rows for its columns; it keeps one half of the rows and gives away the other.
    __device__ void exchange(Scores const& partial, float (&scores)[kOwnScores]) const {
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
            int const token = query_row_of(piece, own_row(i)).token;
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

    // Softmax over tokens, which are spread over the lanes with the same lane % 4 and over the warps of the group.
    __device__ void write_probabilities(float (&scores)[kOwnScores]) {
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
        bool raises_any = false;
        float factor[kOwnRows];
#pragma unroll
        for (int tile = 0; tile < kOwnRowTiles; ++tile) {
            float2 x[4];
#pragma unroll
            for (int w = 0; w < 4; ++w)
                x[w] = *reinterpret_cast<float2 const*>(&shared.largest[group][w][8 * tile + 2 * (lane() % 4)]);
            largest[2 * tile] = fmaxf(fmaxf(x[0].x, x[1].x), fmaxf(x[2].x, x[3].x));
            largest[2 * tile + 1] = fmaxf(fmaxf(x[0].y, x[1].y), fmaxf(x[2].y, x[3].y));
        }
        float const scale = params.softmax_scale_log2;
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
            float const raised = largest[i] * scale;
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
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
            float const offset = reference[i] == kMinusInfinity ? 0.f : -reference[i];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float& score = scores[4 * (i / 2) + 2 * h + i % 2];
                score = exp2_approx(fmaf(score, scale, offset));
                row_sum[i] += score;
            }
        }
        store_transposed(scores);
    }

    // P as (row, token), through stores that transpose 8×8 matrices.
    __device__ void store_transposed(float const (&scores)[kOwnScores]) const {
        uint32_t const p = shared_address(shared.p);
#pragma unroll
        for (int tile = 0; tile < kOwnRowTiles; ++tile) {
            int const row = group * kRows / Traits::kNumGroups + 8 * tile + lane() % 8;
            uint32_t const address = p + row * 128 + ((2 * warp() + lane() / 8 % 2) ^ row % 8) * 16;
            store_matrix_x2_transposed(address, pack_pair(scores[4 * tile], scores[4 * tile + 1], Element{}),
                                       pack_pair(scores[4 * tile + 2], scores[4 * tile + 3], Element{}));
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

    __device__ void multiply_v(uint32_t stage, Outputs& outputs) const {
        using namespace cute;
        typename Traits::MmaOutput mma;
        auto const slice = mma.get_slice(0);
        int const chunk = group * Traits::kChunksPerGroup;
        Tensor const s_v = make_tensor(make_smem_ptr(shared.block[stage][chunk]), typename Traits::LayoutV{});
        Tensor const s_p = make_tensor(make_smem_ptr(shared.p), typename Traits::LayoutP{});
        Tensor const v = slice.partition_fragment_A(s_v);  // (MMA, chunk, k-step)
        Tensor const p = slice.partition_fragment_B(s_p);  // (MMA, 1, k-step)
        warpgroup_fence_operand(outputs);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < size<2>(v); ++k) cute::gemm(mma, v(_, _, k), p(_, _, k), outputs);
        warpgroup_commit_batch();
        warpgroup_wait<0>();
        warpgroup_fence_operand(outputs);
    }

    __device__ static int chunks_per_cta(int num_ctas) { return Traits::kLatentChunks / num_ctas; }

    // By all consumers, after a barrier that follows the last use of the query rows.
    __device__ void allow_sending() const {
        if (group == 0 && thread < num_ctas()) shared.barriers.may_send.arrive(thread);
    }

    __device__ void expect_results(int num_active) const {
        int const bytes_per_cta =
            chunks_per_cta(num_ctas()) * kRowTiles * 128 * sizeof(float4) + kRows * sizeof(float2);
        shared.barriers.received.arrive_and_expect_tx(num_active * bytes_per_cta);
    }

    // Reference and sum of each row, as far as this CTA has seen its keys, to shared memory.
    __device__ void share_statistics(int num_active) {
        if (rank >= num_active) return;
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2)
                row_sum[i] += __shfl_xor_sync(~0u, row_sum[i], distance);
            if (lane() < 4) shared.row_sum[warp()][own_row(i)] = row_sum[i];
            if (thread < 4) shared.reference[own_row(i)] = reference[i];
        }
        sync_consumers();
    }

    // What this CTA has of the output, 64 columns to the CTA that merges them.
    __device__ void send(Outputs const& outputs, int num_active) const {
        shared.barriers.may_send.wait(piece_count % 2);
        if (rank >= num_active) return;
        uint32_t const barrier = shared_address(shared.barriers.received);
#pragma unroll 1
        for (int i = group * 128 + thread; i < kRows * num_ctas(); i += Traits::kConsumerThreads) {
            int const row = i % kRows, target = i / kRows;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < 4; ++w) sum += shared.row_sum[w][row];
            store_remote(remote_address(shared_address(shared.received_statistics[rank][row]), target),
                         float2{shared.reference[row], sum}, remote_address(barrier, target));
        }
        int const chunks = chunks_per_cta(num_ctas());
#pragma unroll
        for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
            int const chunk = group * Traits::kChunksPerGroup + m;
            int const target = chunk / chunks, slot = (chunk % chunks) * num_ctas() + rank;
            uint32_t const remote =
                remote_address(shared_address(shared.received[slot * kRowTiles * 128 + thread]), target);
            uint32_t const remote_barrier = remote_address(barrier, target);
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile) {
                auto const at = [&](int c, int h) { return outputs(cute::make_coord(c, h, tile), m, 0); };
                store_remote(remote + tile * 128 * sizeof(float4), float4{at(0, 0), at(1, 0), at(0, 1), at(1, 1)},
                             remote_barrier);
            }
        }
    }

    // What the results of each CTA weigh for one row, and the row's log2-sum-exp2.
    __device__ float weigh(int row, int num_active) const {
        float largest = kMinusInfinity, total = 0.f;
#pragma unroll 1
        for (int i = 0; i < num_active; ++i) largest = fmaxf(largest, shared.received_statistics[i][row].x);
        float const offset = largest == kMinusInfinity ? 0.f : largest;
#pragma unroll 1
        for (int i = 0; i < num_active; ++i) {
            float2 const from = shared.received_statistics[i][row];
            float const weight = exp2_approx(from.x - offset);
            shared.weight[i][row] = weight;
            total += weight * from.y;
        }
        float const inverse = total == 0.f ? 0.f : 1.f / total;
#pragma unroll 1
        for (int i = 0; i < num_active; ++i) shared.weight[i][row] *= inverse;
        return total == 0.f ? kMinusInfinity : log2f(total) + largest;
    }

    // The 64-column chunks of this CTA, from all CTAs of the cluster in the order of their ranks.
    __device__ void merge(Piece const& piece, int num_active) const {
        shared.barriers.received.wait(piece_count % 2);
        if (int const row = group * 128 + thread; row < kRows) {
            float const lse_log2 = weigh(row, num_active);
            if (rank == 0) store_lse(piece, row, lse_log2);
        }
        sync_consumers();
        int const chunks = chunks_per_cta(num_ctas());
#pragma unroll 1
        for (int i = group; i < chunks * kRowTiles; i += Traits::kNumGroups) {
            int const chunk = i / kRowTiles, tile = i % kRowTiles;
            float4 const* part = shared.received + (chunk * num_ctas() * kRowTiles + tile) * 128 + thread;
            float sum[4] = {};
#pragma unroll 2
            for (int sender = 0; sender < num_active; ++sender, part += kRowTiles * 128) {
                float4 const x = *part;
                float2 const weight =
                    *reinterpret_cast<float2 const*>(&shared.weight[sender][fragment_column(thread, tile)]);
                add_weighted(sum[0], x.x, weight.x);
                add_weighted(sum[1], x.y, weight.y);
                add_weighted(sum[2], x.z, weight.x);
                add_weighted(sum[3], x.w, weight.y);
            }
            store(piece, rank * chunks + chunk, tile, sum);
        }
    }

    // A row that saw no key is 0, whatever the values of the keys it did not see.
    __device__ static void add_weighted(float& sum, float part, float weight) {
        sum = weight == 0.f ? sum : fmaf(part, weight, sum);
    }

    __device__ void store(Piece const& piece, int chunk, int tile, float const (&sum)[4]) const {
        int const first_column = chunk * Traits::kChunkColumns;
        if (piece.is_partial()) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int const row = fragment_column(thread, tile) + i % 2;
                if (!query_row_of(piece, row).exists) continue;
                params.out_partial[partial_row(params.grid, piece.slot, lane_now(), row, kRows) * kHeadDimV +
                                   first_column + fragment_row(thread, i / 2)] = sum[i];
            }
            return;
        }
        int const row = 8 * tile + lane() / 4;
        QueryRow const at = query_row_of(piece, row);
        Element* const out = static_cast<Element*>(params.out) + out_offset(params, piece.batch, at) + first_column +
                             16 * warp() + 2 * (lane() % 4);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t const pair = transpose_matrix(pack_pair(sum[2 * h], sum[2 * h + 1], Element{}));
            if (at.exists) *reinterpret_cast<uint32_t*>(out + 8 * h) = pair;
        }
    }

    __device__ void store_lse(Piece const& piece, int row, float lse_log2) const {
        QueryRow const at = query_row_of(piece, row);
        if (!at.exists) return;
        if (piece.is_partial()) {
            params.lse_partial[partial_row(params.grid, piece.slot, lane_now(), row, kRows)] = lse_log2;
        } else {
            params.lse[lse_offset(params, piece.batch, at)] = lse_log2 == kMinusInfinity ? INFINITY : lse_log2 * kLn2;
        }
    }

    __device__ void write_empty(Piece const& piece) const {
        if (rank != 0) return;
        for (int row = group * 4 + warp(); row < kRows; row += 4 * Traits::kNumGroups) {
            QueryRow const at = query_row_of(piece, row);
            if (!at.exists) return;
            store_lse(piece, row, kMinusInfinity);
            // The combine reads no output where the weight is 0.
            if (piece.is_partial()) continue;
            auto* const out =
                reinterpret_cast<uint4*>(static_cast<Element*>(params.out) + out_offset(params, piece.batch, at));
            for (int i = lane(); i < kHeadDimV / 8; i += 32) out[i] = uint4{0, 0, 0, 0};
        }
    }
};

}  // namespace flash_mla::sm90
