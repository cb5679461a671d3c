// SPDX-License-Identifier: Apache-2.0
// The one decoder layer of an EAGLE-3 head over a few rows, in one call: embedding and norms, QKV,
// rotary positions, attention (attend.hpp), output projection, gated MLP, final norm.
#pragma once

#include "linear.hpp"
#include "parallel_attend.hpp"
#include "rows.hpp"

namespace heterospec {

// Field order and sizes of these two are those in structs.py. Matrices are contiguous, linear weights packed.

struct HeadWeights {
  int64_t hidden_size, intermediate_size, rotary_size;
  int64_t norm_before_residual, norm_output;
  double epsilon;
  const void *embedding, *embed_norm, *hidden_norm, *qkv, *attention_output, *post_norm;
  const void *gate_up, *down, *final_norm;
  const float* cos_sin;  // [max_positions, rotary_size], cosines and then sines
};
static_assert(sizeof(HeadWeights) == 128);

struct HeadInputs {
  int64_t num_rows;
  const int64_t *token_ids, *positions;  // [num_rows]
  const void* hidden;                    // [num_rows, hidden_size]
  // [num_rows, num_kv_heads, head_size], written: the tail's rows of this call.
  void *own_keys, *own_values;
  const int64_t* slots;   // [num_rows] pages that are written too, or null
  void *normed, *output;  // [num_rows, hidden_size], written
};
static_assert(sizeof(HeadInputs) == 72);

// One after the other, as Python sends them.
struct HeadArguments : HeadWeights, HeadInputs {
  Arguments attention;  // its query and output are this layer's own
};
static_assert(sizeof(HeadArguments) ==
              sizeof(HeadWeights) + sizeof(HeadInputs) + sizeof(Arguments));

// L: what rows are multiplied as, bfloat16 for products of pairs.
template <typename T, typename Pages, typename L>
class HeadLayer {
 public:
  explicit HeadLayer(const HeadArguments& args)
      : args_(args), attention_(args.attention), rows_(args.num_rows), hidden_(args.hidden_size) {
    const Arguments& a = attention_;
    query_size_ = a.num_heads * a.head_size;
    kv_size_ = a.num_kv_heads * a.head_size;
    const int64_t qkv_size = query_size_ + 2 * kv_size_, width = args.intermediate_size;
    static thread_local Buffer<L> lefts;
    static thread_local Buffer<float> floats;
    static thread_local Buffer<T> attended;
    const int64_t in_memory = whole_tiles(rows_);
    left_ = lefts.at_least(in_memory * std::max({2 * hidden_, query_size_, width}));
    residual_ = floats.at_least(in_memory * (2 * hidden_ + qkv_size + 2 * width));
    sums_ = residual_ + in_memory * hidden_;
    qkv_ = sums_ + in_memory * hidden_;
    gates_ = qkv_ + in_memory * qkv_size;
    query_ = attended.at_least(2 * rows_ * query_size_);
    attended_ = query_ + rows_ * query_size_;
    attention_.query = query_;
    attention_.output = attended_;
    attention_.query_token_stride = attention_.output_token_stride = query_size_;
    attention_.query_head_stride = attention_.output_head_stride = a.head_size;
  }

  void run() {
#pragma omp parallel
    before_attention();
    heterospec::run<T, Pages, L>(attention_);
#pragma omp parallel
    after_attention();
  }

 private:
  void before_attention() {
    for (Share s(rows_); s.begin < s.end; ++s.begin) take_inputs(s.begin);
#pragma omp barrier
    linear(args_.qkv, 2 * hidden_, query_size_ + 2 * kv_size_, qkv_);
#pragma omp barrier
    for (Share s(rows_); s.begin < s.end; ++s.begin) place(s.begin);
  }

  void after_attention() {
    for (Share s(rows_); s.begin < s.end; ++s.begin)
      convert(attended_ + s.begin * query_size_, left_ + s.begin * query_size_, query_size_);
#pragma omp barrier
    linear(args_.attention_output, query_size_, hidden_, sums_);
#pragma omp barrier
    for (Share s(rows_); s.begin < s.end; ++s.begin) {
      add_residual(s.begin);
      norm(row(residual_, s.begin), args_.post_norm, left_ + s.begin * hidden_);
    }
#pragma omp barrier
    linear(args_.gate_up, hidden_, 2 * args_.intermediate_size, gates_);
#pragma omp barrier
    activate();
#pragma omp barrier
    linear(args_.down, args_.intermediate_size, hidden_, sums_);
#pragma omp barrier
    for (Share s(rows_); s.begin < s.end; ++s.begin) {
      add_residual(s.begin);
      T* normed = static_cast<T*>(args_.normed) + s.begin * hidden_;
      norm(row(residual_, s.begin), args_.final_norm, normed);
      T* output = static_cast<T*>(args_.output) + s.begin * hidden_;
      if (args_.norm_output)
        std::copy_n(normed, hidden_, output);
      else
        convert(row(residual_, s.begin), output, hidden_);
    }
  }

