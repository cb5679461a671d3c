// SPDX-License-Identifier: Apache-2.0
// C[rows, columns] (+)= A[rows, depth] * B[depth, columns], in register tiles of up to kTileRows rows and kTileVectors
// vectors of columns. Both products of attention have this shape, scores = Q * K and output += P * V; how B lies in
// memory is the cache's matter (pages.hpp): `Rows` or `Panels`. A linear layer's weight is `Panels`, too.
#pragma once

#include <algorithm>
#include <type_traits>

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

// Keeps what was summed before.
struct Ones {
  float factor[16];  // rows that are multiplied together, at most
  constexpr Ones() : factor() {
    for (float& f : factor) f = 1.0f;
  }
};
inline constexpr Ones kOnes;

// B row-major with a stride.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  // What `pairs` gives is in the order of 128-bit lanes 0 2 4 6 | 1 3 5 7.
  static constexpr bool kLaneOrder = true;

  HETEROSPEC_INLINE Rows from_column(int64_t column) const { return {data + column, stride}; }
  HETEROSPEC_INLINE vf16 at(int64_t row, int64_t column) const {
    return load(data + row * stride + column);
  }
  // Brings rows `row` and `row + 1` of kVectors vectors into the cache.
  template <int kVectors>
  HETEROSPEC_INLINE void prefetch(int64_t row) const {
    for (int64_t r = row; r < row + 2; ++r)
      for (size_t i = 0; i < kVectors * kLanes; i += 64 / sizeof(T))
        __builtin_prefetch(data + r * stride + i, 0, 2);
  }
#if defined(HETEROSPEC_BF16_DOT)
  // Rows `row` and `row + 1` interleaved, as a bfloat16 product takes them.
  template <int kVectors>
  HETEROSPEC_INLINE void pairs(int64_t row, __m512i out[kVectors]) const {
    const T *x = data + row * stride, *y = x + stride;
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
#endif
};

// B in panels of kLanes columns, `stride` elements apart: in bfloat16 each [depth / 2][kLanes][2], so that a pair of rows is
// what one product of pairs takes and what two shifts widen; [depth][kLanes] in other types. kNear: the cache it is
// fetched into ahead, 3 for the nearest.
template <typename T, int kNear = 2>
struct Panels {
  static constexpr bool kLaneOrder = false;
  static constexpr bool kPairs = std::is_same_v<T, bf16>;
  const T* data;
  int64_t stride;

  HETEROSPEC_INLINE Panels from_column(int64_t column) const {
    return {data + column / kLanes * stride, stride};
  }
  // row: even
  HETEROSPEC_INLINE Panels from_row(int64_t row) const { return {data + row * kLanes, stride}; }
  // bfloat16: the pair that `row` belongs to, of all columns of the panel; the pairs of later rows follow.
  HETEROSPEC_INLINE const T* pair(int64_t row, int64_t column) const {
    return data + column / kLanes * stride + row / 2 * (2 * kLanes);
  }
  HETEROSPEC_INLINE vf16 at(int64_t row, int64_t column) const {
    if constexpr (kPairs)
      return half<vf16>(row % 2, pair(row, column));
    else
      return load(data + column / kLanes * stride + row * kLanes);
  }
  // Rows `row` and `row + 1`.
  template <int kVectors>
  HETEROSPEC_INLINE void prefetch(int64_t row) const {
    for (int v = 0; v < kVectors; ++v)
      for (size_t i = 0; i < 2 * kLanes; i += 64 / sizeof(T))
        __builtin_prefetch(data + v * stride + row * kLanes + i, 0, kNear);
  }
#if defined(HETEROSPEC_BF16_DOT)
  template <int kVectors>
  HETEROSPEC_INLINE void pairs(int64_t row, __m512i out[kVectors]) const {
    for (int v = 0; v < kVectors; ++v) out[v] = load_raw<__m512i>(pair(row, v * kLanes));
  }
#endif

 private:
  // One of each pair's values.
  template <typename V>
  HETEROSPEC_INLINE static V half(bool odd, const T* pairs) {
    if constexpr (kIsTwice<V>) {
      typedef decltype(V::low) Half;
      return {half<Half>(odd, pairs), half<Half>(odd, pairs + kLanesOf<V>)};
    } else {
      typedef typename Like<V>::u32 u32;
      const u32 bits = load_raw<u32>(pairs);
      return bit_cast<V>(odd ? bits & 0xffff0000u : bits << 16);
    }
  }
};

