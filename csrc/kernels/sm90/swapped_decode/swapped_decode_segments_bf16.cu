#include "kernels/sm90/swapped_decode/launch.cuh"

namespace flash_mla::sm90 {

template <>
cudaError_t launch_swapped_decode<ElementType::kBFloat16, Summation::kBySegments>(DenseDecodeParams const& params,
                                                                                  cudaStream_t stream) {
    return launch_swapped_for_element<cutlass::bfloat16_t, Summation::kBySegments>(params, stream);
}

}  // namespace flash_mla::sm90
