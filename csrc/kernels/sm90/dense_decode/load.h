// What comes into shared memory: KV blocks by tensor copies, query rows by gathers.
#pragma once

#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/sm90/dense_decode/traits.h"
#include "kernels/sm90/primitives/fragment.h"
#include "kernels/sm90/primitives/pieces.h"

namespace flash_mla::sm90 {

// The first element of a query row. Rows that do not exist read another one: what becomes of them is never stored.
template <typename Element>
__device__ Element const* q_row(DenseDecodeParams const& params, Piece const& piece, int row_in_tile) {
    if (piece.is_end()) return static_cast<Element const*>(params.q);
    QueryRow const at = query_row(params, piece.place, row_in_tile);
    return static_cast<Element const*>(params.q) + piece.batch * params.q_batch_stride +
           (at.exists ? at.token * params.q_token_stride + at.head_q * params.q_head_stride : 0);
}

// Line by line: the instruction that fetches a whole row takes one lane after the other.
template <typename Element>
__device__ void prefetch_q_row(DenseDecodeParams const& params, Piece const& piece, int row_in_tile) {
    constexpr int kLineBytes = 128, kRowBytes = kHeadDim * sizeof(Element);
    auto const* const row = reinterpret_cast<char const*>(q_row<Element>(params, piece, row_in_tile));
#pragma unroll 1
    for (int offset = 0; offset < kRowBytes; offset += kLineBytes)
        asm volatile("prefetch.global.L2 [%0];\n" ::"l"(row + offset) : "memory");
}

// Brings in the KV blocks of a CTA. In a cluster each CTA copies one half of the latent columns to the same place in
// both. RoPE columns each copies for itself: they are in a hurry, and would have to wait for the other CTA.
template <typename Traits>
struct BlockLoader {
    DenseDecodeParams const& params;
    KMaps const& maps;
    typename Traits::SharedStorage& shared;

    // The first blocks are loaded by the first warp of an output warpgroup, which has nothing else to do yet: it looks
    // up the first one before the cluster is known to be there, and loads the last one into the stage through which the
    // query rows came (QRegisters::load_staged). Who looks up pages from then on has seen the RoPE columns of the first
    // block arrive, which come last.
    __device__ void begin() const {
        if (thread_in_warpgroup_now() == 0) shared.loads.begin(params);
        look_up({0}, false);
        cute::cp_async_wait<0>();
    }
    __device__ void load_first_blocks() const {
        bool const is_loading_thread = thread_in_warpgroup_now() == 0;
        if (is_loading_thread) load_own_halves({0});
#pragma unroll 1
        for (uint32_t block = 1; block < Traits::kNumStages; ++block) {
            look_up({block});
            cute::cp_async_wait<0>();
            if (is_loading_thread && block + 1 < Traits::kNumStages) load_own_halves({block});
        }
        if (is_loading_thread) {
            for (uint32_t block = Traits::kRopePlaces; block-- > 0;) load_rope({block});
            for (int half = 0; half < 2; ++half) {
                if (copies_half(half)) fill_half({Traits::kNumStages - 1}, half);
            }
        }
        __syncwarp();
    }

    // By one warp at a time. The query rows of the piece that begins with the block are fetched into the L2, unless
    // they are loaded right away.
    __device__ void look_up(BlockPosition<Traits> const& block, bool fetches_q = true) const {
        int const lane = thread_in_warpgroup_now() % 32;
        bool enters_piece = false;
        if (lane == 0)
            enters_piece = shared.loads.look_up(params, shared.pieces,
                                                [&]() -> LoadOrder& { return shared.order[block.order()]; });
        if (!__any_sync(~0u, enters_piece && fetches_q)) return;
        // The vote alone does not order what lane 0 wrote, nor what it writes next.
        __syncwarp();
        for (int row = thread_in_warpgroup_now() % 32; row < kBlockM; row += 32)
            prefetch_q_row<typename Traits::Element>(params, shared.pieces.latest(), row);
        __syncwarp();
    }

    // By one thread, once nobody reads the RoPE columns that were in this place.
    __device__ void load_rope(BlockPosition<Traits> const& block) const {
        LoadOrder const order = shared.order[block.order()];
        if (order.head_kv == LoadOrder::kNothing) return;
        auto& full = shared.barriers.rope_full[block.rope_place()];
        full.arrive_and_expect_tx(Traits::kChunkBytes);
        cute::SM90_TMA_LOAD_4D::copy(&maps.rope, reinterpret_cast<uint64_t*>(&full), cache_hint(),
                                     shared.rope[block.rope_place()], rope_column(), 0, order.head_kv, order.page);
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

    __device__ static int rope_column() { return Traits::kLatentChunks * Traits::kChunkColumns; }
    __device__ void load_own_halves(BlockPosition<Traits> const& block) const {
        for (int half = 0; half < 2; ++half) {
            if (copies_half(half)) load_half(block, half);
        }
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
        auto& full = shared.barriers.latent_full[block.stage()];
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
        // Room for the RoPE columns comes later; until then they wait in the L2.
        if (half == 0) {
            cute::SM90_TMA_LOAD_4D::PREFETCH::copy(&maps.rope, rope_column(), 0, order.head_kv, order.page);
        }
    }
};

// Starts the gather of a tile's query rows, as far as they go to shared memory, by one warpgroup. Rows may be strided
// in every dimension and a tile may cross tokens, so they come 16 bytes at a time, swizzled as wgmma expects.
template <typename Traits>
__device__ void load_q_shared(DenseDecodeParams const& params, typename Traits::SharedStorage& shared,
                              Piece const& piece, int thread) {
    using Element = typename Traits::Element;
    auto load_columns = [&](int first_column, auto num_pieces, uint32_t destination, auto swizzle) {
        constexpr int kPieces = decltype(num_pieces)::value;  // of 16 bytes, in a row
        int const piece_of_row = thread % kPieces;
#pragma unroll 1
        for (int row = thread / kPieces; row < kBlockM; row += 128 / kPieces) {
            Element const* const source = q_row<Element>(params, piece, row) + first_column + piece_of_row * 8;
            uint32_t const target = destination + row * kPieces * 16 + swizzle(piece_of_row, row) * 16;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(target), "l"(source) : "memory");
        }
    };
    load_columns(kHeadDimV, cute::Int<8>{}, cute::cast_smem_ptr_to_uint(shared.q_rope),
                 [](int piece, int row) { return piece ^ row % 8; });
    load_columns(Traits::kQRegisterSteps * 16, cute::Int<2>{}, cute::cast_smem_ptr_to_uint(shared.q_last_step),
                 [](int piece, int row) { return piece ^ row / 4 % 2; });
    cute::cp_async_fence();
}

// The other columns, as the A operand of wgmma.
template <typename Traits>
struct QRegisters {
    static constexpr int kNumSteps = Traits::kQRegisterSteps;