  float* row(float* matrix, int64_t r) const { return matrix + r * hidden_; }

  template <typename From, typename To>
  void norm(const From* from, const void* weight, To* to) const {
    rms_norm(from, static_cast<const T*>(weight), to, hidden_, float(args_.epsilon));
  }

  void linear(const void* weight, int64_t depth, int64_t columns, float* out) const {
    project(left_, depth, rows_, static_cast<const T*>(weight), depth, columns, out, columns);
  }

  // The normed embedding and the normed hidden state side by side.
  void take_inputs(int64_t r) {
    const T* hidden = static_cast<const T*>(args_.hidden) + r * hidden_;
    const T* embedded = static_cast<const T*>(args_.embedding) + args_.token_ids[r] * hidden_;
    L* left = left_ + r * 2 * hidden_;
    norm(embedded, args_.embed_norm, left);
    norm(hidden, args_.hidden_norm, left + hidden_);
    if (args_.norm_before_residual)
      convert(left + hidden_, row(residual_, r), hidden_);
    else
      convert(hidden, row(residual_, r), hidden_);
  }

  // Rotates queries and keys, and puts keys and values where attention finds them.
  void place(int64_t r) {
    const Arguments& a = attention_;
    const int64_t dim = a.head_size;
    float* heads = qkv_ + r * (query_size_ + 2 * kv_size_);
    for (int64_t h = 0; h < a.num_heads + a.num_kv_heads; ++h) rotate(heads + h * dim, r);
    convert(heads, query_ + r * query_size_, query_size_);
    T* keys = static_cast<T*>(args_.own_keys) + r * kv_size_;
    T* values = static_cast<T*>(args_.own_values) + r * kv_size_;
    convert(heads + query_size_, keys, kv_size_);
    convert(heads + query_size_ + kv_size_, values, kv_size_);
    if (args_.slots == nullptr) return;
    const Pages pages{dim, a.block_size};
    const int64_t block = args_.slots[r] / a.block_size, inside = args_.slots[r] % a.block_size;
    for (int64_t h = 0; h < a.num_kv_heads; ++h) {
      T* key_page = static_cast<T*>(const_cast<void*>(a.key_cache)) + block * a.key_block_stride +
                    h * a.key_head_stride;
      T* value_page = static_cast<T*>(const_cast<void*>(a.value_cache)) +
                      block * a.value_block_stride + h * a.value_head_stride;
      for (int64_t d = 0; d < dim; ++d) {
        key_page[pages.key(inside, d)] = keys[h * dim + d];
        value_page[pages.value(inside, d)] = values[h * dim + d];
      }
    }
  }

  void rotate(float* head, int64_t r) const {
    const int64_t half = args_.rotary_size / 2;
    const float* cosines = args_.cos_sin + args_.positions[r] * args_.rotary_size;
    const float* sines = cosines + half;
    for (int64_t i = 0; i < half; ++i) {
      const float x = head[i], y = head[i + half];
      head[i] = x * cosines[i] - y * sines[i];
      head[i + half] = y * cosines[i] + x * sines[i];
    }
  }

  void add_residual(int64_t r) {
    float *residual = row(residual_, r), *sums = row(sums_, r);
    for (int64_t i = 0; i < hidden_; i += kLanes)
      store(residual + i, load(residual + i) + load(sums + i));
  }

  void activate() {
    const int64_t width = args_.intermediate_size;
    for (Share s(rows_ * width / kLanes); s.begin < s.end; ++s.begin) {
      const int64_t r = s.begin * kLanes / width, i = s.begin * kLanes % width;
      const float* gates = gates_ + r * 2 * width + i;
      store(left_ + r * width + i, silu(load(gates)) * load(gates + width));
    }
  }

  const HeadArguments& args_;
  Arguments attention_;
  const int64_t rows_, hidden_;
  int64_t query_size_ = 0, kv_size_ = 0;
  L* left_;  // of the linear layer that is next
  float *residual_, *sums_, *qkv_, *gates_;
  T *query_, *attended_;
};

}  // namespace heterospec
