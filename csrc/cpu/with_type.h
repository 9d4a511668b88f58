// Calls a generic function with the type of a dtype.
#pragma once

#include "common/dtype.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Calls body(T{}) for the type of the dtype.
template <class Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kFloat16:
      return body(Float16{});
    default:  // kBFloat16; group norm does not take kUInt8
      return body(BFloat16{});
  }
}

// Calls body(T{}) for the dtypes of the convolutions.
template <class Body>
void with_conv_type(DType dtype, Body body) {
  dtype == DType::kBFloat16 ? body(BFloat16{}) : body(float{});  // Python passes no other dtypes
}

// Calls body(T{}, P{}) for the dtype of maps and that of packed weights, which is the same or float32.
template <class Body>
void with_conv_types(DType maps, DType packed, Body body) {
  with_conv_type(maps, [&](auto type) { maps == packed ? body(type, type) : body(type, float{}); });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
