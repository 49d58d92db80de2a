// What a CTA can know before the kernel before has ended: with which piece and block it probably begins.
//
// The plan, the lengths and the block table may be written until then. So what is read earlier is good for copies that
// are made again where it turns out to have been wrong, and for nothing else; it is read past the L1 (pieces.h), and is
// within bounds whatever it says. When the kernel before has ended, it is read again, all at once, as nothing has to be
// followed any more, and before any copy is asked for, behind whose bytes it would wait. The copies do not wait for it.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/sm90/primitives/k_maps.h"
#include "kernels/sm90/primitives/pieces.h"

namespace flash_mla::sm90 {

template <typename Pieces>
struct EarlyPiece {
    struct Sources {
        WorkerRow row;
        int batch, seqlen;  // of the request that it seemed to be; no batch, if there seemed to be none
    };

    WorkerRow row;
    Pieces pieces;  // what follows
    Piece piece;
    bool exists;  // and has keys

    __device__ explicit EarlyPiece(DenseDecodeParams const& params) : row(read_row<PastL1>(params)), pieces(row) {
        exists = pieces.look_ahead(params, row, piece) && !piece.is_empty();
        // Where there is none they are undefined.
        if (!exists) piece.begin_block = piece.end_block = 0;
    }
    __device__ Sources read_again(DenseDecodeParams const& params) const {
        return {read_row<PastL1>(params), exists ? piece.batch : Piece::kEnd,
                exists ? PastL1::load(params.cache_seqlens + piece.batch) : 0};
    }
    // Which may have been read again by a thread to which it seemed to be another piece.
    __device__ bool is_from(Sources const& now) const {
        return exists && now.batch == piece.batch && now.row == row && now.seqlen == piece.seqlen;
    }
};

inline constexpr int kNoPage = -1;
// The pages of the first of these blocks of an early piece; kNoPage where there is none.
template <typename Pieces, int kNumPages>
__device__ void early_pages(DenseDecodeParams const& params, EarlyPiece<Pieces> const& early, int begin, int end,
                            int (&page)[kNumPages]) {
    int const* const entries = params.block_table + early.piece.batch * params.block_table_stride;
    end = min(end, params.block_table_columns);
#pragma unroll
    for (int i = 0; i < kNumPages; ++i) {
        page[i] = uint32_t(begin + i) < uint32_t(end) ? PastL1::load(entries + begin + i) : kNoPage;
        if (uint32_t(page[i]) >= uint32_t(params.num_blocks)) page[i] = kNoPage;
    }
}
// What the block table says now of those that were there. Nothing here waits for it.
template <typename Pieces, int kNumPages>
__device__ void page_entries(DenseDecodeParams const& params, EarlyPiece<Pieces> const& early, int begin,
                             int const (&page)[kNumPages], int (&page_now)[kNumPages]) {
    int const* const entries = params.block_table + early.piece.batch * params.block_table_stride;
#pragma unroll
    for (int i = 0; i < kNumPages; ++i) page_now[i] = page[i] == kNoPage ? kNoPage : PastL1::load(entries + begin + i);
}

// Four chunks of a block's latent columns, and its RoPE columns, to the L2.
__device__ inline void prefetch_latent(KMaps const& maps, int chunk, int head_kv, int page) {
    cute::SM90_TMA_LOAD_5D::PREFETCH::copy(&maps.latent, 0, 0, chunk, head_kv, page);
}
__device__ inline void prefetch_rope(KMaps const& maps, int head_kv, int page) {
    cute::SM90_TMA_LOAD_4D::PREFETCH::copy(&maps.rope, kKLatentChunks * kKChunkColumns, 0, head_kv, page);
}

}  // namespace flash_mla::sm90
