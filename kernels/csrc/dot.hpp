// SPDX-License-Identifier: Apache-2.0
// Linear layers over a few rows: out[row, column] = left[row, :] . weight[column, :], the weight as
// checkpoints hold it. With so few rows the time is that of reading the weight once.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <type_traits>

#include "gemm.hpp"

namespace heterospec {

// Columns of a weight are a multiple of this, its depth of 32 (linear_cpu.py).
constexpr int kDotColumns = 8;

inline int team_size() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

inline int team_member() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// This thread's part of `count` things that are dealt out in whole `unit`s.
struct Share {
  int64_t begin, end;

  explicit Share(int64_t count, int64_t unit = 1) {
    const int64_t units = (count + unit - 1) / unit, member = team_member(), size = team_size();
    begin = std::min(count, units * member / size * unit);
    end = std::min(count, units * (member + 1) / size * unit);
  }
};

template <typename T, int kRows, int kColumns>
void dot_tile(const typename Left<T>::type* left, int64_t left_stride, const T* weight,
              int64_t depth, float* out, int64_t out_stride) {
#if defined(HETEROSPEC_BF16_DOT)
  if constexpr (std::is_same_v<T, bf16>) {
    // The tile after this one follows in memory.
    const T* ahead = weight + kColumns * depth;
    __m512 acc[kRows][kColumns] = {};
    for (int64_t k = 0; k < depth; k += 2 * kLanes) {
      __m512bh right[kColumns];
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        right[c] = (__m512bh)load_raw<__m512i>(weight + c * depth + k);
        __builtin_prefetch(ahead + c * depth + k, 0, 2);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512bh x = (__m512bh)load_raw<__m512i>(left + r * left_stride + k);
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], x, right[c]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kColumns; ++c)
        out[r * out_stride + c] = _mm512_reduce_add_ps(acc[r][c]);
    return;
  } else
#endif
  {
    vf acc[kRows][kColumns] = {};
    for (int64_t k = 0; k < depth; k += kLanesOf<vf>) {
      vf x[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) x[r] = load<vf>(left + r * left_stride + k);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        const vf right = load<vf>(weight + c * depth + k);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r][c] += x[r] * right;
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kColumns; ++c) out[r * out_stride + c] = reduce_add(acc[r][c]);
  }
}

// Columns [columns.begin, columns.end) of all rows; both ends multiples of kDotColumns.
template <typename T>
void project(const typename Left<T>::type* left, int64_t left_stride, int64_t num_rows,
             const T* weight, int64_t depth, Share columns, float* out, int64_t out_stride) {
  constexpr int kHalf = kDotColumns / 2;
  for (int64_t c = columns.begin; c < columns.end; c += kDotColumns) {
    const T* tile = weight + c * depth;
    if (num_rows == 1) {
      dot_tile<T, 1, kDotColumns>(left, left_stride, tile, depth, out + c, out_stride);
      continue;
    }
    for (int half = 0; half < 2; ++half, tile += kHalf * depth) {
      for (int64_t r = 0; r < num_rows; r += 4) {
        const auto* x = left + r * left_stride;
        float* to = out + r * out_stride + c + half * kHalf;
        switch (num_rows - r) {
          case 1: dot_tile<T, 1, kHalf>(x, left_stride, tile, depth, to, out_stride); break;
          case 2: dot_tile<T, 2, kHalf>(x, left_stride, tile, depth, to, out_stride); break;
          case 3: dot_tile<T, 3, kHalf>(x, left_stride, tile, depth, to, out_stride); break;
          default: dot_tile<T, 4, kHalf>(x, left_stride, tile, depth, to, out_stride);
        }
      }
    }
  }
}

}  // namespace heterospec
