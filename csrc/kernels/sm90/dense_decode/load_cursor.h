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
        exhausted_ = !pieces_.next_with_keys(params, piece_);
        block_ = piece_.begin_block;
    }

    __device__ LoadOrder next(DenseDecodeParams const& params) {
        if (exhausted_) return {0, LoadOrder::kNothing};
        LoadOrder const order{__ldg(params.block_table + piece_.batch * params.block_table_stride + block_),
                              piece_.place.head_kv};
        if (++block_ == piece_.end_block) {
            exhausted_ = !pieces_.next_with_keys(params, piece_);
            block_ = piece_.begin_block;
        }
        return order;
    }

private:
    PieceCursor pieces_;
    Piece piece_;
    int block_;
    bool exhausted_;
};

}  // namespace flash_mla::sm90
