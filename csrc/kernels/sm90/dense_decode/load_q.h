// The query rows of a tile: most of their columns on their way into registers, as the A operand of wgmma, the others in
// shared memory.
#pragma once

#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/sm90/dense_decode/traits.h"
#include "kernels/sm90/primitives/fragment.h"
#include "kernels/sm90/primitives/pieces.h"

namespace flash_mla::sm90 {

// The first element of a query row, or of another one if it does not exist: what becomes of it is never stored.
template <typename Element>
__device__ Element const* q_row(DenseDecodeParams const& params, Piece const& piece, int row_in_tile) {
    QueryRow const at = query_row(params, piece.place, row_in_tile);
    return static_cast<Element const*>(params.q) + piece.batch * params.q_batch_stride +
           (at.exists ? at.token * params.q_token_stride + at.head_q * params.q_head_stride : 0);
}

// Into the L2, by one thread.
template <typename Traits>
__device__ void prefetch_q(CUtensorMap const& q, Piece const& piece) {
#pragma unroll 1
    for (int chunk = 0; chunk < Traits::kNumChunks; ++chunk) {
        cute::SM90_TMA_LOAD_5D::PREFETCH::copy(&q, 0, piece.place.m_tile * kBlockM, chunk, piece.place.head_kv,
                                               piece.batch);
    }
}

template <typename Traits>
struct QRegisters {
    using Element = typename Traits::Element;
    using SharedStorage = typename Traits::SharedStorage;
    static constexpr int kNumChunks = Traits::kQRegisterChunks, kNumSteps = Traits::kQRegisterSteps;

    // Word 4·step + 2·c + h is the pair of columns 16·step + 8·c + 2·(t % 4) of the thread's row h.
    uint32_t word[kNumSteps * 4];

    // Undefined until loaded: zeros would occupy the registers from the start.
    __device__ QRegisters() {}

    // Brings all columns into shared memory, those for registers by way of a stage that is free: a warp of the scores
    // warpgroup its share of them, some chunks, or its rows where they are gathered. Each warp arrives at `full` once,
    // also where it has nothing to bring.
    __device__ static void begin_loading(DenseDecodeParams const& params, DecodeMaps const& maps, SharedStorage& shared,
                                         Piece const& piece, bool loads, uint32_t stage, TransactionBarrier& full) {
        constexpr int kWarps = 4;
        int const thread = thread_in_warpgroup_now(), warp = thread / 32;
        bool const is_by_map = loads && maps.has_q;
        if (loads && !maps.has_q) gather(params, shared, piece, stage);
        if (thread % 32 == 0 && !is_by_map) full.arrive();
        if (thread % 32 == 0 && is_by_map) {
            full.arrive_and_expect_tx(ceil_div(Traits::kNumChunks - warp, kWarps) * Traits::kChunkBytes);
#pragma unroll 1
            for (int chunk = warp; chunk < Traits::kNumChunks; chunk += kWarps) {
                cute::SM90_TMA_LOAD_5D::copy(&maps.q, reinterpret_cast<uint64_t*>(&full),
                                             static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                             chunk_place(shared, stage, chunk), 0, piece.place.m_tile * kBlockM, chunk,
                                             piece.place.head_kv, piece.batch);
            }
        }
        __syncwarp();
    }

    __device__ void load_staged(SharedStorage& shared, uint32_t stage) {
        int const thread = thread_in_warpgroup_now(), lane = thread % 32, row = thread / 32 * 16 + lane % 16;
        uint32_t const address = cute::cast_smem_ptr_to_uint(chunk_place(shared, stage, 0)) + row * kChunkRowBytes +
                                 (lane / 16 ^ row % 8) * 16;
#pragma unroll
        for (int step = 0; step < kNumSteps; ++step) {
            uint32_t const in_chunk = step % Traits::kStepsPerChunk * 32;
            load_matrix_x4((address ^ in_chunk) + step / Traits::kStepsPerChunk * Traits::kChunkBytes, word[4 * step],
                           word[4 * step + 1], word[4 * step + 2], word[4 * step + 3]);
        }
    }

private:
    static constexpr int kChunkRowBytes = Traits::kChunkColumns * sizeof(Element);

    __device__ static Element* chunk_place(SharedStorage& shared, uint32_t stage, int chunk) {
        return chunk < kNumChunks ? shared.latent[stage][chunk] : shared.q[chunk - kNumChunks];
    }

    // Of rows whose strides no tensor map can describe: 16 bytes at a time. Each warp brings the 16 rows it needs.
    __device__ static void gather(DenseDecodeParams const& params, SharedStorage& shared, Piece const& piece,
                                  uint32_t stage) {
        constexpr int kVectors = kChunkRowBytes / 16;
        int const thread = thread_in_warpgroup_now(), vector = thread % kVectors;
#pragma unroll 1
        for (int i = thread % 32 / kVectors; i < 16; i += 32 / kVectors) {
            int const row = thread / 32 * 16 + i;
            Element const* const source = q_row<Element>(params, piece, row) + vector * 8;
#pragma unroll 1
            for (int chunk = 0; chunk < Traits::kNumChunks; ++chunk) {
                Element* const target =
                    chunk_place(shared, stage, chunk) + row * Traits::kChunkColumns + (vector ^ row % 8) * 8;
                copy_16_bytes_async(cute::cast_smem_ptr_to_uint(target), source + chunk * Traits::kChunkColumns);
            }
        }
        cute::cp_async_fence();
        cute::cp_async_wait<0>();
        cutlass::arch::fence_view_async_shared();
    }
};

}  // namespace flash_mla::sm90
