// Stores into the shared memory of another CTA of the cluster, counted by a barrier there.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include <cstdint>

namespace flash_mla::sm90 {

// An address in this CTA's shared memory, in that of another one.
__device__ inline uint32_t remote_address(uint32_t shared_address, int rank) {
    return cute::set_block_rank(shared_address, rank);
}

__device__ inline void store_remote(uint32_t remote_address, float4 const& value, uint32_t remote_barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(
                     remote_address),
                 "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(remote_barrier)
                 : "memory");
}
__device__ inline void store_remote(uint32_t remote_address, float2 const& value, uint32_t remote_barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];\n" ::"r"(remote_address),
        "f"(value.x), "f"(value.y), "r"(remote_barrier)
        : "memory");
}

}  // namespace flash_mla::sm90
