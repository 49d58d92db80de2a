// Where bits do not depend on the batch a piece is a segment, and its value goes its way through the tree of segments
// (segments.h), folded with what waits there: in registers, as far as these suffice, and else in scratch.
#pragma once

#include "kernels/sm90/primitives/fold.h"
#include "kernels/sm90/swapped_decode/consumer.h"

namespace flash_mla::sm90 {

template <typename Traits>
struct FoldingConsumer : SwappedConsumer<Traits> {
    using Base = SwappedConsumer<Traits>;
    using Base::group, Base::params, Base::shared, Base::thread;
    using Base::kMinusInfinity, Base::kRows, Base::kRowTiles;
    using typename Base::Outputs;

    // Where the value of a begun chain waits for what follows: with 16 rows there is room for the innermost level of a
    // tile in registers, and for the next one in shared memory.
    enum class Place { kRegisters, kShared, kSlot };
    static constexpr bool kHasRoom = kRows <= 16;
    static constexpr int kRowsOfTile = 2;  // that a thread has outputs of, of a tile of 8 rows

    Outputs waiting;
    float waiting_log2_sum[2][kRowTiles][kRowsOfTile];  // of these, and of what is in shared memory

    __device__ void run() {
        typename Traits::Pieces pieces;
        Piece piece;
        bool has_piece = this->begin(pieces, piece);
        if (!has_piece) return;
        bool are_rows_new = true;
        while (has_piece) {
            Outputs outputs;
            this->add_blocks(piece, BlockRange(piece, 0, 1), are_rows_new, outputs, [] {});
            // Behind its barrier nobody reads the query rows any more.
            this->share_statistics();
            fold(piece, outputs);
            Piece const previous = piece;
            has_piece = this->next_with_keys(pieces, piece);
            are_rows_new = has_piece && !piece.is_of_tile(previous);
            if (are_rows_new) this->load_q(piece);
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

    __device__ void fold(Piece const& piece, Outputs& outputs) {
        SegmentFold const fold(params, piece, kRows);
        float log2_sum[kRowTiles][kRowsOfTile];
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            normalize(tile, outputs, log2_sum[tile]);
            fold_tile(fold, tile, outputs, log2_sum[tile]);
        }
        if (fold.path.ends_tile()) {
            store_results(piece, outputs, log2_sum);
            return;
        }
        // Behind a barrier where log2-sum-exp2 in slots may still be read.
        Place const place = place_of(fold.path.end_level, fold);
        bool const is_last = fold.is_last_of_worker();
        bool const stays = place != Place::kSlot && fold.path.is_begin(fold.segment_bits) && !is_last;
        if (stays) {
            keep(place, outputs, log2_sum);
        } else {
            this->sync_consumers();
            store_in_slot(fold.end_slot(), log2_sum,
                          [&](int m, int tile) { return this->fragment_of(outputs, m, tile); });
        }
        int const next_level = fold.path.end_level + 1;
        // What waits at the next level in shared memory, the chain at its own level being its last.
        if (kHasRoom && is_last && place == Place::kRegisters && next_level < kFoldLevels &&
            fold.has_waiting(next_level))
            store_in_slot(fold.waiting_slot(next_level), waiting_log2_sum[1],
                          [&](int m, int tile) { return in_shared(m, tile); });
    }

    // A row that saw no key is 0, whatever the values of the keys it did not see.
    __device__ void normalize(int tile, Outputs& outputs, float (&log2_sum)[kRowsOfTile]) const {
        float inverse[kRowsOfTile];
#pragma unroll
        for (int i = 0; i < kRowsOfTile; ++i) {
            float2 const statistics = this->statistics(row_of(tile, i));  // reference and sum
            inverse[i] = statistics.y == 0.f ? 0.f : __fdividef(1.f, statistics.y);
            log2_sum[i] = log2_sum_of(statistics);
        }
        for_each_output([&](int i, int m, int h) {
            float& output = outputs(cute::make_coord(i, h, tile), m, 0);
            output = inverse[i] == 0.f ? 0.f : __fmul_rn(output, inverse[i]);
        });
    }

    __device__ void fold_tile(SegmentFold const& fold, int tile, Outputs& outputs,
                              float (&log2_sum)[kRowsOfTile]) const {
#pragma unroll 1
        for (int level = 0; level < kFoldLevels; ++level) {
            if (!fold.path.folds_at(level)) continue;
            Place const place = place_of(level, fold);
            int const slot = place == Place::kSlot ? fold.waiting_slot(level) : 0;
            FoldWeights weights[kRowsOfTile];
#pragma unroll
            for (int i = 0; i < kRowsOfTile; ++i) {
                float both = place == Place::kRegisters ? waiting_log2_sum[0][tile][i]
                             : place == Place::kShared
                                 ? waiting_log2_sum[1][tile][i]
                                 : load_scratch(params.lse_partial + slot * kRows + row_of(tile, i));
                weights[i] = fold_log2_sums(both, log2_sum[i]);
                log2_sum[i] = both;
            }
            if (place == Place::kRegisters) {
                for_each_output([&](int i, int m, int h) {
                    float& output = outputs(cute::make_coord(i, h, tile), m, 0);
                    output = fold_outputs(waiting(cute::make_coord(i, h, tile), m, 0), output, weights[i]);
                });
            } else {
                float4 folded[Traits::kChunksPerGroup];
#pragma unroll
                for (int m = 0; m < Traits::kChunksPerGroup; ++m)
                    folded[m] = place == Place::kShared ? in_shared(m, tile) : load_scratch(vector_of(slot, m, tile));
                for_each_output([&](int i, int m, int h) {
                    float const low = i == 0 ? folded[m].x : folded[m].y, high = i == 0 ? folded[m].z : folded[m].w;
                    float& output = outputs(cute::make_coord(i, h, tile), m, 0);
                    output = fold_outputs(h == 0 ? low : high, output, weights[i]);
                });
            }
        }
    }

    // Levels before the first one whose chains have several members only pass values on.
    __device__ static Place place_of(int level, SegmentFold const& fold) {
        if (!kHasRoom) return Place::kSlot;
        if (member_bits(level, fold.segment_bits) == 0) return Place::kRegisters;
        return member_bits(level - 1, fold.segment_bits) == 0 ? Place::kShared : Place::kSlot;
    }
    // Where each thread has what it put there itself; results of a cluster have no use for it here.
    __device__ float4& in_shared(int m, int tile) const {
        return shared.received[((m * Traits::kNumGroups + group) * kRowTiles + tile) * 128 + thread];
    }
    __device__ void keep(Place place, Outputs const& outputs, float const (&log2_sum)[kRowTiles][kRowsOfTile]) {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            if (place == Place::kRegisters) {
#pragma unroll
                for (int i = 0; i < kRowsOfTile; ++i) waiting_log2_sum[0][tile][i] = log2_sum[tile][i];
                for_each_output([&](int i, int m, int h) {
                    auto const at = cute::make_coord(i, h, tile);
                    waiting(at, m, 0) = outputs(at, m, 0);
                });
            } else {
#pragma unroll
                for (int i = 0; i < kRowsOfTile; ++i) waiting_log2_sum[1][tile][i] = log2_sum[tile][i];
#pragma unroll
                for (int m = 0; m < Traits::kChunksPerGroup; ++m)
                    in_shared(m, tile) = this->fragment_of(outputs, m, tile);
            }
        }
    }

