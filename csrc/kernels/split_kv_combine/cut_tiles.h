// What the decode has left of tiles that the plan cuts, where bits do not depend on the batch: values of the tree of
// segments (segments.h). Which there are, and in which slots, follows from the segments at which workers begin.
#pragma once

#include <cstdint>

#include "params/segments.h"

namespace flash_mla {

inline constexpr int kMaxOuterChains = 1 << level_bits(2, kMaxSegmentBits);
inline constexpr int kMaxChains = kMaxOuterChains << level_bits(1, kMaxSegmentBits);  // innermost ones, of a tile

// The segments of a tile at which workers begin, but for the first: a bit each.
struct Cuts {
    uint32_t word[kMaxSegments / 32];

    // Those of an outer chain, of `count` segments: they are in one word.
    __host__ __device__ uint32_t in_outer_chain(int begin, int count) const {
        return word[begin / 32] >> begin % 32 & ~0u >> (32 - count);
    }
    __host__ __device__ bool any_before(int segment) const {
        bool any = false;
#pragma unroll
        for (int i = 0; i < kMaxSegments / 32; ++i) {
            int const count = segment - 32 * i < 32 ? segment - 32 * i : 32;
            any |= count > 0 && word[i] << (32 - count) != 0;
        }
        return any;
    }
};

struct CutTile {
    int batch, tile, segment_bits;
    Cuts cuts;

    // Innermost chains, and how many of them an outer one has.
    __host__ __device__ int num_chains() const { return 1 << (segment_bits - level_bits(0, segment_bits)); }
    __host__ __device__ int radix() const { return 1 << level_bits(1, segment_bits); }
};

// What is left of an innermost chain: of a part of it, of all of it, or of several chains of which it is the first.
struct Run {
    int first_segment;
    int num_values;            // to be folded; 0: what there is of the chain is part of another's value
    int second_value_segment;  // from there on a value is a segment

    Run() = default;
    __host__ __device__ Run(int chain, CutTile const& tile) {
        int const size = 1 << level_bits(0, tile.segment_bits), outer_size = size * tile.radix();
        int const begin = chain * size, outer_begin = begin & -outer_size;
        uint32_t const cuts = tile.cuts.in_outer_chain(outer_begin, outer_size);
        uint32_t const up_to_begin = cuts & (2u << (begin - outer_begin)) - 1;
        uint32_t const within = cuts >> (begin - outer_begin) & (1u << size) - 2;
        first_segment = begin, num_values = 1, second_value_segment = 0;
        if (within != 0) {
            second_value_segment = begin + 1;
            while ((within >> (second_value_segment - begin) & 1) == 0) ++second_value_segment;
            num_values = 1 + begin + size - second_value_segment;
        } else if (begin > outer_begin) {
            num_values = up_to_begin > 1;
        } else if (begin > 0 && cuts <= 1) {
            num_values = cuts == 1 || tile.cuts.any_before(begin);
        }
    }
    __host__ __device__ int segment_of(int value) const {
        return value == 0 ? first_segment : second_value_segment + value - 1;
    }
};

}  // namespace flash_mla
