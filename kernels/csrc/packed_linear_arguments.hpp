// SPDX-License-Identifier: Apache-2.0
// What a linear layer over packed weights is called with, for the kernel (packed_linear.hpp) and its operator
// (torch_ops.cpp), which is built without the kernel's instruction set.
#pragma once

#include <cstdint>

namespace heterospec {

// Field order and sizes are those in structs.py. Matrices are contiguous but for the input's rows.
struct PackedLinearArguments {
  int64_t dtype, num_rows, depth, num_columns, input_stride;
  const void *input, *weight, *bias;  // weight: packed; bias: [num_columns], or null for none
  void* out;                          // [num_rows, num_columns], written
};
static_assert(sizeof(PackedLinearArguments) == 72);

}  // namespace heterospec
