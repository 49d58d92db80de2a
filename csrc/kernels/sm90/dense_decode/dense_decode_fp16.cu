#include "kernels/sm90/dense_decode/launch.cuh"

namespace flash_mla::sm90 {

template <>
cudaError_t launch_dense_decode<ElementType::kFloat16, Summation::kByWorkers>(DenseDecodeParams const& params,
                                                                              cudaStream_t stream) {
    return launch_for_element<cutlass::half_t, Summation::kByWorkers>(params, stream);
}

}  // namespace flash_mla::sm90
