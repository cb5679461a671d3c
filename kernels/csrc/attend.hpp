// SPDX-License-Identifier: Apache-2.0
// One thread's part of tree attention: the rows of one (request, KV head) over a range of key
// chunks, with a running softmax. Query rows are packed [row of the request][query head of the
// group], so that every key and value is read from memory once for all of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "pages.hpp"
#include "tiles.hpp"

namespace heterospec {

constexpr int kChunk = 128;  // keys whose scores are held at a time; a multiple of 2 * kLanes
constexpr int kMaxPieces = kChunk / kLanes;

// Field order and sizes of these three are those in structs.py. Strides count elements.

// A layer's pages and heads.
struct LayerArguments {
  int64_t dtype, isa;  // isa: 0 `vec`, 1 `amx` (pages.hpp)
  const void *key_cache, *value_cache;
  int64_t num_heads, num_kv_heads, head_size, block_size;
  int64_t key_block_stride, key_head_stride, value_block_stride, value_head_stride;
  double scale;
};
static_assert(sizeof(LayerArguments) == 104);

// The requests of a step.
struct RequestArguments {
  int64_t num_threads, num_reqs, block_table_stride;
  const int32_t *query_start_loc, *seq_lens, *block_table;
  const uint64_t* ancestor_mask;
  // The tail: rows outside the pages (a draft head's scratch). Where it is given, seq_lens count
  // paged keys only, all of them seen by every row, and ancestor_mask is not read.
  const void *tail_key, *tail_value;
  const int32_t* tail_index;  // [num_tokens, max_tail], -1 padded
  int64_t max_tail, tail_key_stride, tail_value_stride, tail_head_stride;
};
static_assert(sizeof(RequestArguments) == 112);

// The step's rows in a layer.
struct RowArguments {
  const void* query;
  void* output;
  int64_t query_token_stride, query_head_stride, output_token_stride, output_head_stride;
};
static_assert(sizeof(RowArguments) == 48);

// One after the other, as Python sends them.
struct Arguments : LayerArguments, RequestArguments, RowArguments {};
static_assert(sizeof(Arguments) ==
              sizeof(LayerArguments) + sizeof(RequestArguments) + sizeof(RowArguments));

// The running softmax of a set of rows: largest score (base-2), sum of weights, weighted values.
struct Partial {
  float *largest, *sum, *values;  // [rows], [rows], [rows, head_size]

  Partial(float* memory, int64_t rows)
      : largest(memory), sum(memory + rows), values(memory + 2 * rows) {}
  static int64_t floats(int64_t rows, int64_t head_size) { return rows * (2 + head_size); }
};

// Whether products are made in AMX tiles where the process may use them.
template <typename L, typename Pages>
#if defined(HETEROSPEC_AMX)
constexpr bool kInTiles = std::is_same_v<L, bf16> && std::is_same_v<Pages, AmxPages>;
#else
constexpr bool kInTiles = false;
#endif

// T: what queries, pages and output hold; L: what queries and weights are multiplied as, bfloat16 for products of pairs.
template <typename T, typename Pages, typename L>
class Attend {
  using Matrix = typename Pages::template Matrix<T>;
  using Bits = unsigned __int128;
  static_assert(kChunk <= 128, "one bit a key of the chunk");
  static constexpr int kRows = kInTiles<L, Pages> ? 16 : kTileRows;  // attended to together

  struct Piece {  // keys of a chunk that lie in one cache block
    Matrix keys, values;
    int offset, size;  // offset: within the chunk
  };
  struct Chunk {
    int64_t first;
    int size, dense;  // the first `dense` keys are seen by every row; even
    bool masked;
    int num_pieces;
    Piece pieces[kMaxPieces];
  };

 public:
  explicit Attend(const Arguments& args)
      : args_(args),
        pages_{args.head_size, args.block_size},
        dim_(int(args.head_size)),
        group_(int(args.num_heads / args.num_kv_heads)),
        exponent_scale_(float(args.scale * 1.4426950408889634)) {}

  // Attends the request's rows to key chunks [begin, end) of its sequence.
  void run(int64_t req, int64_t kv_head, int64_t begin, int64_t end) {
    start(req, kv_head);
    Chunk c = locate(begin, kv_head);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const bool last = chunk + 1 == end;
      // What is probably read next: it is fetched while this chunk is multiplied.
      const Chunk next = last ? locate(0, std::min(kv_head + 1, args_.num_kv_heads - 1))
                              : locate(chunk + 1, kv_head);
      for (int tile = 0; tile < rows_; tile += kRows)
        attend_tile(c, tile == 0 ? next : c, tile, std::min(kRows, rows_ - tile));
      c = next;
    }
    for (int r = 0; r < rows_; ++r) state().sum[r] = reduce_add(load(lane_sums_ + r * kLanes));
  }