    // As slots are laid out (segments.h).
    __device__ float4* vector_of(int slot, int m, int tile) const {
        int const chunk = group * Traits::kChunksPerGroup + m, vector = (chunk * kRowTiles + tile) * 4 + this->warp();
        return reinterpret_cast<float4*>(params.out_partial + int64_t(slot) * kRows * kHeadDimV) + vector * 32 +
               this->lane();
    }
    __device__ bool stores_log2_sums() const { return group == 0 && thread < 4; }

    template <typename FragmentAt>  // (chunk, tile)
    __device__ void store_in_slot(int slot, float const (&log2_sum)[kRowTiles][kRowsOfTile],
                                  FragmentAt const& fragment_at) const {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int m = 0; m < Traits::kChunksPerGroup; ++m) *vector_of(slot, m, tile) = fragment_at(m, tile);
            if (!stores_log2_sums()) continue;
#pragma unroll
            for (int i = 0; i < kRowsOfTile; ++i)
                params.lse_partial[slot * kRows + row_of(tile, i)] = log2_sum[tile][i];
        }
    }

    __device__ void store_results(Piece const& piece, Outputs const& outputs,
                                  float const (&log2_sum)[kRowTiles][kRowsOfTile]) const {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int m = 0; m < Traits::kChunksPerGroup; ++m) {
                float4 const x = this->fragment_of(outputs, m, tile);
                this->store_rows(piece, group * Traits::kChunksPerGroup + m, tile, {x.x, x.y, x.z, x.w});
            }
            if (!stores_log2_sums()) continue;
#pragma unroll
            for (int i = 0; i < kRowsOfTile; ++i) {
                QueryRow const at = query_row_of<Traits>(params, piece, row_of(tile, i));
                if (at.exists) params.lse[lse_offset(params, piece.batch, at)] = natural_lse(log2_sum[tile][i]);
            }
        }
    }
};

}  // namespace flash_mla::sm90
