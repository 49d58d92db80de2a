// The pieces that have keys, on their way from the thread that loads their blocks to the warpgroups that compute them.
#pragma once

#include "kernels/sm90/primitives/pieces.h"
#include "kernels/sm90/primitives/pipeline.h"

namespace flash_mla::sm90 {

// Nobody waits for room: pages are looked up 3 blocks before the scores, which are at most 3 blocks before the slower
// output warpgroup, so with at least one block per piece, the end among them, no more than 7 pieces are in use.
struct PieceQueue {
    static constexpr uint32_t kCapacity = 8;

    Piece piece[kCapacity];
    Barrier full[kCapacity];
    uint32_t num_published;  // the publisher's own
    uint32_t next_scores;    // the next piece of the scores warpgroup: in a register it would be one too many

    __device__ void init() {
        for (auto& barrier : full) barrier.init(1);
        num_published = next_scores = 0;
    }
    // The piece to fill in, before the others see it.
    __device__ Piece& next() { return piece[num_published % kCapacity]; }
    __device__ void publish_next() { full[num_published++ % kCapacity].arrive(); }
    __device__ Piece const& latest() const { return piece[(num_published + kCapacity - 1) % kCapacity]; }
    // Of a piece that is there.
    __device__ Piece const& get(uint32_t index) const { return piece[index % kCapacity]; }
    __device__ Piece const& wait(uint32_t index) const {
        full[index % kCapacity].wait(index / kCapacity % 2);
        return get(index);
    }
};

}  // namespace flash_mla::sm90
