// SPDX-License-Identifier: Apache-2.0
// Some rows of several matrices, side by side.
#pragma once

#include <cstdint>
#include <cstring>

namespace heterospec {

// Field order and sizes are those in structs.py.
struct RowSource {
  const char* data;
  int64_t row_stride, row_bytes;  // both in bytes
};
static_assert(sizeof(RowSource) == 24);

// Field order and sizes are those in structs.py; `num_sources` records of RowSource follow.
struct GatherArguments {
  int64_t num_sources, num_rows;
  const int64_t* rows;  // [num_rows]
  char* out;            // [num_rows, bytes of all sources' rows together], written

  const RowSource& source(int64_t i) const {
    return reinterpret_cast<const RowSource*>(this + 1)[i];
  }
};
static_assert(sizeof(GatherArguments) == 32);

inline void gather_rows(const GatherArguments& args) {
  int64_t width = 0;
  for (int64_t i = 0; i < args.num_sources; ++i) width += args.source(i).row_bytes;
  // A row takes less than a tenth of a microsecond, waking a thread several.
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (args.num_rows >= 256)
#endif
  for (int64_t r = 0; r < args.num_rows; ++r) {
    char* out = args.out + r * width;
    for (int64_t i = 0; i < args.num_sources; ++i) {
      const RowSource& source = args.source(i);
      std::memcpy(out, source.data + args.rows[r] * source.row_stride, source.row_bytes);
      out += source.row_bytes;
    }
  }
}

}  // namespace heterospec
