// The order in which KV blocks come into shared memory.
#pragma once

#include "kernels/sm90/dense_decode/pieces.h"

namespace flash_mla::sm90 {

// Which KV block a freed stage takes next.
struct LoadOrder {
    static constexpr int kNothing = -1;

    int page;
    int head_kv;  // or kNothing
};

// Yields the KV blocks of all pieces of a CTA in the order in which they are consumed. One thread advances it; it lives in
// shared memory because registers are dearer, all but the page of the next block: that is on its way to a register.
class LoadCursor {
public:
    // Returns the page of the first block.
    __device__ int begin(DenseDecodeParams const& params) {
        pieces_ = PieceCursor(params);
        exhausted_ = !pieces_.next_with_keys(params, piece_);
        block_ = piece_.begin_block;
        return exhausted_ ? 0 : fetch_page(params);
    }

    // Takes the page of the block it yields and replaces it by that of the block after.
    __device__ LoadOrder next(DenseDecodeParams const& params, int& page) {
        if (exhausted_) return {0, LoadOrder::kNothing};
        LoadOrder const order{page, piece_.place.head_kv};
        if (++block_ == piece_.end_block) {
            exhausted_ = !pieces_.next_with_keys(params, piece_);
            block_ = piece_.begin_block;
        }
        if (!exhausted_) page = fetch_page(params);
        return order;
    }

private:
    __device__ int fetch_page(DenseDecodeParams const& params) const {
        return __ldg(params.block_table + piece_.batch * params.block_table_stride + block_);
    }

    PieceCursor pieces_;
    Piece piece_;
    int block_;
    bool exhausted_;
};

}  // namespace flash_mla::sm90
