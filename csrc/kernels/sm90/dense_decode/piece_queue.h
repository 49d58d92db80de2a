// The pieces that have keys, on their way from the thread that loads their blocks to the warpgroups that compute them.
#pragma once

#include "kernels/sm90/dense_decode/pieces.h"
#include "kernels/sm90/primitives/pipeline.h"

namespace flash_mla::sm90 {

// Nobody waits for room: loads run at most 3 blocks ahead of the slower output warpgroup, which is at most 2 blocks behind
// the other, so with at least one block per piece no more than 6 pieces are in use.
struct PieceQueue {
    static constexpr int kCapacity = 8;
    static constexpr int kEnd = -1;  // as batch: there are no more

    Piece piece[kCapacity];
    Barrier full[kCapacity];

    __device__ void init() {
        for (auto& barrier : full) barrier.init(1);
    }
    __device__ void publish(int index, Piece const& next) {
        piece[index % kCapacity] = next;
        full[index % kCapacity].arrive();
    }
    __device__ void publish_end(int index) {
        piece[index % kCapacity].batch = kEnd;
        full[index % kCapacity].arrive();
    }
    __device__ Piece const& wait(int index) {
        full[index % kCapacity].wait(index / kCapacity % 2);
        return piece[index % kCapacity];
    }
};

}  // namespace flash_mla::sm90
