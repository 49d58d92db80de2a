// The order in which KV blocks come into shared memory.
#pragma once

#include "kernels/sm90/dense_decode/pieces.h"

namespace flash_mla::sm90 {

// Which KV block comes next.
struct LoadOrder {
    static constexpr int kNothing = -1;

    int page;
    int head_kv;  // or kNothing
};

// Yields the KV blocks of all pieces of a CTA in the order in which they are consumed. One thread advances it, while it
// would else wait for the tensor cores; it lives in shared memory because registers are dearer.
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

    __device__ LoadOrder next(DenseDecodeParams const& params) {
        begins_piece_ = false;
        if (exhausted_) return {0, LoadOrder::kNothing};
        LoadOrder const order{__ldg(params.block_table + piece_.batch * params.block_table_stride + block_),
                              piece_.place.head_kv};
        if (++block_ == piece_.end_block) enter_next_piece(params);
        return order;
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
