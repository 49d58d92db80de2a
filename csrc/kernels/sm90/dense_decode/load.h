// KV blocks on their way into shared memory.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/sm90/dense_decode/load_q.h"
#include "kernels/sm90/dense_decode/traits.h"
#include "kernels/sm90/primitives/early_block.h"

namespace flash_mla::sm90 {

// Brings in the KV blocks of a CTA. In a cluster each CTA copies one half of the latent columns to the same place in
// both. RoPE columns each copies for itself, to where its own P was.
template <typename Traits>
struct BlockLoader {
    DenseDecodeParams const& params;
    DecodeMaps const& maps;
    typename Traits::SharedStorage& shared;

    // What seems to be the first blocks before the kernel before has ended: each CTA of a cluster brings a part of the
    // very first one to the L2. By one thread.
    using Early = EarlyPiece<typename Traits::Pieces>;
    static constexpr int kNumEarly = Traits::kNumStages;
    __device__ void look_ahead(Early const& early, int (&page)[kNumEarly]) const {
        early_pages(params, early, early.piece.begin_block, early.piece.end_block, page);
        if (page[0] == kNoPage) return;
        for (int half = 0; half < 2; ++half) {
            if (copies_half(half))
                prefetch_latent(maps, half * Traits::kChunksPerHalf, early.piece.place.head_kv, page[0]);
        }
        prefetch_rope(maps, early.piece.place.head_kv, page[0]);
    }

    // The first blocks are loaded by the first thread of an output warpgroup, which has nothing else to do yet. It asks
    // for the second when the query rows have come, so that these and the first block come first, and for the last one
    // when the query rows have left its stage.
    __device__ void load_first_blocks(Early const& early, int const (&page)[kNumEarly]) const {
        load_first_block(early, page);
        if (shared.order[0].head_kv != LoadOrder::kNothing) shared.barriers.first_rows[0].wait(0);
        load_own_share({1});
        for (int half = 0; half < 2; ++half) {
            if (copies_half(half)) fill_half({Traits::kNumStages - 1}, half);
        }
    }

    // By one warp at a time. The query rows of the piece that begins with the block are fetched into the L2, unless
    // they are loaded right away or no map describes them.
    __device__ void look_up(BlockPosition<Traits> const& block) const {
        if (thread_in_warpgroup_now() % 32 == 0) look_up_later(block);
        __syncwarp();
    }

    // By one thread, once nobody reads the RoPE columns or P that were in this place.
    __device__ void load_rope(BlockPosition<Traits> const& block) const {
        LoadOrder const order = shared.order[block.order()];
        if (order.head_kv == LoadOrder::kNothing) return;
        auto& full = shared.barriers.block_full[block.stage()];
        full.arrive_and_expect_tx(Traits::kChunkBytes);
        copy_rope(order, reinterpret_cast<uint64_t*>(&full), block.rope_place());
    }

    // Loads half of a block once the whole cluster has consumed what was there. By one thread of the CTA that copies
    // this half.
    __device__ void fill_half(BlockPosition<Traits> const& block, int half) const {
        shared.barriers.consumed[block.stage()][half].wait(block.consumed_phase());
        load_half(block, half);
    }
    // In a cluster each CTA copies one half for both.
    __device__ static bool copies_half(int half) { return Traits::kClusterSize == 1 || half == Traits::rank(); }

private:
    static constexpr uint16_t kToAll = (1 << Traits::kClusterSize) - 1;

    static constexpr int kArrivals = Traits::kHalvesPerCta + 1;  // at block_full

    __device__ bool look_up_one(BlockPosition<Traits> const& block) const {
        return shared.loads.look_up(params, shared.pieces, [&]() -> LoadOrder& { return shared.order[block.order()]; });
    }

    __device__ void look_up_later(BlockPosition<Traits> const& block) const {
        bool const enters_piece = look_up_one(block);
        if (enters_piece && maps.has_q) prefetch_q<Traits>(maps.q, shared.pieces.latest());
    }