  void save(float* memory) { std::copy_n(state_, Partial::floats(rows_, dim_), memory); }

  // Adds what another thread saved for other chunks of the same rows.
  void merge(float* memory) {
    const Partial mine = state(), other(memory, rows_);
    for (int r = 0; r < rows_; ++r) {
      const float largest = std::max(mine.largest[r], other.largest[r]);
      if (largest == kNone) continue;
      const float keep = std::exp2(mine.largest[r] - largest);
      const float add = std::exp2(other.largest[r] - largest);
      mine.largest[r] = largest;
      mine.sum[r] = mine.sum[r] * keep + other.sum[r] * add;
      for (int d = 0; d < dim_; d += kLanes) {
        float* values = mine.values + r * dim_ + d;
        store(values, load(values) * keep + load(other.values + r * dim_ + d) * add);
      }
    }
  }

  void write_output() {
    if (args_.tail_index != nullptr) add_tail();
    const Partial mine = state();
    for (int r = 0; r < rows_; ++r) {
      T* out = static_cast<T*>(args_.output) +
               (first_row_ + r / group_) * args_.output_token_stride +
               (kv_head_ * group_ + r % group_) * args_.output_head_stride;
      const float inverse = 1.0f / mine.sum[r];
      for (int d = 0; d < dim_; d += kLanes)
        store_out(out + d, load(mine.values + r * dim_ + d) * inverse);
    }
  }

 private:
  static constexpr float kNone = -std::numeric_limits<float>::infinity();

  static void store_out(T* to, vf16 v) { store(to, v); }

  // Each row's few keys outside the pages, one at a time: a row has at most its depth of them.
  void add_tail() {
    const Partial mine = state();
    for (int r = 0; r < rows_; ++r) {
      const int32_t* index = args_.tail_index + (first_row_ + r / group_) * args_.max_tail;
      for (int64_t i = 0; i < args_.max_tail && index[i] >= 0; ++i) {
        const int64_t head = kv_head_ * args_.tail_head_stride;
        const T* key =
            static_cast<const T*>(args_.tail_key) + index[i] * args_.tail_key_stride + head;
        const T* value =
            static_cast<const T*>(args_.tail_value) + index[i] * args_.tail_value_stride + head;
        add_key(mine, r, key, value);
      }
    }
  }

  void add_key(const Partial& mine, int r, const T* key, const T* value) {
    vf16 products = splat(0.0f);
    for (int d = 0; d < dim_; d += kLanes) products += load(query_ + r * dim_ + d) * load(key + d);
    const float score = reduce_add(products) * exponent_scale_;
    const float largest = std::max(mine.largest[r], score);
    const float keep = std::exp2(mine.largest[r] - largest), weight = std::exp2(score - largest);
    mine.largest[r] = largest;
    mine.sum[r] = mine.sum[r] * keep + weight;
    float* values = mine.values + r * dim_;
    for (int d = 0; d < dim_; d += kLanes)
      store(values + d, load(values + d) * keep + load(value + d) * weight);
  }

  Partial state() { return Partial(state_, rows_); }

  void start(int64_t req, int64_t kv_head) {
    req_ = req;
    kv_head_ = kv_head;
    first_row_ = args_.query_start_loc[req];
    const int query_len = int(args_.query_start_loc[req + 1] - first_row_);
    rows_ = query_len * group_;
    context_ = args_.seq_lens[req] - (args_.tail_index != nullptr ? 0 : query_len);
    // Products in tiles touch whole tiles of rows.
    state_ = state_memory_.at_least(Partial::floats(rows_, dim_) + (kRows - 1) * dim_);
    lane_sums_ = lane_sum_memory_.at_least(size_t(rows_) * kLanes);
    std::fill_n(state_, rows_, kNone);
    std::fill_n(state_ + rows_, Partial::floats(rows_, dim_) - rows_, 0.0f);
    std::fill_n(lane_sums_, rows_ * kLanes, 0.0f);
    pack_query();
  }

