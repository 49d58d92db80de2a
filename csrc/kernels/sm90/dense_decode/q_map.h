// How the copy engine sees the query rows, where their strides allow it.
#pragma once

#include "kernels/sm90/primitives/k_maps.h"

namespace flash_mla::sm90 {

struct DenseDecodeMaps : KMaps {
    CUtensorMap q{};  // (column, query row, kv head, request), copied 64 columns of a tile at a time
    bool has_q = false;
};

// Whether there is such a map: the rows of a kv head, token by token, have to be equally far from each other.
template <bool kIsBFloat16>
bool find_q_map(CUtensorMap* map, DenseDecodeParams const& params) {
    constexpr int64_t kElementBytes = 2, kRowBytes = kHeadDim * kElementBytes;
    constexpr auto kType = kIsBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    bool const has_tokens = params.seqlen_q > 1, has_heads = params.heads_per_group > 1;
    if (has_tokens && has_heads && params.q_token_stride != params.heads_per_group * params.q_head_stride) return false;
    // A stride that is never used must still be a valid one.
    auto const stride = [](bool is_used, int64_t elements) { return is_used ? elements * kElementBytes : kRowBytes; };
    int64_t const row_stride =
        has_heads ? stride(true, params.q_head_stride) : stride(has_tokens, params.q_token_stride);
    TensorMapAxis const column{uint64_t(kHeadDim), kElementBytes, kKChunkColumns};
    TensorMapAxis const row{uint64_t(params.rows_per_head_kv), row_stride, uint32_t(kBlockM)};
    TensorMapAxis const head{uint64_t(params.num_heads_kv),
                             stride(params.num_heads_kv > 1, params.heads_per_group * params.q_head_stride), 1};
    TensorMapAxis const batch{uint64_t(params.batch_size), stride(params.batch_size > 1, params.q_batch_stride), 1};
    return find_tensor_map<4>(map, {kType, params.q, {{column, row, head, batch}}}) == cudaSuccess;
}

}  // namespace flash_mla::sm90
