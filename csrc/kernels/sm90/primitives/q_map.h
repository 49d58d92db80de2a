// How the copy engine sees the query rows, where their strides allow it.
#pragma once

#include "kernels/sm90/primitives/k_maps.h"

namespace flash_mla::sm90 {

struct DecodeMaps : KMaps {
    CUtensorMap q{};  // (column, query row, chunk, kv head, request), copied a tile and some of its chunks at a time
    bool has_q = false;
};

// Whether there is such a map: the rows of a kv head, token by token, have to be equally far from each other.
template <bool kIsBFloat16>
bool find_q_map(CUtensorMap* map, DenseDecodeParams const& params, uint32_t chunks_at_once) {
    bool const has_tokens = params.seqlen_q > 1, has_heads = params.heads_per_group > 1;
    int64_t const group_stride = params.heads_per_group * params.q_head_stride;
    if (has_tokens && has_heads && params.q_token_stride != group_stride) return false;
    int64_t const row_stride = has_heads ? params.q_head_stride : params.q_token_stride;
    TensorMapAxis const column{kKChunkColumns, kElementBytes, kKChunkColumns};
    TensorMapAxis const row = row_axis(params.rows_per_head_kv, row_stride, uint32_t(params.grid.rows_per_tile));
    TensorMapAxis const chunk{kHeadDim / kKChunkColumns, kKChunkColumns * kElementBytes, chunks_at_once};
    TensorMapAxis const head = row_axis(params.num_heads_kv, group_stride, 1);
    TensorMapAxis const batch = row_axis(params.batch_size, params.q_batch_stride, 1);
    return find_tensor_map<5>(map, {kMapType<kIsBFloat16>, params.q, {{column, row, chunk, head, batch}}}) ==
           cudaSuccess;
}

template <bool kIsBFloat16>
cudaError_t find_decode_maps(DecodeMaps* maps, DenseDecodeParams const& params, uint32_t q_chunks_at_once) {
    maps->has_q = find_q_map<kIsBFloat16>(&maps->q, params, q_chunks_at_once);
    return find_k_maps<kIsBFloat16>(maps, params);
}

}  // namespace flash_mla::sm90
