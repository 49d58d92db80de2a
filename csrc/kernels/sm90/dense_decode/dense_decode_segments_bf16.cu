#include "kernels/sm90/dense_decode/launch.cuh"

namespace flash_mla::sm90 {

template cudaError_t launch_dense_decode<ElementType::kBFloat16, Summation::kBySegments>(DenseDecodeParams const&,
                                                                                         cudaStream_t);

}  // namespace flash_mla::sm90
