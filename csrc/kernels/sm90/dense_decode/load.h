// What comes into shared memory: KV blocks by tensor copies, query rows by gathers.
#pragma once

#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/sm90/dense_decode/pieces.h"
#include "kernels/sm90/dense_decode/traits.h"

namespace flash_mla::sm90 {

// Starts the copies of some chunks of a block; one thread calls it.
template <typename Traits>
__device__ void load_chunks(DenseDecodeParams const& params, CUtensorMap const& k_map,
                            typename Traits::SharedStorage& shared, int stage, LoadOrder const& order, int first_chunk,
                            int num_chunks) {
    // KV that several lanes read should stay in the L2 until the last of them has it.
    auto const hint = params.grid.num_lanes > 1 ? cute::TMA::CacheHintSm90::EVICT_NORMAL
                                                : cute::TMA::CacheHintSm90::EVICT_FIRST;
    for (int chunk = first_chunk; chunk < first_chunk + num_chunks; ++chunk) {
        auto& full = shared.barriers.kv_full[stage][chunk];
        full.arrive_and_expect_tx(Traits::kChunkBytes);
        cute::SM90_TMA_LOAD_4D::copy(&k_map, reinterpret_cast<uint64_t*>(&full), static_cast<uint64_t>(hint),
                                     shared.kv[stage][chunk], chunk * Traits::kChunkColumns, 0, order.head_kv,
                                     order.page);
    }
}

// Starts the gather of a tile's query rows by one warpgroup. They may be strided in every dimension and a tile may
// cross tokens, so they come 16 bytes at a time, swizzled as wgmma expects. Rows that do not exist are zero.
template <typename Traits>
__device__ void load_q(DenseDecodeParams const& params, typename Traits::SharedStorage& shared, Piece const& piece,
                       int thread) {
    constexpr int kPiecesPerChunkRow = 8;  // 16-byte pieces of a row in a chunk
    constexpr int kRowsAtOnce = 128 / kPiecesPerChunkRow;
    using Element = typename Traits::Element;

    int const column_piece = thread % kPiecesPerChunkRow;
    auto const* const q = static_cast<Element const*>(params.q) + piece.batch * params.q_batch_stride;
    uint32_t const destination = cute::cast_smem_ptr_to_uint(shared.q);
    for (int row = thread / kPiecesPerChunkRow; row < kBlockM; row += kRowsAtOnce) {
        QueryRow const at = query_row(params, piece.place, row);
        Element const* const source =
            q + (at.exists ? at.token * params.q_token_stride + at.head_q * params.q_head_stride : 0) +
            column_piece * 8;
        uint32_t const target = destination + row * 128 + ((column_piece ^ (row % 8)) * 16);
#pragma unroll
        for (int chunk = 0; chunk < Traits::kNumChunks; ++chunk) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(target + chunk * Traits::kChunkBytes),
                         "l"(source + chunk * Traits::kChunkColumns), "r"(at.exists ? 16 : 0)
                         : "memory");
        }
    }
    cute::cp_async_fence();
}

}  // namespace flash_mla::sm90
