// Every warp merges 8 rows of 32 columns at a time, or of 64 where pieces are few, a quad for each row. The CTAs share
// out all tiles that the plan cuts: a worker whose last piece begins a tile is the first of those that have a part of
// it. Where a tile is in many pieces, the warps of a CTA share out these instead of columns, and more CTAs take part.
// Pieces are added in the order of the workers, those of a warp and then the warps, so results repeat bit for bit.
#include "kernels/split_kv_combine/split_kv_combine.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/sm90/primitives/dependent_launch.h"
#include "kernels/sm90/primitives/kernel_attributes.h"
#include "kernels/sm90/primitives/pieces.h"
#include "kernels/split_kv_combine/store_columns.h"
#include "params/query_rows.h"

namespace flash_mla {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarpsPerCta = 4;
constexpr int kThreads = kWarpsPerCta * kWarpSize;
constexpr int kPartsOfRow = kHeadDimV / kBoxColumns;
constexpr int kMostUnshared = 8;  // pieces of a tile

// What a warp merges at a time: so many parts of its rows, of so many pieces.
template <int kParts_, int kPieces_>
struct Portion {
    static constexpr int kParts = kParts_, kPieces = kPieces_;
};

// How the CTAs take tiles. The warps share out columns; but where a tile has more than kMostUnshared pieces, and more
// than come in two turns, they share out these, and as many CTAs take it as there are parts. Where tiles are so few
// that there are CTAs for all parts, they always do.
template <typename Columns_, int kSharedPieces, int kCtasPerSm_>
struct Division {
    using Columns = Columns_;  // of a warp; void if pieces always are shared out
    using Pieces = Portion<1, kSharedPieces>;
    static constexpr int kCtasPerSm = kCtasPerSm_;
    static constexpr bool kAlwaysPieces = std::is_void_v<Columns>;

    static constexpr int parts_per_cta() {
        if constexpr (kAlwaysPieces) {
            return 1;
        } else {
            return kWarpsPerCta * Columns::kParts;
        }
    }
    static constexpr int kPartsPerCta = parts_per_cta(), kPartGroups = kPartsOfRow / kPartsPerCta;
    // CTAs that take the same parts of a tile with so many pieces: fewer than these, so that there is a worker for
    // each.
    __device__ static int num_ctas(int num_pieces) {
        if constexpr (kAlwaysPieces) {
            return 1;
        } else {
            constexpr int kInTwoTurns = 2 * Columns::kPieces;
            constexpr int kMost = kInTwoTurns < kMostUnshared ? kMostUnshared : kInTwoTurns;
            static_assert(kPartsPerCta <= kMost);
            return num_pieces > kMost ? kPartsPerCta : 1;
        }
    }
};

// What a CTA takes: a tile in pieces, by the worker that begins it, and the one part of a group that it has of its
// rows, or kAllParts.
struct CutTile {
    static constexpr int kAllParts = -1;

    int batch, tile, worker, last_worker;
    int first_slot;
    int part;
};

// What is not a number stays it.
__device__ float max_or_nan(float x, float y) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(result) : "f"(x), "f"(y));
    return result;
}

__device__ float inverse_or_0(float x) { return x == 0.f ? 0.f : 1.f / x; }
__device__ float2 scaled(float2 pair, float factor) { return {pair.x * factor, pair.y * factor}; }

// Whether a worker's last piece begins a tile that others end. Not where the row is of a plan for other shapes, and
// would lead to where nothing is.
__device__ bool begins_cut_tile(DenseDecodeParams const& params, WorkerRow const& row, int worker) {
    bool const begins_tile = row.num_pieces > 1 || row.begin_block == 0;
    bool const is_cut =
        row.num_pieces > 0 && begins_tile && row.last_worker > worker && row.last_worker < params.grid.num_workers;
    if (!is_cut) return false;
    return sm90::has_tile(params, row.end_batch, row.end_tile);
}

