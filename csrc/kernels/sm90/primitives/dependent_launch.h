// Programmatic dependent launch: a kernel may be launched while the one before it in its stream still runs.
#pragma once

#include <cuda_runtime_api.h>

namespace flash_mla::sm90 {

// From here on the next kernel may be launched. It sees nothing of this one before it has waited for its end.
__device__ inline void allow_dependent_launch() { asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory"); }

// Waits until the kernel before has ended and what it wrote is visible.
__device__ inline void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;\n" ::: "memory"); }

// The attribute of a launch that need not wait for the end of the kernel before.
inline cudaLaunchAttribute dependent_launch_attribute() {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return attribute;
}

}  // namespace flash_mla::sm90
