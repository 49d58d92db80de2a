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
        typename Traits::Pieces pieces;
        Piece piece;
        bool has_piece = this->begin(pieces, piece);
        if (!has_piece) return;
        clear_statistics();
        while (has_piece) {
            Outputs outputs;
            BlockRange const blocks(piece, rank, num_ctas());
            int const num_active = blocks.num_active;
            if (group == 0 && thread == 0 && !is_alone()) expect_results(num_active);
            this->add_blocks(piece, blocks, true, outputs);
            if (!Traits::kHasRoomForBoth) sync_consumers();
            this->share_statistics([&] {
                if (!is_alone()) share_largest(outputs);
                if (!Traits::kHasRoomForBoth) allow_sending();
            });
            if (is_alone()) {
                store_own(piece, outputs);
            } else {
                send(outputs, num_active);
            }
            // While results are on their way.
            Piece following;
            has_piece = this->next_with_keys(pieces, following);
            if (Traits::kHasRoomForBoth && has_piece) this->load_q(following);
            if (!is_alone()) merge(piece, num_active);
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
        shared.barriers.received.arrive_and_expect_tx(num_active * bytes_per_cta + num_ctas() * kRows * sizeof(float4));
    }

    // What CTAs that do not exist have seen: no key.
    __device__ void clear_statistics() const {
        int const i = int(thread_now());
        if (i >= num_ctas() * kRows && i < kMaxSplitCtas * kRows)
            shared.received_statistics[i / kRows][i % kRows] = float4{kMinusInfinity, 0.f, 0.f, 0.f};
    }

    __device__ float4& received_from(int sender, int own_chunk, int pair) const {
        int const slot = own_chunk * num_ctas() + sender;
        return shared.received[slot * Traits::kVectorsPerChunk + pair * 128 + thread_in_warpgroup_now()];
    }

    // Of the finite outputs of each row, for the exponent that they are sent with; before a barrier of all consumers.
    __device__ void share_largest(Outputs const& outputs) const {
        int const thread = int(thread_now());  // what follows from it occupies no registers between
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                uint32_t largest = 0;
#pragma unroll
                for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        largest = max(largest, magnitude(outputs(cute::make_coord(c, h, tile), m, 0)));
                }
