// The ops as C++ functions; flash_mla/ops.py has their schemas and says what they take and give.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace flash_mla {

std::tuple<at::Tensor, at::Tensor> decode_schedule(at::Tensor const& cache_seqlens, int64_t num_rows_per_head_kv,
                                                   int64_t num_heads_kv, bool batch_invariant);

std::tuple<at::Tensor, at::Tensor> dense_decode(at::Tensor const& q, at::Tensor const& k_cache,
                                                at::Tensor const& block_table, at::Tensor const& cache_seqlens,
                                                at::Tensor const& tile_scheduler_metadata, at::Tensor const& num_splits,
                                                double softmax_scale, bool causal, bool batch_invariant);

at::Tensor dense_decode_out(at::Tensor const& q, at::Tensor const& k_cache, at::Tensor const& block_table,
                            at::Tensor const& cache_seqlens, at::Tensor const& tile_scheduler_metadata,
                            at::Tensor const& num_splits, double softmax_scale, bool causal, bool batch_invariant,
                            at::Tensor& out);

void append_kv(at::Tensor const& kv_c, at::Tensor const& k_pe, at::Tensor& cache, at::Tensor const& slot_mapping);

}  // namespace flash_mla
