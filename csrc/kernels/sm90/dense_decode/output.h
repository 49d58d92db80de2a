// An output warpgroup: O = P·V for one half of the latent columns, kept in registers, and its way to global memory.
#pragma once

#include "kernels/sm90/dense_decode/load.h"
#include "kernels/sm90/dense_decode/traits.h"
#include "kernels/sm90/primitives/fragment.h"
#include "kernels/sm90/primitives/swizzled_operand.h"

namespace flash_mla::sm90 {

template <typename Traits>
struct OutputMainloop {
    using Element = typename Traits::Element;
    using SharedStorage = typename Traits::SharedStorage;

    static constexpr int kNumOutputs = kBlockM * Traits::kHalfColumns / 128;  // per thread
    using Outputs = decltype(cute::partition_fragment_C(
        typename Traits::MmaOutput{}, cute::Shape<cute::Int<kBlockM>, cute::Int<Traits::kHalfColumns>>{}));

    DenseDecodeParams const& params;
    DecodeMaps const& maps;
    SharedStorage& shared;
    WarpgroupRole role;
    int thread;  // in the warpgroup
    BlockPosition<Traits> at = {};
    uint32_t piece_count = 0;

    __device__ void run() {
        for (;; ++piece_count) {
            cutlass::arch::NamedBarrier::sync(3 * 128, kRowsBarrier);
            if (shared.pieces.wait(piece_count).is_end()) return;
            run_piece();
        }
    }

private:
    __device__ int half() const { return role == WarpgroupRole::kOutputHigh; }
    __device__ int first_chunk() const { return half() * Traits::kChunksPerHalf; }
    // Folding leaves no register for it.
    __device__ int own_thread() const {
        return Traits::kSummation == Summation::kBySegments ? thread_in_warpgroup_now() : thread;
    }
    __device__ uint32_t barrier() const { return warpgroup_barrier(role); }

    // Looked up anew each time: not even its address, or what kind it is, should occupy a register meanwhile.
    __device__ Piece const& piece_now() const {
        uint32_t index;
        asm volatile("mov.b32 %0, %1;\n" : "=r"(index) : "r"(piece_count));
        return shared.pieces.get(index);
    }

    __device__ void run_piece() {
        Piece const& piece = piece_now();
        Outputs outputs;
        cute::clear(outputs);
        int num_keys = piece.seqlen - piece.begin_block * kPageSize;
        int const num_keys_after = piece.seqlen - piece.end_block * kPageSize;
        for (; num_keys > keys_after(num_keys_after); num_keys -= kPageSize) {
            int const keys_left = num_keys - kPageSize - keys_after(num_keys_after);
            // Before the wait, after which each cycle counts.
            ColumnwiseOperand const p(shared_address(shared.rope_or_p[at.p_place(keys_left == 0)]));
            RowwiseOperand const v(shared_address(shared.latent[at.stage()][first_chunk()]));
            shared.barriers.p_ready[at.p_turn()].wait(at.p_phase());
            if (flag_for_warp(shared.must_rescale[at.stage()][own_thread() / 32])) rescale(outputs);
            if (num_keys < kPageSize) clear_keys_from(num_keys);
            issue(p, v, outputs);
            cute::warpgroup_wait<0>();
            fence_outputs(outputs);
            quads_arrive(shared.barriers.p_consumed[at.p_turn()]);
            if (keys_left != 0) {
                if (own_thread() % 32 == 0) shared.barriers.announce_consumed(at.stage(), half());
                refill(at);
            } else if constexpr (Traits::kSummation == Summation::kByWorkers) {
                cutlass::arch::NamedBarrier::arrive(3 * 128, kLastOutputsBarrier);
            }
            refill_rope(keys_left);
            at.advance();
        }
        if constexpr (Traits::kSummation == Summation::kBySegments) start_copies();
        shared.barriers.stats_full.wait(piece_count % 2);
        if constexpr (Traits::kSummation == Summation::kBySegments) {
            fold_and_store(outputs);
        } else {
            store_half<0>(piece_now(), outputs);
            refill(at.previous());
            store_half<1>(piece_now(), outputs);
        }
        quads_arrive(shared.barriers.stats_empty);
    }

