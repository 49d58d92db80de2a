// Every warp merges 8 rows of 32 columns at a time, or of 64 where pieces are few, a quad for each row. The CTAs share
// out all tiles that the plan cuts: a worker whose last piece begins a tile is the first of those that have a part of
// it. Where few tiles are in many pieces, the warps of a CTA share out the pieces, too. Pieces are added in the order
// of the workers, those of a warp and then the warps, so results repeat bit for bit.
#include "kernels/split_kv_combine/split_kv_combine.h"

#include <algorithm>
#include <cmath>

#include "kernels/sm90/primitives/dependent_launch.h"
#include "kernels/sm90/primitives/kernel_attributes.h"
#include "kernels/split_kv_combine/store_columns.h"
#include "params/query_rows.h"

namespace flash_mla {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarpsPerCta = 4;
constexpr int kThreads = kWarpsPerCta * kWarpSize;
constexpr int kCtasPerSm = 5;
constexpr int kParts = kHeadDimV / kBoxColumns;  // of a row

// A tile in pieces, by the worker that begins it.
struct CutTile {
    int batch, tile, worker, last_worker;
    int first_slot;
};

// What is not a number stays it.
__device__ float max_or_nan(float x, float y) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(result) : "f"(x), "f"(y));
    return result;
}

__device__ float inverse_or_0(float x) { return x == 0.f ? 0.f : 1.f / x; }
__device__ float2 scaled(float2 pair, float factor) { return {pair.x * factor, pair.y * factor}; }

// Lists the tiles that are cut, in the order of the workers, for all threads of the CTA. Returns how many.
__device__ int list_cut_tiles(DenseDecodeParams const& params, CutTile* cut_tiles) {
    __shared__ int cuts_of_warp[kWarpsPerCta];
    WorkerGrid const& grid = params.grid;
    int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    int num_cuts = 0;
    for (int base = 0; base < grid.num_workers; base += kThreads) {
        int const worker = base + threadIdx.x;
        bool cut = false;
        WorkerRow row{};
        if (worker < grid.num_workers) {
            row = params.metadata[worker];
            bool const begins_tile = row.num_pieces > 1 || row.begin_block == 0;
            cut = row.num_pieces > 0 && begins_tile && row.last_worker > worker;
            // Not of a plan for other shapes.
            cut = cut && row.end_batch < params.batch_size && row.end_tile < grid.tiles_per_request &&
                  row.last_worker < grid.num_workers;
        }
        unsigned const votes = __ballot_sync(~0u, cut);
        if (lane == 0) cuts_of_warp[warp] = __popc(votes);
        __syncthreads();
        int index = num_cuts + __popc(votes & ((1u << lane) - 1));
        for (int i = 0; i < kWarpsPerCta; ++i) {
            if (i < warp) index += cuts_of_warp[i];
            num_cuts += cuts_of_warp[i];
        }
        if (cut) {
            cut_tiles[index] = {row.end_batch, row.end_tile, worker, row.last_worker,
                                partial_slot(worker, row.num_pieces == 1)};
        }
        __syncthreads();
    }
    return num_cuts;
}

// What a thread has of a piece's partial output: 8 numbers of a row, as the dense kernel writes them, boxes of 16 bits.
struct PackedNumbers {
    static constexpr int kLoadsAtOnce = 8;

    uint4 words;
    float scale;

    __device__ void load(DenseDecodeParams const& params, int64_t tile_row, int row, int first_column, int lane) {
        auto const* const box =
            static_cast<__half const*>(params.packed_partial) + tile_row * kHeadDimV + box_offset(row, first_column);
        words = reinterpret_cast<uint4 const*>(box)[lane];
        scale = params.scale_partial[(tile_row + row) * kScalesPerRow + scale_of(first_column, lane % 4)];
    }
    __device__ void add_to(float (&sum)[kNumbersPerThread], float weight) const {
        uint32_t const word[] = {words.x, words.y, words.z, words.w};
        for (int i = 0; i < 4; ++i) {
            float2 const pair = __half22float2(reinterpret_cast<__half2 const&>(word[i]));
            sum[2 * i] = fmaf(weight * scale, pair.x, sum[2 * i]);
            sum[2 * i + 1] = fmaf(weight * scale, pair.y, sum[2 * i + 1]);
        }
    }
    // Of the i-th pair.
    __device__ static int column(int i, int lane) { return 8 * i + 2 * (lane % 4); }
};

// The swapped kernel's: rows of floats.
struct FloatNumbers {
    static constexpr int kLoadsAtOnce = 4;

    float4 low, high;

