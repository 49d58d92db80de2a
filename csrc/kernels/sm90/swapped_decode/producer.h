// The thread that loads KV blocks, from the block table through TMA into shared memory.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/sm90/primitives/dependent_launch.h"
#include "kernels/sm90/primitives/early_block.h"
#include "kernels/sm90/swapped_decode/rows.h"
#include "kernels/sm90/swapped_decode/traits.h"

namespace flash_mla::sm90 {

template <typename Traits>
struct SwappedProducer {
    DenseDecodeParams const& params;
    DecodeMaps const& maps;
    typename Traits::SharedStorage& shared;
    int rank;
    uint32_t count = 0;

    // What seem to be the first query rows and the first block are asked for as soon as the kernel before has ended;
    // then it is found out whether they are.
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

        // Before what takes long, behind which it would come.
        auto const sources = early.read_again(params);
        int page_now[Traits::kNumStages];
        page_entries(params, early, blocks.begin, page, page_now);
        auto& barriers = shared.barriers;
        copy_early_rows(early.exists, early.piece);
        bool const is_early = page[0] != kNoPage;
        if (is_early) copy_early_block(page[0], head_kv);
        shared.sources = sources;
        barriers.sources_known.arrive();
        bool const is_known = early.is_from(sources);
        if (is_known && maps.has_q) barriers.rows_full.arrive();
        bool is_right = is_known && is_early;
        for (int i = 0; i < Traits::kNumStages; ++i) is_right &= page[i] == page_now[i];
        auto pieces = early.pieces;
        Piece piece = early.piece;
        if (is_right) {
            barriers.block_full[0].arrive();
            for (count = 1; count < Traits::kNumStages && page[count] != kNoPage; ++count)
                copy_block(page[count], head_kv, count, barriers.block_full[count]);
            load(piece, count);
        } else {
            for (auto& half : barriers.early_block) {
                if (!is_early) half.arrive();
                half.wait(0);
            }
            pieces = typename Traits::Pieces(params);
            bool const has_piece = next_with_keys(pieces, params, piece);
            if (!is_known) replace_rows(has_piece, piece);
            if (!has_piece) return;
            load(piece, 0);
        }
        while (next_with_keys(pieces, params, piece)) load(piece, 0);
    }

private:
    // With fewer left, what is asked for first comes later.
    static constexpr int kBlocksWorthPrefetching = 8;

    __device__ void copy_early_rows(bool exists, Piece const& piece) const {
        if (!maps.has_q) return;
        auto& full = shared.barriers.early_rows;
        if (exists) {
            copy_rows<Traits>(maps, shared, piece, full);
        } else {
            full.arrive();
        }
    }
    // Those of the true first piece, when the early ones have come.
    __device__ void replace_rows(bool has_piece, Piece const& piece) const {
        if (!maps.has_q) return;
        shared.barriers.early_rows.wait(0);
        if (has_piece) {
            copy_rows<Traits>(maps, shared, piece, shared.barriers.rows_full);
        } else {
            shared.barriers.rows_full.arrive();
        }
    }

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
        // Until the first stage goes free nothing else is asked of the memory.
        if (num_loaded == Traits::kNumStages && blocks.end - begin >= kBlocksWorthPrefetching)
            prefetch_block(page, piece.place.head_kv);
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

    // KV that several lanes read should stay in the L2 until the last of them has it.
    __device__ uint64_t cache_hint() const {
        return static_cast<uint64_t>(params.grid.num_lanes > 1 ? cute::TMA::CacheHintSm90::EVICT_NORMAL
                                                               : cute::TMA::CacheHintSm90::EVICT_FIRST);
    }

    __device__ void copy_block(int page, int head_kv, uint32_t stage, TransactionBarrier& full) const {
        full.arrive_and_expect_tx(Traits::kBlockBytes);
        for (int group = 0; group < Traits::kNumGroups; ++group) copy_latent(page, head_kv, stage, group, full);
        copy_rope(page, head_kv, stage, full);
    }
    // Each group's columns for themselves, so that the first group begins when its own are there.
    __device__ void copy_early_block(int page, int head_kv) const {
        auto& halves = shared.barriers.early_block;
        constexpr int kHalfBytes = Traits::kChunksPerGroup * Traits::kChunkBytes;
        halves[0].arrive_and_expect_tx(kHalfBytes + Traits::kChunkBytes);
        copy_rope(page, head_kv, 0, halves[0]);
        copy_latent(page, head_kv, 0, 0, halves[0]);
        halves[1].arrive_and_expect_tx(kHalfBytes);
        copy_latent(page, head_kv, 0, 1, halves[1]);
    }
    __device__ void copy_latent(int page, int head_kv, uint32_t stage, int group, TransactionBarrier& full) const {
        int const chunk = group * Traits::kChunksPerGroup;
        cute::SM90_TMA_LOAD_5D::copy(&maps.latent, reinterpret_cast<uint64_t*>(&full), cache_hint(),
                                     shared.block[stage][chunk], 0, 0, chunk, head_kv, page);
    }
    __device__ void copy_rope(int page, int head_kv, uint32_t stage, TransactionBarrier& full) const {
        cute::SM90_TMA_LOAD_4D::copy(&maps.rope, reinterpret_cast<uint64_t*>(&full), cache_hint(),
                                     shared.block[stage][Traits::kLatentChunks],
                                     Traits::kLatentChunks * Traits::kChunkColumns, 0, head_kv, page);
    }
};

}  // namespace flash_mla::sm90
