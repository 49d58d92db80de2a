// What the tile schedulers share: the line of work of a batch, and finding places on it.
#pragma once

#include <cstdint>

#include "params/work_division.h"

namespace flash_mla {

inline constexpr int kThreads = 1024;
inline constexpr int kWarps = kThreads / 32;

__device__ inline int num_blocks_of(int seqlen) { return seqlen > 0 ? (seqlen - 1) / kPageSize + 1 : 0; }

// Inclusive scan of one value per thread over the CTA.
template <typename T>
__device__ T scan_inclusive(T value, T* warp_totals) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int delta = 1; delta < 32; delta *= 2) {
        T const below = __shfl_up_sync(~0u, value, delta);
        if (lane >= delta) value += below;
    }
    if (lane == 31) warp_totals[warp] = value;
    __syncthreads();
    if (warp == 0) {
        T total = warp_totals[lane];
        for (int delta = 1; delta < kWarps; delta *= 2) {
            T const below = __shfl_up_sync(~0u, total, delta);
            if (lane >= delta) total += below;
        }
        warp_totals[lane] = total;
    }
    __syncthreads();
    T const result = warp > 0 ? value + warp_totals[warp - 1] : value;
    __syncthreads();
    return result;
}

// The request whose stretch of the line holds cost x.
__device__ inline int find_request(int64_t const* start, int batch_size, int64_t x) {
    int low = 0, high = batch_size;  // start[low] <= x < start[high]
    while (high - low > 1) {
        int const middle = (low + high) / 2;
        (start[middle] <= x ? low : high) = middle;
    }
    return low;
}

}  // namespace flash_mla
