#include "kernels/sm90/swapped_decode/launch.cuh"

namespace flash_mla::sm90 {

template cudaError_t launch_swapped_decode<ElementType::kFloat16, Summation::kByWorkers>(DenseDecodeParams const&,
                                                                                         cudaStream_t);

}  // namespace flash_mla::sm90
