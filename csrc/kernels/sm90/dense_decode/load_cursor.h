// The order in which KV blocks come into shared memory.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "kernels/sm90/dense_decode/piece_queue.h"
#include "kernels/sm90/primitives/early_block.h"

namespace flash_mla::sm90 {

// Where a KV block is in the cache.
struct LoadOrder {
    static constexpr int kNothing = -1;

    int page;
    int head_kv;  // or kNothing: there are no more blocks
};

// Yields the KV blocks of all pieces of a CTA in the order in which they are consumed, and announces the pieces as
// their first blocks come up. One thread advances it; it lives in shared memory because registers are dearer.
template <typename Pieces>
class LoadCursor {
public:
    // With a piece that is known, and where its first blocks are. Returns how many.
    template <int kNumPages>
    __device__ uint32_t begin(DenseDecodeParams const& params, PieceQueue& queue, EarlyPiece<Pieces> const& early,
                              int const (&page)[kNumPages], LoadOrder* orders) {
        pieces_ = early.pieces;
        queue.next() = early.piece;
        queue.publish_next();
        Position at = begin_of(params, early.piece);
        uint32_t num_known = 0;
#pragma unroll
        for (int i = 0; i < kNumPages; ++i) {
            if (num_known != i || page[i] == kNoPage) continue;
            orders[i] = {page[i], at.head_kv};
            ++num_known;
        }
        at.pages += num_known;
        at.blocks_left -= num_known;
        at_ = at;
        return num_known;
    }
    __device__ void begin(DenseDecodeParams const& params) {
        pieces_ = Pieces(params);
        at_ = {nullptr, 0, 0};
    }

    // Starts to look up the next block: the page is in the order after cp_async_wait, nobody stalls on the block table.
    // Returns whether the block begins a piece.
    template <typename NextOrder>
    __device__ bool look_up(DenseDecodeParams const& params, PieceQueue& queue, NextOrder&& next_order) {
        Position at = at_;
        bool const enters_piece = at.blocks_left == 0 && at.head_kv != LoadOrder::kNothing;
        if (enters_piece) at = enter_next_piece(params, queue);
        LoadOrder& order = next_order();
        order.head_kv = at.head_kv;
        if (at.head_kv != LoadOrder::kNothing) {
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(cute::cast_smem_ptr_to_uint(&order.page)),
                         "l"(at.pages)
                         : "memory");
            cute::cp_async_fence();
            ++at.pages;
            --at.blocks_left;
        }
        at_ = at;
        return enters_piece && at.head_kv != LoadOrder::kNothing;
    }

private:
    // In one piece, so that it takes one access.
    struct alignas(16) Position {
        int const* pages;
        int blocks_left;  // of the piece
        int head_kv;
    };

    __device__ static Position begin_of(DenseDecodeParams const& params, Piece const& piece) {
        return {params.block_table + piece.batch * params.block_table_stride + piece.begin_block, piece.num_blocks(),
                piece.place.head_kv};
    }

    __device__ Position enter_next_piece(DenseDecodeParams const& params, PieceQueue& queue) {
        Piece& piece = queue.next();
        Position begin = {nullptr, 0, LoadOrder::kNothing};
        if (!next_with_keys(pieces_, params, piece)) {
            piece.batch = Piece::kEnd;
        } else {
            begin = begin_of(params, piece);
        }
        queue.publish_next();
        return begin;
    }

    Position at_;
    Pieces pieces_;
};

}  // namespace flash_mla::sm90
