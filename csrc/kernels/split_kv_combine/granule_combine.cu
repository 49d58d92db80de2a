// The upper part of the tree of segments (segments.h), for tiles that the plan cuts: what several workers have folded
// of them (cut_tiles.h). Other tiles have their results from the decode.
//
// An item is a vector of a tile, 32 lanes with 4 numbers of each, as the decode kernels hold them, or some of the same
// rows. A CTA has one at a time, with a warp for each outer chain.
//
// All that a warp needs comes to shared memory by asynchronous copies, statistics first. From these it makes the
// weights of all folds, a lane for each row and innermost chain, while numbers are on their way.
#include "kernels/split_kv_combine/granule_combine.h"

#include <algorithm>
#include <cute/arch/copy_sm80.hpp>

#include "kernels/sm90/primitives/dependent_launch.h"
#include "kernels/sm90/primitives/fold.h"
#include "kernels/sm90/primitives/fragment.h"
#include "kernels/sm90/primitives/kernel_attributes.h"
#include "kernels/split_kv_combine/cut_tiles.h"

namespace flash_mla {
namespace {

using sm90::FoldWeights;

constexpr int kWarpSize = 32;
__device__ int lane_now() { return threadIdx.x % kWarpSize; }

constexpr int kMaxInnerChains = kMaxChains / kMaxOuterChains;  // of an outer one
constexpr int kMaxSize = kMaxSegments / kMaxChains;            // segments of an innermost chain
static_assert(kMaxInnerChains * kVectorRows == kWarpSize && kMaxSize == kVectorRows);
constexpr int kThreads = kMaxOuterChains * kWarpSize;

// Of the slots in scratch.
struct SlotLayout {
    int first_granule, granules_of_tile;  // slots
    int granule_bits;                     // log2 of how many granules a tile has, at most
};

// Of a row: statistics, and instead of them, where these have been folded with what comes before, with which weights.
struct alignas(8) StatisticsOrWeights {
    float value[2];

    __device__ void operator=(RowStatistics const& statistics) {
        value[0] = statistics.reference, value[1] = statistics.sum;
    }
    __device__ void operator=(FoldWeights const& weights) { value[0] = weights.folded, value[1] = weights.next; }
    __device__ operator RowStatistics() const { return {value[0], value[1]}; }
    __device__ operator FoldWeights() const { return {value[0], value[1]}; }
};

// Values as they lie in slots: some vectors, of the same rows.
template <int kPlaces, int kVectors>
struct alignas(16) Values {
    float4 number[kPlaces][kVectors][kWarpSize];
    StatisticsOrWeights row[kPlaces][kVectorRows];
};
template <int kVectors>
struct Numbers {
    float4 vector[kVectors];

    __device__ void get(float4 const (&from)[kVectors][kWarpSize]) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) vector[v] = from[v][lane_now()];
    }
    __device__ void put(float4 (&to)[kVectors][kWarpSize]) const {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) to[v][lane_now()] = vector[v];
    }
};

// How much a CTA takes at once, and how many of them there is room for. A granule is a segment, of which an outer chain
// has up to 32, or at least an innermost chain, up to 4.
template <int kPlacesOfOuterChain, int kVectorsAtOnce, int kNumCtas>
struct Share {
    static constexpr int kPlaces = kPlacesOfOuterChain, kVectors = kVectorsAtOnce, kCtasPerSm = kNumCtas;
    static constexpr bool kIsCoarse = kPlaces == kMaxInnerChains;  // a value for each innermost chain
};
using FineShare = Share<kMaxInnerChains * kMaxSize, 1, 3>;
using CoarseShare = Share<kMaxInnerChains, 4, 5>;

template <typename Share>
struct Shared {
    struct OfWarp {
        Values<Share::kPlaces, Share::kVectors> values;
        uint8_t segment[Share::kPlaces];  // where the value in a place begins
        int begin[kMaxInnerChains + 1];   // the first places of innermost chains, which come one after the other
    };
    OfWarp warp[kMaxOuterChains];
    Values<kMaxOuterChains, Share::kVectors> outer_chains;
    bool exists[kMaxOuterChains];
    alignas(16) CutTile tile;  // so that a wide load of it does not take in `exists`, which other warps write
};