  void pack_query() {
    query_ = query_memory_.at_least(size_t(rows_ + kRows - 1) * dim_);
    for (int r = 0; r < rows_; ++r) {
      const T* from = static_cast<const T*>(args_.query) +
                      (first_row_ + r / group_) * args_.query_token_stride +
                      (kv_head_ * group_ + r % group_) * args_.query_head_stride;
      for (int d = 0; d < dim_; d += kLanes) store(query_ + r * dim_ + d, load(from + d));
    }
  }

  Chunk locate(int64_t chunk, int64_t kv_head) const {
    Chunk c;
    c.first = chunk * kChunk;
    const int64_t end = std::min<int64_t>(c.first + kChunk, args_.seq_lens[req_]);
    c.size = int(end - c.first);
    c.masked = end > context_ || c.size < kChunk;
    c.dense = int(std::clamp<int64_t>(context_ - c.first, 0, c.size)) & ~1;
    c.num_pieces = 0;
    const int32_t* blocks = args_.block_table + req_ * args_.block_table_stride;
    for (int64_t position = c.first; position < end;) {
      const int64_t block = blocks[position / args_.block_size];
      const int64_t inside = position % args_.block_size;
      Piece& piece = c.pieces[c.num_pieces++];
      piece.offset = int(position - c.first);
      piece.size = int(std::min(args_.block_size - inside, end - position));
      piece.keys = pages_.keys(static_cast<const T*>(args_.key_cache) +
                                   block * args_.key_block_stride + kv_head * args_.key_head_stride,
                               inside);
      piece.values =
          pages_.values(static_cast<const T*>(args_.value_cache) +
                            block * args_.value_block_stride + kv_head * args_.value_head_stride,
                        inside);
      position += piece.size;
    }
    for (int p = c.num_pieces; p < kMaxPieces; ++p) c.pieces[p] = c.pieces[0];
    return c;
  }

  void attend_tile(const Chunk& c, const Chunk& ahead, int tile, int count) {
    alignas(64) float scores[kRows * kChunk];
    alignas(64) L weights[kRows * kChunk];
    float keep[kRows];
    Bits sparse[kRows];
    for (int p = 0; p < c.num_pieces; ++p) {
      const Piece& piece = c.pieces[p];
      const int columns = (piece.size + kLanes - 1) / kLanes * kLanes;
      multiply(count, query_ + tile * dim_, dim_, piece.keys, scores + piece.offset, kChunk,
               columns, dim_, nullptr, ahead.pieces[p].keys);
    }
    for (int r = 0; r < count; ++r) {
      const Bits seen = c.masked ? visible(c, tile + r) : ~Bits{0};
      sparse[r] = seen & ~low_bits(c.dense);
      float* row = scores + r * kChunk;
      keep[r] = c.masked ? softmax<true>(row, weights + r * kChunk, c.size, tile + r, seen)
                         : softmax<false>(row, weights + r * kChunk, kChunk, tile + r, seen);
    }
    float* values = state().values + tile * dim_;
    add_dense(c, ahead, count, weights, values, keep);
    if (!c.masked) return;
    for (int r = 0; r < count; ++r)
      add_sparse(c, sparse[r], weights + r * kChunk, values + r * dim_);
  }

  // `gemm` for up to kRows rows.
  static void multiply(int rows, const L* a, int lda, Matrix b, float* c, int ldc, int columns,
                       int depth, const float* keep, Matrix ahead) {
#if defined(HETEROSPEC_AMX)
    if constexpr (kInTiles<L, Pages>) {
      if (Tiles::permitted())
        return tile_gemm(rows, a, lda, b, c, ldc, columns, depth, keep, ahead);
    }
#endif
    gemm_all(rows, a, lda, b, c, ldc, columns, depth, keep, ahead);
  }

  static Bits low_bits(int count) { return count >= 128 ? ~Bits{0} : (Bits{1} << count) - 1; }

  // Bit i: the row sees key i of the chunk.
  Bits visible(const Chunk& c, int row) const {
    const Bits tree =
        args_.tail_index != nullptr ? Bits{0} : args_.ancestor_mask[first_row_ + row / group_];
    const int64_t shift = context_ - c.first;
    const Bits context = low_bits(int(std::clamp<int64_t>(shift, 0, c.size)));
    const Bits rows = shift >= 0 ? tree << shift : (shift > -64 ? tree >> -shift : Bits{0});
    return (context | rows) & low_bits(c.size);
  }