    // Word 4·step + 2·c + h is the pair of columns 16·step + 8·c + 2·(t % 4) of the thread's row h.
    uint32_t word[kNumSteps * 4];

    // Undefined until loaded: zeros would occupy the registers from the start.
    __device__ QRegisters() {}

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

    // Starts to bring in all of the query rows; the latent columns by way of the last stage, because a row takes a
    // single instruction then. Each warp brings the 16 rows it needs.
    __device__ static void stage(DenseDecodeParams const& params, typename Traits::SharedStorage& shared,
                                 Piece const& piece) {
        using Element = typename Traits::Element;
        constexpr int kRowBytes = kHeadDimV * sizeof(Element);
        int const thread = thread_in_warpgroup_now(), lane = thread % 32, first_row = thread / 32 * 16;
        auto const own_row = reinterpret_cast<uint64_t>(q_row<Element>(params, piece, first_row + lane % 16));
        if (lane == 0) shared.rows_staged.arrive_and_expect_tx(16 * kRowBytes);
        __syncwarp();
        if (lane < 16) {
            cute::SM90_BULK_COPY_G2S::copy(reinterpret_cast<void const*>(own_row),
                                           reinterpret_cast<uint64_t*>(&shared.rows_staged),
                                           staged_row(shared, first_row + lane), kRowBytes);
        }
        // 16 bytes of a row at a time, swizzled as wgmma expects.
        auto const copy = [&](void* target, int row, int first_column) {
            auto const from = __shfl_sync(~0u, own_row, row % 16) + first_column * sizeof(Element);
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(cute::cast_smem_ptr_to_uint(target)),
                         "l"(from)
                         : "memory");
        };
        {
            int const row = first_row + lane / 2, half = lane % 2;
            copy(shared.q_last_step + row * 16 + (half ^ row / 4 % 2) * 8, row, kNumSteps * 16 + half * 8);
        }
#pragma unroll
        for (int first = 0; first < 16; first += 4) {
            int const row = first_row + first + lane / 8, part = lane % 8;
            copy(shared.q_rope + row * 64 + (part ^ row % 8) * 8, row, kHeadDimV + part * 8);
        }
        cute::cp_async_fence();
    }
    __device__ void load_staged(typename Traits::SharedStorage& shared) {
        int const thread = thread_in_warpgroup_now(), lane = thread % 32, row = thread / 32 * 16 + lane % 16;
        uint32_t const address = cute::cast_smem_ptr_to_uint(staged_row(shared, row)) + lane / 16 * 16;
#pragma unroll
        for (int step = 0; step < kNumSteps; ++step) {
            load_matrix_x4(address + step * 32, word[4 * step], word[4 * step + 1], word[4 * step + 2],
                           word[4 * step + 3]);
        }
        // Copies come to where these rows were.
        cutlass::arch::fence_view_async_shared();
        cutlass::arch::NamedBarrier::arrive(3 * 128, kFirstRowsBarrier);
        __syncwarp();
        if (lane != 0) return;
        for (int half = 0; half < 2; ++half) shared.barriers.announce_consumed(Traits::kNumStages - 1, half);
    }

    // Where a row is staged: so that reading 16 bytes of 8 rows at once meets each bank once. The last row has no room
    // in the stage and is where P will be.
    __device__ static char* staged_row(typename Traits::SharedStorage& shared, int row) {
        constexpr int kPitch = kHeadDimV * sizeof(typename Traits::Element) + 16;
        static_assert((kBlockM - 1) * kPitch <= sizeof(shared.latent[0]));
        constexpr int kLast = (kBlockM - 1) * 16 % 128;
        if (row == kBlockM - 1) return reinterpret_cast<char*>(shared.p) + kLast;
        return reinterpret_cast<char*>(shared.latent[Traits::kNumStages - 1]) + row * kPitch;
    }

    __device__ void finish() {
#pragma unroll
        for (int step = 0; step < kNumSteps; ++step) {
            transpose_in_quad(word[4 * step], word[4 * step + 1], word[4 * step + 2], word[4 * step + 3]);
        }
    }
};

}  // namespace flash_mla::sm90
