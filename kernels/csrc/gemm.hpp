// SPDX-License-Identifier: Apache-2.0
// C[rows, columns] (+)= A[rows, depth] * B[depth, columns], B row-major with a stride, in register
// tiles of up to kTileRows rows and kTileVectors vectors of columns. Both products of attention have this shape in vLLM's `vec` layout:
// scores = Q * K with K stored [head_size, block_size], and output += P * V with V [keys, head_size].
#pragma once

#include "simd.hpp"

namespace heterospec {

// Most of the registers accumulate: 24 of AVX-512's 32, 12 of AVX2's and SSE's 16, 24 of NEON's 32.
#if defined(HETEROSPEC_AVX512)
constexpr int kTileRows = 12, kTileVectors = 2;
#elif defined(HETEROSPEC_AVX2) || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 1;
#else
constexpr int kTileRows = 3, kTileVectors = 1;
#endif

// The type A is held in: bfloat16 pairs where the machine multiplies them, float otherwise.
template <typename T>
struct Left {
  using type = float;
};
#if defined(HETEROSPEC_BF16_DOT)
template <>
struct Left<bf16> {
  using type = bf16;
};
#endif

template <int kVectors, typename T>
HETEROSPEC_INLINE void prefetch(const T* from) {
  for (size_t i = 0; i < kVectors * kLanes; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, 2);
}

// `keep` null: C is overwritten. Otherwise row r of C is first multiplied by keep[r].
// `ahead`: memory with B's shape and stride that is wanted soon, fetched meanwhile (any address).
template <typename T, int kRows, int kVectors>
void gemm_tile(const float* a, int lda, const T* b, int ldb, float* c, int ldc, int depth,
               const float* keep, const T* ahead) {
  vf16 acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = keep ? load(c + r * ldc + v * kLanes) * keep[r] : splat(0.0f);
  for (int k = 0; k < depth; ++k) {
    vf16 right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + int64_t(k) * ldb + v * kLanes);
    prefetch<kVectors>(ahead + int64_t(k) * ldb);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[r][v] += right[v] * a[r * lda + k];
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

#if defined(HETEROSPEC_BF16_DOT)
// Interleaving two rows of B leaves the columns in the order of 128-bit lanes 0 2 4 6 | 1 3 5 7;
// C is brought into that order when loaded and back when stored.
template <int kVectors>
HETEROSPEC_INLINE void interleave(const bf16* x, const bf16* y, __m512i out[kVectors]) {
  if constexpr (kVectors == 2) {
    const __m512i a = load_raw<__m512i>(x), b = load_raw<__m512i>(y);
    out[0] = _mm512_unpacklo_epi16(a, b);
    out[1] = _mm512_unpackhi_epi16(a, b);
  } else {
    const __m256i a = load_raw<__m256i>(x), b = load_raw<__m256i>(y);
    out[0] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_unpacklo_epi16(a, b)),
                                _mm256_unpackhi_epi16(a, b), 1);
  }
}

template <int kVectors>
HETEROSPEC_INLINE void to_lane_order(__m512 v[kVectors]) {
  if constexpr (kVectors == 2) {
    const __m512 a = v[0], b = v[1];
    v[0] = _mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(2, 0, 2, 0));
    v[1] = _mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(3, 1, 3, 1));
  } else {
    v[0] = _mm512_shuffle_f32x4(v[0], v[0], _MM_SHUFFLE(3, 1, 2, 0));
  }
}

template <int kVectors>
HETEROSPEC_INLINE void from_lane_order(__m512 v[kVectors]) {
  if constexpr (kVectors == 2) {
    const __m512 low = _mm512_shuffle_f32x4(v[0], v[1], _MM_SHUFFLE(1, 0, 1, 0));
    const __m512 high = _mm512_shuffle_f32x4(v[0], v[1], _MM_SHUFFLE(3, 2, 3, 2));
    v[0] = _mm512_shuffle_f32x4(low, low, _MM_SHUFFLE(3, 1, 2, 0));
    v[1] = _mm512_shuffle_f32x4(high, high, _MM_SHUFFLE(3, 1, 2, 0));
  } else {
    to_lane_order<1>(v);
  }
}

// As above with bfloat16 products and float sums; depth, lda even.
template <typename T, int kRows, int kVectors>
void gemm_tile(const bf16* a, int lda, const bf16* b, int ldb, float* c, int ldc, int depth,
               const float* keep, const bf16* ahead) {
  __m512 acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = keep ? (__m512)(load(c + r * ldc + v * kLanes) * keep[r]) : _mm512_setzero_ps();
    if (keep) to_lane_order<kVectors>(acc[r]);
  }
  for (int k = 0; k < depth; k += 2) {
    __m512i right[kVectors];
    const bf16* row = b + int64_t(k) * ldb;
    interleave<kVectors>(row, row + ldb, right);
    prefetch<kVectors>(ahead + int64_t(k) * ldb);
    prefetch<kVectors>(ahead + int64_t(k + 1) * ldb);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(load_raw<int32_t>(a + r * lda + k));
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], left, (__m512bh)right[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    from_lane_order<kVectors>(acc[r]);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + r * ldc + v * kLanes, (vf16)acc[r][v]);
  }
}
#endif

template <typename T, int kRows>
void gemm_rows(const typename Left<T>::type* a, int lda, const T* b, int ldb, float* c, int ldc,
               int columns, int depth, const float* keep, const T* ahead) {
  constexpr int kWidth = kTileVectors * kLanes;
  int column = 0;
  for (; column + kWidth <= columns; column += kWidth)
    gemm_tile<T, kRows, kTileVectors>(a, lda, b + column, ldb, c + column, ldc, depth, keep,
                                      ahead + column);
  for (; column < columns; column += kLanes)
    gemm_tile<T, kRows, 1>(a, lda, b + column, ldb, c + column, ldc, depth, keep, ahead + column);
}

// rows in 1..kTileRows; columns a multiple of 16.
template <typename T, int kRows = kTileRows>
void gemm(int rows, const typename Left<T>::type* a, int lda, const T* b, int ldb, float* c,
          int ldc, int columns, int depth, const float* keep, const T* ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows)
      return gemm<T, kRows - 1>(rows, a, lda, b, ldb, c, ldc, columns, depth, keep, ahead);
  }
  gemm_rows<T, kRows>(a, lda, b, ldb, c, ldc, columns, depth, keep, ahead);
}

}  // namespace heterospec
