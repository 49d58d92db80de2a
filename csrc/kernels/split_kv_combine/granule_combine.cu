// The upper part of the tree of segments (segments.h), for tiles that the plan cuts: what several workers have folded
// of them. Other tiles have their results from the decode.
//
// A warp takes one vector of a tile at a time, of the dense kernel two of the same rows: 32 lanes with 4 numbers of
// each, as the decode kernels hold them. Where there are few vectors in many parts a CTA shares them, a warp for each
// innermost chain. Which values there are in which slots follows from the segments at which workers begin.
#include "kernels/split_kv_combine/granule_combine.h"

#include <algorithm>
#include <cmath>

#include "kernels/sm90/primitives/dependent_launch.h"
#include "kernels/sm90/primitives/fold.h"
#include "kernels/sm90/primitives/fragment.h"

namespace flash_mla {
namespace {

using sm90::FoldWeights;

constexpr int kWarpSize = 32;
constexpr int kLoadsAtOnce = 4;
constexpr int kMaxOuterChains = 1 << level_bits(2, kMaxSegmentBits);
constexpr int kMaxChains = kMaxOuterChains << level_bits(1, kMaxSegmentBits);  // innermost ones, of a tile

// The segments of a tile at which workers begin, but for the first: a bit each.
struct Cuts {
    uint32_t word[kMaxSegments / 32];

    // Whether there is one behind segment `first`, up to segment `last`.
    __host__ __device__ bool any_in(int first, int last) const {
        bool any = false;
#pragma unroll
        for (int i = 0; i < kMaxSegments / 32; ++i) {
            int const begin = first + 1 - 32 * i > 0 ? first + 1 - 32 * i : 0, end = last + 1 - 32 * i;
            if (begin >= end || begin >= 32) continue;
            any |= (word[i] >> begin << begin << (end < 32 ? 32 - end : 0)) != 0;
        }
        return any;
    }
    // The first one behind the begin of an innermost chain of 2 to 8 segments, which has one.
    __host__ __device__ int first_in_chain(int begin) const {
        uint32_t bits = word[begin / 32] >> begin % 32 & ~1u;
        int segment = begin;
        for (; (bits & 1) == 0; bits >>= 1) ++segment;
        return segment;
    }
};

struct CutTile {
    int batch, tile, segment_bits;
    Cuts cuts;
};

// Where a worker begins.
struct Begin {
    int batch, tile, segment;  // 0 if it cuts no tile
    int segment_bits;

    __device__ bool cuts_tile_of(Begin const& other) const {
        return segment > 0 && other.segment > 0 && batch == other.batch && tile == other.tile;
    }
};

__device__ Begin begin_of(DenseDecodeParams const& params, int worker) {
    WorkerGrid const& grid = params.grid;
    WorkerRow const row = params.metadata[worker];
    // Not of a plan for other shapes.
    if (row.begin_block <= 0 || row.begin_batch >= params.batch_size || row.begin_tile >= grid.tiles_per_request)
        return {};
    int const num_blocks = num_blocks_of(max(params.cache_seqlens[row.begin_batch], 0));
    int const segment_bits = segment_bits_of(num_blocks, grid.rows_per_tile, grid.num_lanes);
    int const segment = segment_at(min(row.begin_block, kMaxSegments), segment_bits, grid.num_granules);
    return {row.begin_batch, row.begin_tile, segment < 1 << segment_bits ? segment : 0, segment_bits};
}

// For all threads of the CTA, in the order of the workers. Returns how many.
__device__ int list_cut_tiles(DenseDecodeParams const& params, CutTile* cut_tiles, Begin* begins) {
    __shared__ int listed_by_warp[kMaxChains];
    int const num_workers = params.grid.num_workers, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    for (int worker = threadIdx.x; worker < num_workers; worker += blockDim.x)
        begins[worker] = begin_of(params, worker);
    __syncthreads();
    int num_listed = 0;
    for (int base = 0; base < num_workers; base += blockDim.x) {
        int const worker = base + threadIdx.x;
        Begin const begin = worker < num_workers ? begins[worker] : Begin{};
        // The first one that begins within a tile lists it.
        bool const lists = begin.segment > 0 && (worker == 0 || !begin.cuts_tile_of(begins[worker - 1]));
        unsigned const votes = __ballot_sync(~0u, lists);
        if (lane == 0) listed_by_warp[warp] = __popc(votes);
        __syncthreads();
        int index = num_listed + __popc(votes & (2u << lane) - 1) - 1;  // of the last tile listed so far
        for (int i = 0; i < int(blockDim.x) / kWarpSize; ++i) {
            if (i < warp) index += listed_by_warp[i];
            num_listed += listed_by_warp[i];
        }
        if (lists) cut_tiles[index] = {begin.batch, begin.tile, begin.segment_bits, {}};
        __syncthreads();
        if (begin.segment > 0) atomicOr(&cut_tiles[index].cuts.word[begin.segment / 32], 1u << begin.segment % 32);
    }
    __syncthreads();
    return num_listed;
}

// A value in scratch: members of a chain of some level, folded; the first of them 0 or the only one.
struct Run {
    int level, first_member, last_member;
    int first_segment;
    int num_values;  // of which it is to be folded; 0: it is part of another
    int second_value_segment;

