// Where bits do not depend on the batch a CTA goes through the segments that its worker has of a tile, and the value of
// each goes its way through the tree of segments (segments.h), folded with what waits there. With 16 rows it does so
// while the tensor cores compute the scores of the next segment's first block, and all waits in registers and shared
// memory; with 32 rows before that, and what does not fit registers waits in scratch.
#pragma once

#include "kernels/sm90/primitives/fold.h"
#include "kernels/sm90/swapped_decode/consumer.h"

namespace flash_mla::sm90 {

template <typename Traits>
struct FoldingConsumer : SwappedConsumer<Traits> {
    using Base = SwappedConsumer<Traits>;
    using Base::block_count, Base::group, Base::params, Base::shared, Base::thread;
    using Base::kRows, Base::kRowTiles;
    using typename Base::Outputs;

    // The value of a begun chain waits for what follows: at the innermost level whose chains have several members in
    // registers, and at those above with 16 rows in shared memory and in registers again, with 32 rows in slots.
    static constexpr bool kKeepsAll = kRows <= 16;
    // As there are registers for.
    static constexpr bool kFoldsDuringScores = kKeepsAll;
    static constexpr int kTilesAtOnce = kKeepsAll ? kRowTiles : 1;
    static constexpr int kRowsOfTile = 2;  // that a thread has outputs of, of a tile of 8 rows
    struct Statistics {
        RowStatistics row[kRowTiles][kRowsOfTile];
    };

    Outputs waiting, waiting_outermost;
    Statistics waiting_statistics;  // of the first level with 16 rows, the others being in shared memory

    __device__ void run() {
        typename Traits::Pieces pieces;
        Piece piece;
        bool has_piece = this->begin(pieces, piece);
        while (has_piece) {
            this->wait_for_q();
            add_segments(piece);
            has_piece = this->next_with_keys(pieces, piece);
            // Behind the last segment's barrier nobody reads the query rows any more.
            if (has_piece) this->load_q(piece);
        }
    }

private:
    __device__ int row_of(int tile, int i) const { return fragment_column(thread, tile) + i; }
    // Calls function(i, m, h) for the outputs of a tile: of its i-th row, of a column in chunk m.
    template <typename Function>
    __device__ static void for_each_output(Function const& function) {
#pragma unroll
        for (int i = 0; i < kRowsOfTile; ++i) {
#pragma unroll
            for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
#pragma unroll
                for (int h = 0; h < 2; ++h) function(i, m, h);
            }
        }
    }

    // With 32 rows asked for anew each time, so that nothing that follows from it occupies registers between.
    __device__ static int num_blocks_now(Piece const& piece) {
        int seqlen = piece.seqlen;
        if (!kKeepsAll) asm volatile("" : "+r"(seqlen));
        return num_blocks_of(seqlen);
    }

    __device__ void add_segments(Piece const& piece) {
        Outputs outputs, of_previous;
        SegmentOfWorker segment = segment_of(piece);
        int segment_end = piece.begin_block;
#pragma unroll 1
        for (int block = piece.begin_block; block < piece.end_block;) {
            bool const is_first = block == segment_end;
            if (is_first) {
                int const num_blocks = num_blocks_now(piece);
                segment_end = segment_begin(segment.index + 1, segment_bits_of(num_blocks, kRows, 1), num_blocks);
                this->forget_keys();
                if constexpr (!kFoldsDuringScores) {
                    if (segment.index > segment.begin) fold(piece, segment.previous(), outputs);
                    cute::clear(outputs);  // so that they need no registers before
                }
            }
            this->add_block(
                piece, block, outputs, is_first, kFoldsDuringScores && is_first ? Base::kBegins : Base::kAdds,
                [&] {
                    if (kFoldsDuringScores && is_first && segment.index > segment.begin)
                        fold(piece, segment.previous(), of_previous);
                },
                [&] {
                    if (block + 1 == segment_end) this->put_statistics();
                });
            ++block_count, ++block;
            if (block < segment_end) continue;
            this->sync_consumers();  // for the statistics
            if constexpr (kFoldsDuringScores) {
                // Not read where wgmma wrote them: ptxas would wait for the scores then.
                of_previous = outputs;
                cute::warpgroup_fence_operand(of_previous);
            }
            ++segment.index;
        }
        fold(piece, segment.previous(), kFoldsDuringScores ? of_previous : outputs);
    }

