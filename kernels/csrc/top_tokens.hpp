// SPDX-License-Identifier: Apache-2.0
// A draft head's logits and the likeliest tokens of each row with their log-probabilities, without
// the logits ever leaving this call.
#pragma once

#include <cmath>
#include <limits>

#include "linear.hpp"
#include "rows.hpp"

namespace heterospec {

// Field order and sizes are those in structs.py.
struct TopArguments {
  int64_t dtype, num_rows, depth, num_columns, top_k;
  const void* rows;            // [num_rows, depth], contiguous
  const void* weight;          // packed, with columns to fill the last panel
  const int64_t* offsets;      // [num_columns] what is added to a column to get its token, or null
  const uint32_t* masks;       // [num_masks, num_words] bit 1 for tokens that are allowed, or null
  const int32_t* mask_of_row;  // [num_rows], -1 where all are; with masks
  int64_t* tokens;             // [num_rows, top_k], written
  float* log_probs;            // [num_rows, top_k], written
  int64_t num_words;
};
static_assert(sizeof(TopArguments) == 104);

// The logarithm of the sum of exponentials; NaN where a logit is NaN or +inf, or all are -inf.
inline float log_sum_exp(const float* logits, int64_t count) {
  constexpr float kLog2e = 1.4426950408889634f;
  vf16 best = splat(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < count; i += kLanes) best = max(best, load(logits + i));
  const float largest = reduce_max(best);
  vf16 sum = splat(0.0f);
  for (int64_t i = 0; i < count; i += kLanes)
    sum += exp2_nonpositive((load(logits + i) - largest) * kLog2e);
  return largest + std::log(reduce_add(sum));
}

// Makes the columns of forbidden tokens minus infinity.
inline void forbid(float* logits, int64_t count, const int64_t* offsets, const uint32_t* mask) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = i + (offsets == nullptr ? 0 : offsets[i]);
    if (!(mask[token / 32] >> (token % 32) & 1))
      logits[i] = -std::numeric_limits<float>::infinity();
  }
}

// The largest first, of equals the first column; columns that are not there are -1.
inline void top_columns(const float* logits, int64_t count, int64_t top_k, int64_t* columns,
                        float* values) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  constexpr int64_t kBlock = 4 * kLanes;
  std::fill_n(columns, top_k, -1);
  std::fill_n(values, top_k, kNone);
  for (int64_t first = 0; first < count; first += kBlock) {
    vf16 best = splat(kNone);
    const int64_t end = std::min(first + kBlock, count);
    for (int64_t i = first; i < end; i += kLanes) best = max(load(logits + i), best);
    if (!(reduce_max(best) > values[top_k - 1])) continue;
    for (int64_t i = first; i < end; ++i) {
      if (!(logits[i] > values[top_k - 1])) continue;
      int64_t place = top_k - 1;
      for (; place > 0 && logits[i] > values[place - 1]; --place) {
        values[place] = values[place - 1];
        columns[place] = columns[place - 1];
      }
      values[place] = logits[i];
      columns[place] = i;
    }
  }
}

// L: what rows are multiplied as, bfloat16 for products of pairs.
template <typename T, typename L>
void top_tokens(const TopArguments& args) {
  static thread_local Buffer<L> lefts;
  static thread_local Buffer<float> floats;
  const int64_t stride = (args.num_columns + kLanes - 1) / kLanes * kLanes;
  L* left = lefts.at_least(whole_tiles(args.num_rows) * args.depth);
  float* logits = floats.at_least(whole_tiles(args.num_rows) * stride);
  convert(static_cast<const T*>(args.rows), left, args.num_rows * args.depth);
#pragma omp parallel
  {
    project(left, args.depth, args.num_rows, static_cast<const T*>(args.weight), args.depth, stride,
            logits, stride);
#pragma omp barrier
    for (Share s(args.num_rows); s.begin < s.end; ++s.begin) {
      float* row = logits + s.begin * stride;
      std::fill(row + args.num_columns, row + stride, -std::numeric_limits<float>::infinity());
      const int32_t mask = args.masks == nullptr ? -1 : args.mask_of_row[s.begin];
      if (mask >= 0)
        forbid(row, args.num_columns, args.offsets, args.masks + mask * args.num_words);
      const float total = log_sum_exp(row, stride);
      int64_t* tokens = args.tokens + s.begin * args.top_k;
      float* log_probs = args.log_probs + s.begin * args.top_k;
      top_columns(row, stride, args.top_k, tokens, log_probs);
      for (int64_t k = 0; k < args.top_k; ++k) {
        const int64_t column = std::max<int64_t>(tokens[k], 0);
        tokens[k] = column + (args.offsets == nullptr ? 0 : args.offsets[column]);
        log_probs[k] -= total;
      }
    }
  }
}

}  // namespace heterospec
