// SPDX-License-Identifier: Apache-2.0
// The one place that asks OpenMP; without it there is one thread.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <cstdint>

namespace heterospec {

#if defined(_OPENMP)
inline int max_threads() { return omp_get_max_threads(); }
inline int team_size() { return omp_get_num_threads(); }
inline int team_member() { return omp_get_thread_num(); }
#else
inline int max_threads() { return 1; }
inline int team_size() { return 1; }
inline int team_member() { return 0; }
#endif

// This thread's part of `count` things that are dealt out in whole `unit`s.
struct Share {
  int64_t begin, end;

  explicit Share(int64_t count, int64_t unit = 1) {
    const int64_t units = (count + unit - 1) / unit, member = team_member(), size = team_size();
    begin = std::min(count, units * member / size * unit);
    end = std::min(count, units * (member + 1) / size * unit);
  }
};

}  // namespace heterospec
