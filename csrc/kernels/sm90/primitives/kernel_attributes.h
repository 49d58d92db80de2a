// What has to be set once for a kernel before it can be launched.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

namespace flash_mla::sm90 {

// Once per device. Where it fails, the next call tries again.
template <auto* kKernel, cudaFuncAttribute kAttribute>
cudaError_t set_attribute(int value) {
    constexpr int kMaxDevices = 64;
    static std::atomic<bool> is_set[kMaxDevices];
    int device = 0;
    if (cudaError_t const error = cudaGetDevice(&device); error != cudaSuccess) return error;
    if (device >= kMaxDevices) return cudaErrorInvalidDevice;
    if (is_set[device]) return cudaSuccess;
    cudaError_t const error = cudaFuncSetAttribute(kKernel, kAttribute, value);
    if (error == cudaSuccess) is_set[device] = true;
    return error;
}

// Raises a kernel's shared-memory limit.
template <auto* kKernel>
cudaError_t allow_shared_memory(size_t bytes) {
    return set_attribute<kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize>(int(bytes));
}

// Of more than 8 CTAs.
template <auto* kKernel>
cudaError_t allow_large_clusters() {
    return set_attribute<kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed>(1);
}

}  // namespace flash_mla::sm90
