// SPDX-License-Identifier: Apache-2.0
// A target's tap states on their way into the draft head: each tap normed on its own, then one
// linear layer over all of them.
#pragma once

#include <cmath>

#include "attend.hpp"
#include "dot.hpp"

namespace heterospec {

// Field order and sizes are those of `_PACK` in tap_fusion_cpu.py. Matrices are contiguous.
struct TapArguments {
  int64_t dtype, num_rows, num_taps, tap_size, num_columns;
  double epsilon;
  const void *features, *norms, *weight;  // norms: [num_taps, tap_size], or null for none
  void* fused;                            // [num_rows, num_columns], written
};

template <typename T, typename L>
void norm_tap(const T* from, const T* weight, L* to, int64_t size, float epsilon) {
  vf16 squares = splat(0.0f);
  for (int64_t i = 0; i < size; i += kLanes) squares += load(from + i) * load(from + i);
  const float scale = 1.0f / std::sqrt(reduce_add(squares) / size + epsilon);
  for (int64_t i = 0; i < size; i += kLanes)
    store(to + i, load(from + i) * scale * load(weight + i));
}

template <typename T>
void fuse_taps(const TapArguments& args) {
  using L = typename Left<T>::type;
  static thread_local Buffer<L> lefts;
  static thread_local Buffer<float> floats;
  const int64_t depth = args.num_taps * args.tap_size;
  L* left = lefts.at_least(args.num_rows * depth);
  float* sums = floats.at_least(args.num_rows * args.num_columns);
  const T* features = static_cast<const T*>(args.features);
  const T* norms = static_cast<const T*>(args.norms);
#pragma omp parallel
  {
    for (Share s(args.num_rows * args.num_taps); s.begin < s.end; ++s.begin) {
      const int64_t at = s.begin * args.tap_size;
      if (norms != nullptr)
        norm_tap(features + at, norms + s.begin % args.num_taps * args.tap_size, left + at,
                 args.tap_size, float(args.epsilon));
      else
        for (int64_t i = 0; i < args.tap_size; i += kLanes)
          store(left + at + i, load(features + at + i));
    }
#pragma omp barrier
    const Share columns(args.num_columns, kDotColumns);
    project<T>(left, depth, args.num_rows, static_cast<const T*>(args.weight), depth, columns,
               sums, args.num_columns);
#pragma omp barrier
    T* fused = static_cast<T*>(args.fused);
    for (Share s(args.num_rows * args.num_columns, kLanes); s.begin < s.end; s.begin += kLanes)
      store(fused + s.begin, load(sums + s.begin));
  }
}

}  // namespace heterospec
