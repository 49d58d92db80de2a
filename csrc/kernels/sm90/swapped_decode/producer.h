// The thread that loads KV blocks, from the block table through TMA into shared memory.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/sm90/swapped_decode/traits.h"

namespace flash_mla::sm90 {

template <typename Traits>
struct SwappedProducer {
    DenseDecodeParams const& params;
    CUtensorMap const& map;
    typename Traits::SharedStorage& shared;
    int rank;
    RingPosition<Traits> at = {};

    __device__ void run() {
        typename Traits::Pieces pieces(params);
        Piece piece;
        for (bool is_first = true; next_with_keys(pieces, params, piece); is_first = false) {
            if (!is_first) leave_room_for_results();
            load(piece);
        }
    }

private:
    __device__ void load(Piece const& piece) {
        BlockRange const blocks(piece, rank, params.grid.split_ctas);
        int const* const pages = params.block_table + piece.batch * params.block_table_stride;
        int page = 0;
        if (blocks.begin < blocks.end) page = __ldg(pages + blocks.begin);
        for (int block = blocks.begin; block < blocks.end; ++block) {
            // The next page comes while there is no room for this block.
            int const next_page = block + 1 < blocks.end ? __ldg(pages + block + 1) : 0;
            load_block(page, piece.place.head_kv, (block - blocks.begin) % Traits::kNumGroups);
            page = next_page;
        }
    }

    __device__ void leave_room_for_results() {
        for (RingPosition<Traits> const end = at.after_results(); at.count < end.count; ++at.count) {
            wait_until_empty();
            shared.barriers.third_full[0][at.place()].arrive();
        }
    }
    __device__ void wait_until_empty() const { shared.barriers.third_empty[at.place()].wait(at.empty_phase()); }

    __device__ void load_block(int page, int head_kv, int group) {
        // KV that several lanes read should stay in the L2 until the last of them has it.
        auto const hint = static_cast<uint64_t>(params.grid.num_lanes > 1 ? cute::TMA::CacheHintSm90::EVICT_NORMAL
                                                                          : cute::TMA::CacheHintSm90::EVICT_FIRST);
#pragma unroll 1
        for (int third = 0; third < Traits::kThirds; ++third, ++at.count) {
            wait_until_empty();
            auto& full = shared.barriers.third_full[group][at.place()];
            full.arrive_and_expect_tx(Traits::kThirdBytes);
            cute::SM90_TMA_LOAD_5D::copy(&map, reinterpret_cast<uint64_t*>(&full), hint, shared.ring[at.place()], 0, 0,
                                         third * Traits::kChunksPerThird, head_kv, page);
        }
    }
};

}  // namespace flash_mla::sm90
