// Types and shared memory of the swapped decode kernel; kernel.cuh opens with how they work together.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/numeric_types.h>

#include "kernels/sm90/primitives/early_block.h"
#include "kernels/sm90/primitives/pipeline.h"
#include "kernels/sm90/primitives/q_map.h"
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
    // And a warp that loads, and one that has the statistics of the rows; or, where consumers take registers from it, a
    // warpgroup for the one that loads.
    static constexpr int kNumThreads = kConsumerThreads + (kSummation == Summation::kByWorkers ? 64 : 128);
    static constexpr int kFoldingRegisters = 224, kLoadingRegisters = 56;  // together 3 × 168, what a CTA starts with

    static constexpr int kNumStages = 2;  // of KV blocks
    static constexpr int kChunkColumns = kKChunkColumns, kLatentChunks = kKLatentChunks;
    static constexpr int kChunksPerGroup = kLatentChunks / kNumGroups;
    static constexpr int kChunkElements = kPageSize * kChunkColumns;
    static constexpr int kChunkBytes = kChunkElements * sizeof(Element);
    static constexpr int kBlockBytes = (kLatentChunks + 1) * kChunkBytes;
    static constexpr int kRowTiles = kRows / 8;                  // of 8 columns in a fragment
    static constexpr int kOwnRowTiles = kRowTiles / kNumGroups;  // whose softmax a group computes

    using Pieces = PiecesOf<kSummation, kRows, 1>;

    using KMajorAtom = cute::GMMA::Layout_K_SW128_Atom<Element>;
    using MNMajorAtom = cute::GMMA::Layout_MN_SW128_Atom<Element>;
    using Columns = cute::Int<kChunksPerGroup * kChunkColumns>;  // of a group, latent
    // (token, column)
    using LayoutLatent = decltype(cute::tile_to_shape(KMajorAtom{}, cute::Shape<cute::Int<kPageSize>, Columns>{}));
    using LayoutRope =
        decltype(cute::tile_to_shape(KMajorAtom{}, cute::Shape<cute::Int<kPageSize>, cute::Int<kChunkColumns>>{}));
    // (row, column)
    using LayoutQ = decltype(cute::tile_to_shape(KMajorAtom{}, cute::Shape<cute::Int<kRows>, cute::Int<kHeadDim>>{}));
    // The latent columns of a group as V: (column, token)
    using LayoutV = decltype(cute::tile_to_shape(MNMajorAtom{}, cute::Shape<Columns, cute::Int<kPageSize>>{},
                                                 cute::Step<cute::_2, cute::_1>{}));
    // (row, token)
    using LayoutP = decltype(cute::tile_to_shape(KMajorAtom{}, cute::Shape<cute::Int<kRows>, cute::Int<kPageSize>>{}));

    using Tile = cute::Shape<cute::_64, cute::Int<kRows>, cute::_16>;
    static constexpr auto kK = cute::GMMA::Major::K;
    static constexpr auto kMN = cute::GMMA::Major::MN;
    using MmaScores =
        decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, Tile, kK, kK>()));
    using MmaOutput =
        decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, Tile, kMN, kK>()));

    struct Barriers {
        // Copied before it was known whether they are the first ones: of the block the columns of each group, with RoPE
        // in the first half.
        TransactionBarrier early_block[kNumGroups], early_rows;
        Barrier sources_known;  // what says whether they are
        TransactionBarrier rows_full;
        TransactionBarrier block_full[kNumStages];
        Barrier block_empty[kNumStages];
        Barrier may_send;         // every CTA of the cluster is done with its query rows, whose place results take
        Barrier statistics_left;  // of the rows, in this CTA
        TransactionBarrier received_statistics;  // those of every CTA of the cluster
        Barrier weighed;                         // the outputs of every CTA
        TransactionBarrier received;             // these outputs, for the columns of this CTA
    };

    // Results of a CTA for 64 columns, in 16 bits: a vector per two tiles of 8 rows and thread, as the accumulators
    // hold them.
    static constexpr int kVectorsPerChunk = kRowTiles / 2 * 128;
    // 8 chunks go to 6 CTAs: two to some, from 6 each. 16 CTAs get a half of one from each.
    static constexpr int kMaxCtas = max_split_ctas(kRows);
    static constexpr int kMaxReceivedChunks = kMaxCtas;
    static_assert(kMaxReceivedChunks >= kLatentChunks && (kRows > 16 || kMaxReceivedChunks >= 2 * 6));
    // Where bits do not depend on the batch, nothing is received, and with 16 rows outputs wait in this place as they
    // are.
    static constexpr int kReceivedVectors = kSummation == Summation::kByWorkers ? kMaxReceivedChunks * kVectorsPerChunk
                                            : kRows <= 16                       ? kLatentChunks * kRowTiles * 128
                                                                                : 1;

    // Where query rows and results have places of their own, the next query rows come while results are merged.
    static constexpr bool kHasRoomForBoth = kRows <= 16;
    struct QueryAndReceived {
        alignas(1024) Element q[kHeadDim * kRows];
        alignas(1024) float4 received[kReceivedVectors];
    };
    struct QueryOrReceived {
        union {
            alignas(1024) Element q[kHeadDim * kRows];
            alignas(1024) float4 received[kReceivedVectors];  // (own chunk, sender, two tiles, thread)
        };
    };

    struct SharedStorage : std::conditional_t<kHasRoomForBoth, QueryAndReceived, QueryOrReceived> {
        alignas(1024) Element block[kNumStages][kLatentChunks + 1][kChunkElements];  // the last chunk is RoPE
        alignas(1024) Element p[kRows * kPageSize];
        float4 exchanged[kNumGroups][kOwnRowTiles][128];
        alignas(16) float largest[kNumGroups][4][kRows / kNumGroups];
        float row_sum[4][kRows];
        float rescale[kRows];
        float reference[kRows];                                   // log2
        alignas(16) float2 received_statistics[kMaxCtas][kRows];  // reference and sum, by sender
        // What a warp's outputs of a row are multiplied with, by own chunk and sender.
        alignas(8) float received_scale[kMaxReceivedChunks][4][kRows];
        alignas(8) float weight[kMaxCtas][kRows];
        alignas(8) bool exceeds[kNumGroups][4];  // by warp
        int must_rescale[kNumGroups];
        // Where bits do not depend on the batch, of outputs that wait, by thread: for each row that it has some of.
        static constexpr int kLevelsOfStatistics = kSummation == Summation::kByWorkers ? 1 : kRows <= 16 ? 2 : 1;
        static constexpr int kStatisticsThreads = kSummation == Summation::kByWorkers ? 1 : kConsumerThreads;
        RowStatistics waiting_statistics[kLevelsOfStatistics][2 * kRowTiles][kStatisticsThreads];
        typename EarlyPiece<Pieces>::Sources sources;  // of the first piece
        alignas(8) Barriers barriers;
    };
    static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// The KV blocks of a piece that one CTA of the cluster takes. The first CTAs take one more where they do not come out
// even.
struct BlockRange {
    int begin, end;

    __device__ BlockRange(Piece const& piece, int rank, int num_ctas) {
        int const each = piece.num_blocks() / num_ctas, rest = piece.num_blocks() - each * num_ctas;
        begin = piece.begin_block + rank * each + min(rank, rest);
        end = begin + each + (rank < rest);
    }
};

}  // namespace flash_mla::sm90
