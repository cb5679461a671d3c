// SPDX-License-Identifier: Apache-2.0
// Matrix products in AMX tiles: 16 rows of 64 bytes, bfloat16 in, float sums out. One instruction multiplies 16 rows of
// A with 16 columns of B over a depth of 32, and takes as long for one row. B lies in pairs: tile row i holds the
// elements 2 i and 2 i + 1 of the depth for each of 16 columns, as `Panels` do (vLLM's `amx` pages, packed weights).
#pragma once

#include "buffer.hpp"
#include "gemm.hpp"

#if defined(HETEROSPEC_AMX)
#if defined(HETEROSPEC_EMULATED_TILES)
#include "emulated_tiles.hpp"
#else
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#if defined(HETEROSPEC_EMULATED_TILES)
    return true;
#else
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted;
#endif
  }
};

// GCC does not know that a tile load reads memory: what was stored before must be there.
HETEROSPEC_INLINE void settle_stores() { __asm__ volatile("" ::: "memory"); }

// One tile of B for every column tile of C, which are `kTiles` side by side.
template <int kTiles, typename B>
void tile_columns(const bf16* a, int lda, B b, float* c, int ldc, int depth, bool add, B ahead) {
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
template <typename B>
void tile_gemm(int rows, const bf16* a, int lda, B b, float* c, int ldc, int columns, int depth,
               const float* keep, B ahead) {
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
      case 16: take(tile_columns<1, B>); break;
      case 32: take(tile_columns<2, B>); break;
      case 48: take(tile_columns<3, B>); break;
      default: take(tile_columns<4, B>);
    }
  }
  if (whole < depth)
    gemm_all(rows, a + whole, lda, b.from_row(whole), c, ldc, columns, depth - whole,
             whole ? kOnes.factor : keep, ahead);
}

}  // namespace heterospec
#endif
