// The upper part of the tree of segments (segments.h): one CTA per four rows of a tile of query rows. All granules of a
// tile were written by the decode, whoever had them; tiles of a single segment have their results already.
//
// First the log2-sum-exp2 of the granules are folded level by level, one thread per chain, which gives the weights of
// every fold. Then each thread folds its columns, granule by granule.
#include "kernels/split_kv_combine/granule_combine.h"

#include <algorithm>
#include <cmath>

#include "kernels/sm90/primitives/dependent_launch.h"
#include "kernels/sm90/primitives/fold.h"
#include "kernels/split_kv_combine/store_columns.h"

namespace flash_mla {
namespace {

using sm90::FoldWeights;

constexpr int kVectorColumns = 4;
constexpr int kVectorsPerThread = 2;
constexpr int kThreadsPerRow = kHeadDimV / kVectorColumns / kVectorsPerThread;
constexpr int kRowsPerCta = 4;
constexpr int kGranulesAtOnce = 4;  // their loads run side by side
static_assert(kThreadsPerRow >= kMaxSegments);

struct RowFolds {
    float log2_sum[kMaxSegments];                    // of what a level begins with
    FoldWeights weights[kFoldLevels][kMaxSegments];  // by what comes next
};

__device__ float4 fold_outputs(float4 const& folded, float4 const& next, FoldWeights const& weights) {
    return {sm90::fold_outputs(folded.x, next.x, weights), sm90::fold_outputs(folded.y, next.y, weights),
            sm90::fold_outputs(folded.z, next.z, weights), sm90::fold_outputs(folded.w, next.w, weights)};
}

template <typename Element>
__global__ void __launch_bounds__(kRowsPerCta* kThreadsPerRow)
    granule_combine_kernel(__grid_constant__ DenseDecodeParams const params) {
    __shared__ RowFolds folds_of_rows[kRowsPerCta];
    WorkerGrid const& grid = params.grid;
    sm90::allow_dependent_launch();
    sm90::wait_for_previous_kernel();
    int const m_tile = blockIdx.x, head_kv_of_batch = blockIdx.y;
    int const batch = head_kv_of_batch / params.num_heads_kv;
    int const head_kv = head_kv_of_batch - batch * params.num_heads_kv;
    int const num_blocks = num_blocks_of(max(params.cache_seqlens[batch], 0));
    int const segment_bits = segment_bits_of(num_blocks, min_segment_blocks(grid.rows_per_tile));
    if (segment_bits == 0) return;

    int const row_in_cta = threadIdx.x / kThreadsPerRow, thread = threadIdx.x % kThreadsPerRow;
    int const row_in_tile = blockIdx.z * kRowsPerCta + row_in_cta;
    QueryRow const at = query_row(params, {head_kv, m_tile}, row_in_tile, grid.rows_per_tile);
    bool const exists = row_in_tile < grid.rows_per_tile && at.exists;
    int const granule_bits = granule_bits_of(grid.num_granules, segment_bits), num_granules = 1 << granule_bits;
    int const first_level = levels_in_granule(grid.num_granules);
    auto const row_of = [&](int granule) {
        return int64_t(granule_slot(grid, head_kv_of_batch, m_tile, granule)) * grid.rows_per_tile + row_in_tile;
    };

    RowFolds& folds = folds_of_rows[row_in_cta];
    if (exists && thread < num_granules) folds.log2_sum[thread] = params.lse_partial[row_of(thread)];
    __syncthreads();
    for (int level = first_level, count = num_granules; level < kFoldLevels; ++level) {
        int const bits = level_bits(level, segment_bits), members = 1 << bits;
        bool const has_chain = exists && thread < count >> bits;
        float folded = 0.f;
        if (has_chain) {
            folded = folds.log2_sum[thread << bits];
            for (int i = (thread << bits) + 1; i < (thread << bits) + members; ++i)
                folds.weights[level][i] = sm90::fold_log2_sums(folded, folds.log2_sum[i]);
        }
        __syncthreads();
        if (has_chain) folds.log2_sum[thread] = folded;
        __syncthreads();
        count >>= bits;
    }
    if (!exists) return;
    if (thread == 0) {
        params.lse[lse_offset(params, batch, at)] = natural_lse(folds.log2_sum[0]);
    }

    Element* const out_row = static_cast<Element*>(params.out) + out_offset(params, batch, at);
    float4 waiting[kFoldLevels][kVectorsPerThread] = {};
#pragma unroll 1
    for (int first = 0; first < num_granules; first += kGranulesAtOnce) {
        float4 loaded[kGranulesAtOnce][kVectorsPerThread] = {};
#pragma unroll
        for (int i = 0; i < kGranulesAtOnce; ++i) {
            if (first + i >= num_granules) continue;
            auto const* const source =
                reinterpret_cast<float4 const*>(params.out_partial + row_of(first + i) * kHeadDimV) + thread;
#pragma unroll
            for (int v = 0; v < kVectorsPerThread; ++v) loaded[i][v] = source[v * kThreadsPerRow];
        }
#pragma unroll
        for (int i = 0; i < kGranulesAtOnce; ++i) {
            if (first + i >= num_granules) continue;
            int index = first + i;
            bool is_on_its_way = true;
#pragma unroll
            for (int level = 0; level < kFoldLevels; ++level) {
                if (level < first_level || !is_on_its_way) continue;
                int const bits = level_bits(level, segment_bits), last = (1 << bits) - 1, member = index & last;
                if (member > 0) {
                    FoldWeights const weights = folds.weights[level][index];
#pragma unroll
                    for (int v = 0; v < kVectorsPerThread; ++v)
                        loaded[i][v] = fold_outputs(waiting[level][v], loaded[i][v], weights);
                }
                if (member < last) {
                    is_on_its_way = false;
#pragma unroll
                    for (int v = 0; v < kVectorsPerThread; ++v) waiting[level][v] = loaded[i][v];
                }
                index >>= bits;
            }
            if (!is_on_its_way) continue;
#pragma unroll
            for (int v = 0; v < kVectorsPerThread; ++v)
                store_columns(out_row + (v * kThreadsPerRow + thread) * kVectorColumns, loaded[i][v]);
        }
    }
}

}  // namespace

cudaError_t launch_granule_combine(DenseDecodeParams const& params, ElementType type, cudaStream_t stream) {
    WorkerGrid const& grid = params.grid;
    if (grid.num_granules <= 1) return cudaSuccess;
    int const rows = std::min(params.rows_per_head_kv, grid.rows_per_tile);
    cudaLaunchAttribute attribute = sm90::dependent_launch_attribute();
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(ceil_div(params.rows_per_head_kv, grid.rows_per_tile),
                          params.batch_size * params.num_heads_kv, ceil_div(rows, kRowsPerCta));
    config.blockDim = dim3(kRowsPerCta * kThreadsPerRow);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    auto* const kernel =
        type == ElementType::kBFloat16 ? granule_combine_kernel<__nv_bfloat16> : granule_combine_kernel<__half>;
    return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace flash_mla
