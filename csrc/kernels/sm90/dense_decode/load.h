// What comes into shared memory: KV blocks by tensor copies, query rows by gathers.
#pragma once

#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/sm90/dense_decode/pieces.h"
#include "kernels/sm90/dense_decode/traits.h"
#include "kernels/sm90/primitives/fragment.h"

namespace flash_mla::sm90 {

// KV that several lanes read should stay in the L2 until the last of them has it.
__device__ inline uint64_t cache_hint(DenseDecodeParams const& params) {
    return static_cast<uint64_t>(params.grid.num_lanes > 1 ? cute::TMA::CacheHintSm90::EVICT_NORMAL
                                                           : cute::TMA::CacheHintSm90::EVICT_FIRST);
}

// Starts the copy of one half of a block's latent columns; one thread calls it.
template <typename Traits>
__device__ void load_latent(DenseDecodeParams const& params, CUtensorMap const& latent_map,
                            typename Traits::SharedStorage& shared, int stage, int half, LoadOrder const& order) {
    auto& full = shared.barriers.latent_full[stage][half];
    full.arrive_and_expect_tx(Traits::kChunksPerHalf * Traits::kChunkBytes);
    cute::SM90_TMA_LOAD_5D::copy(&latent_map, reinterpret_cast<uint64_t*>(&full), cache_hint(params),
                                 shared.latent[stage][half * Traits::kChunksPerHalf], 0, 0,
                                 half * Traits::kChunksPerHalf, order.head_kv, order.page);
}

template <typename Traits>
__device__ void load_rope(DenseDecodeParams const& params, CUtensorMap const& rope_map,
                          typename Traits::SharedStorage& shared, int slot, LoadOrder const& order) {
    auto& full = shared.barriers.rope_full[slot];
    full.arrive_and_expect_tx(Traits::kChunkBytes);
    cute::SM90_TMA_LOAD_4D::copy(&rope_map, reinterpret_cast<uint64_t*>(&full), cache_hint(params),
                                 shared.rope_or_p[slot], Traits::kLatentChunks * Traits::kChunkColumns, 0, order.head_kv, order.page);
}

// Into the L2 only: a block's RoPE columns find room in shared memory later than the others.
template <typename Traits>
__device__ void prefetch_rope(CUtensorMap const& rope_map, LoadOrder const& order) {
    cute::SM90_TMA_LOAD_4D::PREFETCH::copy(&rope_map, Traits::kLatentChunks * Traits::kChunkColumns, 0, order.head_kv,
                                           order.page);
}

// The first element of a query row. Rows that do not exist read another one: what becomes of them is never stored.
template <typename Element>
__device__ Element const* q_row(DenseDecodeParams const& params, Piece const& piece, int row_in_tile) {
    QueryRow const at = query_row(params, piece.place, row_in_tile);
    return static_cast<Element const*>(params.q) + piece.batch * params.q_batch_stride +
           (at.exists ? at.token * params.q_token_stride + at.head_q * params.q_head_stride : 0);
}

// Starts the gather of the last chunks of a tile's query rows into shared memory by one warpgroup. Rows may be strided in
// every dimension and a tile may cross tokens, so they come 16 bytes at a time, swizzled as wgmma expects.
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
        Element const* const source = q_row<Element>(params, piece, row) +
                                      Traits::kQRegisterChunks * Traits::kChunkColumns + column_piece * 8;
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
    static constexpr int kNumGroups = kNumSteps / 2;  // of 32 columns: 16 bytes a lane

    // Word 4·step + 2·c + h is the pair of columns 16·step + 8·c + 2·(t % 4) of the thread's row h.
    uint32_t word[kNumSteps * 4];

    __device__ uint32_t& at(int group, int tile, int h) { return word[8 * group + 2 * tile + h]; }

    // Starts the loads; until finish() each lane holds 8 columns in a row.
    __device__ void load(DenseDecodeParams const& params, Piece const& piece, int thread) {
        using Element = typename Traits::Element;
#pragma unroll
        for (int h = 0; h < kRowsPerThread; ++h) {
            auto const* const row = reinterpret_cast<uint4 const*>(
                q_row<Element>(params, piece, fragment_row(thread, h)) + thread % 4 * 8);
#pragma unroll
            for (int group = 0; group < kNumGroups; ++group) {
                uint4 const columns = __ldg(row + 4 * group);
                at(group, 0, h) = columns.x, at(group, 1, h) = columns.y;
                at(group, 2, h) = columns.z, at(group, 3, h) = columns.w;
            }
        }
    }

    __device__ void finish() {
#pragma unroll
        for (int group = 0; group < kNumGroups; ++group) {
#pragma unroll
            for (int h = 0; h < kRowsPerThread; ++h) {
                uint32_t tile[4] = {at(group, 0, h), at(group, 1, h), at(group, 2, h), at(group, 3, h)};
                transpose_in_quad(tile);
#pragma unroll
                for (int i = 0; i < 4; ++i) at(group, i, h) = tile[i];
            }
        }
    }
};

}  // namespace flash_mla::sm90
