#include "ops/device.h"

#include <c10/cuda/CUDAException.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

namespace flash_mla {
namespace {

int ask_num_sms(int device) {
    int major = 0, minor = 0, num_sms = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    TORCH_CHECK(major == 9 && minor == 0, "flash_mla's kernels need an sm_90 GPU (H100, H200, H800, H20), got sm_",
                major, minor, " (cuda:", device, ")");
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
    return num_sms;
}

}  // namespace

int num_sms_of(c10::Device const& device) {
    constexpr size_t kMaxDevices = 64;
    static std::array<std::atomic<int>, kMaxDevices> known{};
    int const index = device.index();
    TORCH_CHECK(index >= 0 && size_t(index) < kMaxDevices, "device index must be below ", kMaxDevices, ", got ", index);
    int num_sms = known[index].load(std::memory_order_relaxed);
    if (num_sms == 0) {
        num_sms = ask_num_sms(index);
        known[index].store(num_sms, std::memory_order_relaxed);
    }
    return num_sms;
}

}  // namespace flash_mla
