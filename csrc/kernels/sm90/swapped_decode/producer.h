// The thread that loads KV blocks, from the block table through TMA into shared memory.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/sm90/primitives/dependent_launch.h"
#include "kernels/sm90/primitives/early_block.h"
#include "kernels/sm90/swapped_decode/traits.h"

namespace flash_mla::sm90 {

template <typename Traits>
struct SwappedProducer {
    DenseDecodeParams const& params;
    KMaps const& maps;
    typename Traits::SharedStorage& shared;
    int rank;
    uint32_t count = 0;

    // What seems to be the first block is asked for as soon as the kernel before has ended; then it is found out
    // whether it is.
    __device__ void run() {
        EarlyPiece<typename Traits::Pieces> const early(params);
        BlockRange const blocks(early.piece, rank, params.grid.split_ctas);
        int const head_kv = early.piece.place.head_kv;
        int page[Traits::kNumStages];
        early_pages(params, early, blocks.begin, blocks.end, page);
        for (int const each : page) {
            if (each != kNoPage) prefetch_block(each, head_kv);
        }
        wait_for_previous_kernel();
        allow_dependent_launch();

        auto const sources = early.read_again(params);
        int page_now[Traits::kNumStages];
        page_entries(params, early, blocks.begin, page, page_now);
        auto& early_block = shared.barriers.early_block;
        if (page[0] != kNoPage) copy_block(page[0], head_kv, 0, early_block);
        bool is_right = early.is_from(sources) && page[0] != kNoPage;
        for (int i = 0; i < Traits::kNumStages; ++i) is_right &= page[i] == page_now[i];
        auto pieces = early.pieces;
        Piece piece = early.piece;
        if (is_right) {
            for (count = 1; count < Traits::kNumStages && page[count] != kNoPage; ++count)
                copy_block(page[count], head_kv, count, shared.barriers.block_full[count]);
            early_block.wait(0);
            shared.barriers.block_full[0].arrive();
            load(piece, count);
        } else {
            if (page[0] != kNoPage) early_block.wait(0);
            pieces = typename Traits::Pieces(params);
        }
        while (next_with_keys(pieces, params, piece)) load(piece, 0);
    }

private:
    __device__ void prefetch_block(int page, int head_kv) const {
        for (int chunk = 0; chunk < Traits::kLatentChunks; chunk += Traits::kLatentChunks / 2)
            prefetch_latent(maps, chunk, head_kv, page);
        prefetch_rope(maps, head_kv, page);
    }

    // The blocks of a piece but for the first ones.
    __device__ void load(Piece const& piece, int num_loaded) {
        BlockRange const blocks(piece, rank, params.grid.split_ctas);
        int const* const pages = params.block_table + piece.batch * params.block_table_stride;
        int const begin = blocks.begin + num_loaded;
        int page = 0;
        if (begin < blocks.end) page = __ldg(pages + begin);
        for (int block = begin; block < blocks.end; ++block) {
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
        copy_block(page, head_kv, stage, shared.barriers.block_full[stage]);
    }

    __device__ void copy_block(int page, int head_kv, uint32_t stage, TransactionBarrier& full) const {
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