    Run() = default;
    // What comes of the innermost chain with this number, and of those that one worker has folded with it.
    __host__ __device__ Run(int chain, CutTile const& tile) {
        Cuts const& cuts = tile.cuts;
        int const size = 1 << level_bits(0, tile.segment_bits), radix = 1 << level_bits(1, tile.segment_bits);
        int const begin = chain * size, outer = chain / radix, outer_begin = outer * radix * size;
        level = 1, first_member = last_member = chain - outer * radix;
        first_segment = begin, num_values = 1, second_value_segment = 0;
        if (cuts.any_in(begin, begin + size - 1)) {
            // The first value is the chain's begin, the others are single segments.
            second_value_segment = cuts.first_in_chain(begin);
            num_values = 1 + begin + size - second_value_segment;
        } else if (first_member > 0) {
            num_values = cuts.any_in(outer_begin, begin);
        } else {
            int members = 1;
            while (members < radix && !cuts.any_in(begin, begin + (members + 1) * size - 1)) ++members;
            last_member = members - 1;
            if (members < radix) return;
            level = 2, first_member = last_member = outer;
            if (outer > 0) {
                num_values = cuts.any_in(0, begin);
                return;
            }
            while (!cuts.any_in(0, (last_member + 2) * radix * size - 1)) ++last_member;
        }
    }
};

// What a lane has of some vectors: 4 numbers of each, of one row or of two.
template <bool kIsSwapped, int kVectors>
struct Value {
    static constexpr int kRows = kIsSwapped ? 2 : 1;
    float4 number[kVectors];
    RowStatistics statistics[kRows];

