// The order in which KV blocks come into shared memory.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "kernels/sm90/dense_decode/piece_queue.h"

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
    __device__ void begin(DenseDecodeParams const& params) {
        pieces_ = Pieces(params);
        blocks_left_ = 0;
        head_kv_ = 0;
        pieces_.prefetch(params);
    }

    // Starts to look up the next block: the page is in the order after cp_async_wait, nobody stalls on the block table.
    // Returns whether the block begins a piece.
    template <typename NextOrder>
    __device__ bool look_up(DenseDecodeParams const& params, PieceQueue& queue, NextOrder&& next_order) {
        bool const enters_piece = blocks_left_ == 0 && head_kv_ != LoadOrder::kNothing;
        if (enters_piece) enter_next_piece(params, queue);
        LoadOrder& order = next_order();
        order.head_kv = head_kv_;
        if (head_kv_ == LoadOrder::kNothing) return false;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(cute::cast_smem_ptr_to_uint(&order.page)),
                     "l"(pages_)
                     : "memory");
        cute::cp_async_fence();
        ++pages_;
        --blocks_left_;
        return enters_piece;
    }

private:
    __device__ void enter_next_piece(DenseDecodeParams const& params, PieceQueue& queue) {
        Piece& piece = queue.next();
        if (!next_with_keys(pieces_, params, piece)) {
            piece.batch = Piece::kEnd;
            head_kv_ = LoadOrder::kNothing;
        } else {
            head_kv_ = piece.place.head_kv;
            pages_ = params.block_table + piece.batch * params.block_table_stride + piece.begin_block;
            blocks_left_ = piece.num_blocks();
        }
        queue.publish_next();
    }

    Pieces pieces_;
    int const* pages_;
    int blocks_left_;
    int head_kv_;
};

}  // namespace flash_mla::sm90
