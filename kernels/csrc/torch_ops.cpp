// SPDX-License-Identifier: Apache-2.0
// Kernels as operators of torch: a compiled graph calls them without going through Python, in which the arguments of one
// call take as long as a small product. Through torch's stable ABI, whose headers compile in a second; a library of its
// own, so that the kernels' stays free of torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "packed_linear_arguments.hpp"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Entries of the kernels' library (kernels.cpp), set before the first call.
int (*packed_linear_entry)(const heterospec::PackedLinearArguments*) = nullptr;

// DTYPE_CODES in library.py.
int64_t code_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return 0;
    case ScalarType::BFloat16: return 1;
    case ScalarType::Half: return 2;
    default: return -1;
  }
}

Tensor empty_matrix(int64_t num_rows, int64_t num_columns, const Tensor& like) {
  const int64_t sizes[] = {num_rows, num_columns}, strides[] = {num_columns, 1};
  int32_t dtype, device;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, dtype, device, 0, &handle));
  return Tensor(handle);
}

// As packed_linear_cpu in packed_linear.py.
Tensor packed_linear(const Tensor& rows, const Tensor& packed, const std::optional<Tensor>& bias) {
  constexpr int64_t kLanes = 16;
  const int64_t num_columns = packed.size(0) * kLanes, depth = rows.size(1);
  STD_TORCH_CHECK(rows.dim() == 2 && rows.stride(1) == 1,
                  "packed_linear: rows are no matrix with adjacent columns");
  STD_TORCH_CHECK(packed.scalar_type() == rows.scalar_type() && packed.is_contiguous() &&
                      packed.numel() == num_columns * depth,
                  "packed_linear: the weight is not packed for rows of ", depth,
                  " values of that dtype");
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == rows.scalar_type() && bias->is_contiguous() &&
                            bias->numel() == num_columns),
                  "packed_linear: the bias is not of ", num_columns, " values of the rows' dtype");
  Tensor out = empty_matrix(rows.size(0), num_columns, rows);
  heterospec::PackedLinearArguments arguments;
  arguments.dtype = code_of(rows.scalar_type());
  arguments.num_rows = rows.size(0);
  arguments.depth = depth;
  arguments.num_columns = num_columns;
  arguments.input_stride = rows.stride(0);
  arguments.input = rows.data_ptr();
  arguments.weight = packed.data_ptr();
  arguments.bias = bias ? bias->data_ptr() : nullptr;
  arguments.out = out.data_ptr();
  STD_TORCH_CHECK(packed_linear_entry(&arguments) == 0,
                  "packed_linear: float32, bfloat16 and float16 are allowed");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heterospec, CPU, library) {
  library.impl("packed_linear", TORCH_BOX(&packed_linear));
}

extern "C" __attribute__((visibility("default"))) void heterospec_set_packed_linear(
    int (*entry)(const heterospec::PackedLinearArguments*)) {
  packed_linear_entry = entry;
}
