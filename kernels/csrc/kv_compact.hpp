// SPDX-License-Identifier: Apache-2.0
// Moves tokens' keys and values between slots of vLLM's paged cache, all layers in one call.
#pragma once

#include <cstdint>

#include "pages.hpp"

namespace heterospec {

// Field order and sizes are those in structs.py. Strides count elements.
struct CompactArguments {
  int64_t element_size, isa, num_layers, num_moves, num_kv_heads, head_size, block_size;
  int64_t block_stride, head_stride;  // of [num_blocks, num_kv_heads, 2 * block_size, head_size]
  const uint64_t* layers;             // [num_layers] addresses of the caches
  const int64_t *sources, *targets;   // [num_moves] slots, carried out in order
};
static_assert(sizeof(CompactArguments) == 96);

template <typename Pages, typename T>
void compact_layer(const CompactArguments& args, T* cache) {
  const Pages pages{args.head_size, args.block_size};
  const int64_t keys = args.head_size * args.block_size;  // the key half of a (block, head)
  for (int64_t m = 0; m < args.num_moves; ++m) {
    const int64_t from = args.sources[m], to = args.targets[m];
    for (int64_t h = 0; h < args.num_kv_heads; ++h) {
      const T* source = cache + from / args.block_size * args.block_stride + h * args.head_stride;
      T* target = cache + to / args.block_size * args.block_stride + h * args.head_stride;
      const int64_t source_row = from % args.block_size, target_row = to % args.block_size;
      for (int64_t d = 0; d < args.head_size; ++d) {
        target[pages.key(target_row, d)] = source[pages.key(source_row, d)];
        target[keys + pages.value(target_row, d)] = source[keys + pages.value(source_row, d)];
      }
    }
  }
}

template <typename Pages>
int compact(const CompactArguments& args) {
  for (int64_t layer = 0; layer < args.num_layers; ++layer) {
    void* cache = reinterpret_cast<void*>(args.layers[layer]);
    switch (args.element_size) {
      case 2: compact_layer<Pages>(args, static_cast<uint16_t*>(cache)); break;
      case 4: compact_layer<Pages>(args, static_cast<uint32_t*>(cache)); break;
      default: return 1;
    }
  }
  return 0;
}

}  // namespace heterospec