    // Folded with what comes next.
    __device__ void fold(Value const& next) {
        FoldWeights weights[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) weights[i] = sm90::fold_statistics(statistics[i], next.statistics[i]);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            number[v].x = sm90::fold_outputs(number[v].x, next.number[v].x, weights[0]);
            number[v].y = sm90::fold_outputs(number[v].y, next.number[v].y, weights[kRows - 1]);
            number[v].z = sm90::fold_outputs(number[v].z, next.number[v].z, weights[0]);
            number[v].w = sm90::fold_outputs(number[v].w, next.number[v].w, weights[kRows - 1]);
        }
    }
};

__device__ void store_lse(DenseDecodeParams const& params, int batch, QueryRow const& at,
                          RowStatistics const& statistics) {
    if (at.exists) params.lse[lse_offset(params, batch, at)] = natural_lse(sm90::folded_log2_sum(statistics));
}

template <typename Element, bool kIsSwapped, int kVectors>
__device__ void store(DenseDecodeParams const& params, int batch, TilePlace const& place, VectorPlace const& vector,
                      Value<kIsSwapped, kVectors> const& value) {
    int const lane = threadIdx.x % kWarpSize, rows_per_tile = params.grid.rows_per_tile;
    QueryRow const at = query_row(params, place, vector.row + lane / 4, rows_per_tile);
    if constexpr (kIsSwapped) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int const row = vector.row + 2 * (lane % 4) + i;
            if (vector.column == 0 && lane < 4)
                store_lse(params, batch, query_row(params, place, row, rows_per_tile), value.statistics[i]);
        }
    } else if (vector.column == 0 && lane % 4 == 0) {
        store_lse(params, batch, at, value.statistics[0]);
    }
    constexpr int kRows = Value<kIsSwapped, kVectors>::kRows;
    float const first = sm90::inverse_of(value.statistics[0].sum);
    float const second = sm90::inverse_of(value.statistics[kRows - 1].sum);
    using sm90::normalized;
    Element* const out =
        static_cast<Element*>(params.out) + out_offset(params, batch, at) + vector.column + 2 * (lane % 4);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        float4 const& x = value.number[v];
        uint32_t pair[2] = {sm90::pack_pair(normalized(x.x, first), normalized(x.y, second), Element{}),
                            sm90::pack_pair(normalized(x.z, first), normalized(x.w, second), Element{})};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // Of two rows and a column each.
            if constexpr (kIsSwapped) pair[i] = sm90::transpose_matrix(pair[i]);
            if (at.exists) *reinterpret_cast<uint32_t*>(out + kVectorColumns * v + 8 * i) = pair[i];
        }
    }
}

// Vectors of a cut tile, and where their values are: of the same rows, with columns that follow.
template <bool kIsSwapped, int kVectors>
struct Item {
    static_assert(4 % kVectors == 0);
    using LaneValue = Value<kIsSwapped, kVectors>;

    DenseDecodeParams const& params;
    CutTile const& tile;
    int vector;  // the first one
    TilePlace place;
    VectorPlace at;
    int first_granule, granule_shift;

    static __host__ __device__ int items_of_tile(WorkerGrid const& grid) {
        return vectors_of_slot(grid.rows_per_tile) / kVectors;
    }
    // A number counts the items of all cut tiles and lanes.
    __device__ Item(DenseDecodeParams const& params, CutTile const* cut_tiles, int number)
        : params(params), tile(cut_tiles[number / items_of_tile(params.grid) / params.grid.num_lanes]) {
        WorkerGrid const& grid = params.grid;
        int const items = items_of_tile(grid);
        vector = number % items * kVectors;
        place = tile_place(grid, tile.tile, number / items % grid.num_lanes);
        at = vector_place(vector, grid.rows_per_tile);
        first_granule = granule_slot(grid, tile.batch * params.num_heads_kv + place.head_kv, place.m_tile, 0);
        granule_shift = tile.segment_bits - granule_bits_of(grid.num_granules, tile.segment_bits);
    }
    __device__ bool has_rows() const {
        return place.m_tile * params.grid.rows_per_tile + at.row < params.rows_per_head_kv;
    }
    __device__ int radix() const { return 1 << level_bits(1, tile.segment_bits); }
    __device__ int num_chains() const { return 1 << (tile.segment_bits - level_bits(0, tile.segment_bits)); }

    // What was left from a segment on.
    __device__ LaneValue load(int segment) const {
        int const lane = threadIdx.x % kWarpSize, rows_per_tile = params.grid.rows_per_tile;
        int64_t const first_row = int64_t(first_granule + (segment >> granule_shift)) * rows_per_tile;
        LaneValue value;
        auto const* const numbers = reinterpret_cast<float4 const*>(params.out_partial + first_row * kHeadDimV);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) value.number[v] = numbers[(vector + v) * kWarpSize + lane];
#pragma unroll
        for (int i = 0; i < LaneValue::kRows; ++i) {
            int const row = at.row + (kIsSwapped ? 2 * (lane % 4) + i : lane / 4);
            value.statistics[i] = params.statistics_partial[first_row + row];
        }
        return value;
    }
};

// What has been folded so far, if anything.
template <typename Value>
struct Sum {
    Value value;
    bool exists = false;

    __device__ void add(Value const& next) {
        if (exists) {
            value.fold(next);
        } else {
            value = next;
        }
        exists = true;
    }
};

