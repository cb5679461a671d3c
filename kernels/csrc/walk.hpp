// SPDX-License-Identifier: Apache-2.0
// The walk of draft trees: each visited row's token (argmax or a sample), then to the child that carries it.
#pragma once

#include <cstdint>

#include "argmax.hpp"
#include "gumbel.hpp"
#include "nucleus.hpp"
#include "row_rules.hpp"

namespace heterospec {

// Field order and sizes are those in structs.py. Strides count elements.
struct WalkArguments {
  int64_t dtype, num_reqs, max_nodes, max_emitted, num_columns, row_stride;
  const void* values;
  const int64_t* first_row;   // [num_reqs]
  const int64_t* parents;     // [num_reqs, max_nodes + 1]
  const int64_t* tokens;      // [num_reqs, max_nodes]
  const float* temperatures;  // [num_reqs], or null where all take the argmax
  const int32_t* top_k;       // [num_reqs], num_columns for all; or null, like the next one
  const float* top_p;         // [num_reqs], 1 for all
  const int64_t* seeds;       // [num_reqs, max_emitted], read where the temperature is not 0
  int64_t* rows;              // [num_reqs, max_emitted], written, like the next two
  int64_t* emitted;           // [num_reqs, max_emitted]
  int64_t* num_emitted;       // [num_reqs]
  const RowRules* rules;      // [num_reqs], or null
  const uint32_t* masks;  // [num_masks, num_words] bit 1 for tokens that a grammar allows, or null
  const int32_t* mask_of_row;  // of each row of the values, -1 where all are allowed; with masks
  int64_t num_words;           // of a mask, those of the rules among them
};
static_assert(sizeof(WalkArguments) == 168);

// The child row that carries a token, 0 where there is none. Parents come first.
inline int64_t child_of(const int64_t* parents, const int64_t* tokens, int64_t max_nodes,
                        int64_t row, int64_t token) {
  for (int64_t child = row + 1; child <= max_nodes; ++child)
    if (parents[child] == row && tokens[child - 1] == token) return child;
  return 0;
}

// A row of logits as floats, changed by the grammar's mask and the request's rules; null where nothing changes them.
template <typename T>
const float* ruled(const WalkArguments& args, const T* logits, int64_t row, int64_t req,
                   int64_t depth) {
  const int32_t mask = args.masks ? args.mask_of_row[row] : -1;
  const RowRules* rules = args.rules ? args.rules + req : nullptr;
  if (rules && !rules->is_used) rules = nullptr;
  if (mask < 0 && !rules) return nullptr;
  static thread_local Buffer<float> buffer;
  float* changed = buffer.at_least(args.num_columns);
  for (int64_t i = 0; i < args.num_columns; ++i) changed[i] = to_float(logits[i]);
  if (mask >= 0) keep_allowed(changed, args.num_columns, args.masks + mask * args.num_words);
  if (rules)
    apply_rules(changed, args.num_columns, *rules, args.emitted + req * args.max_emitted, depth);
  return changed;
}

// The token of a row; T: the logits' type.
template <typename T>
int64_t token_of(const WalkArguments& args, const T* logits, int64_t req, int64_t depth) {
  const float temperature = args.temperatures ? args.temperatures[req] : 0.0f;
  if (temperature < kLeastTemperature)
    return argmax(reinterpret_cast<const IntOf<T>*>(logits), args.num_columns);
  const uint64_t seed = uint64_t(args.seeds[req * args.max_emitted + depth]);
  const int64_t top_k = args.top_k ? args.top_k[req] : args.num_columns;
  const float top_p = args.top_p ? args.top_p[req] : 1.0f;
  if (top_k < args.num_columns || top_p < 1.0f)
    return sample_best(logits, args.num_columns, temperature, top_k, top_p, seed);
  return sample(logits, args.num_columns, temperature, seed);
}

template <typename T>
void walk(const WalkArguments& args) {
  const T* values = static_cast<const T*>(args.values);
  // A visited row takes a few microseconds (sampled: some tens), about what waking a thread costs.
#if defined(_OPENMP)
#pragma omp parallel for schedule( \
        dynamic) if (args.num_reqs >= (args.temperatures || args.rules || args.masks ? 2 : 4))
#endif
  for (int64_t req = 0; req < args.num_reqs; ++req) {
    const int64_t* parents = args.parents + req * (args.max_nodes + 1);
    const int64_t* tokens = args.tokens + req * args.max_nodes;
    int64_t* rows = args.rows + req * args.max_emitted;
    int64_t* emitted = args.emitted + req * args.max_emitted;
    int64_t row = 0, count = 0;
    do {
      const int64_t at = args.first_row[req] + row;
      const T* logits = values + at * args.row_stride;
      const float* changed = ruled(args, logits, at, req, count);
      rows[count] = row;
      emitted[count] =
          changed ? token_of(args, changed, req, count) : token_of(args, logits, req, count);
      row = child_of(parents, tokens, args.max_nodes, row, emitted[count]);
      ++count;
    } while (row && count < args.max_emitted);
    args.num_emitted[req] = count;
    for (; count < args.max_emitted; ++count) rows[count] = emitted[count] = -1;
  }
}

}  // namespace heterospec
