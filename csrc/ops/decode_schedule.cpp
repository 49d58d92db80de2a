#include "kernels/decode_schedule/decode_schedule.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "ops/checks.h"
#include "ops/device.h"
#include "ops/ops.h"

namespace flash_mla {

std::tuple<Tensor, Tensor> decode_schedule(Tensor const& cache_seqlens, int64_t num_rows_per_head_kv,
                                           int64_t num_heads_kv, bool batch_invariant) {
    constexpr int64_t kMaxRows = std::numeric_limits<int>::max() / 2;
    check_dtype("cache_seqlens", cache_seqlens, at::kInt);
    check_shape("cache_seqlens", cache_seqlens, "(batch_size,) = ", {-1});
    check_contiguous("cache_seqlens", cache_seqlens);
    TORCH_CHECK_VALUE(cache_seqlens.size(0) <= kMaxScheduleBatch, "cache_seqlens must have at most ", kMaxScheduleBatch,
                      " requests, got ", cache_seqlens.size(0));
    TORCH_CHECK_VALUE(num_rows_per_head_kv >= 1 && num_rows_per_head_kv <= kMaxRows,
                      "num_rows_per_head_kv must be positive, got ", num_rows_per_head_kv);
    TORCH_CHECK_VALUE(num_heads_kv >= 1 && num_heads_kv <= kMaxRows, "num_heads_kv must be positive, got ",
                      num_heads_kv);
    c10::cuda::CUDAGuard const guard(cache_seqlens.device());

    int const batch_size = int(cache_seqlens.size(0));
    ClusterCapacity const capacity = cluster_capacity_of(cache_seqlens.device());
    DecodeScheduleParams params{};
    params.batch_size = batch_size;
    params.num_plan_rows = num_plan_rows(int(num_rows_per_head_kv), int(num_heads_kv), capacity.num_sms());
    params.grid = decode_grid(batch_size, int(num_rows_per_head_kv), int(num_heads_kv), capacity, batch_invariant);
    Tensor const metadata = at::empty({params.num_plan_rows, kWorkerRowInts}, cache_seqlens.options());
    Tensor const num_splits = at::empty({batch_size + 1}, cache_seqlens.options());
    params.cache_seqlens = cache_seqlens.const_data_ptr<int>();
    params.metadata = metadata.mutable_data_ptr<int>();
    params.num_splits = num_splits.mutable_data_ptr<int>();
    C10_CUDA_CHECK(launch_decode_schedule(params, c10::cuda::getCurrentCUDAStream(cache_seqlens.device().index())));
    return {metadata, num_splits};
}

}  // namespace flash_mla
