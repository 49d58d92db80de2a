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
    using Outputs = decltype(cute::partition_fragment_C(typename Traits::MmaOutput{},
                                                        cute::Shape<cute::Int<kHeadDimV>, cute::Int<Traits::kRows>>{}));

    static constexpr int kRows = Traits::kRows;
    static constexpr int kRowTiles = Traits::kRowTiles;
    static constexpr int kOwnRows = 2 * kRowTiles;  // rows of a thread's scores
    static constexpr float kMinusInfinity = OnlineSoftmax::kMinusInfinity;

    static constexpr int kStepsPerChunk = Traits::kChunkColumns / 16;

    // Half of the columns, as the accumulators hold them.
    struct Part {
        float4 vector[Traits::kChunksPerGroup][kRowTiles];
    };

    DenseDecodeParams const& params;
    SharedStorage& shared;
    int group, thread;             // thread of the group
    int rank;                      // of the CTA in its cluster
    RingPosition<Traits> at = {};  // begin of the piece
    uint32_t full_phases = 0;      // of this group's third_full, a bit per place
    uint32_t piece_count = 0;
    float reference[kOwnRows];  // log2 domain; -inf before the first key
    float row_sum[kOwnRows];    // of this thread's tokens

    __device__ void run() {
        typename Traits::Pieces pieces(params);
        Piece piece;
        bool has_piece = next_with_keys(pieces, piece);
        if (!has_piece) return;
        clear_statistics();
        load_q(piece);
        cute::cluster_wait();
        while (has_piece) {
            Outputs outputs;
            int const num_active = add_blocks(piece, outputs);
            Part part;
            exchange(outputs, part);
            send(part, num_active);
            // While results are on their way.
            Piece following;
            has_piece = next_with_keys(pieces, following);
            if (has_piece) {
                release_until(at.results());
                load_q(following);
            }
            merge(piece, num_active);
            if (has_piece) {
                cutlass::arch::fence_view_async_shared();
                sync_consumers();
                release_until(at.after_results());
            }
            piece = following;
            ++piece_count;
        }
    }

private:
    __device__ int warp() const { return thread / 32; }
    __device__ int lane() const { return thread % 32; }
    __device__ int num_ctas() const { return params.grid.split_ctas; }
    // Alone, a CTA has nobody to wait for, and stores are all it takes.
    __device__ bool is_alone() const { return num_ctas() == 1; }
    __device__ static void sync_consumers() { cutlass::arch::NamedBarrier::sync(Traits::kConsumerThreads, 1); }
    __device__ void sync_group() const { cutlass::arch::NamedBarrier::sync(128, 2 + group); }
    __device__ QueryRow query_row_of(Piece const& piece, int row) const {
        if (params.seqlen_q > 1) return query_row(params, piece.place, row, kRows);
        // No division.
        int const head = piece.place.m_tile * kRows + row;
        return {0, piece.place.head_kv * params.heads_per_group + head, head < params.heads_per_group};
    }
    // The i-th of the rows that this thread has.
    __device__ int own_row(int i) const { return fragment_column(thread, i / 2) + i % 2; }

    // Writes what pieces without keys get on the way.
    __device__ bool next_with_keys(typename Traits::Pieces& pieces, Piece& piece) const {
        while (pieces.next(params, piece)) {
            if (!piece.is_empty()) return true;
            write_empty(piece);
        }
        return false;
    }

    // The groups take turns. Returns how many CTAs of the cluster have blocks of the piece.
    __device__ int add_blocks(Piece const& piece, Outputs& outputs) {
        BlockRange const blocks(piece, rank, num_ctas());
        if (group == 0 && thread == 0 && !is_alone()) expect_results(blocks.num_active);
        cute::clear(outputs);
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) reference[i] = kMinusInfinity, row_sum[i] = 0.f;
        wait_for_q();
