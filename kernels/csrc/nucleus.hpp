// SPDX-License-Identifier: Apache-2.0
// A sample as in gumbel.hpp among a row's best tokens only: top-k, then top-p (nucleus), as vLLM applies them.
//
// vLLM sorts the vocabulary. Here the tokens near the largest logit are gathered, more and more of
// them until they hold what is asked for, and those few are sorted.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

#include "buffer.hpp"
#include "gumbel.hpp"
#include "simd.hpp"

namespace heterospec {

// One row of logits, divided by the temperature.
class ScaledRow {
 public:
  template <typename T>
  ScaledRow(const T* logits, int64_t count, float temperature) : count_(count) {
    static thread_local Buffer<float> values;
    static thread_local Buffer<int32_t> tokens;
    const int64_t padded = (count + kBlock - 1) / kBlock * kBlock;
    values_ = values.at_least(padded);
    tokens_ = tokens.at_least(count);
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      values_[i] = to_float(logits[i]) / temperature;
      finite &= values_[i] <= FLT_MAX;  // false for NaN, too
    }
    std::fill(values_ + count, values_ + padded, -kInfinity);
    sane_ = finite;
    vf16 most = splat(-kInfinity);
    for (int64_t i = 0; i < padded; i += kLanes) most = max(most, load(values_ + i));
    largest_ = reduce_max(most);
  }

  // Whether there is a largest logit and nothing is NaN or infinite but downwards.
  bool sane() const { return sane_ && largest_ > -kInfinity; }

  // Leaves the `top_k` largest and all that equal the last of them.
  void keep_top_k(int64_t top_k) {
    for (float depth = 4.0f; num_kept_ < top_k; depth *= 2.0f) {
      gather(reaches_all(depth) ? -kInfinity : largest_ - depth);
      if (num_kept_ == count_) break;
    }
    static thread_local Buffer<float> buffer;
    float* kept = buffer.at_least(num_kept_);
    for (int64_t i = 0; i < num_kept_; ++i) kept[i] = values_[tokens_[i]];
    std::nth_element(kept, kept + top_k - 1, kept + num_kept_, std::greater<float>());
    floor_ = kept[top_k - 1];
    gather(floor_);
  }

  // Leaves the likeliest that together have a probability of `top_p`, at least one; of equals the last first.
  void keep_top_p(float top_p) {
    const double wanted = double(top_p) * mass_above_floor();
    for (float depth = 2.0f;; depth *= 2.0f) {
      const float lowest = reaches_all(depth) ? -kInfinity : largest_ - depth;
      gather(std::max(floor_, lowest));
      if (lowest <= floor_ || mass_of_kept() >= wanted) break;
    }
    std::sort(tokens_, tokens_ + num_kept_, [&](int32_t a, int32_t b) {
      return values_[a] > values_[b] || (values_[a] == values_[b] && a > b);
    });
    double before = 0.0;
    int64_t kept = 0;
    while (kept < num_kept_ && (kept == 0 || before < wanted)) before += mass(tokens_[kept++]);
    num_kept_ = kept;
  }

  const int32_t* begin() const { return tokens_; }
  const int32_t* end() const { return tokens_ + num_kept_; }

 private:
  static constexpr int64_t kBlock = 4 * kLanes;
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr float kLog2e = 1.4426950408889634f;

  // Deeper than any float that is not as good as none.
  bool reaches_all(float depth) const { return depth > 4096.0f; }

  double mass(int32_t token) const { return std::exp(double(values_[token]) - double(largest_)); }

  double mass_of_kept() const {
    double sum = 0.0;
    for (int32_t token : *this) sum += mass(token);
    return sum;
  }

  double mass_above_floor() const {
    if (floor_ > -kInfinity) return mass_of_kept();
    double sum = 0.0;
    for (int64_t first = 0; first < count_; first += kBlock) {
      vf16 part = splat(0.0f);
      for (int64_t i = first; i < first + kBlock; i += kLanes)
        part += exp2_nonpositive((load(values_ + i) - largest_) * kLog2e);
      sum += double(reduce_add(part));
    }
    return sum;
  }

  // Keeps the tokens from a logit on.
  void gather(float lowest) {
    num_kept_ = 0;
    for (int64_t first = 0; first < count_; first += kBlock) {
      vf16 most = splat(-kInfinity);
      for (int64_t i = first; i < first + kBlock; i += kLanes) most = max(most, load(values_ + i));
      if (reduce_max(most) < lowest) continue;
      const int64_t end = std::min(first + kBlock, count_);
      for (int64_t i = first; i < end; ++i)
        if (values_[i] >= lowest) tokens_[num_kept_++] = int32_t(i);
    }
  }

  int64_t count_, num_kept_ = 0;
  float* values_;    // [count], padded to whole blocks with -inf
  int32_t* tokens_;  // [num_kept]
  float largest_, floor_ = -kInfinity;
  bool sane_;
};

template <typename T>
int64_t sample_best(const T* logits, int64_t count, float temperature, int64_t top_k, float top_p,
                    uint64_t seed) {
  const uint64_t key = splitmix64(seed);
  ScaledRow row(logits, count, temperature);
  if (!row.sane()) return sample_in_turn(logits, count, temperature, key);
  if (top_k < count) row.keep_top_k(std::max<int64_t>(top_k, 1));
  if (top_p < 1.0f) row.keep_top_p(top_p);
  BestToken<T> best(logits, temperature, key, *row.begin());
  for (int32_t token : row)
    if (token != *row.begin()) best.challenge(token);
  return best.token;
}

}  // namespace heterospec
