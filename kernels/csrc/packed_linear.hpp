// SPDX-License-Identifier: Apache-2.0
// A linear layer over any number of rows: out = input * weight^T + bias, the weight packed once into panels. With few
// rows, a decoding step's or a tree's, the time is that of reading the weight; what is read next is fetched while the
// rows are multiplied. An element's sum does not depend on how many rows there are.
#pragma once

#include "attend.hpp"
#include "dot.hpp"
#include "gemm.hpp"
#include "product_speed.hpp"
#include "rows.hpp"

namespace heterospec {

// Field order and sizes are those of `_PACK` in packed_linear_cpu.py. Matrices are contiguous but for the input's rows.
struct PackedLinearArguments {
  int64_t dtype, num_rows, depth, num_columns, input_stride;
  int64_t pairs;  // bfloat16: 1 for products of pairs, 0 for float ones, 2 for the faster
  const void *input, *weight, *bias;  // weight: packed; bias: [num_columns], or null for none
  void* out;                          // [num_rows, num_columns], written
};

// Bytes of the input that stay in the cache while all panels pass.
constexpr int64_t kChunkBytes = 512 << 10;
// Bytes of a panel's columns that do.
constexpr int64_t kBlockBytes = 64 << 10;
// How far ahead of the products a panel is fetched, in pairs of its rows.
constexpr int64_t kPairsAhead = 32;

// Panels of kLanes columns: in bfloat16 each [depth / 2][kLanes][2], so that a pair of rows is what one product of pairs
// takes and what two shifts widen; [depth][kLanes] in other types.
template <typename T>
struct Packed {
  static constexpr bool kPairs = std::is_same_v<T, bf16>;
  static constexpr bool kLaneOrder = false;
  const T* data;
  int64_t stride;  // elements from one panel to the next

  HETEROSPEC_INLINE Packed from_column(int64_t column) const {
    return {data + column / kLanes * stride, stride};
  }
  // row: even
  HETEROSPEC_INLINE Packed from_row(int64_t row) const { return {data + row * kLanes, stride}; }
  HETEROSPEC_INLINE vf16 at(int64_t row, int64_t column) const {
    const T* panel = data + column / kLanes * stride;
    if constexpr (kPairs) {
      return half<vf16>(row % 2, panel + row / 2 * (2 * kLanes));
    } else {
      return load(panel + row * kLanes);
    }
  }
  // Rows `row` and `row + 1`.
  template <int kVectors>
  HETEROSPEC_INLINE void prefetch(int64_t row) const {
    for (int v = 0; v < kVectors; ++v)
      for (size_t i = 0; i < 2 * kLanes; i += 64 / sizeof(T))
        __builtin_prefetch(data + v * stride + row * kLanes + i, 0, 3);
  }
#if defined(HETEROSPEC_BF16_DOT)
  template <int kVectors>
  HETEROSPEC_INLINE void pairs(int64_t row, __m512i out[kVectors]) const {
    for (int v = 0; v < kVectors; ++v) out[v] = load_raw<__m512i>(data + v * stride + row * kLanes);
  }
#endif

 private:
  // One of each pair's values.
  template <typename V>
  HETEROSPEC_INLINE static V half(bool odd, const T* pairs) {
    if constexpr (kIsTwice<V>) {
      typedef decltype(V::low) Half;
      return {half<Half>(odd, pairs), half<Half>(odd, pairs + kLanesOf<V>)};
    } else {
      typedef typename Like<V>::u32 u32;
      const u32 bits = load_raw<u32>(pairs);
      return bit_cast<V>(odd ? bits & 0xffff0000u : bits << 16);
    }
  }
};

// The rows cut into pieces of nearly equal size (a tile of one row is slow), the pieces into chunks.
struct Pieces {
  int64_t rows, count, chunks;