#pragma unroll 1
        for (int i = group; i < blocks.end - blocks.begin; i += Traits::kNumGroups) {
            add_block(piece, blocks.begin + i, at.later(i * Traits::kThirds), outputs, i == group);
        }
        at = at.later((blocks.end - blocks.begin) * Traits::kThirds);
        // Nobody reads blocks or query rows any more.
        sync_consumers();
        allow_sending();
        return blocks.num_active;
    }

    // Lets blocks of the next piece come to places that this one does not need, or not any more.
    __device__ void release_until(RingPosition<Traits> const& end) {
        RingPosition<Traits> const third = at.later(lane());
        if (group == 0 && third.count < end.count) {
            wait_until_full(third.place());
            shared.barriers.third_empty[third.place()].arrive();
        }
        for (; at.count < end.count; ++at.count) full_phases ^= group == 0 ? 1u << at.place() : 0u;
    }
    __device__ void wait_until_full(uint32_t place) const {
        shared.barriers.third_full[group][place].wait(full_phases >> place & 1);
    }

    // A warp per row, 16 bytes a lane, swizzled as wgmma expects.
    __device__ void load_q(Piece const& piece) const {
        constexpr int kVectorsPerRow = kHeadDim / 8;
#pragma unroll 2
        for (int row = group * 4 + warp(); row < kRows; row += 4 * Traits::kNumGroups) {
            // Rows that do not exist read another one: what becomes of them is never stored.
            QueryRow const at = query_row_of(piece, row);
            Element const* const source =
                static_cast<Element const*>(params.q) + piece.batch * params.q_batch_stride +
                (at.exists ? at.token * params.q_token_stride + at.head_q * params.q_head_stride : 0);
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

    __device__ void add_block(Piece const& piece, int block, RingPosition<Traits> const& first, Outputs& outputs,
                              bool is_first) {
        Scores scores;
        multiply_q(first, scores);
        // The whole group is done with these columns of K, and with P and the flags of the block before.
        sync_group();
        int const num_keys = piece.seqlen - block * kPageSize;
        if (num_keys - (params.causal ? params.seqlen_q - 1 : 0) < kPageSize) mask(piece, num_keys, scores);
        if (num_keys < kPageSize) clear_keys_from(num_keys, first);
        if (is_first || !try_probabilities(scores)) {
            raise_references(scores);
            write_probabilities(scores);
            cutlass::arch::fence_view_async_shared();
            sync_group();
            if (!is_first && shared.must_rescale[group]) rescale(outputs);
        }
        multiply_v(first, outputs);
        if (lane() < Traits::kThirds) shared.barriers.third_empty[first.later(lane()).place()].arrive();
    }

    // Each third as it comes.
    __device__ void multiply_q(RingPosition<Traits> const& first, Scores& scores) {
        using namespace cute;
        typename Traits::MmaScores mma;
        constexpr int kSteps = Traits::kChunksPerThird * kStepsPerChunk;
        SwizzledOperand<128, kRows> const q(shared_address(shared.q));
        warpgroup_fence_operand(scores);
        mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
        for (int third = 0; third < Traits::kThirds; ++third) {
            RingPosition<Traits> const position = first.later(third);
            wait_until_full(position.place());
            full_phases ^= 1u << position.place();
            SwizzledOperand<128> const k(third_address(position));
            warpgroup_arrive();
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                gemm(mma, k.step(step)(_, 0), q.step(third * kSteps + step)(_, 0), scores(_, 0, 0));
                mma.accumulate_ = GMMA::ScaleOut::One;
            }
            warpgroup_commit_batch();
        }
        warpgroup_wait<0>();
        warpgroup_fence_operand(scores);
    }
    __device__ uint32_t third_address(RingPosition<Traits> const& position) const {
        return shared_address(shared.ring) + position.place() * sizeof(shared.ring[0]);
    }

    // Score 4·tile + 2·h + c is that of token fragment_row(thread, h) and row own_row(2·tile + c).
    __device__ void mask(Piece const& piece, int num_keys, Scores& scores) const {
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

    // Whatever the cache holds behind the last key may be NaN, and 0 · NaN is not 0.
    __device__ void clear_keys_from(int num_keys, RingPosition<Traits> const& first) {
#pragma unroll 1
        for (int chunk = 0; chunk < Traits::kLatentChunks; ++chunk) {
            auto* const words = reinterpret_cast<uint4*>(
                shared.ring[first.later(chunk / Traits::kChunksPerThird).place()][chunk % Traits::kChunksPerThird]);
            for (int i = num_keys * 8 + thread; i < kPageSize * 8; i += 128) words[i] = uint4{0, 0, 0, 0};
        }
    }

    // Probabilities by the references as they are. Returns whether these still do, for all rows, after a barrier of the
    // group.
    __device__ bool try_probabilities(Scores const& scores) {
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
        sync_group();
        if (*reinterpret_cast<uint32_t const*>(shared.exceeds[group]) == 0) return true;
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) row_sum[i] = previous_sum[i];
        return false;
    }

    // Raises the references where these scores ask for it. Tokens are spread over the lanes with the same lane % 4 and
    // over the warps of the group.
    __device__ void raise_references(Scores const& scores) {
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
            for (int tile = 0; tile < kRowTiles; ++tile) {
                *reinterpret_cast<float2*>(&shared.largest[group][warp()][8 * tile + 2 * lane()]) =
                    float2{largest[2 * tile], largest[2 * tile + 1]};
            }
        }
        sync_group();
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
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
                for (int i = 0; i < kOwnRows; ++i) shared.rescale[group][own_row(i)] = factor[i];
            }
        }
    }

    // P to shared memory as (row, token), through stores that transpose 8×8 matrices.
    __device__ void write_probabilities(Scores const& scores) {
        uint32_t const p = shared_address(shared.p[group]);
        float const scale = params.softmax_scale_log2;
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
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
            int const row = 8 * tile + lane() % 8;
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
                float const factor = shared.rescale[group][fragment_column(thread, tile) + c];
#pragma unroll
                for (int m = 0; m < Traits::kLatentChunks; ++m) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) outputs(cute::make_coord(c, h, tile), m, 0) *= factor;
                }
            }
        }
    }

    __device__ void multiply_v(RingPosition<Traits> const& first, Outputs& outputs) const {
        using namespace cute;
        typename Traits::MmaOutput mma;
        mma.accumulate_ = GMMA::ScaleOut::One;
        SwizzledOperand<128, kRows> const p(shared_address(shared.p[group]));
        warpgroup_fence_operand(outputs);
        warpgroup_arrive();
#pragma unroll
        for (int third = 0; third < Traits::kThirds; ++third) {
            TransposedOperand const v(third_address(first.later(third)));
#pragma unroll
            for (int i = 0; i < Traits::kChunksPerThird; ++i) {
                int const chunk = third * Traits::kChunksPerThird + i;
                if (chunk == Traits::kLatentChunks) continue;  // RoPE
#pragma unroll
                for (int step = 0; step < kPageSize / 16; ++step)
                    gemm(mma, v.step(i, step)(_, 0), p.step(step)(_, 0), outputs(_, chunk, 0));
            }
        }
        warpgroup_commit_batch();
        warpgroup_wait<0>();
        warpgroup_fence_operand(outputs);
    }

    // Chunk c of the output is merged by CTA c % num_ctas().
    __device__ int num_own_chunks() const { return (Traits::kLatentChunks - 1 - rank) / num_ctas() + 1; }

    // Tells the CTAs of the cluster that they may send here, by all consumers after a barrier.
    __device__ void allow_sending() const {
        if (!is_alone() && group == 0 && thread < num_ctas()) shared.barriers.may_send.arrive(thread);
    }

    __device__ void expect_results(int num_active) const {
        int const bytes_per_cta = num_own_chunks() * Traits::kVectorsPerChunk * sizeof(float4);
        shared.barriers.received.arrive_and_expect_tx(num_active * bytes_per_cta + num_ctas() * kRows * sizeof(float2));
    }

    // What CTAs that do not exist have seen: no key.
    __device__ void clear_statistics() const {
        int const i = group * 128 + thread;
        if (i >= num_ctas() * kRows && i < kMaxSplitCtas * kRows)
            shared.received_statistics[i / kRows][i % kRows] = float2{kMinusInfinity, 0.f};
    }

    // Each group has the output of all columns for its keys; of half of the columns it gets the sum of both, and gives
    // away the other half. What both have seen of the rows is in shared memory then.
    __device__ void exchange(Outputs const& outputs, Part& part) {
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2)
                row_sum[i] += __shfl_xor_sync(~0u, row_sum[i], distance);
            if (lane() < 4) shared.row_sum[group][warp()][own_row(i)] = row_sum[i];
            if (thread < 4) shared.reference[group][own_row(i)] = reference[i];
        }
