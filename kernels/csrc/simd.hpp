// SPDX-License-Identifier: Apache-2.0
// Sixteen-lane float vectors, written with the compiler's vector extension and held in as many of
// the machine's registers as that takes: one with AVX-512, two with AVX2, four with SSE or NEON.
// A vector type wider than a register would live on the stack, so those are made of halves.
// HETEROSPEC_PORTABLE switches every intrinsic off (for tests).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if !defined(HETEROSPEC_PORTABLE)
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HETEROSPEC_AVX512 1
#include <immintrin.h>
#if defined(__AVX512BF16__)
#define HETEROSPEC_BF16_DOT 1
#if (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)) || \
    defined(HETEROSPEC_EMULATED_TILES)
#define HETEROSPEC_AMX 1
#endif
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define HETEROSPEC_AVX2 1
#include <immintrin.h>
#endif
#endif

namespace heterospec {

#define HETEROSPEC_INLINE inline __attribute__((always_inline))
#define HETEROSPEC_INLINE_LAMBDA __attribute__((always_inline))

constexpr int kLanes = 16;

// The integer vectors that go with a vector of floats.
template <typename V>
struct Like {
  typedef uint32_t u32 __attribute__((vector_size(sizeof(V))));
  typedef int32_t i32 __attribute__((vector_size(sizeof(V))));
  typedef uint16_t u16 __attribute__((vector_size(sizeof(V) / 2)));
};

template <typename V>
struct Twice {
  V low, high;
};

typedef float vf4 __attribute__((vector_size(16)));
typedef float vf8 __attribute__((vector_size(32)));
#if defined(HETEROSPEC_AVX512)
typedef float vf __attribute__((vector_size(64)));  // what one register holds
typedef vf vf16;
#elif defined(HETEROSPEC_AVX2)
typedef vf8 vf;
typedef Twice<vf> vf16;
#else
typedef vf4 vf;
typedef Twice<Twice<vf>> vf16;
#endif

template <typename V>
constexpr bool kIsTwice = !std::is_same_v<V, vf>;
template <typename V>
constexpr int kLanesOf = sizeof(V) / sizeof(float);

template <typename V>
HETEROSPEC_INLINE Twice<V> operator+(Twice<V> a, Twice<V> b) {
  return {a.low + b.low, a.high + b.high};
}
template <typename V>
HETEROSPEC_INLINE Twice<V> operator*(Twice<V> a, Twice<V> b) {
  return {a.low * b.low, a.high * b.high};
}
template <typename V>
HETEROSPEC_INLINE Twice<V> operator-(Twice<V> a, float b) {
  return {a.low - b, a.high - b};
}
template <typename V>
HETEROSPEC_INLINE Twice<V> operator*(Twice<V> a, float b) {
  return {a.low * b, a.high * b};
}
template <typename V>
HETEROSPEC_INLINE Twice<V>& operator+=(Twice<V>& a, Twice<V> b) {
  return a = a + b;
}

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

template <typename V = vf16>
HETEROSPEC_INLINE V splat(float x) {
  if constexpr (kIsTwice<V>) {
    const auto half = splat<decltype(V::low)>(x);
    return {half, half};
  } else {
    return V{} + x;
  }
}

template <typename V>
HETEROSPEC_INLINE V load_raw(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

HETEROSPEC_INLINE vf load_register(const float* from) { return load_raw<vf>(from); }

HETEROSPEC_INLINE vf load_register(const bf16* from) {
  typedef Like<vf>::u32 u32;
#if defined(HETEROSPEC_AVX2)
  // GCC 12 widens in two halves where one instruction does it.
  return bit_cast<vf>((u32)_mm256_cvtepu16_epi32(load_raw<__m128i>(from)) << 16);
#else
  return bit_cast<vf>(__builtin_convertvector(load_raw<Like<vf>::u16>(from), u32) << 16);
#endif
}

HETEROSPEC_INLINE vf load_register(const f16* from) {
#if defined(HETEROSPEC_AVX512)
  return (vf)_mm512_cvtph_ps(load_raw<__m256i>(from));
#elif defined(HETEROSPEC_AVX2)
  return (vf)_mm256_cvtph_ps(load_raw<__m128i>(from));
#else
  // Shift exponent and mantissa into place and let one multiplication rebias them; it also
  // normalises subnormals. Infinities and NaN need their exponent put back.
  typedef Like<vf>::u32 u32;
  const u32 wide = __builtin_convertvector(load_raw<Like<vf>::u16>(from), u32);
  const u32 magnitude = wide & 0x7fffu;
  const vf finite = bit_cast<vf>(magnitude << 13) * 0x1p112f;
  const u32 special = (magnitude << 13) | 0x7f800000u;
  const u32 bits = magnitude >= 0x7c00u ? special : bit_cast<u32>(finite);
  return bit_cast<vf>(bits | ((wide & 0x8000u) << 16));
#endif
}

template <typename V = vf16, typename T>
HETEROSPEC_INLINE V load(const T* from) {
  if constexpr (kIsTwice<V>) {
    typedef decltype(V::low) Half;
    return {load<Half>(from), load<Half>(from + kLanesOf<Half>)};
  } else {
    return load_register(from);
  }
}

HETEROSPEC_INLINE float to_float(float x) { return x; }
HETEROSPEC_INLINE float to_float(bf16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

// As in load_register(const f16*).
HETEROSPEC_INLINE float to_float(f16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = (x.bits & 0x8000u) << 16;
  const float finite = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  return bit_cast<float>((magnitude >= 0x7c00u ? special : bit_cast<uint32_t>(finite)) | sign);
}

// Round to nearest even, as torch does; NaN stays NaN.
HETEROSPEC_INLINE Like<vf>::u16 to_bf16(vf v) {
  typedef Like<vf>::u16 u16;
#if defined(HETEROSPEC_BF16_DOT)
  return bit_cast<u16>(_mm512_cvtneps_pbh((__m512)v));
#else
  typedef Like<vf>::u32 u32;
  const u32 bits = bit_cast<u32>(v);
  const u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32 quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, u16);
#endif
}

HETEROSPEC_INLINE void store_register(float* to, vf v) { std::memcpy(to, &v, sizeof(v)); }

HETEROSPEC_INLINE void store_register(bf16* to, vf v) {
  const auto narrow = to_bf16(v);
  std::memcpy(to, &narrow, sizeof(narrow));
}

HETEROSPEC_INLINE void store_register(f16* to, vf v) {
#if defined(HETEROSPEC_AVX512)
  const __m256i narrow = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &narrow, sizeof(narrow));
#elif defined(HETEROSPEC_AVX2)
  const __m128i narrow = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &narrow, sizeof(narrow));
#else
  for (int lane = 0; lane < kLanesOf<vf>; ++lane) {
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

template <typename T, typename V>
HETEROSPEC_INLINE void store(T* to, V v) {
  if constexpr (kIsTwice<V>) {
    store(to, v.low);
    store(to + kLanesOf<V> / 2, v.high);
  } else {
    store_register(to, v);
  }
}

// `b` where either is NaN.
template <typename V>
HETEROSPEC_INLINE V max(V a, V b) {
  if constexpr (kIsTwice<V>) {
    return {max(a.low, b.low), max(a.high, b.high)};
  } else {
#if defined(HETEROSPEC_AVX512)
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(HETEROSPEC_AVX2)
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
  }
}

template <typename V>
HETEROSPEC_INLINE float reduce_max(V v) {
  if constexpr (kIsTwice<V>) {
    return reduce_max(max(v.low, v.high));
  } else {
#if defined(HETEROSPEC_AVX512)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float best = v[0];
    for (int lane = 1; lane < kLanesOf<V>; ++lane) best = v[lane] > best ? v[lane] : best;
    return best;
#endif
  }
}

template <typename V>
HETEROSPEC_INLINE float reduce_add(V v) {
  if constexpr (kIsTwice<V>) {
    return reduce_add(v.low + v.high);
  } else {
#if defined(HETEROSPEC_AVX512)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(HETEROSPEC_AVX2)
    const vf4 half =
        (vf4)_mm256_castps256_ps128((__m256)v) + (vf4)_mm256_extractf128_ps((__m256)v, 1);
    return (half[0] + half[2]) + (half[1] + half[3]);
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
  }
}

// 2^x for x <= 0; below -126 the result is 2^-126; NaN stays NaN. Relative error about 1e-7.
template <typename V>
HETEROSPEC_INLINE V exp2_nonpositive(V x) {
  if constexpr (kIsTwice<V>) {
    return {exp2_nonpositive(x.low), exp2_nonpositive(x.high)};
  } else {
    typedef typename Like<V>::u32 u32;
    const V magic = splat<V>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    x = max(splat<V>(-126.0f), x);
    const V rounded = x + magic;
    const V f = x - (rounded - magic);
    V p = splat<V>(1.5403530e-4f);  // Taylor coefficients ln(2)^n / n!, |f| <= 1/2
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return bit_cast<V>(bit_cast<u32>(p) + (bit_cast<u32>(rounded) << 23));
  }
}

// x / (1 + e^-x), without overflow on either side.
template <typename V>
HETEROSPEC_INLINE V silu(V x) {
  if constexpr (kIsTwice<V>) {
    return {silu(x.low), silu(x.high)};
  } else {
    const V magnitude = x > 0.0f ? x : -x;
    const V decayed = exp2_nonpositive(magnitude * -1.4426950408889634f);
    return x * (x > 0.0f ? splat<V>(1.0f) : decayed) / (decayed + 1.0f);
  }
}

// Lanes whose bit is set keep `v`; the others become `other`, whatever `v` held (NaN included).
template <typename V>
HETEROSPEC_INLINE V keep_lanes(uint32_t bits, V v, float other) {
  if constexpr (kIsTwice<V>) {
    return {keep_lanes(bits, v.low, other), keep_lanes(bits >> kLanesOf<V> / 2, v.high, other)};
  } else {
#if defined(HETEROSPEC_AVX512)
    return (V)_mm512_mask_mov_ps((__m512)splat(other), __mmask16(bits), (__m512)v);
#else
    typedef typename Like<V>::i32 i32;
    i32 lane_bit;
    for (int lane = 0; lane < kLanesOf<V>; ++lane) lane_bit[lane] = 1 << lane;
    return ((lane_bit & int32_t(bits)) != 0) ? v : splat<V>(other);
#endif
  }
}

}  // namespace heterospec
