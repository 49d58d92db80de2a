// What the ops check of their arguments. Messages name the argument, what was expected and what came; those of
// flash_mla/checks.py, for tensors that are not on a GPU, say the same.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>

namespace flash_mla {

using at::Tensor;

inline void check_on_device(char const* name, Tensor const& tensor, at::Device const& device) {
    TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on ", device, ", where q is, got ", tensor.device());
}

inline void check_dtype(char const* name, Tensor const& tensor, at::ScalarType expected) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == expected, name, " must have dtype ", expected, ", got ",
                     tensor.scalar_type());
}

// -1 stands for any size.
inline void check_shape(char const* name, Tensor const& tensor, char const* expected,
                        std::initializer_list<int64_t> sizes) {
    bool matches = tensor.dim() == int64_t(sizes.size());
    if (matches) {
        int64_t dim = 0;
        for (int64_t const size : sizes) {
            matches &= size == -1 || tensor.size(dim) == size;
            ++dim;
        }
    }
    TORCH_CHECK_VALUE(matches, name, " must have shape ", expected, at::IntArrayRef(sizes), ", got ", tensor.sizes());
}

inline void check_contiguous(char const* name, Tensor const& tensor) {
    TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
}

// Rows of 16-bit elements that are copied 16 bytes at a time: contiguous in the last dimension, aligned in all others.
inline void check_rows(char const* name, Tensor const& tensor) {
    constexpr int64_t kAlignment = 8;
    int64_t const last = tensor.dim() - 1;
    TORCH_CHECK_VALUE(tensor.stride(last) == 1, name, " must be contiguous in its last dimension, got strides ",
                      tensor.strides());
    for (int64_t dim = 0; dim < last; ++dim) {
        TORCH_CHECK_VALUE(tensor.size(dim) <= 1 || tensor.stride(dim) % kAlignment == 0, name,
                          " must have strides that are multiples of 8 elements, got strides ", tensor.strides());
    }
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name,
                      " must be aligned to 16 bytes, got an address that is not");
}

// The stride of a dimension, 0 where it has at most one element and torch leaves the stride open.
inline int64_t stride_of(Tensor const& tensor, int64_t dim) { return tensor.size(dim) <= 1 ? 0 : tensor.stride(dim); }

}  // namespace flash_mla