  Pieces(int64_t rows, int64_t row_bytes)
      : rows(rows),
        count((rows + kTileRows - 1) / kTileRows),
        chunks(std::min(count, (rows * row_bytes + kChunkBytes - 1) / kChunkBytes)) {}
  int64_t row(int64_t piece) const { return rows * piece / count; }
  int64_t piece(int64_t chunk) const { return count * chunk / chunks; }
};

// A chunk of the input's rows over one panel, or two side by side.
template <typename T, typename A>
void packed_linear_chunk(const PackedLinearArguments& args, const A* left, int64_t left_stride,
                         const Pieces& pieces, int64_t chunk, int64_t column, int width) {
  static thread_local Buffer<float> floats;
  constexpr int64_t kBlock = kBlockBytes / (kLanes * sizeof(T));
  const Packed<T> whole{static_cast<const T*>(args.weight), args.depth * kLanes};
  const int64_t first = pieces.piece(chunk), end = pieces.piece(chunk + 1), begin = pieces.row(first);
  float* sums = floats.at_least((pieces.row(end) - begin) * width);
  for (int64_t k = 0; k < args.depth; k += kBlock) {
    const Packed<T> block = whole.from_column(column).from_row(k);
    const Packed<T> ahead = block.from_row(2 * kPairsAhead);
    const int depth = int(std::min(kBlock, args.depth - k));
    for (int64_t p = first; p < end; ++p)
      gemm(int(pieces.row(p + 1) - pieces.row(p)), left + pieces.row(p) * left_stride + k,
           int(left_stride), block, sums + (pieces.row(p) - begin) * width, width, width, depth,
           k == 0 ? nullptr : kOnes.factor, ahead);
  }
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t r = begin; r < pieces.row(end); ++r) {
    T* out = static_cast<T*>(args.out) + r * args.num_columns;
    for (int64_t c = column; c < column + width; c += kLanes) {
      vf16 sum = load(sums + (r - begin) * width + c - column);
      if (bias != nullptr) sum += load(bias + c);
      store(out + c, sum);
    }
  }
}

// The input's rows as what they are multiplied as, for every thread of a team.
template <typename T, typename A>
class Lefts {
 public:
  const A* data;
  int64_t stride;

  // shared: memory of the thread that starts the team.
  Lefts(const PackedLinearArguments& args, Buffer<A>& shared) : stride(args.depth) {
    const T* input = static_cast<const T*>(args.input);
    if constexpr (std::is_same_v<T, A>) {
      data = input;
      stride = args.input_stride;
    } else if (args.num_rows * args.depth <= kOwnValues) {
      static thread_local Buffer<A> own;
      A* to = own.at_least(args.num_rows * args.depth);
      for (int64_t r = 0; r < args.num_rows; ++r)
        convert(input + r * args.input_stride, to + r * args.depth, args.depth);
      data = to;
    } else {
#pragma omp single
      shared.at_least(args.num_rows * args.depth);
      A* to = shared.at_least(0);
      for (Share s(args.num_rows); s.begin < s.end; ++s.begin)
        convert(input + s.begin * args.input_stride, to + s.begin * args.depth, args.depth);
#pragma omp barrier
      data = to;
    }
  }

 private:
  // Up to here each thread converts all rows sooner than it would wait for the others.
  static constexpr int64_t kOwnValues = 16 << 10;
};

// A: what the rows are multiplied as, bfloat16 for products of pairs.
template <typename T, typename A>
void packed_linear_as(const PackedLinearArguments& args) {
  static thread_local Buffer<A> memory;
  Buffer<A>& shared = memory;  // a thread_local is another one in each thread of the team
#pragma omp parallel
  {
    const Lefts<T, A> lefts(args, shared);
    const Pieces pieces(args.num_rows, args.depth * sizeof(A));
    const int64_t panels = args.num_columns / kLanes;
    // Panels side by side save loads of the input, single ones are dealt out more evenly.
    const int64_t together = panels * pieces.chunks < 4 * kTileVectors * team_size() ? 1 : kTileVectors;
    const int64_t strips = (panels + together - 1) / together;
    for (Share s(strips * pieces.chunks); s.begin < s.end; ++s.begin) {
      const int64_t column = s.begin % strips * together * kLanes;
      const int width = int(std::min(together * kLanes, args.num_columns - column));
      packed_linear_chunk<T>(args, lefts.data, lefts.stride, pieces, s.begin / strips, column, width);
    }
  }
}

template <typename T>
void packed_linear(const PackedLinearArguments& args) {
#if defined(HETEROSPEC_BF16_DOT)
  if constexpr (std::is_same_v<T, bf16>) {
    if (args.pairs == 2 ? pairs_are_fast() : args.pairs == 1) return packed_linear_as<T, bf16>(args);
  }
#endif
  packed_linear_as<T, float>(args);
}

}  // namespace heterospec
