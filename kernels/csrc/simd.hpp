// SPDX-License-Identifier: Apache-2.0
// Sixteen-lane float vectors, written with the compiler's vector extension: the same source becomes
// AVX-512, AVX2, SSE or NEON code. HETEROSPEC_PORTABLE switches every intrinsic off (for tests).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    !defined(HETEROSPEC_PORTABLE)
#define HETEROSPEC_AVX512 1
#include <immintrin.h>
#if defined(__AVX512BF16__)
#define HETEROSPEC_BF16_DOT 1
#endif
#endif

namespace heterospec {

typedef float vf16 __attribute__((vector_size(64)));
typedef int32_t vi16 __attribute__((vector_size(64)));
typedef uint16_t vu16x16 __attribute__((vector_size(32)));
typedef uint32_t vu16 __attribute__((vector_size(64)));

#define HETEROSPEC_INLINE inline __attribute__((always_inline))

constexpr int kLanes = 16;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <typename To, typename From>
HETEROSPEC_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

HETEROSPEC_INLINE vf16 splat(float x) { return vf16{} + x; }

template <typename V>
HETEROSPEC_INLINE V load_raw(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

HETEROSPEC_INLINE void store(float* to, vf16 v) { std::memcpy(to, &v, sizeof(v)); }

HETEROSPEC_INLINE vf16 load(const float* from) { return load_raw<vf16>(from); }

HETEROSPEC_INLINE vf16 load(const bf16* from) {
  const vu16 wide = __builtin_convertvector(load_raw<vu16x16>(from), vu16);
  return bit_cast<vf16>(wide << 16);
}

HETEROSPEC_INLINE vf16 load(const f16* from) {
#if defined(HETEROSPEC_AVX512)
  return (vf16)_mm512_cvtph_ps(load_raw<__m256i>(from));
#else
  // Shift exponent and mantissa into place and let one multiplication rebias them; it also
  // normalises subnormals. Infinities and NaN need their exponent put back.
  const vu16 wide = __builtin_convertvector(load_raw<vu16x16>(from), vu16);
  const vu16 magnitude = wide & 0x7fffu;
  const vf16 finite = bit_cast<vf16>(magnitude << 13) * 0x1p112f;
  const vu16 special = (magnitude << 13) | 0x7f800000u;
  const vu16 bits = magnitude >= 0x7c00u ? special : bit_cast<vu16>(finite);
  return bit_cast<vf16>(bits | ((wide & 0x8000u) << 16));
#endif
}

HETEROSPEC_INLINE float to_float(float x) { return x; }
HETEROSPEC_INLINE float to_float(bf16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

// Round to nearest even, as torch does; NaN stays NaN.
HETEROSPEC_INLINE vu16x16 to_bf16(vf16 v) {
#if defined(HETEROSPEC_BF16_DOT)
  return bit_cast<vu16x16>(_mm512_cvtneps_pbh((__m512)v));
#else
  const vu16 bits = bit_cast<vu16>(v);
  const vu16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu16 quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, vu16x16);
#endif
}

HETEROSPEC_INLINE void store(bf16* to, vf16 v) {
  const vu16x16 narrow = to_bf16(v);
  std::memcpy(to, &narrow, sizeof(narrow));
}

HETEROSPEC_INLINE void store(f16* to, vf16 v) {
#if defined(HETEROSPEC_AVX512)
  const __m256i narrow = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &narrow, sizeof(narrow));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t bits = bit_cast<uint32_t>(v[lane]);
    const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {
      half = 0x7c00u;  // rounds to a value above the largest half
    } else if (magnitude < 0x38800000u) {
      // Subnormal half: adding 0.5 leaves the rounded value in the low mantissa bits.
      half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else {
      half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    to[lane].bits = uint16_t(sign | half);
  }
#endif
}

// `b` where either is NaN.
HETEROSPEC_INLINE vf16 max(vf16 a, vf16 b) {
#if defined(HETEROSPEC_AVX512)
  return (vf16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

HETEROSPEC_INLINE float reduce_max(vf16 v) {
#if defined(HETEROSPEC_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int lane = 1; lane < kLanes; ++lane) best = v[lane] > best ? v[lane] : best;
  return best;
#endif
}

HETEROSPEC_INLINE float reduce_add(vf16 v) {
#if defined(HETEROSPEC_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return sum;
#endif
}

// 2^x for x <= 0; below -126 the result is 2^-126; NaN stays NaN. Relative error about 1e-7.
HETEROSPEC_INLINE vf16 exp2_nonpositive(vf16 x) {
  const vf16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = max(splat(-126.0f), x);
  const vf16 rounded = x + magic;
  const vf16 f = x - (rounded - magic);
  vf16 p = splat(1.5403530e-4f);  // Taylor coefficients ln(2)^n / n!, |f| <= 1/2
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return bit_cast<vf16>(bit_cast<vu16>(p) + (bit_cast<vu16>(rounded) << 23));
}

// Lanes whose bit is set keep `v`; the others become `other`, whatever `v` held (NaN included).
HETEROSPEC_INLINE vf16 keep_lanes(uint32_t bits, vf16 v, float other) {
#if defined(HETEROSPEC_AVX512)
  return (vf16)_mm512_mask_mov_ps((__m512)splat(other), __mmask16(bits), (__m512)v);
#else
  const vi16 lane_bit = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                         1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  return ((lane_bit & int32_t(bits)) != 0) ? v : splat(other);
#endif
}

}  // namespace heterospec
