// Operands of wgmma in shared memory, in chunks of 64 columns of 16 bits, one span of the swizzle, and of 64 rows if
// not said otherwise.
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
template <cute::GMMA::Major kMajor, int kRows = 64>
class SwizzledOperand {
public:
    static constexpr int kColumns = 64, kRowBytes = kColumns * 2;
    static constexpr uint32_t kChunkBytes = kRows * kRowBytes;
    static constexpr int kStepsPerChunk = kColumns / 16;

    __device__ explicit SwizzledOperand(uint32_t shared_address)
        : low_word_(uniform(shared_address % kAddresses / kUnit | kLeadingOffset << 16)) {}

    // The operand of the k-th step, of 16 columns or, transposed, of 16 rows, from a chunk on: (1, 1), a descriptor.
    __device__ auto step(int k, int chunk = 0) const {
        constexpr uint32_t kStrideOffset = 8 * kRowBytes / kUnit;  // from 8 rows to the next 8
        constexpr uint32_t kSwizzle = 1u << 30;                    // of 128 bytes
        uint32_t const offset =
            kIsTransposed ? k * 16 * kRowBytes : k / kStepsPerChunk * kChunkBytes + k % kStepsPerChunk * 16 * 2;
        uint64_t const descriptor =
            uint64_t(kStrideOffset | kSwizzle) << 32 | (low_word_ + (chunk * kChunkBytes + offset) / kUnit);
        return cute::make_tensor(cute::SM90::GMMA::DescriptorIterator{cute::GmmaDescriptor{descriptor}},
                                 cute::Layout<cute::Shape<cute::_1, cute::_1>, cute::Stride<cute::_0, cute::_0>>{});
    }

private:
    static constexpr bool kIsTransposed = kMajor == cute::GMMA::Major::MN;
    static constexpr uint32_t kUnit = 16;
    static constexpr uint32_t kAddresses = 1 << 18;  // above that an address says which CTA of a cluster it belongs to
    // From a chunk to the next one; unused where k runs along the columns.
    static constexpr uint32_t kLeadingOffset = kIsTransposed ? kChunkBytes / kUnit : 1;

    uint32_t low_word_;
};

// Multiplied along their columns, or along their rows.
template <int kRows>
using ColumnwiseOperandOf = SwizzledOperand<cute::GMMA::Major::K, kRows>;
using ColumnwiseOperand = ColumnwiseOperandOf<64>;
using RowwiseOperand = SwizzledOperand<cute::GMMA::Major::MN>;

}  // namespace flash_mla::sm90
