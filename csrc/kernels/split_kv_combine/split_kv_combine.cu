// One CTA per worker, lane and four rows. A worker whose last piece begins a tile that later workers go on with merges
// that tile; all other CTAs end at once. Pieces are added in the order of the workers, so results repeat bit for bit.
#include "kernels/split_kv_combine/split_kv_combine.h"

#include <algorithm>
#include <cmath>

#include "kernels/sm90/primitives/dependent_launch.h"
#include "kernels/split_kv_combine/store_columns.h"
#include "params/query_rows.h"

namespace flash_mla {
namespace {

constexpr int kVectorColumns = 4;
constexpr int kVectorsPerThread = 2;
constexpr int kThreadsPerRow = kHeadDimV / kVectorColumns / kVectorsPerThread;
constexpr int kRowsPerCta = 4;
constexpr int kWarpSize = 32;

__device__ float warp_max(float x) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}
__device__ float warp_sum(float x) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// Turns the log2-sum-exp2 of the pieces of one row into their weights, by one warp, and returns that of all of them:
// -inf for a row that saw no key.
__device__ float merge_weights(float* lse_to_weight, int num_pieces) {
    int const lane = threadIdx.x % kWarpSize;
    float largest = -INFINITY;
    for (int i = lane; i < num_pieces; i += kWarpSize) largest = fmaxf(largest, lse_to_weight[i]);
    largest = warp_max(largest);
    bool const saw_no_key = largest == -INFINITY;
    float sum = 0.f;
    for (int i = lane; i < num_pieces; i += kWarpSize) sum += saw_no_key ? 0.f : exp2f(lse_to_weight[i] - largest);
    sum = warp_sum(sum);
    float const lse = saw_no_key ? -INFINITY : log2f(sum) + largest;
    for (int i = lane; i < num_pieces; i += kWarpSize)
        lse_to_weight[i] = saw_no_key ? 0.f : exp2f(lse_to_weight[i] - lse);
    return lse;
}

template <typename Element>
__global__ void __launch_bounds__(kRowsPerCta* kThreadsPerRow)
    split_kv_combine_kernel(__grid_constant__ DenseDecodeParams const params) {
    extern __shared__ float weights[];  // (kRowsPerCta, num_workers)
    WorkerGrid const& grid = params.grid;
    int const worker = blockIdx.y, lane = blockIdx.x;
    // Before the wait: the decode waited for who wrote the plan before it allowed this launch.
    WorkerRow const row = params.metadata[worker];
    sm90::allow_dependent_launch();
    sm90::wait_for_previous_kernel();
    bool const begins_tile = row.num_pieces > 1 || row.begin_block == 0;
    if (row.num_pieces == 0 || !begins_tile || row.last_worker <= worker) return;
    // Of a plan for other shapes.
    if (row.end_batch >= params.batch_size || row.end_tile >= grid.tiles_per_request) return;
    if (row.last_worker >= grid.num_workers) return;

    int const row_in_cta = threadIdx.x / kThreadsPerRow;
    int const row_in_tile = blockIdx.z * kRowsPerCta + row_in_cta;
    TilePlace const place = tile_place(grid, row.end_tile, lane);
    QueryRow const at = query_row(params, place, row_in_tile, grid.rows_per_tile);
    bool const exists = row_in_tile < grid.rows_per_tile && at.exists;

    // The first piece is this worker's last, the others are the first ones of the workers that follow.
    int const num_pieces = row.last_worker - worker + 1;
    int const first_slot = partial_slot(worker, row.num_pieces == 1);
    auto const slot_of = [&](int piece) { return piece == 0 ? first_slot : partial_slot(worker + piece, true); };
    auto const row_of = [&](int piece) {
        return partial_row(grid, slot_of(piece), lane, row_in_tile, grid.rows_per_tile);
    };

    float* const weight = weights + row_in_cta * grid.num_workers;
    int const thread = threadIdx.x % kThreadsPerRow;
    if (exists && thread < kWarpSize) {
        for (int piece = thread; piece < num_pieces; piece += kWarpSize) {
            weight[piece] = params.lse_partial[row_of(piece)];
        }
        __syncwarp();
        float const lse = merge_weights(weight, num_pieces);
        if (thread == 0) {
            params.lse[lse_offset(params, row.end_batch, at)] = natural_lse(lse);
        }
    }
    __syncthreads();
    if (!exists) return;

    float4 sum[kVectorsPerThread] = {};
#pragma unroll 4
    for (int piece = 0; piece < num_pieces; ++piece) {
        float const w = weight[piece];
        if (w == 0.f) continue;  // a piece without keys has written none
        auto const* const part =
            reinterpret_cast<float4 const*>(params.out_partial + row_of(piece) * kHeadDimV) + thread;
#pragma unroll
        for (int i = 0; i < kVectorsPerThread; ++i) {
            float4 const x = part[i * kThreadsPerRow];
            sum[i].x = fmaf(w, x.x, sum[i].x);
            sum[i].y = fmaf(w, x.y, sum[i].y);
            sum[i].z = fmaf(w, x.z, sum[i].z);
            sum[i].w = fmaf(w, x.w, sum[i].w);
        }
    }
    Element* const out_row = static_cast<Element*>(params.out) + out_offset(params, row.end_batch, at);
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; ++i) {
        store_columns(out_row + (i * kThreadsPerRow + thread) * kVectorColumns, sum[i]);
    }
}

}  // namespace

cudaError_t launch_split_kv_combine(DenseDecodeParams const& params, ElementType type, cudaStream_t stream) {
    int const rows = std::min(params.rows_per_head_kv, params.grid.rows_per_tile);
    cudaLaunchAttribute attribute = sm90::dependent_launch_attribute();
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(params.grid.num_lanes, params.grid.num_workers, ceil_div(rows, kRowsPerCta));
    config.blockDim = dim3(kRowsPerCta * kThreadsPerRow);
    config.dynamicSmemBytes = kRowsPerCta * params.grid.num_workers * sizeof(float);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    auto* const kernel =
        type == ElementType::kBFloat16 ? split_kv_combine_kernel<__nv_bfloat16> : split_kv_combine_kernel<__half>;
    return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace flash_mla
