// SPDX-License-Identifier: Apache-2.0
// A linear layer over any number of rows: out = input * weight^T + bias. An element's sum does not depend on how many
// rows there are.
#pragma once

#include "linear.hpp"
#include "packed_linear_arguments.hpp"
#include "rows.hpp"

namespace heterospec {

// Bytes of the input that stay in the cache while all panels pass.
constexpr int64_t kChunkBytes = 512 << 10;

// Pieces that go through all panels together.
struct Chunks {
  Pieces pieces;
  int64_t count;

  Chunks(int64_t rows, int64_t row_bytes)
      : pieces(rows),
        count(std::min(pieces.count, (rows * row_bytes + kChunkBytes - 1) / kChunkBytes)) {}
  int64_t piece(int64_t chunk) const { return pieces.count * chunk / count; }
};

// A chunk of the input's rows over one panel, or two side by side.
template <typename T, typename A>
void packed_linear_chunk(const PackedLinearArguments& args, const A* left, int64_t left_stride,
                         const Chunks& chunks, int64_t chunk, int64_t column, int width) {
  static thread_local Buffer<float> floats;
  const Weight<T> whole{static_cast<const T*>(args.weight), args.depth * kLanes};
  const int64_t first = chunks.piece(chunk), last = chunks.piece(chunk + 1);
  const int64_t begin = chunks.pieces.row(first), end = chunks.pieces.row(last);
  float* sums = floats.at_least((end - begin) * width);
  multiply_panels<T>(left, left_stride, chunks.pieces, first, last, whole.from_column(column),
                     args.depth, width, sums, width);
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t r = begin; r < end; ++r) {
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
void packed_linear(const PackedLinearArguments& args) {
  static thread_local Buffer<A> memory;
  Buffer<A>& shared = memory;  // a thread_local is another one in each thread of the team
#pragma omp parallel
  {
    const Lefts<T, A> lefts(args, shared);
    const Chunks chunks(args.num_rows, args.depth * sizeof(A));
    const int64_t panels = args.num_columns / kLanes;
    // Panels side by side save loads of the input, single ones are dealt out more evenly.
    const int64_t together =
        panels * chunks.count < 4 * kTileVectors * team_size() ? 1 : kTileVectors;
    const int64_t strips = (panels + together - 1) / together;
    for (Share s(strips * chunks.count); s.begin < s.end; ++s.begin) {
      const int64_t column = s.begin % strips * together * kLanes;
      const int width = int(std::min(together * kLanes, args.num_columns - column));
      packed_linear_chunk<T>(args, lefts.data, lefts.stride, chunks, s.begin / strips, column,
                             width);
    }
  }
}

}  // namespace heterospec
