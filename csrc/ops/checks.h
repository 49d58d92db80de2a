// What the ops check of their arguments. Messages name the argument, what was expected and what came; those of
// flash_mla/checks.py, for tensors that are not on a GPU, say the same.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace flash_mla {

using at::Tensor;

inline void check_on_device(char const* name, Tensor const& tensor, at::Device const& device, char const* owner = "q") {
    TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on ", device, ", where ", owner, " is, got ",
                      tensor.device());
}

// What torch hands to an op as tensor may be None.
inline void check_tensor(char const* name, Tensor const& tensor) {
    TORCH_CHECK_TYPE(tensor.defined(), name, " must be a torch.Tensor, got NoneType");
}

// As Python calls it.
inline std::string dtype_name(at::ScalarType type) { return "torch." + c10::getDtypeNames(type).first; }

inline void check_dtype(char const* name, Tensor const& tensor, at::ScalarType expected) {
    check_tensor(name, tensor);
    TORCH_CHECK_TYPE(tensor.scalar_type() == expected, name, " must have dtype ", dtype_name(expected), ", got ",
                     dtype_name(tensor.scalar_type()));
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

// Of what is read or copied 16 bytes at a time.
inline void check_address(char const* name, Tensor const& tensor) {
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name,
                      " must be aligned to 16 bytes, got an address that is not");
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
    check_address(name, tensor);
}

// Of a tensor that is written to: no two elements in one place. Takes dimensions that interleave for overlapping ones.
inline void check_elements_apart(char const* name, Tensor const& tensor) {
    std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
        if (tensor.size(dim) == 0) return;
        if (tensor.size(dim) > 1) dims.emplace_back(tensor.stride(dim), tensor.size(dim));
    }
    std::sort(dims.begin(), dims.end());
    int64_t extent = 1;
    for (auto const& [stride, size] : dims) {
        TORCH_CHECK_VALUE(stride >= extent, name, " must have a place of its own for every element, got strides ",
                          tensor.strides(), " for shape ", tensor.sizes());
        extent += (size - 1) * stride;
    }
}

// The addresses from the first to the last element of a tensor, end exclusive.
inline std::pair<uintptr_t, uintptr_t> address_span(Tensor const& tensor) {
    auto const begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    if (tensor.numel() == 0) return {begin, begin};
    int64_t last = 0;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
    return {begin, begin + (last + 1) * tensor.element_size()};
}

// Of a tensor that is written to while the other is read.
inline void check_apart_from(char const* name, Tensor const& tensor, char const* other_name, Tensor const& other) {
    auto const [begin, end] = address_span(tensor);
    auto const [other_begin, other_end] = address_span(other);
    TORCH_CHECK_VALUE(begin == end || other_begin == other_end || end <= other_begin || other_end <= begin, name,
                      " must lie apart from ", other_name, " in memory, got tensors that overlap");
}

// The stride of a dimension, 0 where it has at most one element and torch leaves the stride open.
inline int64_t stride_of(Tensor const& tensor, int64_t dim) { return tensor.size(dim) <= 1 ? 0 : tensor.stride(dim); }

}  // namespace flash_mla