template <typename Element, int kRowsPerTile, typename Share>
struct Item {
    static constexpr bool kIsSwapped = kRowsPerTile < kBlockM;
    static constexpr int kVectors = Share::kVectors, kItemsOfSlot = vectors_of_slot(kRowsPerTile) / kVectors;
    using OwnShared = Shared<Share>;
    using WarpShared = typename OwnShared::OfWarp;

    CutTile const* tile;
    TilePlace tile_place;
    VectorPlace at;
    int granule_shift;
    float4 const* numbers;  // of this lane, in the tile's first slot
    float4 const* statistics;
    Element* out;  // null where there is no such row

    // A number counts the items of all lanes of the tile.
    __device__ Item(DenseDecodeParams const& params, SlotLayout const& layout, CutTile const& tile, int number)
        : tile(&tile) {
        WorkerGrid const& grid = params.grid;
        int const lane = lane_now(), vector = number % kItemsOfSlot * kVectors;
        tile_place = flash_mla::tile_place(grid, tile.tile, number / kItemsOfSlot);
        at = vector_place(vector, kRowsPerTile);
        granule_shift = max(tile.segment_bits - layout.granule_bits, 0);
        int const m_tiles = grid.lane_groups * grid.num_lanes;
        int const tile_of_all = (tile.batch * params.num_heads_kv + tile_place.head_kv) * m_tiles + tile_place.m_tile;
        int64_t const row = int64_t(layout.first_granule + tile_of_all * layout.granules_of_tile) * kRowsPerTile;
        numbers = reinterpret_cast<float4 const*>(params.out_partial + row * kHeadDimV) + vector * kWarpSize + lane;
        statistics =
            reinterpret_cast<float4 const*>(params.statistics_partial + row + at.row) + lane % kStatisticsLanes;
        QueryRow const own = query_row(params, tile_place, at.row + lane / 4, kRowsPerTile);
        out = static_cast<Element*>(params.out) + out_offset(params, tile.batch, own) + at.column + 2 * (lane % 4);
        if (!own.exists) out = nullptr;
    }
    __device__ bool has_rows(DenseDecodeParams const& params) const {
        return tile_place.m_tile * kRowsPerTile + at.row < params.rows_per_head_kv;
    }

    // Where the values of an outer chain come to. Returns how many there are.
    __device__ static int lay_out(CutTile const& tile, int outer, WarpShared& shared) {
        int const lane = lane_now(), inner = lane / kMaxSize, value = lane % kMaxSize;
        Run run{};
        if (inner < tile.radix() && outer * tile.radix() < tile.num_chains())
            run = Run(outer * tile.radix() + inner, tile);
        int own_begin = 0, count = 0;
#pragma unroll
        for (int i = 0; i < kMaxInnerChains; ++i) {
            if (i == inner) own_begin = count;
            count += __shfl_sync(~0u, run.num_values, i * kMaxSize);
        }
        if (value < run.num_values) shared.segment[own_begin + value] = run.segment_of(value);
        if (value == 0) shared.begin[inner] = own_begin;
        if (lane == 0) shared.begin[kMaxInnerChains] = count;
        __syncwarp();
        return count;
    }
    __device__ void copy(int count, WarpShared& shared) const {
        using Copy = cute::SM80_CP_ASYNC_CACHEGLOBAL<float4>;
        int const lane = lane_now();
        auto const row_of = [&](int place) { return (shared.segment[place] >> granule_shift) * kRowsPerTile; };
#pragma unroll 1
        for (int place = lane / kStatisticsLanes; place < count; place += kWarpSize / kStatisticsLanes) {
            auto* const to = reinterpret_cast<float4*>(shared.values.row[place]) + lane % kStatisticsLanes;
            Copy::copy(statistics[row_of(place) / kStatisticsAtOnce], *to);
        }
        cute::cp_async_fence();
        constexpr int kAtOnce = Share::kIsCoarse ? kMaxInnerChains : 1;
#pragma unroll(kAtOnce)
        for (int place = 0; place < count; ++place) {
            float4 const* const from = numbers + row_of(place) * (kHeadDimV / 4);
#pragma unroll
            for (int v = 0; v < kVectors; ++v) Copy::copy(from[v * kWarpSize], shared.values.number[place][v][lane]);
        }
        cute::cp_async_fence();
    }

