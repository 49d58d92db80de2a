#include "kernels/sm90/dense_decode/dense_decode.h"

#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "kernels/sm90/swapped_decode/swapped_decode.h"
#include "kernels/split_kv_combine/granule_combine.h"
#include "kernels/split_kv_combine/split_kv_combine.h"
#include "ops/checks.h"
#include "ops/device.h"
#include "ops/ops.h"

namespace flash_mla {
namespace {

struct Arguments {
    Tensor const &q, &k_cache, &block_table, &cache_seqlens, &tile_scheduler_metadata, &num_splits;
    double softmax_scale;
    bool causal, batch_invariant;
};

void check_arguments(Arguments const& a) {
    check_tensor("q", a.q);
    TORCH_CHECK_TYPE(a.q.scalar_type() == at::kBFloat16 || a.q.scalar_type() == at::kHalf,
                     "q must have dtype torch.bfloat16 or torch.float16, got ", dtype_name(a.q.scalar_type()));
    check_dtype("k_cache", a.k_cache, a.q.scalar_type());
    check_dtype("block_table", a.block_table, at::kInt);
    check_dtype("cache_seqlens", a.cache_seqlens, at::kInt);
    check_dtype("tile_scheduler_metadata", a.tile_scheduler_metadata, at::kInt);
    check_dtype("num_splits", a.num_splits, at::kInt);

    check_shape("q", a.q, "(batch_size, seqlen_q, num_heads_q, head_dim) = ", {-1, -1, -1, kHeadDim});
    check_shape("k_cache", a.k_cache,
                "(num_blocks, page_size, num_heads_kv, head_dim) = ", {-1, kPageSize, -1, kHeadDim});
    check_shape("block_table", a.block_table, "(batch_size, max_blocks_per_request) = ", {a.q.size(0), -1});
    check_shape("cache_seqlens", a.cache_seqlens, "(batch_size,) = ", {a.q.size(0)});
    TORCH_CHECK_VALUE(a.q.size(1) >= 1, "q must have at least one token per request, got ", a.q.size(1));
    TORCH_CHECK_VALUE(a.k_cache.size(0) >= 1, "k_cache must have at least one page, got shape ", a.k_cache.sizes());
    TORCH_CHECK_VALUE(a.q.size(2) >= 1 && a.k_cache.size(2) >= 1 && a.q.size(2) % a.k_cache.size(2) == 0,
                      "q must have a multiple of the ", a.k_cache.size(2), " heads of k_cache, got ", a.q.size(2));
    TORCH_CHECK_VALUE(a.q.size(1) * a.q.size(2) <= std::numeric_limits<int>::max() / 2,
                      "q has too many rows per request, got ", a.q.size(1), " tokens of ", a.q.size(2), " heads");
    TORCH_CHECK_VALUE(std::isfinite(a.softmax_scale) && a.softmax_scale >= 0,
                      "softmax_scale must be finite and not negative, got ", a.softmax_scale);

    check_on_device("k_cache", a.k_cache, a.q.device());
    check_on_device("block_table", a.block_table, a.q.device());
    check_on_device("cache_seqlens", a.cache_seqlens, a.q.device());
    check_on_device("tile_scheduler_metadata", a.tile_scheduler_metadata, a.q.device());
    check_on_device("num_splits", a.num_splits, a.q.device());

    check_rows("q", a.q);
    check_rows("k_cache", a.k_cache);
    TORCH_CHECK_VALUE(a.block_table.size(1) <= 1 || a.block_table.stride(1) == 1,
                      "block_table must be contiguous in its last dimension, got strides ", a.block_table.strides());
    check_contiguous("cache_seqlens", a.cache_seqlens);
    check_contiguous("tile_scheduler_metadata", a.tile_scheduler_metadata);
    check_address("tile_scheduler_metadata", a.tile_scheduler_metadata);
}

void check_plan(Arguments const& a, int num_plan_rows) {
    check_shape(
        "tile_scheduler_metadata", a.tile_scheduler_metadata,
        "(num_plan_rows, 8), as planned for these head counts and seqlen_q, = ", {num_plan_rows, kWorkerRowInts});
    check_shape("num_splits", a.num_splits, "(batch_size + 1,) = ", {a.q.size(0) + 1});
}

DenseDecodeParams make_params(Arguments const& a, WorkerGrid const& grid) {
    DenseDecodeParams params{};
    params.q = a.q.const_data_ptr();
    params.k_cache = a.k_cache.const_data_ptr();
    params.block_table = a.block_table.const_data_ptr<int>();
    params.cache_seqlens = a.cache_seqlens.const_data_ptr<int>();
    params.metadata = reinterpret_cast<WorkerRow const*>(a.tile_scheduler_metadata.const_data_ptr<int>());
    params.q_batch_stride = stride_of(a.q, 0);
    params.q_token_stride = stride_of(a.q, 1);
    params.q_head_stride = stride_of(a.q, 2);
    params.k_block_stride = stride_of(a.k_cache, 0);
    params.k_token_stride = a.k_cache.stride(1);
    params.k_head_stride = stride_of(a.k_cache, 2);
    params.block_table_stride = stride_of(a.block_table, 0);
    params.batch_size = int(a.q.size(0));
    params.seqlen_q = int(a.q.size(1));
    params.num_heads_q = int(a.q.size(2));
    params.num_heads_kv = int(a.k_cache.size(2));
    params.num_blocks = int(a.k_cache.size(0));
    params.block_table_columns = int(a.block_table.size(1));
    params.heads_per_group = params.num_heads_q / params.num_heads_kv;
    params.rows_per_head_kv = params.seqlen_q * params.heads_per_group;
    // With a scale of exactly 0 a masked score of -inf would become NaN; with one this small all keys still weigh the
    // same.
    constexpr double kSmallestScale = 1e-30, kLog2E = 1.4426950408889634;
    params.softmax_scale_log2 = float(std::max(a.softmax_scale, kSmallestScale) * kLog2E);
    params.causal = a.causal && params.seqlen_q > 1;
    params.grid = grid;
    return params;
}

DecodeScratch scratch_of(WorkerGrid const& grid, int64_t batch_size, int num_rows_per_head_kv, int num_heads_kv,
                         int num_sms) {
    if (grid.is_invariant()) return invariant_scratch(grid, batch_size);
    return {num_partial_rows(num_rows_per_head_kv, num_heads_kv, num_sms)};
}

// What at::empty comes to on a GPU, without the two dispatches on the way.
Tensor empty(at::IntArrayRef sizes, at::ScalarType type, at::Device device) {
    return Tensor(at::detail::empty_cuda(sizes, type, device, std::nullopt));
}

template <ElementType kType, Summation kSummation>
cudaError_t launch_variant(DenseDecodeParams const& params, cudaStream_t stream) {
    return params.grid.is_swapped() ? sm90::launch_swapped_decode<kType, kSummation>(params, stream)
                                    : sm90::launch_dense_decode<kType, kSummation>(params, stream);
}
template <ElementType kType>
cudaError_t launch_for_type(DenseDecodeParams const& params, cudaStream_t stream) {
    return params.grid.is_invariant() ? launch_variant<kType, Summation::kBySegments>(params, stream)
                                      : launch_variant<kType, Summation::kByWorkers>(params, stream);
}
cudaError_t launch_decode(DenseDecodeParams const& params, ElementType type, cudaStream_t stream) {
    return type == ElementType::kBFloat16 ? launch_for_type<ElementType::kBFloat16>(params, stream)
                                          : launch_for_type<ElementType::kFloat16>(params, stream);
}

Tensor run(Arguments const& a, Tensor const& out) {
    c10::cuda::CUDAGuard const guard(a.q.device());
    Tensor const lse = empty({a.q.size(0), a.q.size(2), a.q.size(1)}, at::kFloat, a.q.device());
    if (a.q.size(0) == 0) return lse;

    int const num_rows_per_head_kv = int(a.q.size(1) * a.q.size(2) / a.k_cache.size(2));
    int const num_heads_kv = int(a.k_cache.size(2));
    ClusterCapacity const capacity = cluster_capacity_of(a.q.device());
    check_plan(a, num_plan_rows(num_rows_per_head_kv, num_heads_kv, capacity.num_sms()));
    WorkerGrid const grid =
        decode_grid(int(a.q.size(0)), num_rows_per_head_kv, num_heads_kv, capacity, a.batch_invariant);
    DenseDecodeParams params = make_params(a, grid);
    params.out = out.mutable_data_ptr();
    params.out_batch_stride = stride_of(out, 0);
    params.out_token_stride = stride_of(out, 1);
    params.out_head_stride = stride_of(out, 2);
    params.lse = lse.mutable_data_ptr<float>();

    DecodeScratch const scratch = scratch_of(grid, a.q.size(0), num_rows_per_head_kv, num_heads_kv, capacity.num_sms());
    at::DataPtr const partial = c10::cuda::CUDACachingAllocator::get()->allocate(scratch.bytes());
    params.out_partial = static_cast<float*>(partial.get());
    params.packed_partial = params.out_partial;
    params.scale_partial = params.out_partial + scratch.rows * (kHeadDimV / 2);
    params.lse_partial = params.out_partial + scratch.rows * kHeadDimV;
    params.statistics_partial = reinterpret_cast<RowStatistics*>(params.lse_partial);

    cudaStream_t const stream = c10::cuda::getCurrentCUDAStream(a.q.device().index());
    bool const is_bfloat16 = a.q.scalar_type() == at::kBFloat16;
    ElementType const type = is_bfloat16 ? ElementType::kBFloat16 : ElementType::kFloat16;
    C10_CUDA_CHECK(launch_decode(params, type, stream));
    C10_CUDA_CHECK(grid.is_invariant() ? launch_granule_combine(params, capacity.num_sms(), type, stream)
                                       : launch_split_kv_combine(params, capacity.num_sms(), type, stream));
    return lse;
}

}  // namespace

std::tuple<Tensor, Tensor> dense_decode(Tensor const& q, Tensor const& k_cache, Tensor const& block_table,
                                        Tensor const& cache_seqlens, Tensor const& tile_scheduler_metadata,
                                        Tensor const& num_splits, double softmax_scale, bool causal,
                                        bool batch_invariant) {
    Arguments const arguments{q,          k_cache,       block_table, cache_seqlens,  tile_scheduler_metadata,
                              num_splits, softmax_scale, causal,      batch_invariant};
    check_arguments(arguments);
    Tensor const out = empty({q.size(0), q.size(1), q.size(2), kHeadDimV}, q.scalar_type(), q.device());
    return {out, run(arguments, out)};
}

Tensor dense_decode_out(Tensor const& q, Tensor const& k_cache, Tensor const& block_table, Tensor const& cache_seqlens,
                        Tensor const& tile_scheduler_metadata, Tensor const& num_splits, double softmax_scale,
                        bool causal, bool batch_invariant, Tensor& out) {
    Arguments const arguments{q,          k_cache,       block_table, cache_seqlens,  tile_scheduler_metadata,
                              num_splits, softmax_scale, causal,      batch_invariant};
    check_arguments(arguments);
    check_dtype("out", out, q.scalar_type());
    check_shape("out", out,
                "(batch_size, seqlen_q, num_heads_q, head_dim_v) = ", {q.size(0), q.size(1), q.size(2), kHeadDimV});
    check_on_device("out", out, q.device());
    check_rows("out", out);
    check_elements_apart("out", out);
    std::pair<char const*, Tensor const*> const others[] = {
        {"q", &q},
        {"k_cache", &k_cache},
        {"block_table", &block_table},
        {"cache_seqlens", &cache_seqlens},
        {"tile_scheduler_metadata", &tile_scheduler_metadata},
        {"num_splits", &num_splits},
    };
    for (auto const& [name, other] : others) check_apart_from("out", out, name, *other);
    return run(arguments, out);
}

}  // namespace flash_mla
