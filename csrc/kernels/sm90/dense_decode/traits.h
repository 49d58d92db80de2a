// Types, shared memory and roles of the dense decode kernel; kernel.cuh opens with how they work together.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/numeric_types.h>

#include "kernels/sm90/dense_decode/load_cursor.h"
#include "kernels/sm90/dense_decode/piece_queue.h"
#include "kernels/sm90/dense_decode/segment_scratch.h"
#include "kernels/sm90/primitives/pipeline.h"
#include "kernels/sm90/primitives/q_map.h"
#include "kernels/sm90/primitives/segment_cursor.h"
#include "params/dense_decode.h"

namespace flash_mla::sm90 {

enum class WarpgroupRole { kScores = 0, kOutputLow = 1, kOutputHigh = 2 };

// Hardware barriers of a warpgroup among itself; 0 is __syncthreads.
__device__ inline uint32_t warpgroup_barrier(WarpgroupRole role) { return 1 + static_cast<uint32_t>(role); }

// The query rows of a piece are in registers: the output warpgroups, which clear keys where these rows were, wait for
// all threads that read them. In fact they do so anyway, but by way of two barriers, which racecheck does not follow.
inline constexpr uint32_t kRowsBarrier = 4;
// The other way round: scores wait for the outputs of the last block of a piece, in whose stage keys may have been
// cleared and query rows come next. p_consumed would say the same, but racecheck does not follow that either.
inline constexpr uint32_t kLastOutputsBarrier = 5;

template <typename Element_, int kClusterSize_, Summation kSummation_ = Summation::kByWorkers>
struct DenseDecodeTraits {
    using Element = Element_;
    static constexpr Summation kSummation = kSummation_;
    // CTAs with other query rows of the same request: each copies its share of the latent columns to all of them.
    static constexpr int kClusterSize = kClusterSize_;
    static_assert(kClusterSize == 1 || kClusterSize == 2);

    using Pieces = PiecesOf<kSummation, kBlockM, kClusterSize>;

    static constexpr int kNumThreads = 3 * 128;
    static constexpr int kScoresRegisters = 184;  // together 3 × 168, what a CTA starts with
    static constexpr int kOutputRegisters = 160;

    static constexpr int kNumStages = 3;  // of latent columns
    static constexpr int kNumOrders = 4;
    static constexpr int kChunkColumns = 64;                     // 128 bytes: one swizzle span
    static constexpr int kNumChunks = kHeadDim / kChunkColumns;  // 9; the last is RoPE
    static constexpr int kLatentChunks = kNumChunks - 1;
    static constexpr int kChunksPerHalf = kLatentChunks / 2;
    static constexpr int kHalfColumns = kHeadDimV / 2;
    static constexpr int kHalvesPerCta = 2 / kClusterSize;  // of the latent columns: what one CTA copies
    static constexpr int kChunkElements = kPageSize * kChunkColumns;
    static constexpr int kChunkBytes = kChunkElements * sizeof(Element);
    static constexpr int kStepsPerChunk = kChunkColumns / 16;  // k-steps of wgmma
    static constexpr int kLookUpWarp = 1;                      // of the scores warpgroup
    static constexpr int kFirstLoader = 128;                   // thread that begins, in the first output warpgroup

    // Q: the latent columns live in registers of the scores warpgroup but for the last chunk, for which these do not
    // suffice. That one and the RoPE columns are in shared memory.
    static constexpr int kQRegisterChunks = kLatentChunks - 1;
    static constexpr int kQRegisterSteps = kQRegisterChunks * kStepsPerChunk;
    static constexpr int kQSharedChunks = kNumChunks - kQRegisterChunks;

