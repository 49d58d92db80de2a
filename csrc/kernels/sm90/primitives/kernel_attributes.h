// What has to be set once for a kernel before it can be launched.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>

namespace flash_mla::sm90 {

// Raises a kernel's shared-memory limit, once per device.
template <auto* kKernel>
cudaError_t allow_shared_memory(size_t bytes) {
    constexpr int kMaxDevices = 64;
    static std::once_flag done[kMaxDevices];
    static cudaError_t status[kMaxDevices];
    int device = 0;
    if (cudaError_t const error = cudaGetDevice(&device); error != cudaSuccess) return error;
    if (device >= kMaxDevices) return cudaErrorInvalidDevice;
    std::call_once(done[device], [&] {
        status[device] = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    });
    return status[device];
}

}  // namespace flash_mla::sm90
