// SPDX-License-Identifier: Apache-2.0
// Where vLLM's CPU cache keeps the keys and values of a (block, head), by its `isa`: offsets of single elements, and
// matrices as gemm.hpp reads them, both from token `inside` of the block on (a multiple of 16).
#pragma once

#include "gemm.hpp"

namespace heterospec {

// Keys [head_size, block_size], values [block_size, head_size].
struct VecPages {
  template <typename T>
  using Matrix = Rows<T>;

  int64_t head_size, block_size;

  int64_t key(int64_t token, int64_t d) const { return d * block_size + token; }
  int64_t value(int64_t token, int64_t d) const { return token * head_size + d; }

  template <typename T>
  Rows<T> keys(const T* page, int64_t inside) const {
    return {page + inside, block_size};
  }
  template <typename T>
  Rows<T> values(const T* page, int64_t inside) const {
    return {page + inside * head_size, head_size};
  }
};

// Tiles of 16 tokens (keys) or 16 dimensions (values), each with pairs of the dimension that products sum over side by
// side: keys [block_size / 16, head_size / 2, 16, 2], values [head_size / 16, block_size / 2, 16, 2].
struct AmxPages {
  template <typename T>
  using Matrix = Panels<T>;

  int64_t head_size, block_size;

  int64_t key(int64_t token, int64_t d) const {
    return token / kLanes * kLanes * head_size + element(d, token);
  }
  int64_t value(int64_t token, int64_t d) const {
    return d / kLanes * kLanes * block_size + element(token, d);
  }

  template <typename T>
  Panels<T> keys(const T* page, int64_t inside) const {
    return {page + inside * head_size, kLanes * head_size};
  }
  template <typename T>
  Panels<T> values(const T* page, int64_t inside) const {
    return {page + inside * kLanes, kLanes * block_size};
  }

 private:
  static int64_t element(int64_t row, int64_t column) {
    return row / 2 * (2 * kLanes) + column % kLanes * 2 + row % 2;
  }
};

}  // namespace heterospec