#pragma unroll
        for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile) {
                float4 const low = fragment_of(outputs, m, tile);
                float4 const high = fragment_of(outputs, Traits::kChunksPerGroup + m, tile);
                part.vector[m][tile] = group == 0 ? low : high;
                shared.results.exchanged[group][m * kRowTiles + tile][thread] = group == 0 ? high : low;
            }
        }
        sync_consumers();
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            float2 const even = weights(own_row(2 * tile)), odd = weights(own_row(2 * tile + 1));
#pragma unroll
            for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
                float4& own = part.vector[m][tile];
                float4 const other = shared.results.exchanged[group ^ 1][m * kRowTiles + tile][thread];
                own.x = weighted_sum(own.x, other.x, even), own.y = weighted_sum(own.y, other.y, odd);
                own.z = weighted_sum(own.z, other.z, even), own.w = weighted_sum(own.w, other.w, odd);
            }
        }
    }
    // Of what this group has of a row, and of what the other has.
    __device__ float2 weights(int row) const {
        float const own = shared.reference[group][row], other = shared.reference[group ^ 1][row];
        float const largest = fmaxf(own, other), offset = largest == kMinusInfinity ? 0.f : largest;
        return {exp2_approx(own - offset), exp2_approx(other - offset)};
    }
    // The same bits in whichever group: the sum of two products that are rounded both.
    __device__ static float weighted_sum(float own, float other, float2 const& weight) {
        float const own_part = weight.x == 0.f ? 0.f : __fmul_rn(own, weight.x);
        float const other_part = weight.y == 0.f ? 0.f : __fmul_rn(other, weight.y);
        return own_part + other_part;
    }
    // Reference and sum of a row, as far as this CTA has seen its keys.
    __device__ float2 statistics(int row) const {
        float2 const weight = weights(row);
        auto const sum_of = [&](int g) {
            auto const& sum = shared.row_sum[g];
            return (sum[0][row] + sum[1][row]) + (sum[2][row] + sum[3][row]);
        };
        return {fmaxf(shared.reference[0][row], shared.reference[1][row]),
                weighted_sum(sum_of(group), sum_of(group ^ 1), weight)};
    }

    // A tile of 8 rows of a chunk of the output, as this thread holds it.
    __device__ static float4 fragment_of(Outputs const& outputs, int chunk_of_group, int tile) {
        auto const at = [&](int c, int h) { return outputs(cute::make_coord(c, h, tile), chunk_of_group, 0); };
        return {at(0, 0), at(1, 0), at(0, 1), at(1, 1)};
    }
    __device__ float4& received_from(int sender, int own_chunk, int tile) const {
        int const slot = own_chunk * num_ctas() + sender;
        return shared.results.received[slot * Traits::kVectorsPerChunk + tile * 128 + thread];
    }

    // What this CTA has of the output, and the statistics of its rows, to where they are merged.
    __device__ void send(Part const& part, int num_active) const {
        if (!is_alone()) return send_to_cluster(part, num_active);
        if (int const row = group * 128 + thread; row < kRows) shared.received_statistics[0][row] = statistics(row);
#pragma unroll
        for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile)
                received_from(0, group * Traits::kChunksPerGroup + m, tile) = part.vector[m][tile];
        }
    }

    __device__ void send_to_cluster(Part const& part, int num_active) const {
        shared.barriers.may_send.wait(piece_count % 2);
        uint32_t const barrier = shared_address(shared.barriers.received);
#pragma unroll 1
        for (int i = group * 128 + thread; i < kRows * num_ctas(); i += Traits::kConsumerThreads) {
            int const row = i % kRows, target = i / kRows;
            store_remote(remote_address(shared_address(shared.received_statistics[rank][row]), target), statistics(row),
                         remote_address(barrier, target));
        }
        if (rank >= num_active) return;
#pragma unroll
        for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
            int const chunk = group * Traits::kChunksPerGroup + m, own_chunk = chunk / num_ctas();
            int const target = chunk - own_chunk * num_ctas();
            uint32_t const remote = remote_address(shared_address(received_from(rank, own_chunk, 0)), target);
            uint32_t const remote_barrier = remote_address(barrier, target);
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile)
                store_remote(remote + tile * 128 * sizeof(float4), part.vector[m][tile], remote_barrier);
        }
    }

    // Weight of what each CTA has of a row: one thread per CTA and row. Returns the row's log2-sum-exp2.
    __device__ float weigh() const {
        static_assert(kMaxSplitCtas * kRows <= Traits::kConsumerThreads);
        int const row = thread % kRows, sender = (group * 128 + thread) / kRows;
        if (sender >= kMaxSplitCtas) return 0.f;
        float2 from[kMaxSplitCtas];
#pragma unroll
        for (int i = 0; i < kMaxSplitCtas; ++i) from[i] = shared.received_statistics[i][row];
        float largest = kMinusInfinity, total = 0.f;
#pragma unroll
        for (float2 const& each : from) largest = fmaxf(largest, each.x);
        float const offset = largest == kMinusInfinity ? 0.f : largest;
#pragma unroll
        for (float2 const& each : from) total = fmaf(exp2_approx(each.x - offset), each.y, total);
        float const inverse = total == 0.f ? 0.f : __fdividef(1.f, total);
        shared.weight[sender][row] = exp2_approx(shared.received_statistics[sender][row].x - offset) * inverse;
        return total == 0.f ? kMinusInfinity : log2f(total) + largest;
    }

    // The chunks of this CTA, from all CTAs of the cluster in the order of their ranks.
    __device__ void merge(Piece const& piece, int num_active) const {
        if (is_alone()) {
            sync_consumers();
        } else {
            shared.barriers.received.wait(piece_count % 2);
        }
        float const lse_log2 = weigh();
        if constexpr (Traits::kSummation == Summation::kBySegments) {
            if (piece.is_partial()) return fold_segment(piece, num_active, lse_log2);
        }
        sync_consumers();
#pragma unroll 1
        for (int i = group; i < num_own_chunks() * kRowTiles; i += Traits::kNumGroups) {
            float sum[4] = {};
            add_from_senders(i, num_active, sum);
            store(piece, i / kRowTiles * num_ctas() + rank, i % kRowTiles, sum);
        }
        if (int const row = group * 128 + thread; rank == 0 && row < kRows) store_lse(piece, row, lse_log2);
    }

    // The i-th tile of 8 rows and 64 columns of those that this CTA merges.
    __device__ void add_from_senders(int i, int num_active, float (&sum)[4]) const {
        int const own_chunk = i / kRowTiles, tile = i % kRowTiles;
        float4 const* part = &received_from(0, own_chunk, tile);
        float const* weight = &shared.weight[0][fragment_column(thread, tile)];
#pragma unroll 4
        for (int sender = 0; sender < num_active; ++sender) {
            float4 const x = *part;
            float2 const w = *reinterpret_cast<float2 const*>(weight);
            add_weighted(sum[0], x.x, w.x);
            add_weighted(sum[1], x.y, w.y);
            add_weighted(sum[2], x.z, w.x);
            add_weighted(sum[3], x.w, w.y);
            part += Traits::kVectorsPerChunk, weight += kRows;
        }
    }

    // What the cluster has of a segment, on its way through the tree (segments.h). Each CTA folds its chunks, and for
    // itself the statistics of all rows.
    __device__ void fold_segment(Piece const& piece, int num_active, float log2_sum) const {
        SegmentFold const fold(params, piece, kRows);
        if (int const row = group * 128 + thread; row < kRows) fold_log2_sum(piece, fold, row, log2_sum);
        sync_consumers();
        constexpr int kAtOnce = 4;  // tiles: their loads run side by side
        int const num_tiles = num_own_chunks() * kRowTiles;
#pragma unroll 1
        for (int first = group; first < num_tiles; first += kAtOnce * Traits::kNumGroups) {
            float value[kAtOnce][4] = {};
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                int const at = first + i * Traits::kNumGroups;
                if (at < num_tiles) add_from_senders(at, num_active, value[i]);
            }
#pragma unroll 1
            for (int level = 0; level < kFoldLevels; ++level) {
                if (!fold.path.folds_at(level)) continue;
                float folded[kAtOnce][4] = {};
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    int const at = first + i * Traits::kNumGroups;
                    for_each_in_slot(piece, fold.slot(level), at, num_tiles,
                                     [&](int k, float* place) { folded[i][k] = load_scratch(place); });
                }
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    int const at = first + i * Traits::kNumGroups;
                    FoldWeights const* weights = &shared.fold_weights[level][fragment_column(thread, at % kRowTiles)];
#pragma unroll
                    for (int k = 0; k < 4; ++k) value[i][k] = fold_outputs(folded[i][k], value[i][k], weights[k % 2]);
                }
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                int const at = first + i * Traits::kNumGroups;
                if (!fold.ends_tile) {
                    for_each_in_slot(piece, fold.slot(fold.path.end_level), at, num_tiles,
                                     [&](int k, float* place) { *place = value[i][k]; });
                } else if (at < num_tiles) {
                    store_rows(piece, at / kRowTiles * num_ctas() + rank, at % kRowTiles, value[i]);
                }
            }
        }
    }

    // By the thread that has the row in every segment.
    __device__ void fold_log2_sum(Piece const& piece, SegmentFold const& fold, int row, float log2_sum) const {
#pragma unroll 1
        for (int level = 0; level < kFoldLevels; ++level) {
            if (!fold.path.folds_at(level)) continue;
            float folded = shared.waiting_log2_sum[level][row];
            shared.fold_weights[level][row] = fold_log2_sums(folded, log2_sum);
            log2_sum = folded;
        }
        int const end_level = fold.path.end_level;
        if (end_level < kFoldLevels) shared.waiting_log2_sum[end_level][row] = log2_sum;
        if (rank != 0) return;
        if (fold.ends_tile) {
            QueryRow const at = query_row_of(piece, row);
            if (at.exists) params.lse[lse_offset(params, piece.batch, at)] = natural_lse(log2_sum);
        } else if (fold.waits_in_granule_slot(end_level)) {
            params.lse_partial[fold.granule_slot * kRows + row] = log2_sum;
        }
    }

    // The elements of a tile that this thread has, for rows that exist, in a slot of rows of 512.
    template <typename Function>
    __device__ void for_each_in_slot(Piece const& piece, int slot, int i, int num_tiles, Function&& function) const {
        if (i >= num_tiles) return;
        int const first_column = (i / kRowTiles * num_ctas() + rank) * Traits::kChunkColumns;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            int const row = fragment_column(thread, i % kRowTiles) + k % 2;
            if (piece.place.m_tile * kRows + row >= params.rows_per_head_kv) continue;
            function(k, params.out_partial + (int64_t(slot) * kRows + row) * kHeadDimV + first_column +
                            fragment_row(thread, k / 2));
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
                if (piece.place.m_tile * kRows + row >= params.rows_per_head_kv) continue;
                params.out_partial[partial_row(params.grid, piece.slot, lane_now(), row, kRows) * kHeadDimV +
                                   first_column + fragment_row(thread, i / 2)] = sum[i];
            }
            return;
        }
        store_rows(piece, chunk, tile, sum);
    }

    __device__ void store_rows(Piece const& piece, int chunk, int tile, float const (&sum)[4]) const {
        int const first_column = chunk * Traits::kChunkColumns;
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
            params.lse[lse_offset(params, piece.batch, at)] = natural_lse(lse_log2);
        }
    }

    __device__ void write_empty(Piece const& piece) const {
        if (rank != 0) return;
        for (int row = group * 4 + warp(); row < kRows; row += 4 * Traits::kNumGroups) {
            QueryRow const at = query_row_of(piece, row);
            if (!at.exists) return;
            store_lse(piece, row, kMinusInfinity);
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