    __device__ void load(DenseDecodeParams const& params, int64_t tile_row, int row, int first_column, int lane) {
        auto const* const from =
            reinterpret_cast<float4 const*>(params.out_partial + (tile_row + row) * kHeadDimV + first_column) +
            lane % 4;
        low = from[0], high = from[4];
    }
    __device__ void add_to(float (&sum)[kNumbersPerThread], float weight) const {
        float const number[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        for (int i = 0; i < kNumbersPerThread; ++i) sum[i] = fmaf(weight, number[i], sum[i]);
    }
    __device__ static int column(int i, int lane) { return i / 2 * 16 + 4 * (lane % 4) + i % 2 * 2; }
};

// Of what has this log2-sum-exp2, if the reference has 1.
__device__ float weight_of(float log2_sum, float reference) {
    return exp2f(log2_sum - (reference == -INFINITY ? 0.f : reference));
}
__device__ float log2_sum_of(float weight, float reference) {
    return weight == 0.f ? -INFINITY : log2f(weight) + reference;
}

// What a thread has added up of a row, in so many parts, with weights of which the largest is 1. What is infinite may
// become NaN where its weight becomes 0.
template <int kNumParts>
struct Sums {
    float number[kNumParts][kNumbersPerThread] = {};
    float weight = 0.f;
    float reference = -INFINITY;  // log2-sum-exp2 that has weight 1; what is not a number stays it

    __device__ void raise(float log2_sum) {
        float const raised = max_or_nan(reference, log2_sum);
        if (raised == reference) return;
        float const factor = exp2f(reference - raised);
        for (auto& part : number) {
            for (float& each : part) each *= factor;
        }
        weight *= factor;
        reference = raised;
    }
};

// A pair of columns of what all warps have, added up in their order: the first pair by the first warp, and so on. By
// the whole CTA.
struct PairOfSums {
    float2 number;
    float weight, log2_sum;

    __device__ PairOfSums(Sums<1> const& sums, bool is_first_item) {
        __shared__ float of_warps[kWarpsPerCta][kNumbersPerThread + 2][kWarpSize];
        static_assert(kNumbersPerThread == 2 * kWarpsPerCta);
        int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
        if (!is_first_item) __syncthreads();  // others may still read what was there before
        float (*to)[kWarpSize] = of_warps[warp];
        for (int i = 0; i < kNumbersPerThread; ++i) to[i][lane] = sums.number[0][i];
        to[kNumbersPerThread][lane] = sums.weight;
        to[kNumbersPerThread + 1][lane] = sums.reference;
        __syncthreads();
        float reference = -INFINITY;
        for (auto const& from : of_warps) reference = max_or_nan(reference, from[kNumbersPerThread + 1][lane]);
        number = {}, weight = 0.f;
        for (auto const& from : of_warps) {
            float const factor = weight_of(from[kNumbersPerThread + 1][lane], reference);
            number.x = fmaf(factor, from[2 * warp][lane], number.x);
            number.y = fmaf(factor, from[2 * warp + 1][lane], number.y);
            weight = fmaf(factor, from[kNumbersPerThread][lane], weight);
        }
        log2_sum = log2_sum_of(weight, reference);
    }
};

constexpr int num_row_groups_of(DenseDecodeParams const& params) {
    int const rows_per_tile = params.grid.rows_per_tile;
    return ceil_div(params.rows_per_head_kv < rows_per_tile ? params.rows_per_head_kv : rows_per_tile, kBoxRows);
}

constexpr int num_parts_per_cta(int parts_at_once, bool shares_pieces) {
    return shares_pieces ? 1 : kWarpsPerCta * parts_at_once;
}

// What a warp merges at a time: rows of a cut tile, some of their columns.
template <int kPartsAtOnce, bool kSharesPieces>
struct Item {
    static constexpr int kPartGroups = kParts / num_parts_per_cta(kPartsAtOnce, kSharesPieces);

    CutTile cut;
    int tile_lane, row, first_column;
    QueryRow at;

