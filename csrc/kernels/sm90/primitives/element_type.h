// The type that stands for an ElementType in device code.
#pragma once

#include <cutlass/numeric_types.h>

#include <type_traits>

#include "params/dense_decode.h"

namespace flash_mla::sm90 {

template <ElementType kType>
using ElementOf = std::conditional_t<kType == ElementType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>;

}  // namespace flash_mla::sm90