// Calls function(value, level, last_member) for the runs of an item that begin in some chains, in order. By a
// warp, of which each lane finds out about one chain.
template <typename Item, typename Function>
__device__ void for_each_run(Item const& item, int first_chain, int num_chains, Function const& function) {
    int const lane = threadIdx.x % kWarpSize;
    Run own_run{};
    if (lane < num_chains) own_run = Run(first_chain + lane, item.tile);
    int const num_values = own_run.num_values;
    int values_up_to_here = num_values;
#pragma unroll
    for (int distance = 1; distance < kMaxChains; distance *= 2) {
        int const before = __shfl_up_sync(~0u, values_up_to_here, distance);
        if (lane >= distance) values_up_to_here += before;
    }
    int const total = __shfl_sync(~0u, values_up_to_here, kMaxChains - 1);
    auto const chain_of = [&](int value) { return __ffs(__ballot_sync(~0u, values_up_to_here > value)) - 1; };
    using Value = typename Item::LaneValue;
    Value run;
#pragma unroll 1
    for (int first = 0; first < total; first += kLoadsAtOnce) {
        Value loaded[kLoadsAtOnce];
#pragma unroll
        for (int i = 0; i < kLoadsAtOnce; ++i) {
            if (first + i >= total) continue;
            int const chain = chain_of(first + i);
            int const value = first + i - __shfl_sync(~0u, values_up_to_here - num_values, chain);
            int const begin = __shfl_sync(~0u, own_run.first_segment, chain);
            int const second = __shfl_sync(~0u, own_run.second_value_segment, chain);
            loaded[i] = item.load(value == 0 ? begin : second + value - 1);
        }
#pragma unroll
        for (int i = 0; i < kLoadsAtOnce; ++i) {
            if (first + i >= total) continue;
            int const chain = chain_of(first + i), end = __shfl_sync(~0u, values_up_to_here, chain);
            if (first + i == end - __shfl_sync(~0u, num_values, chain)) {
                run = loaded[i];
            } else {
                run.fold(loaded[i]);
            }
            if (first + i == end - 1)
                function(run, __shfl_sync(~0u, own_run.level, chain), __shfl_sync(~0u, own_run.last_member, chain));
        }
    }
}

// Folds all runs of an item. By a warp.
template <typename Item>
__device__ typename Item::LaneValue fold_all(Item const& item) {
    int const radix = item.radix();
    Sum<typename Item::LaneValue> outer_chain, whole;
    for_each_run(item, 0, item.num_chains(), [&](auto const& run, int level, int last_member) {
        if (level == 2) return whole.add(run);
        outer_chain.add(run);
        if (last_member < radix - 1) return;
        whole.add(outer_chain.value);
        outer_chain.exists = false;
    });
    return whole.value;
}

// The same by a CTA, a warp per chain and then per chain of chains. The result is that of the first warp.
template <typename Item>
__device__ typename Item::LaneValue fold_all_by_cta(Item const& item) {
    using Value = typename Item::LaneValue;
    __shared__ Value values[kMaxChains][kWarpSize];
    __shared__ bool has_value[kMaxChains];
    int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    int const radix = item.radix(), num_chains = item.num_chains(), num_outer_chains = num_chains / radix;
    bool has_run = false;
    for_each_run(item, warp, warp < num_chains, [&](auto const& run, int, int) {
        values[warp][lane] = run;
        has_run = true;
    });
    if (lane == 0) has_value[warp] = has_run;
    __syncthreads();
    // Takes the place of that of the first chain.
    if (warp < num_outer_chains) {
        Sum<Value> outer_chain;
        for (int chain = warp * radix; chain < (warp + 1) * radix; ++chain) {
            if (has_value[chain]) outer_chain.add(values[chain][lane]);
        }
        __syncwarp();
        values[warp * radix][lane] = outer_chain.value;
        if (lane == 0) has_value[warp * radix] = outer_chain.exists;
    }
    __syncthreads();
    Sum<Value> whole;
    if (warp == 0) {
        for (int outer = 0; outer < num_outer_chains; ++outer) {
            if (has_value[outer * radix]) whole.add(values[outer * radix][lane]);
        }
    }
    __syncthreads();
    return whole.value;
}

