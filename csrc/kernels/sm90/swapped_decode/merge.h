// What the CTAs of a cluster have of a piece, merged: through distributed shared memory, each CTA its part of the
// output columns.
#pragma once

#include "kernels/sm90/primitives/cluster.h"
#include "kernels/sm90/swapped_decode/consumer.h"
#include "kernels/sm90/swapped_decode/statistics.h"

namespace flash_mla::sm90 {

template <typename Traits>
struct MergingConsumer : SwappedConsumer<Traits> {
    using Base = SwappedConsumer<Traits>;
    using Base::group, Base::params, Base::shared, Base::thread;
    using Base::is_alone, Base::kMinusInfinity, Base::kRows, Base::kRowTiles, Base::num_ctas, Base::rank,
        Base::sync_consumers;
    using typename Base::Outputs;

    uint32_t piece_count = 0;

    __device__ void run() {
        typename Traits::Pieces pieces;
        Piece piece;
        bool has_piece = this->begin(pieces, piece);
        if (!has_piece) return;
        while (has_piece) {
            Outputs outputs;
            this->add_blocks(piece, BlockRange(piece, rank(), num_ctas()), outputs, [&] {
                if (!is_alone()) this->leave_statistics();
            });
            if (is_alone()) {
                this->share_statistics();
                store_own(piece, outputs);
            } else {
                send(outputs, num_active_ctas(piece, num_ctas()));
            }
            // While results are on their way.
            Piece following;
            has_piece = this->next_with_keys(pieces, following);
            if (Traits::kHasRoomForBoth && has_piece) this->load_q(following);
            if (!is_alone()) merge(piece, num_active_ctas(piece, num_ctas()));
            if (has_piece) {
                // Query rows may come to where results were.
                if (!Traits::kHasRoomForBoth) cutlass::arch::fence_view_async_shared();
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
    __device__ Shares shares() const { return {num_ctas(), rank()}; }
    // Tells the CTAs of the cluster that they may send here, by all consumers after a barrier.
    __device__ void allow_sending() const {
        if (!is_alone() && group == 0 && thread < num_ctas()) shared.barriers.may_send.arrive(thread);
    }

    __device__ float4& received_from(Shares const& shares, int sender, int own_chunk, int pair) const {
        int const slot = shares.slot(sender, own_chunk);
        return shared.received[slot * Traits::kVectorsPerChunk + pair * 128 + thread_in_warpgroup_now()];
    }

    // Twice the bits of the absolute value, from this on; less for what is not finite.
    static constexpr uint32_t kZeroMagnitude = 2u << 23;
    __device__ static uint32_t magnitude(float x) { return 2 * __float_as_uint(x) + kZeroMagnitude; }
    // Of the outputs that this warp has of a row.
    __device__ static uint32_t largest_magnitude(Outputs const& outputs, int tile, int c) {
        uint32_t largest = 0;
#pragma unroll
        for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) largest = max(largest, magnitude(outputs(cute::make_coord(c, h, tile), m, 0)));
        }
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
            largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
        return largest;
    }
    // The exponent, as floats have it, of a power of two of which an output is as many times as 16 bits can hold.
    __device__ static uint32_t exponent_for(uint32_t largest_magnitude) {
        return max(int((max(largest_magnitude, kZeroMagnitude) - kZeroMagnitude) >> 24) - 14, 1);
    }
    __device__ static float scale(uint32_t exponent) { return __uint_as_float(exponent << 23); }
    __device__ static float inverse_scale(uint32_t exponent) { return __uint_as_float((254 - exponent) << 23); }

    // What this CTA has of the output, to where it is merged.
    __device__ void send(Outputs const& outputs, int num_active) const {
        if (rank() >= num_active) return;
        int const thread = thread_in_warpgroup_now();
        shared.barriers.may_send.wait(piece_count % 2 ^ Traits::kHasRoomForBoth);
        uint32_t const barrier = shared_address(shared.barriers.received);
        Shares const shares = this->shares();
#pragma unroll
        for (int pair = 0; pair < kRowTiles / 2; ++pair) {
            uint32_t exponent[2][2];
            float factor[2][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32_t& each = exponent[i / 2][i % 2];
                each = exponent_for(largest_magnitude(outputs, 2 * pair + i / 2, i % 2));
                factor[i / 2][i % 2] = inverse_scale(each);
            }
#pragma unroll
            for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
                int const chunk = group * Traits::kChunksPerGroup + m, target = shares.target(chunk, thread / 32);
                float2 const first = packed(outputs, m, 2 * pair, factor[0]);
                float2 const second = packed(outputs, m, 2 * pair + 1, factor[1]);
                store_remote(
                    remote_address(shared_address(received_from(shares, shares.rank, shares.own_chunk(chunk), pair)),
                                   target),
                    float4{first.x, first.y, second.x, second.y}, remote_address(barrier, target));
            }
            // The scales of a tile for a chunk by each four lanes.
            static_assert(2 * Traits::kChunksPerGroup == 8);
            int const chunk = group * Traits::kChunksPerGroup + thread / 4 % 4;
            bool const second = thread / 16 % 2;
            int const target = shares.target(chunk, thread / 32), row = fragment_column(thread, 2 * pair + second);
            float& to = shared.received_scale[shares.slot(shares.rank, shares.own_chunk(chunk))][thread / 32][row];
            store_remote(remote_address(shared_address(to), target),
                         float2{scale(second ? exponent[1][0] : exponent[0][0]),
                                scale(second ? exponent[1][1] : exponent[0][1])},
                         remote_address(barrier, target));
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
                float const total = this->statistics(fragment_column(thread, tile) + c).sum;
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
            store_lse<Traits>(params, piece, row, log2_sum_of(this->statistics(row)));
        }
    }

