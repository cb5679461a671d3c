// SPDX-License-Identifier: Apache-2.0
// A sample of softmax(logits / temperature), the same that vLLM's CPU op `fused_gumbel_argmax` draws from a seed:
// the largest of logit + Gumbel noise, where a token's noise is a hash (SplitMix64) of the seed and the token.
//
// Hashes are a few integer operations; the noise's two logarithms are not. A token can only win if
// its uniform variate is close enough to 1, which is tested for whole vectors on the hash itself.
// The few that pass are compared in double precision, as vLLM compares all of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "argmax.hpp"
#include "simd.hpp"

namespace heterospec {

// Below it a request is greedy (vLLM's _SAMPLING_EPS).
constexpr float kLeastTemperature = 1e-5f;

inline uint64_t splitmix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// A token's hash: u = (hash / 2^11 + 1/2) / 2^53, of which the integer part is taken.
inline uint64_t noise_hash(uint64_t key, int64_t token) {
  return splitmix64(key + uint64_t(token + 1) * 0x9e3779b97f4a7c15u);
}

inline double gumbel(uint64_t hash) {
  return -std::log(-std::log((double(hash >> 11) + 0.5) * 0x1p-53));
}

// The best token so far. Scores are compared relative to its logit, so that large ones lose no noise.
template <typename T>
struct BestToken {
  const T* logits;
  float temperature;
  uint64_t key;
  int64_t token;
  double logit, noise;

  BestToken(const T* logits, float temperature, uint64_t key, int64_t token)
      : logits(logits), temperature(temperature), key(key) {
    take(token, gumbel(noise_hash(key, token)));
  }

  float logit_of(int64_t i) const { return to_float(logits[i]) / temperature; }

  void take(int64_t i, double g) {
    token = i;
    logit = double(logit_of(i));
    noise = g;
  }

  // Of equals the first.
  void challenge(int64_t i) {
    const uint64_t hash = noise_hash(key, i);
    const double ahead = double(logit_of(i)) - logit;
    // Noise g wins where g > noise - ahead; and 1 - u <= -log u = exp(-g). One exponential instead
    // of two logarithms.
    if ((double(~hash >> 11) + 0.5) * 0x1p-53 > std::exp(ahead - noise)) return;
    const double g = gumbel(hash);
    if (ahead + g > noise || (ahead + g == noise && i < token)) take(i, g);
  }
};

// Every token in turn: for rows with NaN or infinities.
template <typename T>
int64_t sample_in_turn(const T* logits, int64_t count, float temperature, uint64_t key) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  int64_t first = 0;
  while (first < count && to_float(logits[first]) == -kInfinity) ++first;
  if (first == count) return 0;
  BestToken<T> best(logits, temperature, key, first);
  for (int64_t i = first + 1; i < count; ++i)
    if (to_float(logits[i]) != -kInfinity) best.challenge(i);
  return best.token;
}

template <typename T>
bool all_finite(const T* logits, int64_t count) {
  typedef std::make_unsigned_t<IntOf<T>> Bits;
  const Bits* bits = reinterpret_cast<const Bits*>(logits);
  constexpr Bits kMagnitude = Bits(-1) >> 1;
  Bits largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max<Bits>(largest, bits[i] & kMagnitude);
  const Bits infinity = std::is_same_v<T, float>  ? Bits(0x7f800000u)
                        : std::is_same_v<T, bf16> ? Bits(0x7f80u)
                                                  : Bits(0x7c00u);
  return largest < infinity;
}

template <typename T>
int64_t sample(const T* logits, int64_t count, float temperature, uint64_t seed) {
  const uint64_t key = splitmix64(seed);
  if (!all_finite(logits, count)) return sample_in_turn(logits, count, temperature, key);
  constexpr int64_t kBlock = 8 * kLanes;
  constexpr float kLog2e = 1.4426950408889634f;
  // What scores of the test may be off by, absolute and relative, with room to spare.
  constexpr float kSlack = 1e-4f;
  const float scale = 1.0f / temperature;
  alignas(64) float miss[kBlock], ahead[kBlock];
  const int64_t likeliest = argmax(reinterpret_cast<const IntOf<T>*>(logits), count);
  BestToken<T> best(logits, temperature, key, likeliest);
  int64_t first = 0;
  for (; first + kBlock <= count; first += kBlock) {
    // 1 - u, rounded down to 31 bits.
    for (int64_t i = 0; i < kBlock; ++i)
      miss[i] = float(int32_t(~noise_hash(key, first + i) >> 33)) * 0x1p-31f;
    // Noise g wins where g > best - logit; and 1 - u <= -log u = exp(-g), which must be below `reach`.
    const float best_score = float(best.logit + best.noise);
    const float bar = best_score - kSlack * std::fabs(best_score) - kSlack;
    vf16 most = splat(-1.0f);
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const vf16 short_of = (load(logits + first + i) * scale - bar) * -kLog2e;
      const vf16 reach = exp2_nonpositive(max(short_of, splat(0.0f)) * -1.0f);
      const vf16 spare = reach + load(miss + i) * -1.0f;
      store(ahead + i, spare);
      most = max(most, spare);
    }
    if (!(reduce_max(most) > 0.0f)) continue;
    for (int64_t i = 0; i < kBlock; ++i)
      if (ahead[i] > 0.0f && first + i != likeliest) best.challenge(first + i);
  }
  for (; first < count; ++first)
    if (first != likeliest) best.challenge(first);
  return best.token;
}

}  // namespace heterospec