    // The value of a segment is mostly folded with what waits in registers, and waits there again.
    __device__ void fold(Piece const& piece, SegmentOfWorker const& segment, Outputs& outputs) {
        int const segment_bits = segment_bits_of(num_blocks_now(piece), kRows, 1);
        int const level = first_folding_level(segment_bits), last = (1 << level_bits(level, segment_bits)) - 1;
        int const member = segment.index & last;
        if (member == last || segment.index - member < segment.begin || segment.is_last())
            return fold_upwards({params, piece, segment, segment_bits}, level, piece, outputs);
        Statistics statistics = own_statistics();
        if (member > 0) {
            fold_with_registers(waiting, 0, outputs, statistics, waiting);
        } else {
            waiting = outputs;
        }
        keep_statistics(0, statistics);
    }

    // first_level: where values wait in registers.
    __device__ void fold_upwards(SegmentFold const& fold, int first_level, Piece const& piece, Outputs& outputs) {
        Statistics statistics = own_statistics();
        if (fold.path.folds_at(first_level)) fold_with_registers(waiting, 0, outputs, statistics, outputs);
        if constexpr (kKeepsAll) {
            if (fold.path.folds_at(first_level + 1)) {
                fold_with([&](int tile, int i) { return kept(1, tile, i); },
                          [&](int m, int tile) { return in_shared(m, tile); }, outputs, statistics, outputs);
            }
            if (fold.path.folds_at(first_level + 2))
                fold_with_registers(waiting_outermost, 2, outputs, statistics, outputs);
        } else {
#pragma unroll 1
            for (int level = first_level + 1; level < kFoldLevels; ++level) {
                if (fold.path.folds_at(level)) fold_with_slot(fold.waiting_slot(level), outputs, statistics);
            }
        }
        if (fold.path.ends_tile()) return store_results(piece, outputs, statistics);

        if constexpr (kKeepsAll) {
            int const above = fold.path.end_level - first_level;
            if (above > 0 && fold.path.is_begin(fold.segment_bits) && !fold.is_last_of_worker())
                return keep_above(above, outputs, statistics);
        }
        if (!kKeepsAll) this->sync_consumers();  // statistics in slots may still be read
        store_in_slot(fold.end_slot(), statistics,
                      [&](int m, int tile) { return this->fragment_of(outputs, m, tile); });
        if constexpr (kKeepsAll) {
            if (fold.is_last_of_worker()) leave_waiting(fold, first_level);
        }
    }

    // What waits at levels above that at which the worker's last segment ends.
    __device__ void leave_waiting(SegmentFold const& fold, int first_level) {
        auto const waits_at = [&](int above) {
            int const level = first_level + above;
            return level > fold.path.end_level && level < kFoldLevels && fold.has_waiting(level);
        };
        if (waits_at(1)) {
            store_in_slot(fold.waiting_slot(first_level + 1), all_kept(1),
                          [&](int m, int tile) { return in_shared(m, tile); });
        }
        if (waits_at(2)) {
            store_in_slot(fold.waiting_slot(first_level + 2), all_kept(2),
                          [&](int m, int tile) { return this->fragment_of(waiting_outermost, m, tile); });
        }
    }

