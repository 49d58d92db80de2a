// The order in which KV blocks come into shared memory.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "kernels/sm90/dense_decode/pieces.h"

namespace flash_mla::sm90 {

// Which KV block comes next.
struct LoadOrder {
    static constexpr int kNothing = -1;

    int page;
    int head_kv;  // or kNothing
};

// Yields the KV blocks of all pieces of a CTA in the order in which they are consumed. One thread advances it; it lives in
// shared memory because registers are dearer.
class LoadCursor {
public:
    __device__ void begin(DenseDecodeParams const& params) {
        pieces_ = PieceCursor(params);
        enter_next_piece(params);
    }

    // The piece of the next block, and whether that is its first one.
    __device__ Piece const& piece() const { return piece_; }
    __device__ bool is_exhausted() const { return exhausted_; }
    __device__ bool begins_piece() const { return begins_piece_; }

    // Starts to look up the next block: the page is in the order after cp_async_wait, nobody stalls on the block table.
    __device__ void next(DenseDecodeParams const& params, LoadOrder& order) {
        begins_piece_ = false;
        if (exhausted_) {
            order.head_kv = LoadOrder::kNothing;
            return;
        }
        order.head_kv = piece_.place.head_kv;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(cute::cast_smem_ptr_to_uint(&order.page)),
                     "l"(params.block_table + piece_.batch * params.block_table_stride + block_)
                     : "memory");
        cute::cp_async_fence();
        if (++block_ == piece_.end_block) enter_next_piece(params);
    }

private:
    __device__ void enter_next_piece(DenseDecodeParams const& params) {
        exhausted_ = !pieces_.next_with_keys(params, piece_);
        block_ = piece_.begin_block;
        begins_piece_ = true;
    }

    PieceCursor pieces_;
    Piece piece_;
    int block_;
    bool exhausted_, begins_piece_;
};

}  // namespace flash_mla::sm90