    __device__ static int count(DenseDecodeParams const& params, int num_cuts) {
        return num_cuts * params.grid.num_lanes * num_row_groups_of(params) * kPartGroups;
    }
    __device__ Item(DenseDecodeParams const& params, CutTile const* cut_tiles, int number) {
        WorkerGrid const& grid = params.grid;
        int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
        int const first_part = number % kPartGroups * num_parts_per_cta(kPartsAtOnce, kSharesPieces) +
                               (kSharesPieces ? 0 : warp * kPartsAtOnce);
        int const row_groups = num_row_groups_of(params), group = number / kPartGroups;
        int const lane_and_cut = group / row_groups;
        first_column = first_part * kBoxColumns;
        row = (group - lane_and_cut * row_groups) * kBoxRows + lane / 4;
        cut = cut_tiles[lane_and_cut / grid.num_lanes];
        tile_lane = lane_and_cut % grid.num_lanes;
        at = query_row(params, tile_place(grid, cut.tile, tile_lane), row, grid.rows_per_tile);
    }
    __device__ int num_pieces() const { return at.exists ? cut.last_worker - cut.worker + 1 : 0; }
    // The first piece is a worker's last, the others are the first ones of the workers that follow.
    __device__ int64_t tile_row(WorkerGrid const& grid, int piece) const {
        int const slot = piece == 0 ? cut.first_slot : partial_slot(cut.worker + piece, true);
        return partial_row(grid, slot, tile_lane, 0, grid.rows_per_tile);
    }
};

// kPartsAtOnce: of a row, by a warp. Ways of their own, each no longer than it has to be, because their instructions
// have to come from memory too.
template <typename Element, typename Numbers, int kPartsAtOnce, bool kSharesPieces>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    split_kv_combine_kernel(__grid_constant__ DenseDecodeParams const params) {
    static_assert(!kSharesPieces || kPartsAtOnce == 1);
    using OwnItem = Item<kPartsAtOnce, kSharesPieces>;
    constexpr int kPiecesAtOnce = Numbers::kLoadsAtOnce / kPartsAtOnce;
    extern __shared__ CutTile cut_tiles[];  // [num_workers]
    WorkerGrid const& grid = params.grid;
    // Before the wait: the decode waited for who wrote the plan before it allowed this launch.
    int const num_items = OwnItem::count(params, list_cut_tiles(params, cut_tiles));
    sm90::allow_dependent_launch();
    if (blockIdx.x >= num_items) return sm90::wait_for_previous_kernel();
    OwnItem item(params, cut_tiles, blockIdx.x);
    sm90::wait_for_previous_kernel();

    int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    for (int number = blockIdx.x;;) {
        CutTile const& cut = item.cut;
        QueryRow const& at = item.at;
        int const row = item.row, first_column = item.first_column, num_pieces = item.num_pieces();
        auto const tile_row = [&](int piece) { return item.tile_row(grid, piece); };
        Sums<kPartsAtOnce> sums;
        int const share = kSharesPieces ? ceil_div(num_pieces, kWarpsPerCta) : num_pieces;
        int const begin = kSharesPieces ? warp * share : 0, end = min(begin + share, num_pieces);
        for (int first = begin; first < end; first += kPiecesAtOnce) {
            Numbers numbers[kPiecesAtOnce][kPartsAtOnce];
            float log2_sum[kPiecesAtOnce];
            float largest = -INFINITY;
#pragma unroll
            for (int i = 0; i < kPiecesAtOnce; ++i) {
                int const piece = first + i;
                log2_sum[i] = -INFINITY;
                if (piece >= end) continue;
                log2_sum[i] = params.lse_partial[tile_row(piece) + row];
                // Zeros where the piece has no keys, which are not used.
#pragma unroll
                for (int part = 0; part < kPartsAtOnce; ++part)
                    numbers[i][part].load(params, tile_row(piece), row, first_column + part * kBoxColumns, lane);
            }
#pragma unroll
            for (float const each : log2_sum) largest = max_or_nan(largest, each);
            sums.raise(largest);
#pragma unroll
            for (int i = 0; i < kPiecesAtOnce; ++i) {
                float const weight = weight_of(log2_sum[i], sums.reference);
                sums.weight += weight;
                if (weight == 0.f) continue;
#pragma unroll
                for (int part = 0; part < kPartsAtOnce; ++part) numbers[i][part].add_to(sums.number[part], weight);
            }
        }
        Element* const out = static_cast<Element*>(params.out) + out_offset(params, cut.batch, at) + first_column;
        auto const store_lse = [&](float log2_sum) {
            if (first_column == 0 && lane % 4 == 0)
                params.lse[lse_offset(params, cut.batch, at)] = natural_lse(log2_sum);
        };
        if constexpr (kSharesPieces) {
            PairOfSums const pair(sums, number == blockIdx.x);
            if (at.exists) {
                if (warp == 0) store_lse(pair.log2_sum);
                store_columns(out + Numbers::column(warp, lane), scaled(pair.number, inverse_or_0(pair.weight)));
            }
        } else if (at.exists) {
            store_lse(log2_sum_of(sums.weight, sums.reference));
            float const inverse_total = inverse_or_0(sums.weight);
#pragma unroll
            for (int part = 0; part < kPartsAtOnce; ++part) {
#pragma unroll
                for (int i = 0; i < kNumbersPerThread / 2; ++i) {
                    float2 const pair{sums.number[part][2 * i], sums.number[part][2 * i + 1]};
                    store_columns(out + part * kBoxColumns + Numbers::column(i, lane), scaled(pair, inverse_total));
                }
            }
        }
        number += gridDim.x;
        if (number >= num_items) return;
        item = OwnItem(params, cut_tiles, number);
    }
}

struct Way {
    void (*kernel)(DenseDecodeParams);
    cudaError_t (*allow_shared_memory)(size_t);
    int parts_per_cta;
};
template <typename Element, typename Numbers, int kPartsAtOnce, bool kSharesPieces>
constexpr Way kWay = {split_kv_combine_kernel<Element, Numbers, kPartsAtOnce, kSharesPieces>,
                      sm90::allow_shared_memory<split_kv_combine_kernel<Element, Numbers, kPartsAtOnce, kSharesPieces>>,
                      num_parts_per_cta(kPartsAtOnce, kSharesPieces)};

// CTAs that start while the dense decode runs on some SMs would crowd on the others, up to kCtasPerSm, although they
// are few, and there the next decode could not start early. What keeps them from it is that they ask for more shared
// memory than they use: as much as leaves room for so many more per SM than it takes.
constexpr int kSpareCtasPerSm = 2;
constexpr size_t kMostSharedBytes = 110 * 1024;
size_t shared_bytes_to_spread(int num_ctas, int num_sms) {
    constexpr size_t kOfSm = 227 * 1024, kStaticAndReserved = 7 * 1024;
    int const ctas_per_sm = std::min(ceil_div(num_ctas, num_sms) + kSpareCtasPerSm, kCtasPerSm);
    return ctas_per_sm < kCtasPerSm ? kOfSm / ctas_per_sm - kStaticAndReserved : 0;
}

// By what a plan is where lengths are equal; any of them merges any plan. Tiles in many pieces, so few of them that the
// warps have nothing else to do; tiles in few pieces; and what is between.
template <typename Element, typename Numbers>
Way choose(DenseDecodeParams const& params, int num_sms) {
    WorkerGrid const& grid = params.grid;
    int64_t const num_tiles = int64_t(params.batch_size) * grid.tiles_per_request;
    int64_t const num_parts = num_tiles * grid.num_lanes * num_row_groups_of(params) * kParts;
    if (grid.num_workers > Numbers::kLoadsAtOnce * num_tiles && num_parts <= kCtasPerSm * num_sms)
        return kWay<Element, Numbers, 1, true>;
    if (grid.num_workers < (Numbers::kLoadsAtOnce / 2 + 1) * num_tiles) return kWay<Element, Numbers, 2, false>;
    return kWay<Element, Numbers, 1, false>;
}

template <typename Element>
Way choose_for(DenseDecodeParams const& params, int num_sms) {
    return params.grid.is_swapped() ? choose<Element, FloatNumbers>(params, num_sms)
                                    : choose<Element, PackedNumbers>(params, num_sms);
}

}  // namespace