// Lists the tiles that are cut, in the order of the workers, for all threads of the CTA: as often as there are CTAs for
// the same parts. Returns how many that are.
template <typename Division>
__device__ int list_cut_tiles(DenseDecodeParams const& params, CutTile* cut_tiles) {
    constexpr int kRowsAtOnce = 2;  // of the plan, by a thread
    __shared__ int taken_of_warp[kRowsAtOnce][kWarpsPerCta];
    WorkerGrid const& grid = params.grid;
    int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    unsigned const lanes_before = (1u << lane) - 1;
    int num_taken = 0;
    for (int base = 0; base < grid.num_workers; base += kRowsAtOnce * kThreads) {
        auto const worker_of = [&](int i) { return base + i * kThreads + int(threadIdx.x); };
        WorkerRow row[kRowsAtOnce];
        int num_ctas[kRowsAtOnce], taken_before[kRowsAtOnce];
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i)
            row[i] = worker_of(i) < grid.num_workers ? params.metadata[worker_of(i)] : WorkerRow{};
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
            bool const cut = begins_cut_tile(params, row[i], worker_of(i));
            num_ctas[i] = cut ? Division::num_ctas(row[i].last_worker - worker_of(i) + 1) : 0;
            unsigned const cuts = __ballot_sync(~0u, cut), shared = __ballot_sync(~0u, num_ctas[i] > 1);
            auto const taken_of = [&](unsigned lanes) {
                return __popc(cuts & lanes) + (Division::kPartsPerCta - 1) * __popc(shared & lanes);
            };
            taken_before[i] = taken_of(lanes_before);
            if (lane == 0) taken_of_warp[i][warp] = taken_of(~0u);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
            int index = num_taken + taken_before[i];
            for (int w = 0; w < kWarpsPerCta; ++w) {
                if (w < warp) index += taken_of_warp[i][w];
                num_taken += taken_of_warp[i][w];
            }
            bool const is_shared = num_ctas[i] > 1 || Division::kAlwaysPieces;
#pragma unroll 1
            for (int part = 0; part < num_ctas[i] && index + part < grid.num_workers; ++part) {
                cut_tiles[index + part] = {row[i].end_batch,
                                           row[i].end_tile,
                                           worker_of(i),
                                           row[i].last_worker,
                                           partial_slot(worker_of(i), row[i].num_pieces == 1),
                                           is_shared ? part : CutTile::kAllParts};
            }
        }
        __syncthreads();
    }
    return min(num_taken, grid.num_workers);  // more in a plan for other shapes
}

// What a thread has of a piece's partial output: 8 numbers of a row, as the dense kernel writes them, boxes of 16 bits.
struct PackedNumbers {
    // Where they are, for a tile at the begin of the partial results. A warp's parts are of one half of the columns.
    struct Source {
        uint4 const* words;
        float const* scale;

        __device__ Source(DenseDecodeParams const& params, int row, int first_column, int lane)
            : words(static_cast<uint4 const*>(params.packed_partial) +
                    box_offset(row, first_column) / kNumbersPerThread + lane),
              scale(params.scale_partial + row * kScalesPerRow + scale_of(first_column, lane % 4)) {}
    };

    uint4 words;
    float scale;

    __device__ void load(Source const& source, uint32_t tile_row, int part) {
        words = source.words[tile_row * (kHeadDimV / kNumbersPerThread) + part * kBoxThreads];
        scale = source.scale[tile_row * kScalesPerRow];
    }
    __device__ void add_to(float (&sum)[kNumbersPerThread], float weight) const {
        uint32_t const word[] = {words.x, words.y, words.z, words.w};
        float const factor = weight * scale;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 const pair = __half22float2(reinterpret_cast<__half2 const&>(word[i]));
            sum[2 * i] = fmaf(factor, pair.x, sum[2 * i]);
            sum[2 * i + 1] = fmaf(factor, pair.y, sum[2 * i + 1]);
        }
    }
    // Of the i-th pair.
    __device__ static int column(int i, int lane) { return 8 * i + 2 * (lane % 4); }
};

// The swapped kernel's: rows of floats.
struct FloatNumbers {
    struct Source {
        float4 const* numbers;

        __device__ Source(DenseDecodeParams const& params, int row, int first_column, int lane)
            : numbers(reinterpret_cast<float4 const*>(params.out_partial + row * kHeadDimV + first_column) + lane % 4) {
        }
    };

    float4 low, high;

