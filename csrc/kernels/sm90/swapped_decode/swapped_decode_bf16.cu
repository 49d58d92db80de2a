#include "kernels/sm90/swapped_decode/launch.cuh"

namespace flash_mla::sm90 {

template cudaError_t launch_swapped_decode<ElementType::kBFloat16, Summation::kByWorkers>(DenseDecodeParams const&,
                                                                                          cudaStream_t);

cudaError_t ask_cluster_capacity(ClusterCapacity* capacity) {
    for (int size = 1; size <= kMaxSplitCtas; ++size) {
        // All variants have one CTA per SM, so that one stands for all.
        cudaError_t const error = count_clusters<SwappedDecodeTraits<cutlass::bfloat16_t, 16, Summation::kByWorkers>>(
            &capacity->num_clusters[size], size);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

}  // namespace flash_mla::sm90
