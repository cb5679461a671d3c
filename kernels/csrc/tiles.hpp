// SPDX-License-Identifier: Apache-2.0
// Matrix products in AMX tiles: 16 rows of 64 bytes, bfloat16 in, float sums out. One instruction multiplies 16 rows of
// A with 16 columns of B over a depth of 32, and takes as long for one row. B lies in pairs: tile row i holds the
// elements 2 i and 2 i + 1 of the depth for each of 16 columns, which is how vLLM's `amx` pages and a transposed row
// of a linear layer's input look.
#pragma once

#include "buffer.hpp"
#include "gemm.hpp"

#if defined(HETEROSPEC_AMX)
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

namespace heterospec {

constexpr int kTileDepth = 32;

// Tiles of the full size for the calling thread, as long as this lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // Linux hands the tiles' registers out on request, to a process for good.
  static bool permitted() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted;
  }
};

// GCC does not know that a tile load reads memory: what was stored before must be there.
HETEROSPEC_INLINE void settle_stores() { __asm__ volatile("" ::: "memory"); }

// One tile of B for every column tile of C, which are `kTiles` side by side.
template <int kTiles>
void tile_columns(const bf16* a, int lda, Panels<bf16> b, float* c, int ldc, int depth, bool add,
                  Panels<bf16> ahead) {
  const long c_bytes = 4l * ldc, a_bytes = 2l * lda;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kTiles > 1) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kTiles > 2) _tile_loadd(2, c + 32, c_bytes);
    if constexpr (kTiles > 3) _tile_loadd(3, c + 48, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kTiles > 1) _tile_zero(1);
    if constexpr (kTiles > 2) _tile_zero(2);
    if constexpr (kTiles > 3) _tile_zero(3);
  }
  for (int k = 0; k < depth; k += kTileDepth) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(5, b.pair(k, 0), 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (kTiles > 1) {
      _tile_loadd(6, b.pair(k, 16), 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (kTiles > 2) {
      _tile_loadd(7, b.pair(k, 32), 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (kTiles > 3) {
      _tile_loadd(5, b.pair(k, 48), 64);
      _tile_dpbf16ps(3, 4, 5);
    }
    for (int t = 0; t < kTiles; ++t)
      for (int line = 0; line < 16; ++line)
        __builtin_prefetch(ahead.pair(k, 16 * t) + line * kTileDepth, 0, 2);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kTiles > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (kTiles > 2) _tile_stored(2, c + 32, c_bytes);
  if constexpr (kTiles > 3) _tile_stored(3, c + 48, c_bytes);
}

// `gemm` for up to 16 rows, of which A and C have all 16 in memory; what the others hold does not matter. The caller
// holds `Tiles`.
inline void tile_gemm(int rows, const bf16* a, int lda, Panels<bf16> b, float* c, int ldc, int columns,
                      int depth, const float* keep, Panels<bf16> ahead) {
  const int whole = depth / kTileDepth * kTileDepth;
  if (keep && whole)
    for (int r = 0; r < rows; ++r)
      if (keep[r] != 1.0f)
        for (int i = 0; i < columns; i += kLanes)
          store(c + r * ldc + i, load(c + r * ldc + i) * keep[r]);
  settle_stores();
  for (int i = 0; whole && i < columns; i += 64) {
    const auto take = [&](auto with) {
      with(a, lda, b.from_column(i), c + i, ldc, whole, keep != nullptr, ahead.from_column(i));
    };
    switch (columns - i) {
      case 16: take(tile_columns<1>); break;
      case 32: take(tile_columns<2>); break;
      case 48: take(tile_columns<3>); break;
      default: take(tile_columns<4>);
    }
  }
  if (whole < depth)
    gemm_all(rows, a + whole, lda, b.from_row(whole), c, ldc, columns, depth - whole,
             whole ? kOnes.factor : keep, ahead);
}

// 16 x 16 elements of 32 bits.
HETEROSPEC_INLINE void transpose(__m512i v[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    v[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    v[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    v[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

// Linear layers: the weight's columns, as checkpoints hold them, are the rows of A, so that they need no packing; the
// input is packed as B and what comes out is transposed.
class TileLinear {
 public:
  TileLinear(const bf16* left, int64_t left_stride, int64_t num_rows, int64_t depth)
      : rows_(num_rows), depth_(depth) {
    static thread_local Buffer<bf16> memory;
    pieces_ = (rows_ + 15) / 16;
    packed_ = memory.at_least(size_t(pieces_) * 16 * depth_);
    for (int64_t p = 0; p < pieces_; ++p)
      for (int64_t k = 0; k < depth_; k += kTileDepth) {
        __m512i v[16];
        for (int r = 0; r < 16; ++r) {
          const int64_t row = 16 * p + r;
          v[r] = row < rows_ ? load_raw<__m512i>(left + row * left_stride + k) : _mm512_setzero_si512();
        }
        transpose(v);
        for (int i = 0; i < 16; ++i) std::memcpy(packed(p, k) + i * kTileDepth, &v[i], 64);
      }
    settle_stores();
  }

  // Columns [begin, end) of all rows, a multiple of 16 of them. Four sums at a time hide a product's latency.
  void run(const bf16* weight, int64_t begin, int64_t end, float* out, int64_t out_stride) const {
    const Tiles tiles;
    int64_t column = begin;
    if (pieces_ == 1)
      for (; column + 64 <= end; column += 64) block<4, 1>(weight, column, 0, out, out_stride);
    for (; column + 32 <= end; column += 32) all_pieces<2>(weight, column, out, out_stride);
    for (; column < end; column += 16) all_pieces<1>(weight, column, out, out_stride);
  }

 private:
  bf16* packed(int64_t piece, int64_t k) const { return packed_ + (piece * depth_ + k) * 16; }

  template <int kColumns>
  void all_pieces(const bf16* weight, int64_t column, float* out, int64_t out_stride) const {
    int64_t p = 0;
    for (; p + 2 <= pieces_; p += 2) block<kColumns, 2>(weight, column, p, out, out_stride);
    if (p < pieces_) block<kColumns, 1>(weight, column, p, out, out_stride);
  }

  // Sixteen columns times kColumns of kPieces pieces of the rows: sum c * kPieces + q is in the tile of that number.
  template <int kColumns, int kPieces>
  void block(const bf16* weight, int64_t column, int64_t p, float* out, int64_t out_stride) const {
    constexpr int kSums = kColumns * kPieces;
    const bf16* from = weight + column * depth_;
    const int64_t next = 16 * depth_;
    const long bytes = 2 * depth_;
    _tile_zero(0);
    if constexpr (kSums > 1) _tile_zero(1);
    if constexpr (kSums > 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth_; k += kTileDepth) {
      _tile_loadd(6, packed(p, k), 64);
      _tile_loadd(4, from + k, bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kPieces > 1) {
        _tile_loadd(7, packed(p + 1, k), 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kColumns > 1) {
        _tile_loadd(5, from + next + k, bytes);
        if constexpr (kPieces > 1) {
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        } else {
          _tile_dpbf16ps(1, 5, 6);
        }
      }
      if constexpr (kColumns > 2) {
        _tile_loadd(4, from + 2 * next + k, bytes);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, from + 3 * next + k, bytes);
        _tile_dpbf16ps(3, 5, 6);
      }
      if (p == 0) prefetch(from + kColumns * next + k, 16 * kColumns);
    }
    alignas(64) float sums[kSums][16][16];
    _tile_stored(0, sums[0], 64);
    if constexpr (kSums > 1) _tile_stored(1, sums[1], 64);
    if constexpr (kSums > 2) {
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
    }
    for (int c = 0; c < kColumns; ++c)
      for (int q = 0; q < kPieces; ++q)
        put(sums[c * kPieces + q], p + q, out + column + 16 * c, out_stride);
  }

  // One line of each of the columns that follow.
  void prefetch(const bf16* weight, int columns) const {
    for (int c = 0; c < columns; ++c) __builtin_prefetch(weight + c * depth_, 0, 2);
  }

  void put(const float sums[16][16], int64_t piece, float* out, int64_t out_stride) const {
    __m512i v[16];
    for (int i = 0; i < 16; ++i) v[i] = load_raw<__m512i>(sums[i]);
    transpose(v);
    const int64_t first = 16 * piece, count = std::min<int64_t>(16, rows_ - first);
    for (int64_t r = 0; r < count; ++r) std::memcpy(out + (first + r) * out_stride, &v[r], 64);
  }

  const int64_t rows_, depth_;
  int64_t pieces_;
  bf16* packed_;
};

}  // namespace heterospec
#endif
