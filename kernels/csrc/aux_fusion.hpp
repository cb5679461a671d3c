// SPDX-License-Identifier: Apache-2.0
// A target's aux hidden states on their way into the draft head: each tap normed on its own, then one
// linear layer over all of them.
#pragma once

#include "linear.hpp"
#include "rows.hpp"

namespace heterospec {

// Field order and sizes are those in structs.py. Matrices are contiguous, the weight is packed.
struct AuxFusionArguments {
  int64_t dtype, num_rows, num_aux, aux_size, num_columns;
  double epsilon;
  const void *features, *norms, *weight;  // norms: [num_aux, aux_size], or null for none
  void* fused;                            // [num_rows, num_columns], written
};
static_assert(sizeof(AuxFusionArguments) == 80);

// L: what rows are multiplied as, bfloat16 for products of pairs.
template <typename T, typename L>
void fuse_aux(const AuxFusionArguments& args) {
  static thread_local Buffer<L> lefts;
  static thread_local Buffer<float> floats;
  const int64_t depth = args.num_aux * args.aux_size;
  L* left = lefts.at_least(whole_tiles(args.num_rows) * depth);
  float* sums = floats.at_least(whole_tiles(args.num_rows) * args.num_columns);
  const T* features = static_cast<const T*>(args.features);
  const T* norms = static_cast<const T*>(args.norms);
#pragma omp parallel
  {
    for (Share s(args.num_rows * args.num_aux); s.begin < s.end; ++s.begin) {
      const int64_t at = s.begin * args.aux_size;
      if (norms != nullptr)
        rms_norm(features + at, norms + s.begin % args.num_aux * args.aux_size, left + at,
                 args.aux_size, float(args.epsilon));
      else
        convert(features + at, left + at, args.aux_size);
    }
#pragma omp barrier
    project(left, depth, args.num_rows, static_cast<const T*>(args.weight), depth, args.num_columns,
            sums, args.num_columns);
#pragma omp barrier
    const Share all(args.num_rows * args.num_columns, kLanes);
    convert(sums + all.begin, static_cast<T*>(args.fused) + all.begin, all.end - all.begin);
  }
}

}  // namespace heterospec
