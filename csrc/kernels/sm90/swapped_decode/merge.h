// What the CTAs of a cluster have of a piece, merged: through distributed shared memory, each CTA its part of the
// output columns.
#pragma once

#include "kernels/sm90/primitives/cluster.h"
#include "kernels/sm90/swapped_decode/consumer.h"

namespace flash_mla::sm90 {

template <typename Traits>
struct MergingConsumer : SwappedConsumer<Traits> {
    using Base = SwappedConsumer<Traits>;
    using Base::group, Base::params, Base::rank, Base::shared, Base::thread;
    using Base::is_alone, Base::kMinusInfinity, Base::kRows, Base::kRowTiles, Base::num_ctas, Base::sync_consumers;
    using typename Base::Outputs;

    uint32_t piece_count = 0;

    __device__ void run() {
        typename Traits::Pieces pieces(params);
        Piece piece;
        bool has_piece = this->next_with_keys(pieces, piece);
        if (!has_piece) return;
        clear_statistics();
        this->load_q(piece);
        cute::cluster_wait();
        while (has_piece) {
            Outputs outputs;
            BlockRange const blocks(piece, rank, num_ctas());
            int const num_active = blocks.num_active;
            if (group == 0 && thread == 0 && !is_alone()) expect_results(num_active);
            this->add_blocks(piece, blocks, true, outputs);
            if (!Traits::kHasRoomForBoth) sync_consumers();
            this->share_statistics([this] {
                if (!Traits::kHasRoomForBoth) allow_sending();
            });
            send(outputs, num_active);
            // While results are on their way.
            Piece following;
            has_piece = this->next_with_keys(pieces, following);
            if (Traits::kHasRoomForBoth && has_piece) this->load_q(following);
            merge(piece, num_active);
            if (has_piece) {
                sync_consumers();
                if (Traits::kHasRoomForBoth) {
                    allow_sending();
                } else {
                    this->load_q(following);
                }
            }
            piece = following;
            ++piece_count;
        }
    }

private:
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

    __device__ float4& received_from(int sender, int own_chunk, int tile) const {
        int const slot = own_chunk * num_ctas() + sender;
        return shared.received[slot * Traits::kVectorsPerChunk + tile * 128 + thread];
    }

    // What this CTA has of the output, and the statistics of its rows, to where they are merged.
    __device__ void send(Outputs const& outputs, int num_active) const {
        if (!is_alone()) return send_to_cluster(outputs, num_active);
        if (int const row = group * 128 + thread; row < kRows)
            shared.received_statistics[0][row] = this->statistics(row);
#pragma unroll
        for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile)
                received_from(0, group * Traits::kChunksPerGroup + m, tile) = this->fragment_of(outputs, m, tile);
        }
    }

    __device__ void send_to_cluster(Outputs const& outputs, int num_active) const {
        shared.barriers.may_send.wait(piece_count % 2 ^ Traits::kHasRoomForBoth);
        uint32_t const barrier = shared_address(shared.barriers.received);
#pragma unroll 1
        for (int i = group * 128 + thread; i < kRows * num_ctas(); i += Traits::kConsumerThreads) {
            int const row = i % kRows, target = i / kRows;
            store_remote(remote_address(shared_address(shared.received_statistics[rank][row]), target),
                         this->statistics(row), remote_address(barrier, target));
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
                store_remote(remote + tile * 128 * sizeof(float4), this->fragment_of(outputs, m, tile), remote_barrier);
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
        sync_consumers();
#pragma unroll 1
        for (int i = group; i < num_own_chunks() * kRowTiles; i += Traits::kNumGroups) {
            float sum[4] = {};
            add_from_senders(i, num_active, sum);
            store(piece, i / kRowTiles * num_ctas() + rank, i % kRowTiles, sum);
        }
        if (int const row = group * 128 + thread; rank == 0 && row < kRows) this->store_lse(piece, row, lse_log2);
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
        this->store_rows(piece, chunk, tile, sum);
    }
};

}  // namespace flash_mla::sm90