    // The chunks of this CTA, from all CTAs of the cluster in the order of their ranks.
    __device__ void merge(Piece const& piece, int num_active) const {
        shared.barriers.weighed.wait(piece_count % 2);
        shared.barriers.received.wait(piece_count % 2);
        Shares const shares = this->shares();
        int const num_own_tiles = shares.num_own_chunks() * kRowTiles;
        if (!shares.has_warps_half(thread_in_warpgroup_now() / 32)) return;
#pragma unroll 1
        for (int i = thread_now() / 128; i < num_own_tiles; i += Traits::kNumGroups) {
            int const own_chunk = i / kRowTiles, tile = i % kRowTiles, chunk = shares.chunk(own_chunk);
            float sum[4] = {};
            add_from_senders(own_chunk, tile, num_active, sum);
            store(piece, chunk, tile, sum);
        }
    }

    __device__ void add_from_senders(int own_chunk, int tile, int num_active, float (&sum)[4]) const {
        float2 const* part =
            reinterpret_cast<float2 const*>(&received_from(shares(), 0, own_chunk, tile / 2)) + tile % 2;
        int const row = fragment_column(thread, tile);
        float const* weight = &shared.weight[0][row];
        float const* scale = &shared.received_scale[shares().slot(0, own_chunk)][thread / 32][row];
#pragma unroll 8
        for (int sender = 0; sender < num_active; ++sender) {
            float2 const packed = *part;
            float2 const low = __half22float2(reinterpret_cast<__half2 const&>(packed.x));
            float2 const high = __half22float2(reinterpret_cast<__half2 const&>(packed.y));
            float2 const w = *reinterpret_cast<float2 const*>(weight), s = *reinterpret_cast<float2 const*>(scale);
            add_weighted(sum[0], low.x, w.x * s.x);
            add_weighted(sum[1], low.y, w.y * s.y);
            add_weighted(sum[2], high.x, w.x * s.x);
            add_weighted(sum[3], high.y, w.y * s.y);
            part += 2 * Traits::kVectorsPerChunk, weight += kRows, scale += 4 * kRows;
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
