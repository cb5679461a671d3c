// SPDX-License-Identifier: Apache-2.0
// The walk of draft trees: each visited row's token (argmax or a sample), then to the child that carries it.
#pragma once

#include <cstdint>

#include "argmax.hpp"
#include "gumbel.hpp"

namespace heterospec {

// Field order and sizes are those of `_PACK` in walk_cpu.py. Strides count elements.
struct WalkArguments {
  int64_t dtype, num_reqs, max_nodes, max_emitted, num_columns, row_stride;
  const void* values;
  const int64_t* first_row;   // [num_reqs]
  const int64_t* parents;     // [num_reqs, max_nodes + 1]
  const int64_t* tokens;      // [num_reqs, max_nodes]
  const float* temperatures;  // [num_reqs], or null where all take the argmax
  const int64_t* seeds;       // [num_reqs, max_emitted], read where the temperature is not 0
  int64_t* rows;              // [num_reqs, max_emitted], written, like the next two
  int64_t* emitted;           // [num_reqs, max_emitted]
  int64_t* num_emitted;       // [num_reqs]
};

// The child row that carries a token, 0 where there is none. Parents come first.
inline int64_t child_of(const int64_t* parents, const int64_t* tokens, int64_t max_nodes,
                        int64_t row, int64_t token) {
  for (int64_t child = row + 1; child <= max_nodes; ++child)
    if (parents[child] == row && tokens[child - 1] == token) return child;
  return 0;
}

// T: the logits' type.
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
    const float temperature = args.temperatures ? args.temperatures[req] : 0.0f;
    int64_t row = 0, count = 0;
    do {
      const T* logits = values + (args.first_row[req] + row) * args.row_stride;
      rows[count] = row;
      emitted[count] =
          temperature >= kLeastTemperature
              ? sample(logits, args.num_columns, temperature,
                       uint64_t(args.seeds[req * args.max_emitted + count]))
              : argmax(reinterpret_cast<const IntOf<T>*>(logits), args.num_columns);
      row = child_of(parents, tokens, args.max_nodes, row, emitted[count]);
      ++count;
    } while (row && count < args.max_emitted);
    args.num_emitted[req] = count;
    for (; count < args.max_emitted; ++count) rows[count] = emitted[count] = -1;
  }
}

}  // namespace heterospec