// Rows of A, read from the left. The compiler would hold an address a row, and some of them in vector registers; four rows
// share one here.
template <int kRows, typename T>
struct RowsOfA {
  static constexpr int kShared = 4, kBases = (kRows + kShared - 1) / kShared;
  const T* base[kBases];
  int64_t lda;

  HETEROSPEC_INLINE RowsOfA(const T* a, int64_t lda) : lda(lda) {
    for (int i = 0; i < kBases; ++i) base[i] = a + i * kShared * lda;
  }
  HETEROSPEC_INLINE const T* row(int r) const { return base[r / kShared] + r % kShared * lda; }
  HETEROSPEC_INLINE void advance(int count) {
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) {
      base[i] += count;
      asm("" : "+r"(base[i]));  // an address of its own
    }
  }
};

// `keep` null: C is overwritten. Otherwise row r of C is first multiplied by keep[r].
// `ahead`: a matrix like B that is wanted soon, fetched meanwhile (any address).
template <int kRows, int kVectors, typename B>
void gemm_tile(const float* a, int lda, B b, float* c, int ldc, int depth, const float* keep,
               B ahead) {
  vf16 acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = keep ? load(c + r * ldc + v * kLanes) * keep[r] : splat(0.0f);
  RowsOfA<kRows, float> left(a, lda);
  const auto step = [&](int k) HETEROSPEC_INLINE_LAMBDA {
    vf16 right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = b.at(k, v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[r][v] += right[v] * *left.row(r);
    left.advance(1);
  };
  int k = 0;
  for (; k + 1 < depth; k += 2) {
    ahead.template prefetch<kVectors>(k);
    step(k);
    step(k + 1);
  }
  if (k < depth) step(k);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

#if defined(HETEROSPEC_BF16_DOT)
// C is brought into the order that `Rows::pairs` leaves when loaded, and back when stored.
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
template <int kRows, int kVectors, typename B>
void gemm_tile(const bf16* a, int lda, B b, float* c, int ldc, int depth, const float* keep,
               B ahead) {
  __m512 acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = keep ? (__m512)(load(c + r * ldc + v * kLanes) * keep[r]) : _mm512_setzero_ps();
    if (B::kLaneOrder && keep) to_lane_order<kVectors>(acc[r]);
  }
  RowsOfA<kRows, bf16> lefts(a, lda);
  for (int k = 0; k < depth; k += 2, lefts.advance(2)) {
    __m512i right[kVectors];
    b.template pairs<kVectors>(k, right);
    ahead.template prefetch<kVectors>(k);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(load_raw<int32_t>(lefts.row(r)));
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], left, (__m512bh)right[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (B::kLaneOrder) from_lane_order<kVectors>(acc[r]);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + r * ldc + v * kLanes, (vf16)acc[r][v]);
  }
}
#endif

template <int kRows, typename A, typename B>
void gemm_rows(const A* a, int lda, B b, float* c, int ldc, int columns, int depth,
               const float* keep, B ahead) {
  constexpr int kWidth = kTileVectors * kLanes;
  int column = 0;
  for (; column + kWidth <= columns; column += kWidth)
    gemm_tile<kRows, kTileVectors>(a, lda, b.from_column(column), c + column, ldc, depth, keep,
                                   ahead.from_column(column));
  for (; column < columns; column += kLanes)
    gemm_tile<kRows, 1>(a, lda, b.from_column(column), c + column, ldc, depth, keep,
                        ahead.from_column(column));
}

// rows in 1..kTileRows; columns a multiple of 16. A: float, or bfloat16 for products of B's pairs.
template <int kRows = kTileRows, typename A, typename B>
void gemm(int rows, const A* a, int lda, B b, float* c, int ldc, int columns, int depth,
          const float* keep, B ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return gemm<kRows - 1>(rows, a, lda, b, c, ldc, columns, depth, keep, ahead);
  }
  gemm_rows<kRows>(a, lda, b, c, ldc, columns, depth, keep, ahead);
}

// `gemm` for any number of rows.
template <typename A, typename B>
void gemm_all(int rows, const A* a, int lda, B b, float* c, int ldc, int columns, int depth,
              const float* keep, B ahead) {
  for (int r = 0; r < rows; r += kTileRows)
    gemm(std::min(kTileRows, rows - r), a + r * lda, lda, b, c + r * ldc, ldc, columns, depth,
         keep ? keep + r : nullptr, ahead);
}

}  // namespace heterospec