    // Leaves the weights of all folds of an outer chain, those with which an innermost one is folded where its first
    // value has had its statistics. Returns those of the outer chain, of row lane % 8.
    __device__ static RowStatistics fold_statistics_of(int count, WarpShared& shared) {
        int const row = lane_now() % kVectorRows, own = lane_now() / kVectorRows;
        auto& rows = shared.values.row;
        RowStatistics inner[kMaxInnerChains];
        int begin[kMaxInnerChains + 1];
        if constexpr (Share::kIsCoarse) {
            // Those that have a value, in the order of places.
#pragma unroll
            for (int i = 0; i < kMaxInnerChains; ++i) inner[i] = rows[i][row], begin[i] = min(i, count);
        } else {
            // A lane for each innermost chain.
            int const first = shared.begin[own], end = shared.begin[own + 1];
            RowStatistics folded = rows[min(first, Share::kPlaces - 1)][row];
#pragma unroll 1
            for (int place = first + 1; place < end; ++place)
                rows[place][row] = sm90::fold_statistics(folded, rows[place][row]);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kMaxInnerChains; ++i) {
                int const from = i * kVectorRows + row;
                inner[i] = {__shfl_sync(~0u, folded.reference, from), __shfl_sync(~0u, folded.sum, from)};
                begin[i] = __shfl_sync(~0u, first, from);
            }
        }
        begin[kMaxInnerChains] = count;
        __syncwarp();
        RowStatistics outer = inner[0];
#pragma unroll
        for (int i = 1; i < kMaxInnerChains; ++i) {
            if (begin[i] == begin[i + 1]) continue;
            if (begin[i] == 0) {
                outer = inner[i];
            } else {
                FoldWeights const weights = sm90::fold_statistics(outer, inner[i]);
                if (own == 0) rows[begin[i]][row] = weights;
            }
        }
        __syncwarp();
        return outer;
    }
    // Numbers of one row, or of two in turn.
    __device__ static void fold(Numbers<kVectors>& folded, Numbers<kVectors> const& next,
                                StatisticsOrWeights const (&weights)[kVectorRows]) {
        int const row = kIsSwapped ? 2 * (lane_now() % 4) : lane_now() / 4;
        FoldWeights const first = weights[row], second = weights[row + (kIsSwapped ? 1 : 0)];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            float4& x = folded.vector[v];
            float4 const& y = next.vector[v];
            x.x = sm90::fold_outputs(x.x, y.x, first), x.y = sm90::fold_outputs(x.y, y.y, second);
            x.z = sm90::fold_outputs(x.z, y.z, first), x.w = sm90::fold_outputs(x.w, y.w, second);
        }
    }
    __device__ static Numbers<kVectors> fold_numbers_of(int count, WarpShared const& shared) {
        auto const& values = shared.values;
        Numbers<kVectors> outer{}, inner, next;
        if constexpr (Share::kIsCoarse) {
            outer.get(values.number[0]);
#pragma unroll
            for (int i = 1; i < kMaxInnerChains; ++i) {
                next.get(values.number[i]);
                if (i < count) fold(outer, next, values.row[i]);
            }
        } else {
            int end = 0;
#pragma unroll 1
            for (int i = 0; i < kMaxInnerChains; ++i) {
                int const begin = end;
                end = shared.begin[i + 1];
                if (begin == end) continue;
                inner.get(values.number[begin]);
#pragma unroll 1
                for (int place = begin + 1; place < end; ++place) {
                    next.get(values.number[place]);
                    fold(inner, next, values.row[place]);
                }
                if (begin == 0) {
                    outer = inner;
                } else {
                    fold(outer, inner, values.row[begin]);
                }
            }
        }
        return outer;
    }
    // What has been copied becomes one value.
    __device__ void fold_outer_chain(int outer, OwnShared& shared, int count) const {
        WarpShared& warp = shared.warp[outer];
        int const lane = lane_now();
        if (lane == 0) shared.exists[outer] = count > 0;
        if (count == 0) return;
        cute::cp_async_wait<1>();
        __syncwarp();
        RowStatistics const statistics = fold_statistics_of(count, warp);
        if (lane < kVectorRows) shared.outer_chains.row[outer][lane] = statistics;
        cute::cp_async_wait<0>();
        __syncwarp();
        fold_numbers_of(count, warp).put(shared.outer_chains.number[outer]);
    }

    __device__ void store(DenseDecodeParams const& params, OwnShared& shared) const {
        int const lane = lane_now(), row = lane % kVectorRows;
        auto& values = shared.outer_chains;
        // The first one always exists: it holds the tile's begin.
        RowStatistics of_chain[kMaxOuterChains];
        bool exists[kMaxOuterChains];
#pragma unroll
        for (int outer = 0; outer < kMaxOuterChains; ++outer)
            of_chain[outer] = values.row[outer][row], exists[outer] = shared.exists[outer];
        __syncwarp();
        RowStatistics statistics = of_chain[0];
#pragma unroll
        for (int outer = 1; outer < kMaxOuterChains; ++outer) {
            if (!exists[outer]) continue;
            FoldWeights const weights = sm90::fold_statistics(statistics, of_chain[outer]);
            if (lane < kVectorRows) values.row[outer][row] = weights;
        }
        __syncwarp();
        Numbers<kVectors> whole, next;
        whole.get(values.number[0]);
#pragma unroll
        for (int outer = 1; outer < kMaxOuterChains; ++outer) {
            next.get(values.number[outer]);
            if (exists[outer]) fold(whole, next, values.row[outer]);
        }

        float const inverse = sm90::inverse_of(statistics.sum);
        int const first_row = kIsSwapped ? 2 * (lane % 4) : lane / 4;
        float const first = __shfl_sync(~0u, inverse, first_row);
        float const second = kIsSwapped ? __shfl_sync(~0u, inverse, first_row + 1) : first;
        using sm90::normalized;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            float4 const& x = whole.vector[v];
            uint32_t pair[2] = {sm90::pack_pair(normalized(x.x, first), normalized(x.y, second), Element{}),
                                sm90::pack_pair(normalized(x.z, first), normalized(x.w, second), Element{})};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                // Of two rows and a column each.
                if constexpr (kIsSwapped) pair[i] = sm90::transpose_matrix(pair[i]);
                if (out != nullptr) *reinterpret_cast<uint32_t*>(out + v * kVectorColumns + 8 * i) = pair[i];
            }
        }
        if (at.column != 0 || lane >= kVectorRows) return;
        QueryRow const of_lse = query_row(params, tile_place, at.row + lane, kRowsPerTile);
        float const lse = natural_lse(sm90::folded_log2_sum(statistics));
        if (of_lse.exists) params.lse[lse_offset(params, tile->batch, of_lse)] = lse;
    }