#pragma unroll
                for (int distance = 4; distance < 32; distance *= 2)
                    largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
                if (thread % 32 < 4) shared.largest_output[fragment_column(thread, tile) + c][thread / 32] = largest;
            }
        }
    }
    // Twice the bits of the absolute value, from this on; less for what is not finite.
    static constexpr uint32_t kZeroMagnitude = 2u << 23;
    __device__ static uint32_t magnitude(float x) { return 2 * __float_as_uint(x) + kZeroMagnitude; }

    // The exponent, as floats have it, of a power of two of which the largest output of a row is as many times as 16
    // bits can hold. Behind the barrier.
    __device__ uint32_t exponent_of(int row) const {
        auto const* const of_warps = reinterpret_cast<uint4 const*>(shared.largest_output[row]);
        uint4 const low = of_warps[0], high = of_warps[1];
        uint32_t const largest =
            max(max(max(low.x, low.y), max(low.z, low.w)), max(max(high.x, high.y), max(high.z, high.w)));
        return max(int((max(largest, kZeroMagnitude) - kZeroMagnitude) >> 24) - 14, 1);
    }

    // What this CTA has of the output, and the statistics of its rows, to where they are merged.
    __device__ void send(Outputs const& outputs, int num_active) const {
        int const thread = thread_in_warpgroup_now();
        shared.barriers.may_send.wait(piece_count % 2 ^ Traits::kHasRoomForBoth);
        uint32_t const barrier = shared_address(shared.barriers.received);
#pragma unroll 1
        for (int i = int(thread_now()); i < kRows * num_ctas(); i += Traits::kConsumerThreads) {
            int const row = i % kRows, target = i / kRows;
            float2 const statistics = this->statistics(row);
            float const scale = __uint_as_float(exponent_of(row) << 23);
            store_remote(remote_address(shared_address(shared.received_statistics[rank][row]), target),
                         float4{statistics.x, statistics.y, scale, 0.f}, remote_address(barrier, target));
        }
        if (rank >= num_active) return;
#pragma unroll
        for (int pair = 0; pair < kRowTiles / 2; ++pair) {
            float factor[2][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int const row = fragment_column(thread, 2 * pair + i / 2) + i % 2;
                factor[i / 2][i % 2] = __uint_as_float((254 - exponent_of(row)) << 23);
            }
#pragma unroll
            for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
                int const chunk = group * Traits::kChunksPerGroup + m, own_chunk = chunk / num_ctas();
                int const target = chunk - own_chunk * num_ctas();
                uint32_t const to = shared_address(received_from(rank, own_chunk, pair));
                float2 const first = packed(outputs, m, 2 * pair, factor[0]);
                float2 const second = packed(outputs, m, 2 * pair + 1, factor[1]);
                store_remote(remote_address(to, target), float4{first.x, first.y, second.x, second.y},
                             remote_address(barrier, target));
            }
        }
    }
    // A tile of 8 rows of a chunk, as 16 bits: as if they were floats.
    __device__ float2 packed(Outputs const& outputs, int m, int tile, float const (&factor)[2]) const {
        float4 const x = this->fragment_of(outputs, m, tile);
        return {__uint_as_float(pack_pair(x.x * factor[0], x.y * factor[1], cutlass::half_t{})),
                __uint_as_float(pack_pair(x.z * factor[0], x.w * factor[1], cutlass::half_t{}))};
    }

    // Alone, a CTA has all that there is.
    __device__ void store_own(Piece const& piece, Outputs const& outputs) const {
        int const thread = thread_in_warpgroup_now();
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            float weight[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                float const total = this->statistics(fragment_column(thread, tile) + c).y;
                weight[c] = total == 0.f ? 0.f : __fdividef(1.f, total);
            }
#pragma unroll
            for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
                float4 const x = this->fragment_of(outputs, m, tile);
                float sum[4] = {};
                add_weighted(sum[0], x.x, weight[0]);
                add_weighted(sum[1], x.y, weight[1]);
                add_weighted(sum[2], x.z, weight[0]);
                add_weighted(sum[3], x.w, weight[1]);
                store(piece, group * Traits::kChunksPerGroup + m, tile, sum);
            }
        }
        if (int const row = int(thread_now()); row < kRows) {
            float2 const statistics = this->statistics(row);
            this->store_lse(piece, row, statistics.y == 0.f ? kMinusInfinity : log2f(statistics.y) + statistics.x);
        }
    }

    // Weight of what each CTA has sent of a row: one thread per CTA and row. Returns the row's log2-sum-exp2.
    __device__ float weigh() const {
        static_assert(kMaxSplitCtas * kRows <= Traits::kConsumerThreads);
        int const row = thread_now() % kRows, sender = thread_now() / kRows;
        if (sender >= kMaxSplitCtas) return 0.f;
        float4 from[kMaxSplitCtas];  // reference, sum and scale
#pragma unroll
        for (int i = 0; i < kMaxSplitCtas; ++i) from[i] = shared.received_statistics[i][row];
        float largest = kMinusInfinity, total = 0.f;
#pragma unroll
        for (float4 const& each : from) largest = fmaxf(largest, each.x);
        float const offset = largest == kMinusInfinity ? 0.f : largest;
#pragma unroll
        for (float4 const& each : from) total = fmaf(exp2_approx(each.x - offset), each.y, total);
        float const inverse = total == 0.f ? 0.f : __fdividef(1.f, total);
        float4 const own = shared.received_statistics[sender][row];
        shared.weight[sender][row] = exp2_approx(own.x - offset) * inverse * own.z;
        return total == 0.f ? kMinusInfinity : log2f(total) + largest;
    }

    // The chunks of this CTA, from all CTAs of the cluster in the order of their ranks.
    __device__ void merge(Piece const& piece, int num_active) const {
        shared.barriers.received.wait(piece_count % 2);
        float const lse_log2 = weigh();
        sync_consumers();
#pragma unroll 1
        for (int i = group; i < num_own_chunks() * kRowTiles; i += Traits::kNumGroups) {
            float sum[4] = {};
            add_from_senders(i, num_active, sum);
            store(piece, i / kRowTiles * num_ctas() + rank, i % kRowTiles, sum);
        }
        if (int const row = int(thread_now()); rank == 0 && row < kRows) this->store_lse(piece, row, lse_log2);
    }

    // The i-th tile of 8 rows and 64 columns of those that this CTA merges.
    __device__ void add_from_senders(int i, int num_active, float (&sum)[4]) const {
        int const own_chunk = i / kRowTiles, tile = i % kRowTiles;
        float2 const* part = reinterpret_cast<float2 const*>(&received_from(0, own_chunk, tile / 2)) + tile % 2;
        float const* weight = &shared.weight[0][fragment_column(thread, tile)];
#pragma unroll 4
        for (int sender = 0; sender < num_active; ++sender) {
            float2 const packed = *part;
            float2 const low = __half22float2(reinterpret_cast<__half2 const&>(packed.x));
            float2 const high = __half22float2(reinterpret_cast<__half2 const&>(packed.y));
            float2 const w = *reinterpret_cast<float2 const*>(weight);
            add_weighted(sum[0], low.x, w.x);
            add_weighted(sum[1], low.y, w.y);
            add_weighted(sum[2], high.x, w.x);
            add_weighted(sum[3], high.y, w.y);
            part += 2 * Traits::kVectorsPerChunk, weight += kRows;
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