    __device__ void load(Source const& source, uint32_t tile_row, int part) {
        float4 const* const from = source.numbers + tile_row * (kHeadDimV / 4) + part * kBoxColumns / 4;
        low = from[0], high = from[4];
    }
    __device__ void add_to(float (&sum)[kNumbersPerThread], float weight) const {
        float const number[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
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
// become NaN, where its weight becomes 0 or its piece is the last one, which is read again with weight 0.
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

    __device__ explicit PairOfSums(Sums<1> const& sums) {
        __shared__ float of_warps[kWarpsPerCta][kNumbersPerThread + 2][kWarpSize];
        static_assert(kNumbersPerThread == 2 * kWarpsPerCta);
        int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
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

// The rows and columns of a warp in a cut tile. The grid of CTAs is (lanes × groups of parts, groups of rows, cut
// tiles), of which each CTA may take several.
template <typename Numbers, typename Division>
struct Item {
    CutTile cut;
    int first_column, num_pieces;
    QueryRow at;
    // Of the partial results: where the tile begins in the first piece, in the second one, and how far it is to the
    // next.
    uint32_t first_tile_row, second_tile_row, rows_of_worker;
    float const* log2_sums;
    typename Numbers::Source numbers;

    __device__ Item(DenseDecodeParams const& params, CutTile const& cut)
        : cut(cut),
          first_column(first_part_of(cut) * kBoxColumns),
          log2_sums(params.lse_partial + row()),
          numbers(params, row(), first_column, threadIdx.x % kWarpSize) {
        WorkerGrid const& grid = params.grid;
        int const tile_lane = blockIdx.x / Division::kPartGroups;
        at = query_row(params, tile_place(grid, cut.tile, tile_lane), row(), grid.rows_per_tile);
        num_pieces = at.exists ? cut.last_worker - cut.worker + 1 : 0;
        // The first piece is a worker's last, the others are the first ones of the workers that follow.
        auto const tile_row = [&](int slot) {
            return uint32_t(partial_row(grid, slot, tile_lane, 0, grid.rows_per_tile));
        };
        first_tile_row = tile_row(cut.first_slot);
        second_tile_row = tile_row(partial_slot(cut.worker + 1, true));
        rows_of_worker = partial_slot(1, true) * grid.num_lanes * grid.rows_per_tile;
    }
    __device__ static bool shares_pieces(CutTile const& cut) {
        return Division::kAlwaysPieces || cut.part != CutTile::kAllParts;
    }
    __device__ static int first_part_of(CutTile const& cut) {
        int const first_of_cta = blockIdx.x % Division::kPartGroups * Division::kPartsPerCta;
        int const warp = threadIdx.x / kWarpSize;
        return first_of_cta + (shares_pieces(cut) ? cut.part : warp * (Division::kPartsPerCta / kWarpsPerCta));
    }
    __device__ static int row() { return blockIdx.y * kBoxRows + threadIdx.x % kWarpSize / 4; }
    __device__ uint32_t tile_row(int piece) const {
        return piece == 0 ? first_tile_row : second_tile_row + (piece - 1) * rows_of_worker;
    }
};

// Adds up some of the pieces. Those without keys have weight 0, and numbers that are finite.
template <typename Numbers, typename Taken, typename Item>
__device__ Sums<Taken::kParts> add_pieces(Item const& item, int begin, int end) {
    static_assert(kHeadDimV / 2 % (Taken::kParts * kBoxColumns) == 0);
    Sums<Taken::kParts> sums;
    for (int first = begin; first < end; first += Taken::kPieces) {
        Numbers numbers[Taken::kPieces][Taken::kParts];
        float log2_sum[Taken::kPieces];
        float largest = -INFINITY;
#pragma unroll
        for (int i = 0; i < Taken::kPieces; ++i) {
            // Behind the last one that one again, without weight.
            uint32_t const tile_row = item.tile_row(min(first + i, end - 1));
            log2_sum[i] = item.log2_sums[tile_row];
#pragma unroll
            for (int part = 0; part < Taken::kParts; ++part) numbers[i][part].load(item.numbers, tile_row, part);
        }
#pragma unroll
        for (int i = 0; i < Taken::kPieces; ++i) {
            if (first + i >= end) log2_sum[i] = -INFINITY;
            largest = max_or_nan(largest, log2_sum[i]);
        }
        sums.raise(largest);
#pragma unroll
        for (int i = 0; i < Taken::kPieces; ++i) {
            float const weight = weight_of(log2_sum[i], sums.reference);
            sums.weight += weight;
#pragma unroll
            for (int part = 0; part < Taken::kParts; ++part) numbers[i][part].add_to(sums.number[part], weight);
        }
    }
    return sums;
}

// Divisions are kernels of their own, each no longer than it has to be, because their instructions have to come from
// memory too.
template <typename Element, typename Numbers, typename Division>
__global__ void __launch_bounds__(kThreads, Division::kCtasPerSm)
    split_kv_combine_kernel(__grid_constant__ DenseDecodeParams const params) {
    extern __shared__ CutTile cut_tiles[];  // [num_workers]
    // Before the wait: the decode waited for who wrote the plan before it allowed this launch.
    int const num_taken = list_cut_tiles<Division>(params, cut_tiles);
    sm90::allow_dependent_launch();
    if (blockIdx.z >= num_taken) return sm90::wait_for_previous_kernel();
    Item<Numbers, Division> item(params, cut_tiles[blockIdx.z]);
    sm90::wait_for_previous_kernel();

    int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    for (int number = blockIdx.z;;) {
        QueryRow const& at = item.at;
        auto const out_of_row = [&] {
            return static_cast<Element*>(params.out) + out_offset(params, item.cut.batch, at) + item.first_column;
        };
        auto const store_lse = [&](float log2_sum) {
            if (item.first_column == 0 && lane % 4 == 0)
                params.lse[lse_offset(params, item.cut.batch, at)] = natural_lse(log2_sum);
        };
        if (item.shares_pieces(item.cut)) {
            int const share = ceil_div(item.num_pieces, kWarpsPerCta), begin = warp * share;
            int const end = min(begin + share, item.num_pieces);
            PairOfSums const pair(add_pieces<Numbers, typename Division::Pieces>(item, begin, end));
            if (at.exists) {
                if (warp == 0) store_lse(pair.log2_sum);
                store_columns(out_of_row() + Numbers::column(warp, lane),
                              scaled(pair.number, inverse_or_0(pair.weight)));
            }
        } else if constexpr (!Division::kAlwaysPieces) {
            using Columns = typename Division::Columns;
            auto const sums = add_pieces<Numbers, Columns>(item, 0, item.num_pieces);
            float const inverse_total = inverse_or_0(sums.weight);
            if (at.exists) {
                Element* const out = out_of_row();
                store_lse(log2_sum_of(sums.weight, sums.reference));
#pragma unroll
                for (int part = 0; part < Columns::kParts; ++part) {
#pragma unroll
                    for (int i = 0; i < kNumbersPerThread / 2; ++i) {
                        float2 const pair{sums.number[part][2 * i], sums.number[part][2 * i + 1]};
                        store_columns(out + part * kBoxColumns + Numbers::column(i, lane), scaled(pair, inverse_total));
                    }
                }
            }
        }
        number += gridDim.z;
        if (number >= num_taken) return;
        item = Item<Numbers, Division>(params, cut_tiles[number]);
        __syncthreads();  // all have read what the next item's sums take the place of
    }
}

struct Way {
    void (*kernel)(DenseDecodeParams);
    cudaError_t (*allow_shared_memory)(size_t);
    int part_groups, ctas_per_sm;
};
template <typename Element, typename Numbers, typename Division>
constexpr Way kWay = {
    split_kv_combine_kernel<Element, Numbers, Division>,
    sm90::allow_shared_memory<split_kv_combine_kernel<Element, Numbers, Division>>,
    Division::kPartGroups,
    Division::kCtasPerSm,
};

// CTAs that start while the dense decode runs on some SMs would crowd on the others, although they are few, and there
// the next decode could not start early. What keeps them from it is that they ask for so much shared memory that there
// is room for only so many more per SM than it takes. More than a kernel is made for their registers do not allow.
constexpr int kSpareCtasPerSm = 2;
constexpr size_t kMostSharedBytes = 110 * 1024;
size_t shared_bytes_to_spread(int num_ctas, int num_sms, int most_per_sm) {
    constexpr size_t kOfSm = 227 * 1024, kStaticAndReserved = 7 * 1024;
    int const ctas_per_sm = std::min(ceil_div(num_ctas, num_sms) + kSpareCtasPerSm, most_per_sm);
    return ctas_per_sm < most_per_sm ? kOfSm / ctas_per_sm - kStaticAndReserved : 0;
}

int64_t num_tiles_of(DenseDecodeParams const& params) {
    return int64_t(params.batch_size) * params.grid.tiles_per_request;
}
// No more tiles are cut than there are, or boundaries between workers.
int64_t most_cut_tiles(DenseDecodeParams const& params) {
    return std::max<int64_t>(std::min<int64_t>(num_tiles_of(params), params.grid.num_workers - 1), 1);
}
int ctas_per_tile(DenseDecodeParams const& params, Way const& way) {
    return params.grid.num_lanes * way.part_groups * num_row_groups_of(params);
}

// By what a plan is where lengths are equal; any way merges any plan. As many pieces at a time as a tile has then, and
// columns as wide as lets all CTAs run at once.
template <typename Element>
Way choose(DenseDecodeParams const& params, int num_sms) {
    int64_t const num_tiles = num_tiles_of(params), num_workers = params.grid.num_workers;
    auto const fits = [&](Way const& way) {
        return most_cut_tiles(params) * ctas_per_tile(params, way) <= way.ctas_per_sm * num_sms;
    };
    if (params.grid.is_swapped()) {
        Way const of_pieces = kWay<Element, FloatNumbers, Division<void, 2, 5>>;
        if (num_workers > 4 * num_tiles && fits(of_pieces)) return of_pieces;
        if (num_workers >= 3 * num_tiles) return kWay<Element, FloatNumbers, Division<Portion<1, 4>, 4, 5>>;
        return kWay<Element, FloatNumbers, Division<Portion<2, 2>, 4, 5>>;
    }
    struct {
        int64_t least_workers;
        Way way;
    } const candidates[] = {
        {8 * num_tiles + 1, kWay<Element, PackedNumbers, Division<void, 8, 5>>},
        {8 * num_tiles + 1, kWay<Element, PackedNumbers, Division<Portion<1, 16>, 8, 3>>},
        {5 * num_tiles, kWay<Element, PackedNumbers, Division<Portion<1, 8>, 8, 4>>},
        {3 * num_tiles, kWay<Element, PackedNumbers, Division<Portion<2, 4>, 8, 4>>},
    };
    for (auto const& [least_workers, way] : candidates) {
        if (num_workers >= least_workers && fits(way)) return way;
    }
    return kWay<Element, PackedNumbers, Division<Portion<2, 2>, 8, 5>>;
}

}  // namespace

cudaError_t launch_split_kv_combine(DenseDecodeParams const& params, int num_sms, ElementType type,
                                    cudaStream_t stream) {
    WorkerGrid const& grid = params.grid;
    Way const way =
        type == ElementType::kBFloat16 ? choose<__nv_bfloat16>(params, num_sms) : choose<__half>(params, num_sms);
    cudaLaunchAttribute attribute = sm90::dependent_launch_attribute();
    cudaLaunchConfig_t config{};
    // CTAs without work cost time too.
    int const per_tile = ctas_per_tile(params, way);
    int const tiles_at_once = std::max(way.ctas_per_sm * num_sms / per_tile, 1);
    config.gridDim = dim3(grid.num_lanes * way.part_groups, num_row_groups_of(params),
                          unsigned(std::min<int64_t>(most_cut_tiles(params), tiles_at_once)));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = grid.num_workers * sizeof(CutTile);
    if (!grid.is_swapped()) {
        if (cudaError_t const error = way.allow_shared_memory(kMostSharedBytes); error != cudaSuccess) return error;
        int const num_ctas = per_tile * config.gridDim.z;
        config.dynamicSmemBytes =
            std::max<size_t>(config.dynamicSmemBytes, shared_bytes_to_spread(num_ctas, num_sms, way.ctas_per_sm));
    }
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, way.kernel, params);
}

}  // namespace flash_mla
