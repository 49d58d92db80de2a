// The warp that has the statistics of the rows, which are known before the outputs: it tells them to all CTAs of the
// cluster and weighs what each of these has, while the outputs are still on their way.
#pragma once

#include "kernels/sm90/primitives/approximations.h"
#include "kernels/sm90/primitives/cluster.h"
#include "kernels/sm90/primitives/online_softmax.h"
#include "kernels/sm90/swapped_decode/rows.h"
#include "kernels/sm90/swapped_decode/traits.h"

namespace flash_mla::sm90 {

template <typename Traits>
struct StatisticsWarp {
    static constexpr int kRows = Traits::kRows;
    static constexpr int kLanesPerRow = 32 / kRows, kSendersPerLane = Traits::kMaxCtas / kLanesPerRow;
    static constexpr float kMinusInfinity = OnlineSoftmax::kMinusInfinity;

    DenseDecodeParams const& params;
    typename Traits::SharedStorage& shared;
    int rank;

    __device__ void run() const {
        if (num_ctas() == 1) return;
        int const lane = threadIdx.x % 32;
        for (int i = lane; i < Traits::kMaxCtas * kRows; i += 32) {
            // CTAs that do not exist have seen no key.
            if (i >= num_ctas() * kRows) shared.received_statistics[i / kRows][i % kRows] = {kMinusInfinity, 0.f};
        }
        __syncwarp();
        wait_for_previous_kernel();
        shared.barriers.sources_known.wait(0);
        // What is read from now on is read past the L1: what is read as constant data ptxas moves to before the wait.
        WorkerRow const& row = shared.sources.row;
        typename Traits::Pieces pieces(row);
        int const num_pieces = row.num_pieces;
        Piece piece;
        for (uint32_t count = 0; pieces.index() < num_pieces && pieces.template next<PastL1>(params, piece);) {
            if (!piece.is_empty()) exchange(piece, count++, lane);
        }
    }

private:
    __device__ int num_ctas() const { return params.grid.split_ctas; }

    __device__ void exchange(Piece const& piece, uint32_t count, int lane) const {
        if (lane == 0) expect_results(piece);
        shared.barriers.statistics_left.wait(count % 2);
        // Nobody reads the query rows any more, whose place results may take.
        if (!Traits::kHasRoomForBoth && lane < num_ctas()) shared.barriers.may_send.arrive(lane);
        shared.barriers.may_send.wait(count % 2 ^ Traits::kHasRoomForBoth);
        send();
        shared.barriers.received_statistics.wait(count % 2);
        weigh(piece, lane);
        shared.barriers.weighed.arrive();
        // Before the results of the next piece are announced.
        shared.barriers.received.wait(count % 2);
    }

    __device__ void expect_results(Piece const& piece) const {
        int const num_active = num_active_ctas(piece, num_ctas());
        int const bytes_per_warp = Traits::kVectorsPerChunk / 4 * sizeof(float4) + kRows * sizeof(float);
        int const num_warps = Shares{num_ctas(), rank}.num_warps();
        shared.barriers.received.arrive_and_expect_tx(num_active * num_warps * bytes_per_warp);
        shared.barriers.received_statistics.arrive_and_expect_tx(num_ctas() * kRows * sizeof(float2));
    }

    __device__ void send() const {
        int const lane = threadIdx.x % 32, row = lane % kRows;
        uint32_t const barrier = shared_address(shared.barriers.received_statistics);
        uint32_t const to = shared_address(shared.received_statistics[rank][row]);
        RowStatistics const own = statistics_of(shared, row);
        float2 const statistics = {own.reference, own.sum};
#pragma unroll 4
        for (int target = lane / kRows; target < num_ctas(); target += kLanesPerRow)
            store_remote(remote_address(to, target), statistics, remote_address(barrier, target));
    }

    // Of what each CTA has of a row: lanes share out the CTAs.
    __device__ void weigh(Piece const& piece, int lane) const {
        int const row = lane % kRows, first = lane / kRows * kSendersPerLane;
        float2 from[kSendersPerLane];
        float largest = kMinusInfinity, total = 0.f;
#pragma unroll
        for (int i = 0; i < kSendersPerLane; ++i) {
            from[i] = shared.received_statistics[first + i][row];
            largest = fmaxf(largest, from[i].x);
        }
        if (kLanesPerRow == 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 16));
        float const offset = largest == kMinusInfinity ? 0.f : largest;
        float weight[kSendersPerLane];
#pragma unroll
        for (int i = 0; i < kSendersPerLane; ++i) {
            weight[i] = exp2_approx(from[i].x - offset);
            total = fmaf(weight[i], from[i].y, total);
        }
        if (kLanesPerRow == 2) total += __shfl_xor_sync(~0u, total, 16);
        float const inverse = total == 0.f ? 0.f : __fdividef(1.f, total);
#pragma unroll
        for (int i = 0; i < kSendersPerLane; ++i) shared.weight[first + i][row] = weight[i] * inverse;
        if (rank == 0 && lane < kRows) store_lse<Traits>(params, piece, row, log2_sum_of({largest, total}));
    }
};

}  // namespace flash_mla::sm90
