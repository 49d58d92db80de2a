// Every warp merges 8 rows of 32 columns at a time, a quad for each row. The CTAs share out all tiles that the plan
// cuts: a worker whose last piece begins a tile is the first of those that have a part of it. Pieces are added in the
// order of the workers, so results repeat bit for bit.
#include "kernels/split_kv_combine/split_kv_combine.h"

#include <algorithm>
#include <cmath>

#include "kernels/sm90/primitives/dependent_launch.h"
#include "kernels/split_kv_combine/store_columns.h"
#include "params/query_rows.h"

namespace flash_mla {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarpsPerCta = 4;
constexpr int kThreads = kWarpsPerCta * kWarpSize;
constexpr int kCtasPerSm = 5;
constexpr int kParts = kHeadDimV / (kBoxColumns * kWarpsPerCta);  // CTAs for a row

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
    static constexpr int kPiecesAtOnce = 8;

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
    static constexpr int kPiecesAtOnce = 4;

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

template <typename Element, typename Numbers>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    split_kv_combine_kernel(__grid_constant__ DenseDecodeParams const params) {
    extern __shared__ CutTile cut_tiles[];  // [num_workers]
    WorkerGrid const& grid = params.grid;
    // Before the wait: the decode waited for who wrote the plan before it allowed this launch.
    int const num_cuts = list_cut_tiles(params, cut_tiles);
    sm90::allow_dependent_launch();
    sm90::wait_for_previous_kernel();

    int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    constexpr int kPiecesAtOnce = Numbers::kPiecesAtOnce;
    int const row_groups = ceil_div(min(params.rows_per_head_kv, grid.rows_per_tile), kBoxRows);
    int const num_items = num_cuts * grid.num_lanes * row_groups * kParts;
    for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
        int const part = item % kParts, row_group = item / kParts % row_groups;
        int const lane_and_cut = item / kParts / row_groups;
        int const tile_lane = lane_and_cut % grid.num_lanes;
        CutTile const& cut = cut_tiles[lane_and_cut / grid.num_lanes];

        int const row = row_group * kBoxRows + lane / 4;
        QueryRow const at = query_row(params, tile_place(grid, cut.tile, tile_lane), row, grid.rows_per_tile);
        if (!at.exists) continue;

        // The first piece is a worker's last, the others are the first ones of the workers that follow.
        int const num_pieces = cut.last_worker - cut.worker + 1;
        auto const tile_row = [&](int piece) {
            int const slot = piece == 0 ? cut.first_slot : partial_slot(cut.worker + piece, true);
            return partial_row(grid, slot, tile_lane, 0, grid.rows_per_tile);
        };
        float largest = -INFINITY;  // log2-sum-exp2
#pragma unroll 8
        for (int piece = 0; piece < num_pieces; ++piece)
            largest = max_or_nan(largest, params.lse_partial[tile_row(piece) + row]);

        float sum[kNumbersPerThread] = {};
        float total = 0.f;
        int const first_column = (part * kWarpsPerCta + warp) * kBoxColumns;
        // Nothing where no piece has keys: there is no reference to subtract.
        for (int first = 0; first < num_pieces && largest != -INFINITY; first += kPiecesAtOnce) {
            Numbers numbers[kPiecesAtOnce];
            float weight[kPiecesAtOnce];
#pragma unroll
            for (int i = 0; i < kPiecesAtOnce; ++i) {
                int const piece = first + i;
                weight[i] = 0.f;
                if (piece >= num_pieces) continue;
                weight[i] = exp2f(params.lse_partial[tile_row(piece) + row] - largest);
                // A piece without keys has written none.
                if (weight[i] != 0.f) numbers[i].load(params, tile_row(piece), row, first_column, lane);
            }
#pragma unroll
            for (int i = 0; i < kPiecesAtOnce; ++i) {
                total += weight[i];
                if (weight[i] != 0.f) numbers[i].add_to(sum, weight[i]);
            }
        }
        float const inverse_total = largest == -INFINITY ? 0.f : 1.f / total;
        if (first_column == 0 && lane % 4 == 0) {
            params.lse[lse_offset(params, cut.batch, at)] = natural_lse(log2f(total) + largest);
        }
        Element* const out = static_cast<Element*>(params.out) + out_offset(params, cut.batch, at) + first_column;
#pragma unroll
        for (int i = 0; i < kNumbersPerThread / 2; ++i) {
            store_columns(out + Numbers::column(i, lane),
                          float2{sum[2 * i] * inverse_total, sum[2 * i + 1] * inverse_total});
        }
    }
}

template <typename Element>
auto* kernel_for(WorkerGrid const& grid) {
    return grid.is_swapped() ? split_kv_combine_kernel<Element, FloatNumbers>
                             : split_kv_combine_kernel<Element, PackedNumbers>;
}

}  // namespace

cudaError_t launch_split_kv_combine(DenseDecodeParams const& params, int num_sms, ElementType type,
                                    cudaStream_t stream) {
    WorkerGrid const& grid = params.grid;
    int64_t const rows = std::min(params.rows_per_head_kv, grid.rows_per_tile);
    int64_t const most_items = grid.num_workers * grid.num_lanes * ((rows + kBoxRows - 1) / kBoxRows) * kParts;
    cudaLaunchAttribute attribute = sm90::dependent_launch_attribute();
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(std::min<int64_t>(most_items, kCtasPerSm * num_sms)));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = grid.num_workers * sizeof(CutTile);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    auto* const kernel = type == ElementType::kBFloat16 ? kernel_for<__nv_bfloat16>(grid) : kernel_for<__half>(grid);
    return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace flash_mla
