// How the copy engine sees the latent cache: in chunks of 64 columns, 128 bytes, one span of the swizzle.
#pragma once

#include <cuda.h>

#include "kernels/sm90/primitives/tensor_map.h"
#include "params/dense_decode.h"

namespace flash_mla::sm90 {

inline constexpr uint32_t kKChunkColumns = 64, kKLatentChunks = 8;

// (column, token, chunk, kv head, page), copied four chunks at a time, and (column, token, kv head, page).
struct KMaps {
    CUtensorMap latent, rope;
};

template <bool kIsBFloat16>
cudaError_t find_k_maps(KMaps* maps, DenseDecodeParams const& params) {
    constexpr int64_t kElementBytes = 2, kRowBytes = kHeadDim * kElementBytes;
    constexpr auto kType = kIsBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    constexpr uint32_t kColumns = kKChunkColumns;
    // A stride that is never used must still be a valid one.
    TensorMapAxis const token{uint64_t(kPageSize), params.k_token_stride * kElementBytes, uint32_t(kPageSize)};
    TensorMapAxis const head{uint64_t(params.num_heads_kv),
                             params.num_heads_kv > 1 ? params.k_head_stride * kElementBytes : kRowBytes, 1};
    TensorMapAxis const page{uint64_t(params.num_blocks),
                             params.num_blocks > 1 ? params.k_block_stride * kElementBytes : kRowBytes, 1};
    TensorMapAxis const chunk_column{kColumns, kElementBytes, kColumns};
    TensorMapAxis const chunk{kKLatentChunks, kColumns * kElementBytes, kKLatentChunks / 2};
    TensorMapAxis const column{uint64_t(kHeadDim), kElementBytes, kColumns};
    cudaError_t const error =
        find_tensor_map<5>(&maps->latent, {kType, params.k_cache, {{chunk_column, token, chunk, head, page}}});
    if (error != cudaSuccess) return error;
    return find_tensor_map<4>(&maps->rope, {kType, params.k_cache, {{column, token, head, page}}});
}

}  // namespace flash_mla::sm90
