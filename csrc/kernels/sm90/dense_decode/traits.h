// Types, shared memory and roles of the dense decode kernel; kernel.cuh opens with how they work together.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/numeric_types.h>

#include "kernels/sm90/dense_decode/load_cursor.h"
#include "kernels/sm90/primitives/pipeline.h"
#include "params/dense_decode.h"

namespace flash_mla::sm90 {

enum class WarpgroupRole { kScores = 0, kOutputLow = 1, kOutputHigh = 2 };

// Hardware barriers of a warpgroup among itself; 0 is __syncthreads.
__device__ inline uint32_t warpgroup_barrier(WarpgroupRole role) { return 1 + static_cast<uint32_t>(role); }

template <typename Element_, bool kLookahead_>
struct DenseDecodeTraits {
    using Element = Element_;
    // Whether Q·Kᵀ of the next block is issued before the softmax of this one. It keeps the tensor cores busy where they
    // are the limit; where memory is, it would hold a block back until the next one has arrived.
    static constexpr bool kLookahead = kLookahead_;

    static constexpr int kNumThreads = 3 * 128;  // 168 registers each

    static constexpr int kNumStages = 2;
    static constexpr int kChunkColumns = 64;                      // 128 bytes: one swizzle span, one tensor copy
    static constexpr int kNumChunks = kHeadDim / kChunkColumns;   // 9; the last is RoPE
    static constexpr int kChunksPerHalf = kHeadDimV / kChunkColumns / 2;
    static constexpr int kRopeChunk = kNumChunks - 1;
    static constexpr int kHalfColumns = kHeadDimV / 2;
    static constexpr int kChunkElements = kPageSize * kChunkColumns;
    static constexpr int kChunkBytes = kChunkElements * sizeof(Element);

    using KMajorAtom = cute::GMMA::Layout_K_SW128_Atom<Element>;
    using MNMajorAtom = cute::GMMA::Layout_MN_SW128_Atom<Element>;
    using LayoutQ = decltype(cute::tile_to_shape(KMajorAtom{}, cute::Shape<cute::Int<kBlockM>, cute::Int<kHeadDim>>{}));
    using LayoutK = decltype(cute::tile_to_shape(KMajorAtom{}, cute::Shape<cute::Int<kPageSize>, cute::Int<kHeadDim>>{}));
    // Half of K's latent chunks, the same bytes, read with the tokens as the reduction: (dim, token)
    using LayoutV = decltype(cute::tile_to_shape(
        MNMajorAtom{}, cute::Shape<cute::Int<kHalfColumns>, cute::Int<kPageSize>>{},
        cute::Step<cute::_2, cute::_1>{}));
    using LayoutP = decltype(cute::tile_to_shape(KMajorAtom{}, cute::Shape<cute::Int<kBlockM>, cute::Int<kPageSize>>{}));

    using AtomScores = std::conditional_t<
        std::is_same_v<Element, cutlass::bfloat16_t>,
        cute::SM90_64x64x16_F32BF16BF16_SS<cute::GMMA::Major::K, cute::GMMA::Major::K>,
        cute::SM90_64x64x16_F32F16F16_SS<cute::GMMA::Major::K, cute::GMMA::Major::K>>;
    using AtomOutput = std::conditional_t<
        std::is_same_v<Element, cutlass::bfloat16_t>,
        cute::SM90_64x256x16_F32BF16BF16_SS<cute::GMMA::Major::K, cute::GMMA::Major::MN>,
        cute::SM90_64x256x16_F32F16F16_SS<cute::GMMA::Major::K, cute::GMMA::Major::MN>>;
    using MmaScores = decltype(cute::make_tiled_mma(AtomScores{}));
    using MmaOutput = decltype(cute::make_tiled_mma(AtomOutput{}));

    struct Barriers {
        TransactionBarrier kv_full[kNumStages][kNumChunks];
        Barrier p_ready[kNumStages];
        Barrier p_read_by_low[kNumStages];
        Barrier stats_full, stats_empty;
    };

    struct SharedStorage {
        alignas(1024) Element q[kNumChunks][kChunkElements];
        alignas(1024) Element kv[kNumStages][kNumChunks][kChunkElements];
        float rescale[kNumStages][kBlockM];
        float inverse_sum[kBlockM];
        int must_rescale[kNumStages][4];  // per warp of a warpgroup: its 16 rows
        LoadOrder order[kNumStages];
        LoadCursor loads;
        alignas(8) Barriers barriers;

        // P takes the place of the RoPE columns, which are dead once the scores of their block are done.
        __device__ Element* p(int stage) { return kv[stage][kRopeChunk]; }
    };
};

}  // namespace flash_mla::sm90
