// SPDX-License-Identifier: Apache-2.0
// What a request's parameters make of a row of logits before its token is chosen, as vLLM's sampler does it: a grammar's
// mask, allowed tokens, bad words, stop tokens that come too early, biases, penalties. A row has one past: what the
// request has emitted, then what this walk has. Only the tokens that some rule names are touched.
#pragma once

#include <cstdint>

#include "buffer.hpp"
#include "simd.hpp"

namespace heterospec {

// In place of minus infinity: no noise lifts it above an allowed token, and rows stay finite, which is faster to sample.
constexpr float kForbidden = -1e30f;

// One request's. Field order and sizes are those in structs.py; null and 0 where a rule is not used.
struct RowRules {
  int64_t is_used;
  double repetition, presence, frequency;  // 1, 0, 0 for none
  int64_t num_prompt_tokens, num_output_tokens;
  const int64_t* prompt_tokens;  // [num_prompt_tokens] each token once; read for repetition
  const int64_t* output_tokens;  // [num_output_tokens] each token once
  const int64_t* output_counts;  // [num_output_tokens]
  int64_t num_early;             // tokens to emit before a stop token may come
  int64_t num_stops;
  const int64_t* stops;  // [num_stops]
  int64_t num_biases;
  const int64_t* bias_tokens;  // [num_biases]
  const float* biases;         // [num_biases]
  const uint32_t* allowed;     // [num_words], bit 1 for allowed tokens; or null
  int64_t num_bad_words;
  const int64_t* bad_word_starts;  // [num_bad_words + 1]
  const int64_t* bad_words;        // tokens of all of them
  int64_t num_past;
  const int64_t* past;  // [num_past] the latest outputs, as many as bad words look back
};
static_assert(sizeof(RowRules) == 168);

inline void keep_allowed(float* logits, int64_t count, const uint32_t* mask) {
  for (int64_t first = 0; first < count; first += 32) {
    const uint32_t word = mask[first / 32];
    if (word == ~uint32_t(0)) continue;
    const int64_t end = first + 32 < count ? first + 32 : count;
    for (int64_t i = first; i < end; ++i)
      if (!(word >> (i - first) & 1)) logits[i] = kForbidden;
  }
}

// Of the past, `back` tokens before the next one; what the walk emitted comes last.
inline int64_t past_token(const RowRules& rules, const int64_t* emitted, int64_t depth,
                          int64_t back) {
  return back <= depth ? emitted[depth - back] : rules.past[rules.num_past - (back - depth)];
}

inline void forbid_bad_words(float* logits, const RowRules& rules, const int64_t* emitted,
                             int64_t depth) {
  for (int64_t w = 0; w < rules.num_bad_words; ++w) {
    const int64_t start = rules.bad_word_starts[w], last = rules.bad_word_starts[w + 1] - 1;
    const int64_t before = last - start;
    if (before > rules.num_past + depth) continue;
    bool here = true;
    for (int64_t i = 0; i < before && here; ++i)
      here = rules.bad_words[last - 1 - i] == past_token(rules, emitted, depth, i + 1);
    if (here) logits[rules.bad_words[last]] = kForbidden;
  }
}

// One rounding an operation, as torch has it: the compiler must not fuse them.
inline float rounded(float x) {
  asm volatile("" : "+m"(x));
  return x;
}

inline float penalised(float logit, const RowRules& rules, int64_t times_emitted) {
  const float repetition = float(rules.repetition);
  if (repetition != 1.0f) logit = rounded(logit * (logit > 0 ? 1.0f / repetition : repetition));
  if (times_emitted) {
    logit = rounded(logit - rounded(float(rules.frequency) * float(times_emitted)));
    logit = rounded(logit - float(rules.presence));
  }
  return logit;
}

inline void penalise(float* logits, int64_t count, const RowRules& rules, const int64_t* emitted,
                     int64_t depth) {
  static thread_local Buffer<int32_t> buffer;
  static thread_local int64_t cleared = 0;
  // [count] of each token 1 + how often it was emitted, 0 where no penalty looks at it; 0 between two calls.
  int32_t* seen = buffer.at_least(count);
  if (cleared < count) {
    std::fill_n(seen, count, 0);
    cleared = count;
  }
  const bool repeats = float(rules.repetition) != 1.0f;
  const int64_t num_prompt = repeats ? rules.num_prompt_tokens : 0;
  for (int64_t i = 0; i < num_prompt; ++i) seen[rules.prompt_tokens[i]] = 1;
  for (int64_t i = 0; i < rules.num_output_tokens; ++i)
    seen[rules.output_tokens[i]] = 1 + int32_t(rules.output_counts[i]);
  for (int64_t i = 0; i < depth; ++i) seen[emitted[i]] += seen[emitted[i]] ? 1 : 2;
  const auto take = [&](int64_t token) {
    if (!seen[token]) return;
    logits[token] = penalised(logits[token], rules, seen[token] - 1);
    seen[token] = 0;
  };
  for (int64_t i = 0; i < num_prompt; ++i) take(rules.prompt_tokens[i]);
  for (int64_t i = 0; i < rules.num_output_tokens; ++i) take(rules.output_tokens[i]);
  for (int64_t i = 0; i < depth; ++i) take(emitted[i]);
}

// vLLM's order (`Sampler.apply_logits_processors`); the mask of a grammar comes before.
inline void apply_rules(float* logits, int64_t count, const RowRules& rules, const int64_t* emitted,
                        int64_t depth) {
  if (rules.allowed) keep_allowed(logits, count, rules.allowed);
  forbid_bad_words(logits, rules, emitted, depth);
  if (depth < rules.num_early)
    for (int64_t i = 0; i < rules.num_stops; ++i) logits[rules.stops[i]] = kForbidden;
  for (int64_t i = 0; i < rules.num_biases; ++i) logits[rules.bias_tokens[i]] += rules.biases[i];
  if (rules.repetition != 1.0 || rules.presence != 0.0 || rules.frequency != 0.0)
    penalise(logits, count, rules, emitted, depth);
}

}  // namespace heterospec
