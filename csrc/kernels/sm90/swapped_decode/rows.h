// The query rows of a tile: where they are, what is known of them, and what a CTA has of their outputs.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/sm90/primitives/online_softmax.h"
#include "kernels/sm90/swapped_decode/traits.h"
#include "params/query_rows.h"

namespace flash_mla::sm90 {

template <typename Traits>
__device__ QueryRow query_row_of(DenseDecodeParams const& params, Piece const& piece, int row) {
    if (params.seqlen_q > 1) return query_row(params, piece.place, row, Traits::kRows);
    // No division.
    int const head = piece.place.m_tile * Traits::kRows + row;
    return {0, piece.place.head_kv * params.heads_per_group + head, head < params.heads_per_group};
}

// Asks for the query rows of a tile, by one thread.
template <typename Traits>
__device__ void copy_rows(DecodeMaps const& maps, typename Traits::SharedStorage& shared, Piece const& piece,
                          TransactionBarrier& full) {
    full.arrive_and_expect_tx(sizeof(shared.q));
    cute::SM90_TMA_LOAD_5D::copy(&maps.q, reinterpret_cast<uint64_t*>(&full),
                                 static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), shared.q, 0,
                                 piece.place.m_tile * Traits::kRows, 0, piece.place.head_kv, piece.batch);
}

// Of a tile, or of a piece of it.
template <typename Traits>
__device__ void store_lse(DenseDecodeParams const& params, Piece const& piece, int row, float lse_log2) {
    QueryRow const at = query_row_of<Traits>(params, piece, row);
    if (!at.exists) return;
    if (piece.is_partial()) {
        params.lse_partial[partial_row(params.grid, piece.slot, lane_now(), row, Traits::kRows)] = lse_log2;
    } else {
        params.lse[lse_offset(params, piece.batch, at)] = natural_lse(lse_log2);
    }
}

// Reference and sum of a row, as far as this CTA has seen its keys.
template <typename SharedStorage>
__device__ RowStatistics statistics_of(SharedStorage const& shared, int row) {
    return {shared.reference[row],
            (shared.row_sum[0][row] + shared.row_sum[1][row]) + (shared.row_sum[2][row] + shared.row_sum[3][row])};
}

// log2-sum-exp2 of a row with this reference and sum; -inf if it saw no key.
__device__ inline float log2_sum_of(RowStatistics const& statistics) {
    return statistics.sum == 0.f ? OnlineSoftmax::kMinusInfinity : log2f(statistics.sum) + statistics.reference;
}

// The CTAs of a cluster that have blocks of a piece, the first ones.
__device__ inline int num_active_ctas(Piece const& piece, int num_ctas) { return min(piece.num_blocks(), num_ctas); }

// Who merges what in a cluster: chunk c of the output is merged by CTA c % num_ctas; where there are more of these than
// chunks, a half each, of two warps.
struct Shares {
    int num_ctas, rank;

    __device__ bool has_half_chunks() const { return num_ctas > kKLatentChunks; }
    // How many chunks of its CTA are before this one: chunk / num_ctas.
    __device__ int own_chunk(int chunk) const {
        static_assert(kKLatentChunks <= 4 * 2);
        return (chunk >= num_ctas) + (chunk >= 2 * num_ctas) + (chunk >= 3 * num_ctas);
    }
    __device__ int num_own_chunks() const { return own_chunk(max(kKLatentChunks - 1 - rank, 0)) + 1; }
    __device__ int chunk(int own_chunk) const { return has_half_chunks() ? rank / 2 : own_chunk * num_ctas + rank; }
    // Whether this CTA merges what such a warp of a warpgroup has.
    __device__ bool has_warps_half(int warp) const { return !has_half_chunks() || warp / 2 == rank % 2; }
    // Who merges what a warp of a warpgroup has of a chunk.
    __device__ int target(int chunk, int warp) const {
        return has_half_chunks() ? 2 * chunk + warp / 2 : chunk - own_chunk(chunk) * num_ctas;
    }
    __device__ int slot(int sender, int own_chunk) const { return own_chunk * num_ctas + sender; }
    // That send to this one, of each CTA.
    __device__ int num_warps() const { return has_half_chunks() ? 2 : 4 * num_own_chunks(); }
};

}  // namespace flash_mla::sm90