cudaError_t launch_split_kv_combine(DenseDecodeParams const& params, int num_sms, ElementType type,
                                    cudaStream_t stream) {
    WorkerGrid const& grid = params.grid;
    Way const way = type == ElementType::kBFloat16 ? choose_for<__nv_bfloat16>(params, num_sms)
                                                   : choose_for<__half>(params, num_sms);
    // CTAs without work cost time too: no more tiles are cut than there are, or boundaries between workers.
    int64_t const num_tiles = int64_t(params.batch_size) * grid.tiles_per_request;
    int64_t const most_cuts = std::max<int64_t>(std::min<int64_t>(num_tiles, grid.num_workers - 1), 1);
    int64_t const most_items = most_cuts * grid.num_lanes * num_row_groups_of(params) * kParts / way.parts_per_cta;
    cudaLaunchAttribute attribute = sm90::dependent_launch_attribute();
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(std::min<int64_t>(most_items, kCtasPerSm * num_sms)));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = grid.num_workers * sizeof(CutTile);
    if (!grid.is_swapped()) {
        if (cudaError_t const error = way.allow_shared_memory(kMostSharedBytes); error != cudaSuccess) return error;
        config.dynamicSmemBytes =
            std::max<size_t>(config.dynamicSmemBytes, shared_bytes_to_spread(config.gridDim.x, num_sms));
    }
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, way.kernel, params);
}

}  // namespace flash_mla
