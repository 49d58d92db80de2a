// The thread that loads KV blocks, from the block table through TMA into shared memory.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/sm90/swapped_decode/traits.h"

namespace flash_mla::sm90 {

template <typename Traits>
struct SwappedProducer {
    DenseDecodeParams const& params;
    KMaps const& maps;
    typename Traits::SharedStorage& shared;
    int rank;
    uint32_t count = 0;

    __device__ void run() {
        prefetch_likely_length(params);
        typename Traits::Pieces pieces(params);
        Piece piece;
        while (next_with_keys(pieces, params, piece)) load(piece);
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
            load_block(page, piece.place.head_kv);
            page = next_page;
            ++count;
        }
    }

    __device__ void load_block(int page, int head_kv) const {
        uint32_t const stage = count % Traits::kNumStages;
        shared.barriers.block_empty[stage].wait(count / Traits::kNumStages % 2 ^ 1);
        auto& full = shared.barriers.block_full[stage];
        full.arrive_and_expect_tx(Traits::kBlockBytes);
        auto* const bytes_arrived = reinterpret_cast<uint64_t*>(&full);
        // KV that several lanes read should stay in the L2 until the last of them has it.
        auto const hint = static_cast<uint64_t>(params.grid.num_lanes > 1 ? cute::TMA::CacheHintSm90::EVICT_NORMAL
                                                                          : cute::TMA::CacheHintSm90::EVICT_FIRST);
        auto& chunks = shared.block[stage];
        for (int chunk = 0; chunk < Traits::kLatentChunks; chunk += Traits::kLatentChunks / 2) {
            cute::SM90_TMA_LOAD_5D::copy(&maps.latent, bytes_arrived, hint, chunks[chunk], 0, 0, chunk, head_kv, page);
        }
        cute::SM90_TMA_LOAD_4D::copy(&maps.rope, bytes_arrived, hint, chunks[Traits::kLatentChunks],
                                     Traits::kLatentChunks * Traits::kChunkColumns, 0, head_kv, page);
    }
};

}  // namespace flash_mla::sm90
