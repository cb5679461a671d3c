// SPDX-License-Identifier: Apache-2.0
// What is done to a row on its way between two linear layers. Sizes are multiples of kLanes.
#pragma once

#include <cmath>

#include "simd.hpp"

namespace heterospec {

// To another type, or as it is.
template <typename From, typename To>
void convert(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(from + i));
}

template <typename T, typename From, typename To>
void rms_norm(const From* from, const T* weight, To* to, int64_t size, float epsilon) {
  vf16 squares = splat(0.0f);
  for (int64_t i = 0; i < size; i += kLanes) squares += load(from + i) * load(from + i);
  const float scale = 1.0f / std::sqrt(reduce_add(squares) / size + epsilon);
  for (int64_t i = 0; i < size; i += kLanes)
    store(to + i, load(from + i) * scale * load(weight + i));
}

}  // namespace heterospec
