#include "kernels/append_kv/append_kv.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "ops/checks.h"
#include "ops/device.h"
#include "ops/ops.h"

namespace flash_mla {
namespace {

constexpr int64_t kRopeDim = kHeadDim - kHeadDimV;
constexpr int64_t kVectorBytes = 16;

void check_arguments(Tensor const& kv_c, Tensor const& k_pe, Tensor const& cache, Tensor const& slot_mapping) {
    check_tensor("cache", cache);
    check_tensor("slot_mapping", slot_mapping);
    at::ScalarType const type = cache.scalar_type(), slot_type = slot_mapping.scalar_type();
    TORCH_CHECK_TYPE(type == at::kBFloat16 || type == at::kHalf || type == at::kFloat,
                     "cache must have dtype torch.bfloat16, torch.float16 or torch.float32, got ", dtype_name(type));
    check_shape("cache", cache, "(num_blocks, page_size, 1, head_dim) = ", {-1, kPageSize, 1, kHeadDim});
    check_dtype("kv_c", kv_c, type);
    check_dtype("k_pe", k_pe, type);
    TORCH_CHECK_TYPE(slot_type == at::kInt || slot_type == at::kLong,
                     "slot_mapping must have dtype torch.int32 or torch.int64, got ", dtype_name(slot_type));
    check_shape("kv_c", kv_c, "(num_tokens, latent_dim) = ", {-1, kHeadDimV});
    int64_t const num_tokens = kv_c.size(0);
    if (k_pe.dim() == 3) {
        check_shape("k_pe", k_pe, "(num_tokens, 1, rope_dim) = ", {num_tokens, 1, kRopeDim});
    } else {
        check_shape("k_pe", k_pe, "(num_tokens, rope_dim) or (num_tokens, 1, rope_dim) = ", {num_tokens, kRopeDim});
    }
    check_shape("slot_mapping", slot_mapping, "(num_tokens,) = ", {num_tokens});
    check_on_device("kv_c", kv_c, cache.device(), "cache");
    check_on_device("k_pe", k_pe, cache.device(), "cache");
    check_on_device("slot_mapping", slot_mapping, cache.device(), "cache");
}

// Whether all rows can be copied 16 bytes at a time.
bool has_vector_rows(Tensor const& tensor) {
    int64_t const last = tensor.dim() - 1;
    bool fits = tensor.stride(last) == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kVectorBytes == 0;
    for (int64_t dim = 0; dim < last; ++dim) {
        fits &= stride_of(tensor, dim) * tensor.element_size() % kVectorBytes == 0;
    }
    return fits;
}

}  // namespace

void append_kv(Tensor const& kv_c, Tensor const& k_pe, Tensor& cache, Tensor const& slot_mapping) {
    check_arguments(kv_c, k_pe, cache, slot_mapping);
    if (kv_c.size(0) == 0 || cache.size(0) == 0) return;
    c10::cuda::CUDAGuard const guard(cache.device());
    cluster_capacity_of(cache.device());  // an error on GPUs that the kernel was not compiled for

    int64_t const element_bytes = cache.element_size();
    bool const in_vectors = has_vector_rows(kv_c) && has_vector_rows(k_pe) && has_vector_rows(cache);
    int64_t const elements_per_unit = in_vectors ? kVectorBytes / element_bytes : 1;
    auto const token_stride = [&](Tensor const& tensor) { return stride_of(tensor, 0) * element_bytes; };
    auto const unit_stride = [&](Tensor const& tensor) {
        return tensor.stride(tensor.dim() - 1) * elements_per_unit * element_bytes;
    };

    AppendKvParams params{};
    params.kv_c = static_cast<char const*>(kv_c.const_data_ptr());
    params.k_pe = static_cast<char const*>(k_pe.const_data_ptr());
    params.cache = static_cast<char*>(cache.mutable_data_ptr());
    params.slot_mapping = slot_mapping.const_data_ptr();
    params.kv_c_token_stride = token_stride(kv_c);
    params.kv_c_unit_stride = unit_stride(kv_c);
    params.k_pe_token_stride = token_stride(k_pe);
    params.k_pe_unit_stride = unit_stride(k_pe);
    params.cache_block_stride = stride_of(cache, 0) * element_bytes;
    params.cache_token_stride = cache.stride(1) * element_bytes;
    params.cache_unit_stride = unit_stride(cache);
    params.slot_stride = stride_of(slot_mapping, 0);
    params.num_tokens = kv_c.size(0);
    params.num_slots = cache.size(0) * kPageSize;
    params.unit_bytes = int(elements_per_unit * element_bytes);
    params.latent_units = int(kHeadDimV / elements_per_unit);
    params.rope_units = int(kRopeDim / elements_per_unit);
    params.slots_are_int64 = slot_mapping.scalar_type() == at::kLong;
    C10_CUDA_CHECK(launch_append_kv(params, c10::cuda::getCurrentCUDAStream(cache.device().index())));
}

}  // namespace flash_mla
