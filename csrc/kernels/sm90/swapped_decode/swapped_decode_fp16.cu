#include "kernels/sm90/swapped_decode/launch.cuh"

namespace flash_mla::sm90 {

template <>
cudaError_t launch_swapped_decode<ElementType::kFloat16, Summation::kByWorkers>(DenseDecodeParams const& params,
                                                                                cudaStream_t stream) {
    return launch_swapped_for_element<cutlass::half_t, Summation::kByWorkers>(params, stream);
}

}  // namespace flash_mla::sm90
