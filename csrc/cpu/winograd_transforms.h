// What Winograd's minimal filtering is made of, for convolutions 3x3 of stride 1 and for the gradient of their weights,
// as Lavin and Gray (2015) have it.
//
// F(2x2, 3x3): each 2x2 tile of the output comes of a 4x4 tile of the input, in three steps:
//   B^T d B  transforms the tile to 16 values.
//   G g G^T  are the transformed weights. Each value is multiplied with its own matrix of them, and summed over the
//            input channels.
//   A^T m A  transforms the 16 sums to 4.
// That is 4/9 of the multiplications.
//
// After a nearest-neighbour upsampling by 2, the convolution is four convolutions 2x2 of the small map, one for each
// place in a 2x2 square of the output (its phase): of the three taps of a row, two fall on the same pixel and are
// summed beforehand. F(2x2, 2x2) makes a 2x2 tile of each phase of a 3x3 tile of the small map with 9 products: 36 for
// 16 pixels of the output, 1/4 of those of the convolution of the large map. The tiles of the phases overlap: they are
// corners of a 4x4 tile, and have 25 transformed values among them.
//
// All factors of the transforms of maps are 0 and +-1. In float32 that is about as accurate as the direct sum; larger
// tiles would be several times less so.
#pragma once

#include "cpu/conv.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr Index kMaxTilesInStrip = 32;
constexpr Index kApart = 16;  // floats that keep neighbours in memory out of the same set of a cache

struct Tiles {
  Index down, across, segments, in_strip;  // in_strip: at most

  Tiles(Index height, Index width) : down((height + 1) / 2), across((width + 1) / 2) {
    segments = (across + kMaxTilesInStrip - 1) / kMaxTilesInStrip;
    in_strip = segments == 0 ? 0 : (across + segments - 1) / segments;
  }
};

// Tiles of one row of tiles.
struct Strip {
  Index sample, down, first, tiles;

  Strip(const Tiles& all, Index number)
      : sample(number / (all.segments * all.down)),
        down(number % all.down),
        first(number / all.down % all.segments * all.in_strip),
        tiles(smaller(all.in_strip, all.across - first)) {}
};

// B^T d.
template <class V>
DDPM_FAST_INLINE void transform_input(const V (&d)[4], V (&out)[4]) {
  out[0] = d[0] - d[2];
  out[1] = d[1] + d[2];
  out[2] = d[2] - d[1];
  out[3] = d[1] - d[3];
}

// Of the first phase the first three, of the second the last three.
template <class V>
DDPM_FAST_INLINE void transform_input(const V (&d)[4], V (&out)[5]) {
  out[0] = d[0] - d[1];
  out[1] = d[1];
  out[2] = d[1] - d[2];
  out[3] = d[2];
  out[4] = d[2] - d[3];
}

// Of the gradient of an upsampled convolution's output. Pixel 0 is one before the tile, of the second phase; a kernel
// that is flipped changes phases, so flipped weights are in this order, too.
template <class V>
DDPM_FAST_INLINE void transform_input(const V (&d)[6], V (&out)[6]) {
  for (int i = 0; i < 2; ++i) {
    out[3 * i] = d[i] - d[i + 2];
    out[3 * i + 1] = d[i + 2];
    out[3 * i + 2] = d[i + 2] - d[i + 4];
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
