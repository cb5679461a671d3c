// SPDX-License-Identifier: Apache-2.0
// The greedy walk of draft trees: argmax of each visited row, then to the child that carries it.
#pragma once

#include <cstdint>

#include "argmax.hpp"

namespace heterospec {

// Field order and sizes are those of `_PACK` in walk_greedy_cpu.py. Strides count elements.
struct WalkArguments {
  int64_t element_size, num_reqs, max_nodes, max_emitted, num_columns, row_stride;
  const void* values;
  const int64_t* first_row;  // [num_reqs]
  const int64_t* parents;    // [num_reqs, max_nodes + 1]
  const int64_t* tokens;     // [num_reqs, max_nodes]
  int64_t* rows;             // [num_reqs, max_emitted], written, like the next two
  int64_t* emitted;          // [num_reqs, max_emitted]
  int64_t* num_emitted;      // [num_reqs]
};

// The child row that carries a token, 0 where there is none. Parents come first.
inline int64_t child_of(const int64_t* parents, const int64_t* tokens, int64_t max_nodes,
                        int64_t row, int64_t token) {
  for (int64_t child = row + 1; child <= max_nodes; ++child)
    if (parents[child] == row && tokens[child - 1] == token) return child;
  return 0;
}

template <typename Int>
void walk_greedy(const WalkArguments& args) {
  const Int* values = static_cast<const Int*>(args.values);
  // A visited row takes a few microseconds, about what waking a thread costs.
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) if (args.num_reqs >= 4)
#endif
  for (int64_t req = 0; req < args.num_reqs; ++req) {
    const int64_t* parents = args.parents + req * (args.max_nodes + 1);
    const int64_t* tokens = args.tokens + req * args.max_nodes;
    int64_t* rows = args.rows + req * args.max_emitted;
    int64_t* emitted = args.emitted + req * args.max_emitted;
    int64_t row = 0, count = 0;
    do {
      const Int* logits = values + (args.first_row[req] + row) * args.row_stride;
      rows[count] = row;
      emitted[count] = argmax(logits, args.num_columns);
      row = child_of(parents, tokens, args.max_nodes, row, emitted[count]);
      ++count;
    } while (row && count < args.max_emitted);
    args.num_emitted[req] = count;
    for (; count < args.max_emitted; ++count) rows[count] = emitted[count] = -1;
  }
}

}  // namespace heterospec