private:
    static constexpr int kStatisticsAtOnce = sizeof(float4) / sizeof(RowStatistics);
    static constexpr int kStatisticsLanes = kVectorRows / kStatisticsAtOnce;
};

// Finds out where workers begin in the tile. For all threads of the CTA, to all of which it says whether any does.
template <typename Share>
__device__ bool find_cuts(DenseDecodeParams const& params, int batch, int tile_of_request, Shared<Share>& shared) {
    WorkerGrid const& grid = params.grid;
    CutTile& tile = shared.tile;
    constexpr int kRowsAtOnce = 2;  // of the plan, by a thread, before it is known what they mean
    int const length = params.cache_seqlens[batch];
    bool cuts = false;
#pragma unroll 1
    for (int base = 0; base < grid.num_workers; base += kRowsAtOnce * kThreads) {
        WorkerRow const* row[kRowsAtOnce];
        bool begins_here[kRowsAtOnce];
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
            int const worker = base + i * kThreads + threadIdx.x;
            row[i] = params.metadata + min(worker, grid.num_workers - 1);
            begins_here[i] = row[i]->begin_batch == batch & row[i]->begin_tile == tile_of_request;
        }
        int const segment_bits = segment_bits_of(num_blocks_of(max(length, 0)), grid.rows_per_tile, grid.num_lanes);
        if (base == 0) {
            if (threadIdx.x == 0) tile = {batch, tile_of_request, segment_bits, {}};
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
            int const place = min(max(row[i]->begin_block, 0), kMaxSegments);
            int const segment = segment_at(place, segment_bits, grid.num_granules);
            if (!begins_here[i] || segment == 0 || segment >= 1 << segment_bits) continue;
            cuts = true;
            atomicOr(&tile.cuts.word[segment / 32], 1u << segment % 32);
        }
    }
    return __syncthreads_or(cuts);
}