    // Of this segment.
    __device__ Statistics own_statistics() const {
        Statistics statistics;
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < kRowsOfTile; ++i) statistics.row[tile][i] = this->statistics(row_of(tile, i));
        }
        return statistics;
    }

    __device__ void fold_with_registers(Outputs const& waiting, int level, Outputs const& outputs,
                                        Statistics& statistics, Outputs& result) {
        fold_with([&](int tile, int i) { return kept(level, tile, i); },
                  [&](int m, int tile) { return this->fragment_of(waiting, m, tile); }, outputs, statistics, result);
    }
    __device__ void fold_with_slot(int slot, Outputs& outputs, Statistics& statistics) const {
        RowStatistics const* const of_rows = params.statistics_partial + slot * kRows;
        fold_with([&](int tile, int i) { return load_scratch(of_rows + row_of(tile, i)); },
                  [&](int m, int tile) { return load_scratch(vector_of(slot, m, tile)); }, outputs, statistics,
                  outputs);
    }
    // Folds what waits somewhere with outputs. statistics: of these, and then of the result.
    template <typename StatisticsAt, typename FragmentAt>  // (tile, row of it), (chunk, tile)
    __device__ static void fold_with(StatisticsAt const& statistics_at, FragmentAt const& fragment_at,
                                     Outputs const& outputs, Statistics& statistics, Outputs& result) {
#pragma unroll
        for (int first = 0; first < kRowTiles; first += kTilesAtOnce) {
            FoldWeights weights[kTilesAtOnce][kRowsOfTile];
            float least = 1.f;
#pragma unroll
            for (int j = 0; j < kTilesAtOnce * kRowsOfTile; ++j) {
                int const tile = j / kRowsOfTile, i = j % kRowsOfTile;
                RowStatistics both = statistics_at(first + tile, i);
                weights[tile][i] = fold_statistics(both, statistics.row[first + tile][i]);
                least = fminf(least, weights[tile][i].lesser());
                statistics.row[first + tile][i] = both;
            }
            float4 folded[kTilesAtOnce][Traits::kChunksPerGroup];
#pragma unroll
            for (int tile = 0; tile < kTilesAtOnce; ++tile) {
#pragma unroll
                for (int m = 0; m < Traits::kChunksPerGroup; ++m) folded[tile][m] = fragment_at(m, first + tile);
            }
            auto const fold_all = [&](auto const& fold_one) {
#pragma unroll
                for (int tile = 0; tile < kTilesAtOnce; ++tile) {
                    for_each_output([&](int i, int m, int h) {
                        auto const at = cute::make_coord(i, h, first + tile);
                        float4 const& x = folded[tile][m];
                        float const low = i == 0 ? x.x : x.y, high = i == 0 ? x.z : x.w;
                        result(at, m, 0) = fold_one(h == 0 ? low : high, outputs(at, m, 0), weights[tile][i]);
                    });
                }
            };
            if (__any_sync(~0u, least == 0.f)) {
                fold_all(fold_outputs);
            } else {
                fold_all(fold_weighing_outputs);
            }
        }
    }

    // Where each thread has what it put there itself; results of a cluster have no use for it here.
    __device__ float4& in_shared(int m, int tile) const {
        return shared.received[((m * Traits::kNumGroups + group) * kRowTiles + tile) * 128 + thread];
    }
    // So many levels above the one whose values wait in registers.
    __device__ void keep_above(int above, Outputs const& outputs, Statistics const& statistics) {
        if (above == 2) {
            keep_statistics(2, statistics);
            waiting_outermost = outputs;
            return;
        }
        keep_statistics(1, statistics);
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int m = 0; m < Traits::kChunksPerGroup; ++m) in_shared(m, tile) = this->fragment_of(outputs, m, tile);
        }
    }
    __device__ void keep_statistics(int level, Statistics const& statistics) {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < kRowsOfTile; ++i) kept(level, tile, i) = statistics.row[tile][i];
        }
    }
    __device__ RowStatistics& kept(int level, int tile, int i) {
        int const row = kRowsOfTile * tile + i;
        if (kKeepsAll && level == 0) return waiting_statistics.row[tile][i];
        return shared.waiting_statistics[kKeepsAll ? level - 1 : 0][row][threadIdx.x];
    }
    __device__ Statistics all_kept(int level) {
        Statistics statistics;
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < kRowsOfTile; ++i) statistics.row[tile][i] = kept(level, tile, i);
        }
        return statistics;
    }

    // As slots are laid out (segments.h).
    __device__ float4* vector_of(int slot, int m, int tile) const {
        int const chunk = group * Traits::kChunksPerGroup + m, vector = (chunk * kRowTiles + tile) * 4 + this->warp();
        return reinterpret_cast<float4*>(params.out_partial + int64_t(slot) * kRows * kHeadDimV) + vector * 32 +
               this->lane();
    }
    // Of each row one thread of each warp has them as all others.
    __device__ bool stores_statistics() const { return group == 0 && thread < 4; }

    template <typename FragmentAt>  // (chunk, tile)
    __device__ void store_in_slot(int slot, Statistics const& statistics, FragmentAt const& fragment_at) const {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int m = 0; m < Traits::kChunksPerGroup; ++m) *vector_of(slot, m, tile) = fragment_at(m, tile);
            if (!stores_statistics()) continue;
#pragma unroll
            for (int i = 0; i < kRowsOfTile; ++i)
                params.statistics_partial[slot * kRows + row_of(tile, i)] = statistics.row[tile][i];
        }
    }

    __device__ void store_results(Piece const& piece, Outputs const& outputs, Statistics const& statistics) const {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            float const low = inverse_of(statistics.row[tile][0].sum), high = inverse_of(statistics.row[tile][1].sum);
#pragma unroll
            for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
                float4 const x = this->fragment_of(outputs, m, tile);
                this->store_rows(
                    piece, group * Traits::kChunksPerGroup + m, tile,
                    {normalized(x.x, low), normalized(x.y, high), normalized(x.z, low), normalized(x.w, high)});
            }
            if (!stores_statistics()) continue;
#pragma unroll
            for (int i = 0; i < kRowsOfTile; ++i) {
                QueryRow const at = query_row_of<Traits>(params, piece, row_of(tile, i));
                if (at.exists)
                    params.lse[lse_offset(params, piece.batch, at)] =
                        natural_lse(folded_log2_sum(statistics.row[tile][i]));
            }
        }
    }
};

}  // namespace flash_mla::sm90
