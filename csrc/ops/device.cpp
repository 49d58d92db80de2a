#include "ops/device.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include <array>
#include <mutex>

#include "kernels/sm90/swapped_decode/swapped_decode.h"

namespace flash_mla {
namespace {

ClusterCapacity ask_capacity(c10::Device const& device) {
    c10::cuda::CUDAGuard const guard(device);
    int major = 0, minor = 0, num_sms = 0;
    int const index = device.index();
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    TORCH_CHECK(major == 9 && minor == 0, "flash_mla's kernels need an sm_90 GPU (H100, H200, H800, H20), got sm_",
                major, minor, " (cuda:", index, ")");
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, index));
    ClusterCapacity capacity{};
    C10_CUDA_CHECK(sm90::ask_cluster_capacity(&capacity));
    // What runs beside us, under MPS for instance, must not change how many CTAs there are.
    capacity.num_clusters[1] = num_sms;
    return capacity;
}

}  // namespace

ClusterCapacity const& cluster_capacity_of(c10::Device const& device) {
    constexpr size_t kMaxDevices = 64;
    static std::array<ClusterCapacity, kMaxDevices> known;
    static std::array<std::once_flag, kMaxDevices> asked;
    int const index = device.index();
    TORCH_CHECK(index >= 0 && size_t(index) < kMaxDevices, "device index must be below ", kMaxDevices, ", got ", index);
    // Where asking throws, the next call asks again.
    std::call_once(asked[index], [&] { known[index] = ask_capacity(device); });
    return known[index];
}

}  // namespace flash_mla
