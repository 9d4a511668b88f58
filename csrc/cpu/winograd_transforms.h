// The transforms of Winograd's minimal filtering (Lavin and Gray, 2015), for 3x3 convolutions of stride 1 and for the
// gradient of their weights.
//
// F(2x2, 3x3) computes a 2x2 tile of the output from a 4x4 tile d of the input, with weights g:
//   y = A^T [sum over channels of (G g G^T) * (B^T d B)] A
// * multiplies element by element, so each of the 16 transformed values has a matrix of weights. This takes 4/9 of the
// multiplications of the direct sum.
//
// A convolution after a nearest-neighbour upsampling by 2 is four 2x2 convolutions of the small map. Each makes one
// phase: one pixel of each 2x2 square of the output. Of the three taps of a row two fall on the same pixel, and are
// summed beforehand. F(2x2, 2x2) makes a 2x2 tile of a phase from a 3x3 tile of the small map with 9 products. These
// are 36 for 16 pixels of the output, 1/4 of the multiplications of the direct sum. The tiles of the four phases
// overlap in a 4x4 tile, and have 25 different transformed values.
//
// The transforms of maps have only the factors 0 and +-1. In float32 they are about as accurate as the direct sum.
// Larger tiles would be several times less accurate.
#pragma once

#include "cpu/scratch.h"
#include "cpu/vector.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr Index kMaxTilesInStrip = 32;
constexpr Index kApart = 16;  // padding in floats, so that neighbours do not share a cache set

// The 2x2 tiles of a map. A row of tiles consists of `segments` strips of up to `in_strip` tiles.
struct Tiles {
  Index down, across, segments, in_strip;

  Tiles(Index height, Index width) : down((height + 1) / 2), across((width + 1) / 2) {
    segments = (across + kMaxTilesInStrip - 1) / kMaxTilesInStrip;
    in_strip = segments == 0 ? 0 : (across + segments - 1) / segments;
  }
};

// Neighbouring tiles of one row of tiles.
struct Strip {
  Index sample, down, first, tiles;

  Strip(const Tiles& all, Index number)
      : sample(number / (all.segments * all.down)),
        down(number % all.down),
        first(number / all.down % all.segments * all.in_strip),
        tiles(smaller(all.in_strip, all.across - first)) {}
};

// -------------------------------------------------------------------------------------------------------------- input

//   B^T d
template <class V>
DDPM_FAST_INLINE void transform_input(const V (&d)[4], V (&out)[4]) {
  out[0] = d[0] - d[2];
  out[1] = d[1] + d[2];
  out[2] = d[2] - d[1];
  out[3] = d[1] - d[3];
}

// An upsampled convolution: values 0..2 belong to the first phase, 2..4 to the second.
template <class V>
DDPM_FAST_INLINE void transform_input(const V (&d)[4], V (&out)[5]) {
  out[0] = d[0] - d[1];
  out[1] = d[1];
  out[2] = d[1] - d[2];
  out[3] = d[2];
  out[4] = d[2] - d[3];
}

// The gradient of an upsampled convolution's output. Pixel 0 is the one before the tile and has the second phase.
// Flipped weights have this order of phases, too.
template <class V>
DDPM_FAST_INLINE void transform_input(const V (&d)[6], V (&out)[6]) {
  for (int i = 0; i < 2; ++i) {
    out[3 * i] = d[i] - d[i + 2];
    out[3 * i + 1] = d[i + 2];
    out[3 * i + 2] = d[i + 2] - d[i + 4];
  }
}

// -------------------------------------------------------------------------------------------------------------- output

//   A^T m
DDPM_FAST_INLINE void transform_sums(const Floats (&m)[4], Floats (&out)[2]) {
  out[0] = m[0] + m[1] + m[2];
  out[1] = m[1] - m[2] - m[3];
}
DDPM_FAST_INLINE void transform_sums(const Floats (&m)[3], Floats (&out)[2]) {
  out[0] = m[0] + m[1];
  out[1] = m[1] - m[2];
}

// ------------------------------------------------------------------------------------------------------------- weights

//   G g
DDPM_FAST_INLINE void transform_weights(const Floats (&g)[3], Floats (&out)[4]) {
  const Floats outer = g[0] + g[2];
  out[0] = g[0];
  out[1] = (outer + g[1]) * 0.5f;
  out[2] = (outer - g[1]) * 0.5f;
  out[3] = g[2];
}

// An upsampled convolution: two taps for each phase, and between them their sum, which is the sum of all taps.
DDPM_FAST_INLINE void transform_weights(const Floats (&g)[3], Floats (&out)[6]) {
  const Floats first = g[0] + g[1], last = g[1] + g[2], sum = first + g[2];
  out[0] = g[0], out[1] = sum, out[2] = last;
  out[3] = first, out[4] = sum, out[5] = g[2];
}

// Returns the index, among the matrices of a panel, of row and column of the transformed weights.
template <int side>
constexpr int position_of(int row, int column) {
  if constexpr (side == 4) return side * row + column;
  return 9 * (row / 3 * 2 + column / 3) + row % 3 * 3 + column % 3;  // phase by phase
}

//   G^T m
DDPM_FAST_INLINE void transform_weights_back(const Floats (&m)[4], Floats (&out)[3]) {
  const Floats sum = (m[1] + m[2]) * 0.5f;
  out[0] = m[0] + sum;
  out[1] = (m[1] - m[2]) * 0.5f;
  out[2] = sum + m[3];
}
DDPM_FAST_INLINE void transform_weights_back(const Floats (&m)[6], Floats (&out)[3]) {
  const Floats sum = m[1] + m[4];
  out[0] = m[0] + m[3] + sum;
  out[1] = m[2] + m[3] + sum;
  out[2] = m[2] + m[5] + sum;
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
