// How the copy engine sees the latent cache: in chunks of 64 columns, 128 bytes, one span of the swizzle.
#pragma once

#include <cuda.h>

#include "kernels/sm90/primitives/tensor_map.h"
#include "params/dense_decode.h"

namespace flash_mla::sm90 {

inline constexpr uint32_t kKChunkColumns = 64, kKLatentChunks = 8;

// The axes that all maps of a cache share.
template <bool kIsBFloat16>
struct KAxes {
    static constexpr int64_t kElementBytes = 2, kRowBytes = kHeadDim * kElementBytes;
    static constexpr auto kType = kIsBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    static constexpr uint32_t kColumns = kKChunkColumns;

    DenseDecodeParams const& params;

    TensorMapAxis token() const {
        return {uint64_t(kPageSize), params.k_token_stride * kElementBytes, uint32_t(kPageSize)};
    }
    // A stride that is never used must still be a valid one.
    TensorMapAxis head() const {
        return {uint64_t(params.num_heads_kv),
                params.num_heads_kv > 1 ? params.k_head_stride * kElementBytes : kRowBytes, 1};
    }
    TensorMapAxis page() const {
        return {uint64_t(params.num_blocks), params.num_blocks > 1 ? params.k_block_stride * kElementBytes : kRowBytes,
                1};
    }
    // (column, token, chunk, kv head, page), copied some chunks at a time.
    cudaError_t find_chunks(CUtensorMap* map, uint32_t num_chunks, uint32_t chunks_at_once) const {
        TensorMapAxis const column{kColumns, kElementBytes, kColumns};
        TensorMapAxis const chunk{num_chunks, kColumns * kElementBytes, chunks_at_once};
        return find_tensor_map<5>(map, {kType, params.k_cache, {{column, token(), chunk, head(), page()}}});
    }
};

// Latent columns, half of them at a time, and RoPE columns: (column, token, kv head, page).
struct KMaps {
    CUtensorMap latent, rope;
};

template <bool kIsBFloat16>
cudaError_t find_k_maps(KMaps* maps, DenseDecodeParams const& params) {
    KAxes<kIsBFloat16> const axes{params};
    cudaError_t const error = axes.find_chunks(&maps->latent, kKLatentChunks, kKLatentChunks / 2);
    if (error != cudaSuccess) return error;
    TensorMapAxis const column{uint64_t(kHeadDim), axes.kElementBytes, axes.kColumns};
    return find_tensor_map<4>(&maps->rope,
                              {axes.kType, params.k_cache, {{column, axes.token(), axes.head(), axes.page()}}});
}

// All columns, in thirds.
inline constexpr uint32_t kKThirds = 3, kKChunksPerThird = (kKLatentChunks + 1) / kKThirds;

template <bool kIsBFloat16>
cudaError_t find_k_thirds_map(CUtensorMap* map, DenseDecodeParams const& params) {
    return KAxes<kIsBFloat16>{params}.find_chunks(map, kKLatentChunks + 1, kKChunksPerThird);
}

}  // namespace flash_mla::sm90
