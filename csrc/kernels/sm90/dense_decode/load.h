// What comes into shared memory: KV blocks by tensor copies, query rows by gathers.
#pragma once

#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/sm90/dense_decode/pieces.h"
#include "kernels/sm90/dense_decode/traits.h"
#include "kernels/sm90/primitives/fragment.h"

namespace flash_mla::sm90 {

// The first element of a query row. Rows that do not exist read another one: what becomes of them is never stored.
template <typename Element>
__device__ Element const* q_row(DenseDecodeParams const& params, Piece const& piece, int row_in_tile) {
    QueryRow const at = query_row(params, piece.place, row_in_tile);
    return static_cast<Element const*>(params.q) + piece.batch * params.q_batch_stride +
           (at.exists ? at.token * params.q_token_stride + at.head_q * params.q_head_stride : 0);
}

template <typename Element>
__device__ void prefetch_q_row(DenseDecodeParams const& params, Piece const& piece, int row_in_tile) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(q_row<Element>(params, piece, row_in_tile)),
                 "n"(kHeadDim * sizeof(Element))
                 : "memory");
}

// Brings in the KV blocks of a CTA. In a cluster each CTA copies one half of the latent columns to the same place in
// both. RoPE columns each copies for itself: they are in a hurry, and would have to wait for the other CTA.
template <typename Traits>
struct BlockLoader {
    DenseDecodeParams const& params;
    KMaps const& maps;
    typename Traits::SharedStorage& shared;

    // By one warp, which alone looks up pages. Calls load_q once the first block is on its way, so that the query rows
    // do not have to queue behind all the others.
    template <typename LoadQ>
    __device__ void load_first_blocks(LoadQ&& load_q) const {
        bool const is_loading_warp = thread_in_warpgroup_now() < 32, is_loading_thread = thread_in_warpgroup_now() == 0;
        if (is_loading_warp) {
            if (is_loading_thread) shared.loads.begin(params);
#pragma unroll 1
            for (uint32_t block = 0; block < Traits::kNumStages; ++block) look_up({block});
            cute::cp_async_wait<0>();
            if (is_loading_thread) load_whole(0);
        }
        load_q();
        if (!is_loading_warp) return;
        if (is_loading_thread) {
#pragma unroll 1
            for (uint32_t block = 1; block < Traits::kNumStages; ++block) load_whole(block);
        }
        __syncwarp();
    }

    // By the same warp. The query rows of the piece that begins with the block are fetched into the L2.
    __device__ void look_up(BlockPosition<Traits> const& block) const {
        int const lane = threadIdx.x % 32;
        bool enters_piece = false;
        if (lane == 0) enters_piece = shared.loads.look_up(params, shared.pieces, shared.order[block.order()]);
        if (!__any_sync(~0u, enters_piece)) return;
        // The vote alone does not order what lane 0 wrote, nor what it writes next.
        __syncwarp();
        for (int row = lane; row < kBlockM; row += 32)
            prefetch_q_row<typename Traits::Element>(params, shared.pieces.latest(), row);
        __syncwarp();
    }

    // Fill the places of a block anew once its P is consumed by this CTA, or its V by the whole cluster. Each is called
    // by one thread.
    __device__ void refill_rope(BlockPosition<Traits> const& freed) const {
        shared.barriers.p_consumed[freed.slot()].wait(freed.slot_phase());
        load_rope(freed.later(Traits::kNumSlots));
    }
    __device__ void refill_latent(BlockPosition<Traits> const& freed) const {
        shared.barriers.consumed[freed.stage()].wait(freed.stage_phase());
        load_latent(freed.later(Traits::kNumStages));
    }

private:
    static constexpr uint16_t kToAll = (1 << Traits::kClusterSize) - 1;

    __device__ static int rope_column() { return Traits::kLatentChunks * Traits::kChunkColumns; }
    __device__ void load_whole(uint32_t block) const {
        if (block < Traits::kNumSlots) load_rope({block});
        load_latent({block});
    }

    __device__ static int rank() { return Traits::kClusterSize == 1 ? 0 : cute::block_rank_in_cluster(); }

    // KV that several clusters read should stay in the L2 until the last of them has it.
    __device__ uint64_t cache_hint() const {
        return static_cast<uint64_t>(params.grid.num_lanes > Traits::kClusterSize
                                         ? cute::TMA::CacheHintSm90::EVICT_NORMAL
                                         : cute::TMA::CacheHintSm90::EVICT_FIRST);
    }

