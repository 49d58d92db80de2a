// What the ops need to know of the GPU they run on, asked once per device.
#pragma once

#include <c10/core/Device.h>

namespace flash_mla {

// Number of SMs of a GPU the kernels run on; a RuntimeError for any other.
int num_sms_of(c10::Device const& device);

}  // namespace flash_mla