template <bool kByCta>
constexpr int kThreads = (kByCta ? kMaxChains : 8) * kWarpSize;
template <bool kByCta>
constexpr int kCtasPerSm = kByCta ? 1 : 2;  // that there are registers for
template <bool kIsSwapped>
using ItemOf = Item<kIsSwapped, kIsSwapped ? 1 : 2>;

// kByCta: where there are many values and few vectors. Either way folds what any plan leaves.
template <typename Element, bool kIsSwapped, bool kByCta>
__global__ void __launch_bounds__(kThreads<kByCta>, kCtasPerSm<kByCta>)
    granule_combine_kernel(__grid_constant__ DenseDecodeParams const params) {
    using Item = ItemOf<kIsSwapped>;
    extern __shared__ CutTile cut_tiles[];  // [num_workers], and as many Begin
    WorkerGrid const& grid = params.grid;
    // Before the wait: the decode waited for who wrote the plan before it allowed this launch.
    int const num_cut_tiles = list_cut_tiles(params, cut_tiles, reinterpret_cast<Begin*>(cut_tiles + grid.num_workers));
    sm90::allow_dependent_launch();
    sm90::wait_for_previous_kernel();

    int const num_items = num_cut_tiles * grid.num_lanes * Item::items_of_tile(grid);
    int const warp = threadIdx.x / kWarpSize, num_warps = kByCta ? 1 : kThreads<kByCta> / kWarpSize;
    for (int number = kByCta ? blockIdx.x : warp * gridDim.x + blockIdx.x; number < num_items;
         number += gridDim.x * num_warps) {
        Item const item(params, cut_tiles, number);
        if (!item.has_rows()) continue;
        typename Item::LaneValue const value = kByCta ? fold_all_by_cta(item) : fold_all(item);
        if (!kByCta || warp == 0) store<Element>(params, item.tile.batch, item.place, item.at, value);
    }
}

template <typename Element, bool kIsSwapped, bool kByCta>
cudaError_t launch(DenseDecodeParams const& params, int num_sms, cudaStream_t stream) {
    WorkerGrid const& grid = params.grid;
    int64_t const most_items = int64_t(grid.num_workers) * grid.num_lanes * ItemOf<kIsSwapped>::items_of_tile(grid);
    cudaLaunchAttribute attribute = sm90::dependent_launch_attribute();
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(std::min<int64_t>(most_items, kCtasPerSm<kByCta> * num_sms)));
    config.blockDim = dim3(kThreads<kByCta>);
    config.dynamicSmemBytes = grid.num_workers * (sizeof(CutTile) + sizeof(Begin));
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, granule_combine_kernel<Element, kIsSwapped, kByCta>, params);
}

template <typename Element>
cudaError_t launch_for(DenseDecodeParams const& params, int num_sms, cudaStream_t stream) {
    WorkerGrid const& grid = params.grid;
    int64_t const num_tiles = int64_t(params.batch_size) * grid.tiles_per_request;
    int64_t const num_vectors = num_tiles * grid.num_lanes * vectors_of_slot(grid.rows_per_tile);
    bool const by_cta = grid.num_workers > 8 * num_tiles && num_vectors <= 4 * num_sms;
    if (grid.is_swapped())
        return by_cta ? launch<Element, true, true>(params, num_sms, stream)
                      : launch<Element, true, false>(params, num_sms, stream);
    return by_cta ? launch<Element, false, true>(params, num_sms, stream)
                  : launch<Element, false, false>(params, num_sms, stream);
}

}  // namespace

cudaError_t launch_granule_combine(DenseDecodeParams const& params, int num_sms, ElementType type,
                                   cudaStream_t stream) {
    if (params.grid.num_granules <= 1) return cudaSuccess;
    return type == ElementType::kBFloat16 ? launch_for<cutlass::bfloat16_t>(params, num_sms, stream)
                                          : launch_for<cutlass::half_t>(params, num_sms, stream);
}

}  // namespace flash_mla