    __device__ void load_latent(BlockPosition<Traits> const& block) const {
        LoadOrder const order = shared.order[block.order()];
        if (order.head_kv == LoadOrder::kNothing) return;
        auto& full = shared.barriers.latent_full[block.stage()];
        full.arrive_and_expect_tx(Traits::kLatentChunks * Traits::kChunkBytes);
        auto* const bytes_arrived = reinterpret_cast<uint64_t*>(&full);
        auto* const target = shared.latent[block.stage()];
        if constexpr (Traits::kClusterSize == 1) {
#pragma unroll
            for (int chunk = 0; chunk < Traits::kLatentChunks; chunk += Traits::kChunksPerHalf) {
                cute::SM90_TMA_LOAD_5D::copy(&maps.latent, bytes_arrived, cache_hint(), target[chunk], 0, 0, chunk,
                                             order.head_kv, order.page);
            }
        } else {
            int const chunk = rank() * Traits::kChunksPerHalf;
            cute::SM90_TMA_LOAD_MULTICAST_5D::copy(&maps.latent, bytes_arrived, kToAll, cache_hint(), target[chunk], 0,
                                                   0, chunk, order.head_kv, order.page);
        }
        // Room for the RoPE columns comes later; until then they wait in the L2.
        if (rank() == 0) {
            cute::SM90_TMA_LOAD_4D::PREFETCH::copy(&maps.rope, rope_column(), 0, order.head_kv, order.page);
        }
    }

    __device__ void load_rope(BlockPosition<Traits> const& block) const {
        LoadOrder const order = shared.order[block.order()];
        if (order.head_kv == LoadOrder::kNothing) return;
        auto& full = shared.barriers.rope_full[block.slot()];
        full.arrive_and_expect_tx(Traits::kChunkBytes);
        auto* const bytes_arrived = reinterpret_cast<uint64_t*>(&full);
        cute::SM90_TMA_LOAD_4D::copy(&maps.rope, bytes_arrived, cache_hint(), shared.rope_or_p[block.slot()],
                                     rope_column(), 0, order.head_kv, order.page);
    }
};

// Starts the gather of the last chunks of a tile's query rows into shared memory by one warpgroup. Rows may be strided
// in every dimension and a tile may cross tokens, so they come 16 bytes at a time, swizzled as wgmma expects.
template <typename Traits>
__device__ void load_q_shared(DenseDecodeParams const& params, typename Traits::SharedStorage& shared,
                              Piece const& piece, int thread) {
    constexpr int kPiecesPerChunkRow = 8;  // 16-byte pieces of a row in a chunk
    constexpr int kRowsAtOnce = 128 / kPiecesPerChunkRow;
    using Element = typename Traits::Element;

    int const column_piece = thread % kPiecesPerChunkRow;
    uint32_t const destination = cute::cast_smem_ptr_to_uint(shared.q);
#pragma unroll 1
    for (int row = thread / kPiecesPerChunkRow; row < kBlockM; row += kRowsAtOnce) {
        Element const* const source =
            q_row<Element>(params, piece, row) + Traits::kQRegisterChunks * Traits::kChunkColumns + column_piece * 8;
        uint32_t const target = destination + row * 128 + ((column_piece ^ (row % 8)) * 16);
#pragma unroll
        for (int chunk = 0; chunk < Traits::kQSharedChunks; ++chunk) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(target + chunk * Traits::kChunkBytes),
                         "l"(source + chunk * Traits::kChunkColumns)
                         : "memory");
        }
    }
    cute::cp_async_fence();
}

// The other chunks, as the A operand of wgmma.
template <typename Traits>
struct QRegisters {
    static constexpr int kNumSteps = Traits::kQRegisterChunks * Traits::kStepsPerChunk;

    // Word 4·step + 2·c + h is the pair of columns 16·step + 8·c + 2·(t % 4) of the thread's row h.
    uint32_t word[kNumSteps * 4];

    // Starts the loads, 16 bytes a lane: of each step's 32 bytes of two rows the i-th lane of a quad takes half i / 2
    // of row i % 2. Transposed within the quad that is the operand, in the same registers.
    __device__ void load(DenseDecodeParams const& params, Piece const& piece, int thread) {
        using Element = typename Traits::Element;
        auto const* const columns = reinterpret_cast<uint4 const*>(
            q_row<Element>(params, piece, fragment_row(thread, thread % 2)) + thread % 4 / 2 * 8);
#pragma unroll
        for (int step = 0; step < kNumSteps; ++step) {
            uint4 const loaded = __ldg(columns + 2 * step);
            word[4 * step] = loaded.x, word[4 * step + 1] = loaded.y;
            word[4 * step + 2] = loaded.z, word[4 * step + 3] = loaded.w;
        }
    }

    __device__ void finish() {
#pragma unroll
        for (int step = 0; step < kNumSteps; ++step) {
            transpose_in_quad(word[4 * step], word[4 * step + 1], word[4 * step + 2], word[4 * step + 3]);
        }
    }
};

}  // namespace flash_mla::sm90
