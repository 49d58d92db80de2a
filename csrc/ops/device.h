// What the ops need to know of the GPU they run on, asked once per device.
#pragma once

#include <c10/core/Device.h>

#include "params/work_division.h"

namespace flash_mla {

// What runs at once on a GPU that the kernels run on; a RuntimeError for any other.
ClusterCapacity const& cluster_capacity_of(c10::Device const& device);

}  // namespace flash_mla
