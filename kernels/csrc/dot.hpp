// SPDX-License-Identifier: Apache-2.0
// Linear layers over a few rows: out[row, column] = left[row, :] . weight[column, :], the weight as
// checkpoints hold it. With so few rows the time is that of reading the weight once.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <type_traits>

#include "tiles.hpp"

namespace heterospec {

// Columns of a weight are a multiple of this, its depth of 32 (linear_cpu.py).
constexpr int kDotColumns = 8;
// Rows from which on AMX tiles are the faster ones.
constexpr int64_t kWorthTiles = 5;

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
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) x[r] = load<vf>(left + r * left_stride + k);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        const vf right = load<vf>(weight + c * depth + k);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[r][c] += x[r] * right;
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kColumns; ++c) out[r * out_stride + c] = reduce_add(acc[r][c]);
  }
}

// rows in 1..kRows.
template <typename T, int kRows, int kColumns>
void dot_rows(int64_t rows, const typename Left<T>::type* left, int64_t left_stride,
              const T* weight, int64_t depth, float* out, int64_t out_stride) {
  if constexpr (kRows > 1) {
    if (rows < kRows)
      return dot_rows<T, kRows - 1, kColumns>(rows, left, left_stride, weight, depth, out, out_stride);
  }
  dot_tile<T, kRows, kColumns>(left, left_stride, weight, depth, out, out_stride);
}

// The rows are cut into pieces of nearly equal size, at most kRows: a tile of one row is slow.
template <typename T, int kRows, int kColumns>
void dot_columns(const typename Left<T>::type* left, int64_t left_stride, int64_t num_rows,
                 const T* weight, int64_t depth, Share columns, float* out, int64_t out_stride) {
  static_assert(kDotColumns % kColumns == 0, "shares are cut at multiples of kDotColumns");
  const int64_t pieces = (num_rows + kRows - 1) / kRows;
  for (int64_t c = columns.begin; c < columns.end; c += kColumns) {
    for (int64_t p = 0; p < pieces; ++p) {
      const int64_t r = num_rows * p / pieces, end = num_rows * (p + 1) / pieces;
      dot_rows<T, kRows, kColumns>(end - r, left + r * left_stride, left_stride, weight + c * depth,
                                   depth, out + r * out_stride + c, out_stride);
    }
  }
}

// Columns [columns.begin, columns.end) of all rows; both ends multiples of kDotColumns.
template <typename T>
void project(const typename Left<T>::type* left, int64_t left_stride, int64_t num_rows,
             const T* weight, int64_t depth, Share columns, float* out, int64_t out_stride) {
#if defined(HETEROSPEC_AMX)
  if constexpr (std::is_same_v<T, bf16>) {
    if (num_rows >= kWorthTiles && Tiles::permitted()) {
      const int64_t end = columns.begin + (columns.end - columns.begin) / 16 * 16;
      const TileLinear linear(left, left_stride, num_rows, depth);
      linear.run(weight, columns.begin, end, out, out_stride);
      columns.begin = end;
    }
  }
#endif
  // Twelve to sixteen sums: enough to hide a multiply-add's latency, few enough for the registers.
  const auto with = [&](auto dot) {
    dot(left, left_stride, num_rows, weight, depth, columns, out, out_stride);
  };
  if (num_rows == 1) return with(dot_columns<T, 1, 8>);
#if defined(HETEROSPEC_AVX512) || defined(__aarch64__)
  with(dot_columns<T, 4, 4>);
#else
  if (num_rows <= 3) return with(dot_columns<T, 3, 4>);
  with(dot_columns<T, 6, 2>);
#endif
}

}  // namespace heterospec
