// Types and shared memory of the swapped decode kernel; kernel.cuh opens with how they work together.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/numeric_types.h>

#include "kernels/sm90/primitives/fold.h"
#include "kernels/sm90/primitives/k_maps.h"
#include "kernels/sm90/primitives/pipeline.h"
#include "kernels/sm90/primitives/segment_cursor.h"

namespace flash_mla::sm90 {

template <typename Element_, int kRows_, Summation kSummation_>
struct SwappedDecodeTraits {
    using Element = Element_;
    static constexpr Summation kSummation = kSummation_;
    static constexpr bool kIsBFloat16 = std::is_same_v<Element, cutlass::bfloat16_t>;
    static constexpr int kRows = kRows_;  // query rows of a CTA: N of both products
    static_assert(kRows % 16 == 0 && kRows < kBlockM);

    static constexpr int kNumGroups = 2;  // of consumers, a warpgroup each
    static constexpr int kConsumerThreads = kNumGroups * 128;
    // And a warp that loads; with 32 rows a warpgroup, which leaves its registers to the consumers.
    static constexpr bool kMovesRegisters = kRows > 16;
    static constexpr int kNumThreads = kConsumerThreads + (kMovesRegisters ? 128 : 32);
    static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // together 3 × 168, what a CTA starts with

    static constexpr int kChunkColumns = kKChunkColumns, kLatentChunks = kKLatentChunks;
    static constexpr int kChunksPerGroup = kLatentChunks / kNumGroups;  // of the output, merged by a group
    static constexpr int kChunkElements = kPageSize * kChunkColumns;
    static constexpr int kRowTiles = kRows / 8;  // of 8 columns in a fragment

    // KV blocks come in thirds, 3 chunks of 64 columns each, into a ring: room for some blocks, and for what can be of
    // one more.
    static constexpr int kNumStages = 2;
    static constexpr int kThirds = kKThirds, kChunksPerThird = kKChunksPerThird;
    static constexpr int kThirdBytes = kChunksPerThird * kChunkElements * sizeof(Element);
    static constexpr int kRingThirds = kThirds * kNumStages + (kRows <= 16 ? 2 : 1);

    using Pieces = PiecesOf<kSummation, kRows, 1>;

    using Tile = cute::Shape<cute::_64, cute::Int<kRows>, cute::_16>;
    static constexpr auto kK = cute::GMMA::Major::K;
    static constexpr auto kMN = cute::GMMA::Major::MN;
    using MmaScores =
        decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, Tile, kK, kK>()));
    using MmaOutput =
        decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, Tile, kMN, kK>()));

    struct Barriers {
        // By group: one that does not wait for every third in a place could take the one before for its own.
        TransactionBarrier third_full[kNumGroups][kRingThirds];
        Barrier third_empty[kRingThirds];
        Barrier may_send;             // every CTA of the cluster is done with its blocks, whose place results take
        TransactionBarrier received;  // the results of every CTA of the cluster for the columns of this one
    };

    // Results of a CTA for 64 columns: one float4 per tile of 8 rows and thread, as the accumulators hold them.
    static constexpr int kVectorsPerChunk = kRowTiles * 128;
    // 8 chunks go to 6 CTAs: two to some, from 6 each.
    static constexpr int kMaxReceivedChunks = kRows <= 16 ? 12 : kLatentChunks;
    static constexpr int kReceivedVectors = kMaxReceivedChunks * kVectorsPerChunk;

    // What takes the place of the first thirds between two pieces.
    struct Results {
        float4 received[kReceivedVectors];                               // (own chunk, sender, tile, thread)
        float4 exchanged[kNumGroups][kChunksPerGroup * kRowTiles][128];  // for the other group
    };
    static constexpr int kResultThirds = ceil_div(int(sizeof(Results)), kThirdBytes);
    static_assert(kResultThirds <= kRingThirds);

    struct StorageOfPieces {
        union {
            alignas(1024) Element ring[kRingThirds][kChunksPerThird][kChunkElements];
            Results results;
        };
        alignas(1024) Element q[kHeadDim * kRows];
        alignas(1024) Element p[kNumGroups][kRows * kPageSize];
        alignas(16) float largest[kNumGroups][4][kRows];  // by warp
        float row_sum[kNumGroups][4][kRows];
        float rescale[kNumGroups][kRows];
        float reference[kNumGroups][kRows];                            // log2
        alignas(16) float2 received_statistics[kMaxSplitCtas][kRows];  // reference and sum, by sender
        alignas(8) float weight[kMaxSplitCtas][kRows];
        alignas(8) bool exceeds[kNumGroups][4];  // by warp
        int must_rescale[kNumGroups];
        alignas(8) Barriers barriers;
    };
    // By levels of the tree of segments (segments.h): log2-sum-exp2 of what waits there, and its weight and that of
    // what comes where both are folded.
    struct StorageOfSegments : StorageOfPieces {
        float waiting_log2_sum[kFoldLevels][kRows];
        FoldWeights fold_weights[kFoldLevels][kRows];
    };
    using SharedStorage = std::conditional_t<kSummation == Summation::kBySegments, StorageOfSegments, StorageOfPieces>;
    static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// A third of a KV block in the ring: the thirds of a CTA are counted through, across pieces.
template <typename Traits>
struct RingPosition {
    uint32_t count = 0;

    __device__ uint32_t place() const { return count % Traits::kRingThirds; }
    __device__ uint32_t empty_phase() const { return count / Traits::kRingThirds % 2 ^ 1; }
    __device__ RingPosition later(uint32_t thirds) const { return {count + thirds}; }
    // Where results come after the end of a piece, the begin of the ring, and the next piece after them. They and what
    // is skipped before them are filled and emptied as blocks are.
    __device__ RingPosition results() const {
        return {uint32_t(ceil_div(int(count), Traits::kRingThirds) * Traits::kRingThirds)};
    }
    __device__ RingPosition after_results() const { return results().later(Traits::kResultThirds); }
};

// The KV blocks of a piece that one CTA of the cluster takes. The first CTAs take one more where they do not come out
// even.
struct BlockRange {
    int begin, end;
    int num_active;  // CTAs with blocks, the first ones

    __device__ BlockRange(Piece const& piece, int rank, int num_ctas) {
        int const each = piece.num_blocks() / num_ctas, rest = piece.num_blocks() - each * num_ctas;
        begin = piece.begin_block + rank * each + min(rank, rest);
        end = begin + each + (rank < rest);
        num_active = each > 0 ? num_ctas : rest;
    }
};

}  // namespace flash_mla::sm90
