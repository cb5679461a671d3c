// SPDX-License-Identifier: Apache-2.0
// Products of rows with the weight of a linear layer, packed once into panels (`pack_weight` in packed_linear.py).
// With few rows, a decoding step's or a tree's, the time is that of reading the weight; what is read next is fetched
// while the rows are multiplied. Without tiles an element's sum does not depend on how many rows there are.
#pragma once

#include <algorithm>
#include <type_traits>

#include "threads.hpp"
#include "tiles.hpp"

namespace heterospec {

// Bytes of a panel's columns that stay in the cache while all rows pass.
constexpr int64_t kBlockBytes = 64 << 10;
// How far ahead of the products a panel is fetched, in pairs of its rows.
constexpr int64_t kPairsAhead = 32;
// Rows from which on AMX tiles are the faster ones.
constexpr int64_t kWorthTiles = 5;

template <typename T>
using Weight = Panels<T, 3>;

// Rows cut into pieces of nearly equal size: a tile of one row is slow.
struct Pieces {
  int64_t rows, count;

  explicit Pieces(int64_t rows) : rows(rows), count((rows + kTileRows - 1) / kTileRows) {}
  int64_t row(int64_t piece) const { return rows * piece / count; }
};

// Pieces [first, end) of the rows times up to kTileVectors panels, of which the first begins `weight`. `left` is that of
// row 0, `out` that of the first piece.
template <typename T, typename L>
void multiply_panels(const L* left, int64_t left_stride, const Pieces& pieces, int64_t first,
                     int64_t end, Weight<T> weight, int64_t depth, int width, float* out,
                     int64_t out_stride) {
  constexpr int64_t kBlock = kBlockBytes / (kLanes * sizeof(T));
  for (int64_t k = 0; k < depth; k += kBlock) {
    const Weight<T> block = weight.from_row(k), ahead = block.from_row(2 * kPairsAhead);
    for (int64_t p = first; p < end; ++p) {
      const int64_t row = pieces.row(p);
      gemm(int(pieces.row(p + 1) - row), left + row * left_stride + k, int(left_stride), block,
           out + (row - pieces.row(first)) * out_stride, int(out_stride), width,
           int(std::min(kBlock, depth - k)), k == 0 ? nullptr : kOnes.factor, ahead);
    }
  }
}

// What a few rows need in memory, the last of them unused, as tiles come whole.
inline int64_t whole_tiles(int64_t num_rows) { return (num_rows + 15) / 16 * 16; }

// This thread's columns of out[row, column] = left[row, :] . weight[:, column] for a few rows, both in memory for
// `whole_tiles` of them. num_columns: a multiple of kLanes.
template <typename T, typename L>
void project(const L* left, int64_t left_stride, int64_t num_rows, const T* weight, int64_t depth,
             int64_t num_columns, float* out, int64_t out_stride) {
  const Weight<T> whole{weight, depth * kLanes};
#if defined(HETEROSPEC_AMX)
  if constexpr (std::is_same_v<L, bf16>) {
    if (num_rows >= kWorthTiles && Tiles::permitted()) {
      constexpr int64_t kWide = 4 * kLanes;
      const Tiles tiles;
      for (Share s(num_columns, kWide); s.begin < s.end; s.begin += kWide)
        for (int64_t row = 0; row < num_rows; row += 16)
          tile_gemm(int(std::min<int64_t>(16, num_rows - row)), left + row * left_stride,
                    int(left_stride), whole.from_column(s.begin), out + row * out_stride + s.begin,
                    int(out_stride), int(std::min(kWide, s.end - s.begin)), int(depth), nullptr,
                    whole.from_column(s.begin + kWide));
      return;
    }
  }
#endif
  constexpr int64_t kWide = kTileVectors * kLanes;
  const Pieces pieces(num_rows);
  for (Share s(num_columns, kWide); s.begin < s.end; s.begin += kWide)
    multiply_panels<T>(left, left_stride, pieces, 0, pieces.count, whole.from_column(s.begin),
                       depth, int(std::min(kWide, s.end - s.begin)), out + s.begin, out_stride);
}

}  // namespace heterospec