    // Of the piece. Folding leaves no register for it either.
    __device__ int keys_after(int kept) const {
        if constexpr (Traits::kSummation == Summation::kByWorkers) return kept;
        Piece const& piece = piece_now();
        return piece.seqlen - piece.end_block * kPageSize;
    }

    __device__ void rescale(Outputs& outputs) {
        auto const& rescale = shared.rescale[at.stage()];
        float const factor[kRowsPerThread] = {load_for_quad(rescale[fragment_row(own_thread(), 0)]),
                                              load_for_quad(rescale[fragment_row(own_thread(), 1)])};
#pragma unroll
        for (int i = 0; i < kNumOutputs; ++i) outputs[i] *= factor[i / 2 % 2];
    }

    // Whatever the cache holds behind the last key may be NaN, and 0 · NaN is not 0.
    __device__ void clear_keys_from(int num_keys) {
#pragma unroll
        for (int chunk = 0; chunk < Traits::kChunksPerHalf; ++chunk) {
            auto* const words = reinterpret_cast<uint4*>(shared.latent[at.stage()][first_chunk() + chunk]);
            for (int i = num_keys * 8 + own_thread(); i < kPageSize * 8; i += 128) words[i] = uint4{0, 0, 0, 0};
        }
        cutlass::arch::fence_view_async_shared();
        cutlass::arch::NamedBarrier::sync(128, barrier());
    }

    __device__ static void issue(ColumnwiseOperand const& p, RowwiseOperand const& v, Outputs& outputs) {
        using namespace cute;
        typename Traits::MmaOutput mma;
        fence_outputs(outputs);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < kPageSize / 16; ++k) cute::gemm(mma, p.step(k), v.step(k), outputs);
        warpgroup_commit_batch();
        fence_outputs(outputs);
    }

    __device__ static void fence_outputs(Outputs& outputs) { cute::warpgroup_fence_operand(outputs); }

    // Copies a later block to where a consumed one was. The stage of the last block of a piece is announced as
    // consumed by scores, when query rows have passed through it, or after folding, and so refilled later than others.
    __device__ void refill(BlockPosition<Traits> const& consumed) const {
        if (own_thread() != 0 || !loader().copies_half(half())) return;
        loader().fill_half(consumed.later(Traits::kNumStages), half());
    }

    // Copies the RoPE columns of a later block to where P of the current one was, when both output warpgroups have
    // consumed it. That is the place of the third next block; of the second next, if this one is the last of its piece;
    // and not free yet if it is the last but one, as P of the last comes there. What is missing then, the block two
    // after the first of a piece, scores copy.
    __device__ void refill_rope(int keys_left) const {
        if (role != WarpgroupRole::kOutputLow || own_thread() != 0 || keys_left == kPageSize) return;
        shared.barriers.p_consumed[at.p_turn()].wait(at.p_phase());
        loader().load_rope(at.later(keys_left == 0 ? 2 : 3));
    }

    __device__ BlockLoader<Traits> loader() const { return {params, maps, shared}; }

    // What a segment is folded with first comes by way of its last block's stage, which goes free later than others
    // therefore.
    __device__ void start_copies() const {
        int const folds = folds_now() & (FoldWay::kStays - 1);
        if (folds == 0) return;
        // All warps have multiplied what is there.
        cutlass::arch::NamedBarrier::sync(128, barrier());
        copy_first_parts(__ffs(folds) - 1);
    }

    // A segment, on its way through the tree; it may be the only one of its tile.
    __device__ void fold_and_store(Outputs& outputs) {
#pragma unroll 1
        for (int level = 0; level < kFoldLevels; ++level) {
            if (folds_now() >> level & 1) fold_at(level, outputs);
        }
        if (folds_now() & FoldWay::kStays) {
            cutlass::arch::fence_view_async_shared();
            __syncwarp();
            if (own_thread() % 32 == 0) shared.barriers.announce_consumed(at.previous().stage(), half());
        } else {
            cutlass::arch::NamedBarrier::arrive(3 * 128, kLastOutputsBarrier);
        }
        refill(at.previous());
        store_folded<0>(outputs);
        store_folded<1>(outputs);
    }
    // Read anew each time, as registers are dearer.
    __device__ static int row_now(int h) { return fragment_row(thread_in_warpgroup_now(), h); }
    __device__ uint32_t way_now() const {
        uint32_t index;
        asm volatile("and.b32 %0, %1, 1;\n" : "=r"(index) : "r"(piece_count));
        return shared_address(shared.fold_steps.way) + index * sizeof(FoldWay);
    }
    __device__ int folds_now() const { return word_for_quad_now(way_now() + offsetof(FoldWay, folds)); }
    __device__ int slot_now(int level) const {
        return word_for_quad_now(way_now() + offsetof(FoldWay, slot) + level * sizeof(int));
    }