// CTAs by part of the items of a tile, tile and request.
template <typename Element, int kRowsPerTile, typename Share>
__global__ void __launch_bounds__(kThreads) granule_combine_kernel(__grid_constant__ DenseDecodeParams const params,
                                                                   __grid_constant__ SlotLayout const layout) {
    using OwnItem = Item<Element, kRowsPerTile, Share>;
    extern __shared__ float4 shared_bytes[];
    auto& shared = reinterpret_cast<Shared<Share>&>(shared_bytes);
    sm90::allow_dependent_launch();
    // Before the wait the plan is read: the decode waited for who wrote it before it allowed this launch.
    if (!find_cuts(params, blockIdx.z, blockIdx.y, shared)) return sm90::wait_for_previous_kernel();
    int const outer = __shfl_sync(~0u, threadIdx.x / kWarpSize, 0);
    int const count = OwnItem::lay_out(shared.tile, outer, shared.warp[outer]);
    int const num_items = OwnItem::kItemsOfSlot * params.grid.num_lanes;
    OwnItem item(params, layout, shared.tile, blockIdx.x);
    sm90::wait_for_previous_kernel();
#pragma unroll 1
    for (int number = blockIdx.x; number < num_items; number += gridDim.x) {
        if (number != blockIdx.x) item = OwnItem(params, layout, shared.tile, number);
        if (!item.has_rows(params)) continue;
        item.copy(count, shared.warp[outer]);
        item.fold_outer_chain(outer, shared, count);
        __syncthreads();
        if (outer == 0) item.store(params, shared);
        __syncthreads();
    }
}

template <typename Element, int kRowsPerTile, typename Share>
cudaError_t launch(DenseDecodeParams const& params, int num_sms, cudaStream_t stream) {
    constexpr auto* kKernel = granule_combine_kernel<Element, kRowsPerTile, Share>;
    constexpr size_t kSharedBytes = sizeof(Shared<Share>);
    if (cudaError_t const error = sm90::allow_shared_memory<kKernel>(kSharedBytes); error != cudaSuccess) return error;
    WorkerGrid const& grid = params.grid;
    SlotLayout const layout{num_level_slots(grid), granule_slots_of_tile(grid),
                            granule_bits_of(grid.num_granules, kMaxSegmentBits)};
    unsigned const items = vectors_of_slot(kRowsPerTile) / Share::kVectors * grid.num_lanes;
    cudaLaunchAttribute attribute = sm90::dependent_launch_attribute();
    cudaLaunchConfig_t config{};
    // No more than there is room for at once, and one for each tile.
    static_assert(Share::kCtasPerSm == 227 * 1024 / (kSharedBytes + 1024));
    int64_t const num_tiles = int64_t(params.batch_size) * grid.tiles_per_request;
    int64_t const parts = std::clamp<int64_t>(Share::kCtasPerSm * num_sms / num_tiles, 1, items);
    config.gridDim = dim3(unsigned(parts), grid.tiles_per_request, params.batch_size);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kKernel, params, layout);
}

template <typename Element, int kRowsPerTile>
cudaError_t launch_for_rows(DenseDecodeParams const& params, int num_sms, cudaStream_t stream) {
    return params.grid.num_granules > kMaxChains ? launch<Element, kRowsPerTile, FineShare>(params, num_sms, stream)
                                                 : launch<Element, kRowsPerTile, CoarseShare>(params, num_sms, stream);
}

template <typename Element>
cudaError_t launch_for_type(DenseDecodeParams const& params, int num_sms, cudaStream_t stream) {
    switch (params.grid.rows_per_tile) {
        case 16:
            return launch_for_rows<Element, 16>(params, num_sms, stream);
        case 32:
            return launch_for_rows<Element, 32>(params, num_sms, stream);
        default:
            return launch_for_rows<Element, kBlockM>(params, num_sms, stream);
    }
}

}  // namespace

cudaError_t launch_granule_combine(DenseDecodeParams const& params, int num_sms, ElementType type,
                                   cudaStream_t stream) {
    if (params.grid.num_granules <= 1) return cudaSuccess;
    return type == ElementType::kBFloat16 ? launch_for_type<cutlass::bfloat16_t>(params, num_sms, stream)
                                          : launch_for_type<cutlass::half_t>(params, num_sms, stream);
}

}  // namespace flash_mla
