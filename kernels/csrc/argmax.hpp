// SPDX-License-Identifier: Apache-2.0
// The index of the largest value of some rows of a matrix, without converting or copying them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace heterospec {

// Field order and sizes are those in structs.py. Strides count elements.
struct ArgmaxArguments {
  int64_t element_size, num_rows, num_columns, row_stride;
  const void* values;
  const int64_t* rows;  // [num_rows]
  int64_t* indices;     // [num_rows], written
};
static_assert(sizeof(ArgmaxArguments) == 56);

template <typename T>
using IntOf = std::conditional_t<sizeof(T) == 2, int16_t, int32_t>;

// IEEE floats of any width as integers of the same order: a positive NaN is above infinity, and the
// two zeros are equal.
template <typename Int>
inline Int order_key(Int bits) {
  const Int key = bits ^ ((bits >> (8 * sizeof(Int) - 1)) & std::numeric_limits<Int>::max());
  return key == Int(-1) ? Int(0) : key;
}

template <typename Int>
int64_t argmax(const Int* row, int64_t count) {
  constexpr int64_t kBlock = 2048;
  int64_t best_block = 0;
  Int best = std::numeric_limits<Int>::min();
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t end = std::min(first + kBlock, count);
    Int largest = std::numeric_limits<Int>::min();
    for (int64_t i = first; i < end; ++i) largest = std::max(largest, order_key(row[i]));
    if (largest > best) {
      best = largest;
      best_block = first;
    }
  }
  int64_t index = best_block;
  while (order_key(row[index]) != best) ++index;
  return index;
}

template <typename Int>
void argmax_rows(const ArgmaxArguments& args) {
  const Int* values = static_cast<const Int*>(args.values);
  // A row of some ten thousand values takes a few microseconds, about what waking a thread costs.
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (args.num_rows >= 8)
#endif
  for (int64_t i = 0; i < args.num_rows; ++i)
    args.indices[i] = argmax(values + args.rows[i] * args.row_stride, args.num_columns);
}

}  // namespace heterospec