    template <int h>
    __device__ void store_folded(Outputs& outputs) const {
        int const row = row_now(h), slot = slot_now(kFoldLevels);
        if (slot == FoldWay::kOut) {
            float const inverse_sum = __uint_as_float(word_for_quad_now(shared_address(shared.inverse_sum[row])));
            Piece const& piece = piece_now();
            QueryRow const at = query_row(params, piece.place, row);
            Element* target = out_row(piece, at);
            asm volatile("" : "+l"(target));  // before the outputs are packed: its parts would take more registers
            store_row<h>(target, at.exists, inverse_sum, outputs);
        } else {
            store_slot_row<h>(slot_vectors(slot, row), outputs);
        }
    }

    __device__ void copy_first_parts(int level) const {
        int const slot = slot_now(level);
        copy_part(0, slot);
        copy_part(1, slot);
    }
    // Folds the outputs with what waits at a level: copied in four parts, two on their way at a time. Each thread reads
    // what it has copied itself.
    __device__ void fold_at(int level, Outputs& outputs) const {
        if (folds_now() & ((1 << level) - 1)) copy_first_parts(level);  // those of the first level are on their way
#pragma unroll
        for (int part = 0; part < kNumParts; ++part) {
            int const h = part / 2;
            if (part + 1 < kNumParts) {
                cute::cp_async_wait<1>();
            } else {
                cute::cp_async_wait<0>();
            }
            uint32_t const landing = landing_now();
            FoldWeights const weights = FoldWeights::of(__uint_as_float(
                word_for_quad_now(shared_address(shared.fold_steps.next_above_folded[level][row_now(h)]))));
#pragma unroll
            for (int i = 0; i < kVectorsPerPart; ++i) {
                float4 const x = load_shared(landing + place_of(part, i));
                int const first = 8 * (part % 2 * kVectorsPerPart + i) + 2 * h;
                outputs[first] = fold_outputs(x.x, outputs[first], weights);
                outputs[first + 1] = fold_outputs(x.y, outputs[first + 1], weights);
                outputs[first + 4] = fold_outputs(x.z, outputs[first + 4], weights);
                outputs[first + 5] = fold_outputs(x.w, outputs[first + 5], weights);
            }
            if (part + 2 < kNumParts) copy_part(part + 2, slot_now(level));
        }
    }