  // Turns scores into weights and returns the factor for what was summed before this chunk.
  template <bool kMasked>
  float softmax(float* scores, L* weights, int size, int row, Bits seen) {
    const int vectors = kMasked ? (size + 2 * kLanes - 1) / (2 * kLanes) * 2 : kChunk / kLanes;
    if (kMasked && seen == 0) return 1.0f;  // no weight of this row will be read
    vf16 best = splat(kNone);
    for (int v = 0; v < vectors; ++v) {
      vf16 s = load(scores + v * kLanes) * exponent_scale_;
      if constexpr (kMasked) s = keep_lanes(uint32_t(seen >> (v * kLanes)) & 0xffffu, s, kNone);
      best = max(best, s);
      store(scores + v * kLanes, s);
    }
    float& largest = state().largest[row];
    const float before = largest;
    largest = std::max(before, reduce_max(best));
    const float keep = before == largest ? 1.0f : std::exp2(before - largest);
    vf16 sum = load(lane_sums_ + row * kLanes) * keep;
    for (int v = 0; v < vectors; ++v) {
      vf16 p = exp2_nonpositive(load(scores + v * kLanes) - largest);
      if constexpr (kMasked) p = keep_lanes(uint32_t(seen >> (v * kLanes)) & 0xffffu, p, 0.0f);
      store(weights + v * kLanes, p);
      // The sum of the weights as stored: rounding them then cancels to first order.
      if constexpr (!std::is_same_v<L, float>) p = load(weights + v * kLanes);
      sum += p;
    }
    store(lane_sums_ + row * kLanes, sum);
    return keep;
  }

  void add_dense(const Chunk& c, const Chunk& ahead, int count, const L* weights, float* values,
                 const float* keep) {
    if (c.dense == 0) {
      for (int r = 0; r < count; ++r)
        for (int d = 0; d < dim_; d += kLanes)
          store(values + r * dim_ + d, load(values + r * dim_ + d) * keep[r]);
      return;
    }
    for (int p = 0; p < c.num_pieces && c.pieces[p].offset < c.dense; ++p) {
      const Piece& piece = c.pieces[p];
      multiply(count, weights + piece.offset, kChunk, piece.values, values, dim_, dim_,
               std::min(piece.size, c.dense - piece.offset), p == 0 ? keep : kOnes.factor,
               ahead.pieces[p].values);
    }
  }

  // Keys that only some rows see: visits the set bits, so that a hidden key's values (perhaps NaN)
  // are never touched.
  void add_sparse(const Chunk& c, Bits keys, const L* weights, float* values) {
    for (int p = 0; p < c.num_pieces; ++p) {
      const Piece& piece = c.pieces[p];
      const Bits here = (keys >> piece.offset) & low_bits(piece.size);
      if (here == 0) continue;
      const L* w = weights + piece.offset;
      int d = 0;
      constexpr int kWide = 8 * kLanesOf<vf> / kLanes;  // eight registers accumulate
      for (; d + kWide * kLanes <= dim_; d += kWide * kLanes)
        add_columns<kWide>(here, w, piece.values.from_column(d), values + d);
      if constexpr (kWide == 8)
        for (; d + 4 * kLanes <= dim_; d += 4 * kLanes)
          add_columns<4>(here, w, piece.values.from_column(d), values + d);
      for (; d < dim_; d += kLanes)
        add_columns<1>(here, w, piece.values.from_column(d), values + d);
    }
  }

  template <int kVectors>
  void add_columns(Bits keys, const L* weights, Matrix from, float* values) {
    vf16 acc[kVectors];
    for (int v = 0; v < kVectors; ++v) acc[v] = load(values + v * kLanes);
    for (int word = 0; word < 2; ++word) {
      uint64_t bits = uint64_t(keys >> (64 * word));
      for (; bits != 0; bits &= bits - 1) {
        const int key = 64 * word + __builtin_ctzll(bits);
        const float weight = to_float(weights[key]);
        for (int v = 0; v < kVectors; ++v) acc[v] += from.at(key, v * kLanes) * weight;
      }
    }
    for (int v = 0; v < kVectors; ++v) store(values + v * kLanes, acc[v]);
  }

  const Arguments& args_;
  const Pages pages_;
  const int dim_, group_;
  const float exponent_scale_;
  int64_t req_ = 0, kv_head_ = 0, first_row_ = 0, context_ = 0;
  int rows_ = 0;
  float *state_ = nullptr, *lane_sums_ = nullptr;
  L* query_ = nullptr;
  inline static thread_local Buffer<float> state_memory_, lane_sum_memory_;
  inline static thread_local Buffer<L> query_memory_;
};

}  // namespace heterospec
