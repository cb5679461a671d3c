// SPDX-License-Identifier: Apache-2.0
// AMX tiles in memory, for tests on processors that have none: the instructions of tiles.hpp under their names.
#pragma once

#include <algorithm>
#include <limits>

#include "simd.hpp"

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_zero(tile) heterospec::EmulatedTile::of(tile).zero()
#define _tile_loadd(tile, from, stride) heterospec::EmulatedTile::of(tile).load(from, stride)
#define _tile_stored(tile, to, stride) heterospec::EmulatedTile::of(tile).store(to, stride)
#define _tile_dpbf16ps(sums, a, b)                                             \
  heterospec::EmulatedTile::of(sums).multiply(heterospec::EmulatedTile::of(a), \
                                              heterospec::EmulatedTile::of(b))

namespace heterospec {

struct EmulatedTile {
  uint8_t rows[16][64];

  static EmulatedTile& of(int tile) {
    static thread_local EmulatedTile tiles[8];
    return tiles[tile];
  }
  void zero() { std::memset(rows, 0, sizeof(rows)); }
  void load(const void* from, long stride) {
    for (int i = 0; i < 16; ++i)
      std::memcpy(rows[i], static_cast<const char*>(from) + i * stride, 64);
  }
  void store(void* to, long stride) const {
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, rows[i], 64);
  }
  // rows: sums [16][16]; a: [16][16 pairs]; b: [16 pairs][16].
  void multiply(const EmulatedTile& a, const EmulatedTile& b) {
    for (int r = 0; r < 16; ++r) {
      vf sums = load_raw<vf>(rows[r]);
      for (int pair = 0; pair < 16; ++pair) {
        const auto left = _mm512_set1_epi32(load_raw<int32_t>(a.rows[r] + 4 * pair));
        sums = (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)left,
                                    (__m512bh)load_raw<__m512i>(b.rows[pair]));
      }
      std::memcpy(rows[r], &sums, 64);
    }
  }
};

}  // namespace heterospec
