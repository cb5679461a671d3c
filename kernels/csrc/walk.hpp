// SPDX-License-Identifier: Apache-2.0
// The walk of draft trees: each visited row's token (argmax or a sample), then to the child that carries it.
#pragma once

#include <cstdint>

#include "argmax.hpp"
#include "gumbel.hpp"
#include "nucleus.hpp"

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
};
static_assert(sizeof(WalkArguments) == 136);

// The child row that carries a token, 0 where there is none. Parents come first.
inline int64_t child_of(const int64_t* parents, const int64_t* tokens, int64_t max_nodes,
                        int64_t row, int64_t token) {
  for (int64_t child = row + 1; child <= max_nodes; ++child)
    if (parents[child] == row && tokens[child - 1] == token) return child;
  return 0;
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
#pragma omp parallel for schedule(dynamic) if (args.num_reqs >= (args.temperatures ? 2 : 4))
#endif
  for (int64_t req = 0; req < args.num_reqs; ++req) {
    const int64_t* parents = args.parents + req * (args.max_nodes + 1);
    const int64_t* tokens = args.tokens + req * args.max_nodes;
    int64_t* rows = args.rows + req * args.max_emitted;
    int64_t* emitted = args.emitted + req * args.max_emitted;
    int64_t row = 0, count = 0;
    do {
      const T* logits = values + (args.first_row[req] + row) * args.row_stride;
      rows[count] = row;
      emitted[count] = token_of(args, logits, req, count);
      row = child_of(parents, tokens, args.max_nodes, row, emitted[count]);
      ++count;
    } while (row && count < args.max_emitted);
    args.num_emitted[req] = count;
    for (; count < args.max_emitted; ++count) rows[count] = emitted[count] = -1;
  }
}

}  // namespace heterospec