    static constexpr bool kIsBFloat16 = std::is_same_v<Element, cutlass::bfloat16_t>;
    static constexpr auto kK = cute::GMMA::Major::K;
    static constexpr auto kMN = cute::GMMA::Major::MN;
    using MmaScoresRegisterQ =
        decltype(cute::make_tiled_mma(std::conditional_t<kIsBFloat16, cute::SM90_64x64x16_F32BF16BF16_RS<kK, kK>,
                                                         cute::SM90_64x64x16_F32F16F16_RS<kK, kK>>{}));
    using MmaScoresSharedQ =
        decltype(cute::make_tiled_mma(std::conditional_t<kIsBFloat16, cute::SM90_64x64x16_F32BF16BF16_SS<kK, kK>,
                                                         cute::SM90_64x64x16_F32F16F16_SS<kK, kK>>{}));
    using MmaOutput =
        decltype(cute::make_tiled_mma(std::conditional_t<kIsBFloat16, cute::SM90_64x256x16_F32BF16BF16_SS<kK, kMN>,
                                                         cute::SM90_64x256x16_F32F16F16_SS<kK, kMN>>{}));

    __device__ static int rank() { return kClusterSize == 1 ? 0 : cute::block_rank_in_cluster(); }

    struct Barriers {
        TransactionBarrier early_block;  // copied before it was known to be the first one
        Barrier rows_asked;              // the first ones
        TransactionBarrier block_full[kNumStages];
        Barrier p_ready[2], p_consumed[2];  // blocks take turns
        Barrier consumed[kNumStages][2];    // per half of the latent columns, in the CTA that copies it
        Barrier stats_full, stats_empty;
        TransactionBarrier first_rows[2], next_rows;  // rows of the likely first piece, of the true one; of later ones
        Barrier first_pages;                          // looked up

        // By four warps of each CTA, one thread each: the half goes free in the CTA that copies it to all of them.
        __device__ void announce_consumed(int stage, int half) const {
            if constexpr (kClusterSize == 1) {
                consumed[stage][half].arrive();
            } else {
                consumed[stage][half].arrive(half);
            }
        }
    };

    struct SharedStorage {
        alignas(1024) Element q[kQSharedChunks][kChunkElements];
        alignas(1024) Element latent[kNumStages][kLatentChunks][kChunkElements];
        alignas(1024) Element rope_or_p[2][kChunkElements];
        float rescale[kNumStages][kBlockM];
        bool must_rescale[kNumStages][4];  // per warp of a warpgroup: its 16 rows
        float inverse_sum[kBlockM];
        uint32_t first_masked;  // count of the first block of the piece that is masked
        LoadCursor<Pieces> loads;
        LoadOrder order[kNumOrders];
        alignas(8) PieceQueue pieces;
        alignas(8) Barriers barriers;
        std::conditional_t<kSummation == Summation::kBySegments, FoldSteps, NoFoldSteps> fold_steps;
    };
    static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// Where a KV block is: blocks of a CTA are counted through, across pieces. All follows from the count: a division by a
// constant takes fewer instructions than keeping its result would take registers.
template <typename Traits>
struct BlockPosition {
    uint32_t count = 0;

    __device__ uint32_t stage() const { return count % Traits::kNumStages; }
    __device__ uint32_t stage_phase() const { return count / Traits::kNumStages % 2; }
    // Of `consumed`, that lets this block into its stage. The last stage was consumed once more, after the first query
    // rows had been there.
    __device__ uint32_t consumed_phase() const { return (count - (Traits::kNumStages - 1)) / Traits::kNumStages % 2; }
    // Of `p_ready` and `p_consumed`. Of each there are two, since scores may be two blocks ahead of the outputs: with
    // one, two of its phases could end before somebody looks.
    __device__ uint32_t p_turn() const { return count % 2; }
    __device__ uint32_t p_phase() const { return count / 2 % 2; }
    // Place of the block's RoPE columns, and once they are multiplied of P of the block before. The last block of a
    // piece has no next one to wait for: its P comes to its own place, when P of the block before is consumed.
    __device__ uint32_t rope_place() const { return count % 2; }
    __device__ uint32_t p_place(bool is_last_of_piece) const { return (count + !is_last_of_piece) % 2; }
    __device__ uint32_t order() const { return count % Traits::kNumOrders; }
    __device__ void advance() { ++count; }
    __device__ BlockPosition later(uint32_t blocks) const { return {count + blocks}; }
    __device__ BlockPosition previous() const { return {count - 1}; }
};

}  // namespace flash_mla::sm90
