// K-major operands of wgmma in shared memory, as chunks of 64 rows × 16-bit columns that fill one span of the swizzle.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/sm90/primitives/pipeline.h"

namespace flash_mla::sm90 {

template <typename T>
__device__ uint32_t shared_address(T const& object) {
    return cute::cast_smem_ptr_to_uint(&object);
}

// Descriptors come from a base in a uniform register, where wgmma takes them from: a base in ordinary registers would
// cost a transfer per step, which takes about as long as the step.
class SwizzledOperand {
public:
    static constexpr int kRows = 64, kColumns = 64;
    static constexpr uint32_t kChunkBytes = kRows * kColumns * 2;
    static constexpr int kStepsPerChunk = kColumns / 16;

    __device__ explicit SwizzledOperand(uint32_t shared_address)
        : low_word_(uniform(shared_address / kUnit | kLeadingOffset)) {}

    // The operand of the k-th step of 16 columns: (1, 1), a descriptor.
    __device__ auto step(int k) const {
        constexpr uint32_t kStrideOffset = 8 * kColumns * 2 / kUnit;  // from 8 rows to the next 8
        constexpr uint32_t kSwizzle = 1u << 30;                       // of 128 bytes
        constexpr uint32_t kStepBytes = 16 * 2;
        uint32_t const offset = k / kStepsPerChunk * kChunkBytes + k % kStepsPerChunk * kStepBytes;
        uint64_t const descriptor = uint64_t(kStrideOffset | kSwizzle) << 32 | (low_word_ + offset / kUnit);
        return cute::make_tensor(cute::SM90::GMMA::DescriptorIterator{cute::GmmaDescriptor{descriptor}},
                                 cute::Layout<cute::Shape<cute::_1, cute::_1>, cute::Stride<cute::_0, cute::_0>>{});
    }

private:
    static constexpr uint32_t kUnit = 16;
    static constexpr uint32_t kLeadingOffset = 1 << 16;  // unused with this swizzle

    uint32_t low_word_;
};

}  // namespace flash_mla::sm90
