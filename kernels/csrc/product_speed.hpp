// SPDX-License-Identifier: Apache-2.0
// Whether products of bfloat16 pairs are worth their instruction. On some processors (Xeon, Emerald Rapids) it has half
// the rate of a float multiply-add, which does as much there once a weight is widened; on others (Zen 4) twice as much.
#pragma once

#include <algorithm>
#include <chrono>

#include "simd.hpp"

namespace heterospec {

#if defined(HETEROSPEC_BF16_DOT)

// Seconds of some independent `step`s on registers, the fastest of several runs.
template <typename Step>
double fastest(Step step) {
  double best = 1.0;
  for (int run = 0; run < 9; ++run) {
    __m512 sums[16];
#pragma GCC unroll 16
    for (int s = 0; s < 16; ++s) sums[s] = _mm512_set1_ps(float(s));
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 5000; ++i) {
#pragma GCC unroll 16
      for (int s = 0; s < 16; ++s) sums[s] = step(sums[s]);
    }
#pragma GCC unroll 16
    for (int s = 0; s < 16; ++s) asm volatile("" ::"v"(sums[s]));  // not to be left out
    best = std::min(
        best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

// Measured once a process, in two milliseconds; the rates are apart by two.
inline bool pairs_are_fast() {
  static const bool fast = [] {
    const __m512 ones = _mm512_set1_ps(1.0f);
    const double pair = fastest([&](__m512 sum) {
      return _mm512_dpbf16_ps(sum, (__m512bh)(__m512i)ones, (__m512bh)(__m512i)ones);
    });
    const double single = fastest([&](__m512 sum) { return _mm512_fmadd_ps(ones, ones, sum); });
    return pair < 1.5 * single;  // a pair does the work of two
  }();
  return fast;
}

#endif

}  // namespace heterospec
