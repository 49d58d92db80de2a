// New tokens into a paged cache: cache[slot / 64, slot % 64] = (kv_c[token], k_pe[token]), slot = slot_mapping[token].
//
// A thread copies one unit of a token: threadIdx.x is the unit, threadIdx.y the token within the CTA. Units are of 16
// bytes wherever ops/ finds all addresses and strides to be multiples of that, else they are the elements. Nothing is
// computed, so types do not matter: what arrives is what was there, NaN included.
//
// A token with a negative slot is not written, nor is one whose slot lies behind the end of the cache. Tokens of the
// same slot may be mixed with each other; callers promise that there are none.
#include "kernels/append_kv/append_kv.h"

#include <algorithm>
#include <cstdint>
#include <limits>

namespace flash_mla {
namespace {

constexpr int kMaxThreads = kHeadDim;  // a token in units of one element
constexpr int kThreadsWanted = 288;    // whole warps from tokens of 72 or of 144 units
constexpr int64_t kMaxCtas = std::numeric_limits<int>::max();

__device__ int64_t slot_of(AppendKvParams const& params, int64_t token) {
    int64_t const at = token * params.slot_stride;
    return params.slots_are_int64 ? static_cast<int64_t const*>(params.slot_mapping)[at]
                                  : static_cast<int32_t const*>(params.slot_mapping)[at];
}

template <typename Unit>
__global__ void __launch_bounds__(kMaxThreads) append_kv_kernel(__grid_constant__ AppendKvParams const params) {
    int const unit = threadIdx.x;
    bool const is_latent = unit < params.latent_units;
    char const* const source = is_latent ? params.kv_c + unit * params.kv_c_unit_stride
                                         : params.k_pe + (unit - params.latent_units) * params.k_pe_unit_stride;
    int64_t const source_token_stride = is_latent ? params.kv_c_token_stride : params.k_pe_token_stride;
    int64_t const token = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (token >= params.num_tokens) return;

    Unit const value = *reinterpret_cast<Unit const*>(source + token * source_token_stride);
    // Nothing has to be waited for: it only keeps the compiler from loading the value behind the test of the slot, so
    // that both are on their way at the same time.
    __syncwarp(__activemask());
    int64_t const slot = slot_of(params, token);
    if (slot < 0 || slot >= params.num_slots) return;
    int64_t const page = slot / kPageSize, offset = slot % kPageSize;
    char* const entry = params.cache + page * params.cache_block_stride + offset * params.cache_token_stride +
                        unit * params.cache_unit_stride;
    *reinterpret_cast<Unit*>(entry) = value;
}

}  // namespace

cudaError_t launch_append_kv(AppendKvParams const& params, cudaStream_t stream) {
    int const units = params.latent_units + params.rope_units;
    int64_t const tokens_per_cta = std::max(kThreadsWanted / units, 1);
    int64_t const num_ctas = (params.num_tokens + tokens_per_cta - 1) / tokens_per_cta;
    if (num_ctas > kMaxCtas) return cudaErrorInvalidConfiguration;
    dim3 const grid(static_cast<unsigned>(num_ctas));
    dim3 const block(units, static_cast<unsigned>(tokens_per_cta));
    switch (params.unit_bytes) {
        case 16:
            append_kv_kernel<uint4><<<grid, block, 0, stream>>>(params);
            break;
        case 4:
            append_kv_kernel<uint32_t><<<grid, block, 0, stream>>>(params);
            break;
        case 2:
            append_kv_kernel<uint16_t><<<grid, block, 0, stream>>>(params);
            break;
        default:
            return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

}  // namespace flash_mla