    // Half of one of the two rows of each thread.
    static constexpr int kNumParts = 4, kVectorsPerPart = kNumOutputs / 4 / kNumParts;
    __device__ static constexpr uint32_t place_of(int part, int i) {
        return (part % 2 * kVectorsPerPart + i) * 128 * sizeof(float4);
    }
    __device__ uint32_t landing_now() const {
        return shared_address(shared.latent[at.previous().stage()][first_chunk()]) +
               thread_in_warpgroup_now() * sizeof(float4);
    }
    __device__ void copy_part(int part, int slot) const {
        float4 const* const waiting = slot_vectors(slot, row_now(0));
        uint32_t const landing = landing_now();
        constexpr int kVectorsToNextRows = kHeadDimV / kVectorColumns;
#pragma unroll
        for (int i = 0; i < kVectorsPerPart; ++i) {
            int const vector = part / 2 * kVectorsToNextRows + part % 2 * kVectorsPerPart + i;
            copy_16_bytes_async(landing + place_of(part, i), waiting + 32 * vector);
        }
        cute::cp_async_fence();
    }
    __device__ static float4 load_shared(uint32_t address) {
        float4 value;
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
                     : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                     : "r"(address)
                     : "memory");
        return value;
    }

    template <int h>
    __device__ void store_slot_row(float4* target, Outputs const& outputs) const {
#pragma unroll
        for (int i = 0; i < kNumOutputs / 8; ++i) {
            int const at = 8 * i + 2 * h;
            target[32 * i] = float4{outputs[at], outputs[at + 1], outputs[at + 4], outputs[at + 5]};
        }
    }

    __device__ float4* slot_vectors(int slot, int row) const {
        return sm90::slot_vectors(params, slot, row, half() * Traits::kHalfColumns);
    }

    // One of the two rows of each thread.
    template <int h>
    __device__ void store_half(Piece const& piece, Outputs const& outputs) const {
        int const row = fragment_row(own_thread(), h);
        float const inverse_sum = load_for_quad(shared.inverse_sum[row]);
        if (piece.is_partial()) {
            // A box whole or not at all: its 8 rows are those of a warp.
            int const first_of_box = piece.place.m_tile * kBlockM + own_thread() / 32 * 16 + h * kBoxRows;
            if (first_of_box < params.rows_per_head_kv) store_partial_row<h>(piece, row, inverse_sum, outputs);
        } else {
            QueryRow const at = query_row(params, piece.place, row);
            store_row<h>(out_row(piece, at), at.exists, inverse_sum, outputs);
        }
    }

    __device__ Element* out_row(Piece const& piece, QueryRow const& at) const {
        return static_cast<Element*>(params.out) + out_offset(params, piece.batch, at) + half() * Traits::kHalfColumns;
    }

    template <int h>
    __device__ void store_partial_row(Piece const& piece, int row, float inverse_sum, Outputs const& outputs) const {
        int const lane = lane_now(), first_column = half() * Traits::kHalfColumns;
        int const tile_row = partial_row(params.grid, piece.slot, lane, 0, kBlockM);
        uint32_t const exponent = exponent_above<h>(inverse_sum, outputs);
        params.scale_partial[(tile_row + row) * kScalesPerRow + scale_of(first_column, own_thread() % 4)] =
            __uint_as_float(exponent << 23);
        float const factor = inverse_sum * __uint_as_float((254 - exponent) << 23);
        int const offset = tile_row * kHeadDimV + box_offset(row, first_column);
        uint4* const target = reinterpret_cast<uint4*>(static_cast<__half*>(params.packed_partial) + offset) +
                              thread_in_warpgroup_now() % 32;
#pragma unroll
        for (int box = 0; box < kNumOutputs / 16; ++box) {
            uint32_t word[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int const first = 16 * box + 4 * i + 2 * h;
                word[i] = pack_pair(normalized(outputs[first], factor), normalized(outputs[first + 1], factor),
                                    cutlass::half_t{});
            }
            target[box * kBoxThreads] = uint4{word[0], word[1], word[2], word[3]};
        }
    }

    // The exponent, as floats have it, of a power of two of which the largest of a row's finite outputs is as many
    // times as 16 bits can hold.
    template <int h>
    __device__ static uint32_t exponent_above(float inverse_sum, Outputs const& outputs) {
        uint32_t largest = 0;  // twice the bits of the absolute value, from 2 << 23; less for what is not finite
#pragma unroll
        for (int i = 2 * h; i < kNumOutputs; i += 4) {
            largest = max(largest, 2 * __float_as_uint(outputs[i]) + (2u << 23));
            largest = max(largest, 2 * __float_as_uint(outputs[i + 1]) + (2u << 23));
        }
        float const value = __uint_as_float((max(largest, 2u << 23) - (2u << 23)) / 2) * inverse_sum;
        return max(int(__float_as_uint(value) >> 23) - 14, 1);
    }

    // Four tiles of 8 columns at a time, transposed among the four lanes of a row: 16 bytes a lane, 64 together.
    template <int h>
    __device__ void store_row(Element* row, bool exists, float inverse_sum, Outputs const& outputs) const {
        Element* const target = row + own_thread() % 4 * 8;
#pragma unroll
        for (int group = 0; group < kNumOutputs / 16; ++group) {
            uint32_t word[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int const first = 4 * (4 * group + i) + 2 * h;
                word[i] = pack_pair(normalized(outputs[first], inverse_sum),
                                    normalized(outputs[first + 1], inverse_sum), Element{});
            }
            transpose_in_quad(word[0], word[1], word[2], word[3]);
            if (exists) *reinterpret_cast<uint4*>(target + 32 * group) = uint4{word[0], word[1], word[2], word[3]};
        }
    }
};

}  // namespace flash_mla::sm90