    // What seems to be the first block is asked for, for this CTA alone, as soon as the kernel before has ended. While
    // it is on its way, it is found out whether it is the first one, and where the next ones are.
    __device__ void load_first_block(Early const& early, int const (&page)[kNumEarly]) const {
        auto const sources = early.read_again(params);
        int page_now[kNumEarly];
        page_entries(params, early, early.piece.begin_block, page, page_now);
        auto& barriers = shared.barriers;
        bool const is_early = page[0] != kNoPage;
        barriers.rows_asked.wait(0);  // which are through to registers when the block comes
        if (is_early) load_first({page[0], early.piece.place.head_kv}, barriers.early_block);
        bool is_right = is_early && early.is_from(sources);
        for (int i = 0; i < kNumEarly; ++i) is_right &= page[i] == page_now[i];
        uint32_t num_known = 1;
        if (is_right) {
            num_known = shared.loads.begin(params, shared.pieces, early, page, shared.order);
        } else {
            shared.loads.begin(params);
            look_up_one({0});
            cute::cp_async_wait<0>();
        }
#pragma unroll 1
        for (; num_known < kNumEarly; ++num_known) look_up_later({num_known});
        cute::cp_async_wait<0>();
        barriers.first_pages.arrive();
        if (is_early) barriers.early_block.wait(0);
        LoadOrder const order = shared.order[0];
        if (order.head_kv == LoadOrder::kNothing) return;
        auto& full = barriers.block_full[0];
        if (!is_right) load_first(order, full);
        for (int i = is_right ? 0 : 1; i < kArrivals; ++i) full.arrive();
    }

    // The whole first block, for this CTA alone.
    __device__ void load_first(LoadOrder const& order, TransactionBarrier& full) const {
        full.arrive_and_expect_tx(Traits::kNumChunks * Traits::kChunkBytes);
        auto* const bytes_arrived = reinterpret_cast<uint64_t*>(&full);
        for (int chunk = 0; chunk < Traits::kLatentChunks; chunk += Traits::kChunksPerHalf) {
            cute::SM90_TMA_LOAD_5D::copy(&maps.latent, bytes_arrived, cache_hint(), shared.latent[0][chunk], 0, 0,
                                         chunk, order.head_kv, order.page);
        }
        copy_rope(order, bytes_arrived, 0);
    }

    // What this CTA copies of a block, to where nothing has been yet.
    __device__ void load_own_share(BlockPosition<Traits> const& block) const {
        for (int half = 0; half < 2; ++half) {
            if (copies_half(half)) load_half(block, half);
        }
        load_rope(block);
    }

    __device__ void copy_rope(LoadOrder const& order, uint64_t* bytes_arrived, uint32_t place) const {
        cute::SM90_TMA_LOAD_4D::copy(&maps.rope, bytes_arrived, cache_hint(), shared.rope_or_p[place],
                                     Traits::kLatentChunks * Traits::kChunkColumns, 0, order.head_kv, order.page);
    }

    // KV that several clusters read should stay in the L2 until the last of them has it.
    __device__ uint64_t cache_hint() const {
        return static_cast<uint64_t>(params.grid.num_lanes > Traits::kClusterSize
                                         ? cute::TMA::CacheHintSm90::EVICT_NORMAL
                                         : cute::TMA::CacheHintSm90::EVICT_FIRST);
    }

    __device__ void load_half(BlockPosition<Traits> const& block, int half) const {
        LoadOrder const order = shared.order[block.order()];
        if (order.head_kv == LoadOrder::kNothing) return;
        constexpr int kHalfBytes = Traits::kChunksPerHalf * Traits::kChunkBytes;
        int const chunk = half * Traits::kChunksPerHalf;
        auto& full = shared.barriers.block_full[block.stage()];
        full.arrive_and_expect_tx(kHalfBytes * Traits::kClusterSize);
        auto* const bytes_arrived = reinterpret_cast<uint64_t*>(&full);
        auto* const target = shared.latent[block.stage()][chunk];
        if constexpr (Traits::kClusterSize == 1) {
            cute::SM90_TMA_LOAD_5D::copy(&maps.latent, bytes_arrived, cache_hint(), target, 0, 0, chunk, order.head_kv,
                                         order.page);
        } else {
            cute::SM90_TMA_LOAD_MULTICAST_5D::copy(&maps.latent, bytes_arrived, kToAll, cache_hint(), target, 0, 0,
                                                   chunk, order.head_kv, order.page);
        }
    }
};

}  // namespace flash_mla::sm90
