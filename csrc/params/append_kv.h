// Arguments of the kernel that writes new tokens into a paged cache.
#pragma once

#include <cstdint>

#include "params/work_division.h"

namespace flash_mla {

// Tokens are copied in units of 16 bytes, or of an element where addresses or strides allow no more. Strides are in
// bytes, but for that of the slots.
struct AppendKvParams {
    char const* kv_c;          // (num_tokens, latent_units)
    char const* k_pe;          // (num_tokens, rope_units)
    char* cache;               // (num_blocks, 64, latent_units + rope_units)
    void const* slot_mapping;  // (num_tokens,) int32 or int64; page * 64 + offset in the page, negative: not written

    int64_t kv_c_token_stride, kv_c_unit_stride;
    int64_t k_pe_token_stride, k_pe_unit_stride;
    int64_t cache_block_stride, cache_token_stride, cache_unit_stride;
    int64_t slot_stride;  // in elements

    int64_t num_tokens;
    int64_t num_slots;  // num_blocks * 64
    int unit_bytes;     // 16, 4 or 2
    int latent_units, rope_units;
    bool slots_are_int64;
};

}  // namespace flash_mla
