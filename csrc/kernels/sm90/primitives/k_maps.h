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

inline constexpr int64_t kElementBytes = 2;

template <bool kIsBFloat16>
inline constexpr auto kMapType = kIsBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;

// Along which whole rows of kHeadDim columns are so many elements apart. A stride that is never used must still be a
// valid one.
inline TensorMapAxis row_axis(int extent, int64_t stride, uint32_t box) {
    return {uint64_t(extent), (extent > 1 ? stride : kHeadDim) * kElementBytes, box};
}

template <bool kIsBFloat16>
cudaError_t find_k_maps(KMaps* maps, DenseDecodeParams const& params) {
    constexpr auto kType = kMapType<kIsBFloat16>;
    constexpr uint32_t kColumns = kKChunkColumns;
    TensorMapAxis const token = row_axis(kPageSize, params.k_token_stride, kPageSize);
    TensorMapAxis const head = row_axis(params.num_heads_kv, params.k_head_stride, 1);
    TensorMapAxis const page = row_axis(params.num_blocks, params.k_block_stride, 1);
    TensorMapAxis const chunk_column{kColumns, kElementBytes, kColumns};
    TensorMapAxis const chunk{kKLatentChunks, kColumns * kElementBytes, kKLatentChunks / 2};
    TensorMapAxis const column{uint64_t(kHeadDim), kElementBytes, kColumns};
    cudaError_t const error =
        find_tensor_map<5>(&maps->latent, {kType, params.k_cache, {{chunk_column, token, chunk, head, page}}});
    if (error != cudaSuccess) return error;
    return find_tensor_map<4>(&maps->rope, {kType, params.k_cache, {{column, token, head, page}}});
}

}  // namespace flash_mla::sm90
