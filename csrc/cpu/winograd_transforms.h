// The transforms of Winograd's minimal filtering (Lavin and Gray, 2015), for 3x3 convolutions of stride 1 and for the
// gradient of their weights.
//
// F(2x2, 3x3) computes a 2x2 tile of the output from a 4x4 tile d of the input, with weights g:
//   y = A^T [sum over channels of (G g G^T) * (B^T d B)] A
// * multiplies element by element, so each of the 16 transformed values has a matrix of weights. This takes 4/9 of the
// multiplications of the direct sum. The transforms of maps have only the factors 0 and +-1. In float32 they are about
// as accurate as the direct sum.
//
// F(4x4, 3x3) computes a 4x4 tile from a 6x6 tile by 36 products, 1/4 of the multiplications. It evaluates polynomials
// at 0, +-5/8, +-3/2 and infinity. The usual points, 0, +-1, +-2 and infinity, have twice the error.
//
// A convolution after a nearest-neighbour upsampling by 2 is four 2x2 convolutions of the small map. Each makes one
// phase: one pixel of each 2x2 square of the output. Of the three taps of a row two fall on the same pixel, and are
// summed beforehand. F(2x2, 2x2) makes a 2x2 tile of a phase from a 3x3 tile of the small map with 9 products. These
// are 36 for 16 pixels of the output, 1/4 of the multiplications of the direct sum. The tiles of the four phases
// overlap in a 4x4 tile, and have 25 different transformed values.
#pragma once

#include "cpu/scratch.h"
#include "cpu/vector.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr Index kMostInStrip = 64;  // pixels of a row of one phase of the output
constexpr Index kApart = 16;        // padding in floats, so that neighbours do not share a cache set

// The tiles of a map, which have `size` pixels a side. A row of tiles consists of `segments` strips of up to `in_strip`
// tiles.
struct Tiles {
  Index down, across, segments, in_strip;

  Tiles(Index height, Index width, Index size) : down((height + size - 1) / size), across((width + size - 1) / size) {
    const Index most = kMostInStrip / size;
    segments = (across + most - 1) / most;
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

// An algorithm has the geometry of its tiles and the transforms of a row or column. Each side is that of a square.
//   kTile: side of a tile of the input
//   kAdvance: pixels from tile to tile
//   kSide: side of the transformed values
//   kSumsSide: side of the sums of a phase
//   kOut: side of their pixels of the output
//   kOutputs: phases of the output
//   kScale: pixels from one pixel of a phase to the next
//   kTerms: products of a sum, one for each phase of the input
//   kPhaseApart: transformed values from phase to phase
//   kWeightsSide: side of the transformed weights, for algorithms that weights are packed for
//   input: B^T d
//   sums: A^T m
//   weights: G g
//   weights_back: G^T m

// F(2x2, 3x3).
struct SmallTile {
  static constexpr int kTile = 4, kAdvance = 2, kSide = 4, kSumsSide = 4, kOut = 2;
  static constexpr int kOutputs = 1, kScale = 1, kTerms = 1, kPhaseApart = 0, kWeightsSide = 4;

  static DDPM_FAST_INLINE void input(const Floats (&d)[4], Floats (&out)[4]) {
    out[0] = d[0] - d[2];
    out[1] = d[1] + d[2];
    out[2] = d[2] - d[1];
    out[3] = d[1] - d[3];
  }
  static DDPM_FAST_INLINE void sums(const Floats (&m)[4], Floats (&out)[2]) {
    out[0] = m[0] + m[1] + m[2];
    out[1] = m[1] - m[2] - m[3];
  }
  static DDPM_FAST_INLINE void weights(const Floats (&g)[3], Floats (&out)[4]) {
    const Floats outer = g[0] + g[2];
    out[0] = g[0];
    out[1] = (outer + g[1]) * 0.5f;
    out[2] = (outer - g[1]) * 0.5f;
    out[3] = g[2];
  }
  static DDPM_FAST_INLINE void weights_back(const Floats (&m)[4], Floats (&out)[3]) {
    const Floats sum = (m[1] + m[2]) * 0.5f;
    out[0] = m[0] + sum;
    out[1] = (m[1] - m[2]) * 0.5f;
    out[2] = sum + m[3];
  }
};

// F(4x4, 3x3).
struct LargeTile {
  static constexpr int kTile = 6, kAdvance = 4, kSide = 6, kSumsSide = 6, kOut = 4;
  static constexpr int kOutputs = 1, kScale = 1, kTerms = 1, kPhaseApart = 0, kWeightsSide = 6;

  // The points are 0, a, -a, b, -b and infinity. The products of a and b below are exact in float32.
  static constexpr float a = 0.625f, b = 1.5f;

  static DDPM_FAST_INLINE void input(const Floats (&d)[6], Floats (&out)[6]) {
    const auto scaled = [](float factor, Floats x, Floats y) { return fma(broadcast(factor), x, y); };
    const Floats even_a = scaled(-b * b, d[2], d[4]), odd_a = scaled(-b * b, d[1], d[3]);
    const Floats even_b = scaled(-a * a, d[2], d[4]), odd_b = scaled(-a * a, d[1], d[3]);
    out[0] = scaled(a * a * b * b, d[0], scaled(-a * a - b * b, d[2], d[4]));
    out[1] = scaled(a, odd_a, even_a);
    out[2] = scaled(-a, odd_a, even_a);
    out[3] = scaled(b, odd_b, even_b);
    out[4] = scaled(-b, odd_b, even_b);
    out[5] = scaled(a * a * b * b, d[1], scaled(-a * a - b * b, d[3], d[5]));
  }
  static DDPM_FAST_INLINE void sums(const Floats (&m)[6], Floats (&out)[4]) {
    const Floats even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    const auto both = [](float x, Floats of_a, float y, Floats of_b) { return fma(broadcast(x), of_a, of_b * y); };
    out[0] = m[0] + even_a + even_b;
    out[1] = both(a, odd_a, b, odd_b);
    out[2] = both(a * a, even_a, b * b, even_b);
    out[3] = both(a * a * a, odd_a, b * b * b, odd_b) + m[5];
  }

  // G: the powers of a point, divided by its distances from the other points.
  static constexpr double kAt0 = a * a * b * b, kAtA = 2 * a * a * (a * a - b * b), kAtB = 2 * b * b * (b * b - a * a);
  static constexpr double kWeights[6][3] = {{1 / kAt0, 0, 0},
                                            {1 / kAtA, a / kAtA, a * a / kAtA},
                                            {1 / kAtA, -a / kAtA, a * a / kAtA},
                                            {1 / kAtB, b / kAtB, b * b / kAtB},
                                            {1 / kAtB, -b / kAtB, b * b / kAtB},
                                            {0, 0, 1}};
};

// F(2x2, 2x2) of four phases. Values 0..2 belong to the first phase, 2..4 to the second. The weights have two taps for
// each phase, and between them their sum, which is the sum of all taps.
struct UpsampledTile {
  static constexpr int kTile = 4, kAdvance = 2, kSide = 5, kSumsSide = 3, kOut = 2;
  static constexpr int kOutputs = 4, kScale = 2, kTerms = 1, kPhaseApart = 2, kWeightsSide = 6;

  static DDPM_FAST_INLINE void input(const Floats (&d)[4], Floats (&out)[5]) {
    out[0] = d[0] - d[1];
    out[1] = d[1];
    out[2] = d[1] - d[2];
    out[3] = d[2];
    out[4] = d[2] - d[3];
  }
  static DDPM_FAST_INLINE void sums(const Floats (&m)[3], Floats (&out)[2]) {
    out[0] = m[0] + m[1];
    out[1] = m[1] - m[2];
  }
  static DDPM_FAST_INLINE void weights(const Floats (&g)[3], Floats (&out)[6]) {
    const Floats first = g[0] + g[1], last = g[1] + g[2], sum = first + g[2];
    out[0] = g[0], out[1] = sum, out[2] = last;
    out[3] = first, out[4] = sum, out[5] = g[2];
  }
  static DDPM_FAST_INLINE void weights_back(const Floats (&m)[6], Floats (&out)[3]) {
    const Floats sum = m[1] + m[4];
    out[0] = m[0] + m[3] + sum;
    out[1] = m[2] + m[3] + sum;
    out[2] = m[2] + m[5] + sum;
  }
};

// The gradient of an upsampled convolution's output. Pixel 0 is the one before the tile and has the second phase.
// Flipped weights have this order of phases, too.
struct UpsampledGradientTile {
  static constexpr int kTile = 6, kAdvance = 4, kSide = 6, kSumsSide = 3, kOut = 2;
  static constexpr int kOutputs = 1, kScale = 1, kTerms = 4, kPhaseApart = 3;

  static DDPM_FAST_INLINE void input(const Floats (&d)[6], Floats (&out)[6]) {
    for (int i = 0; i < 2; ++i) {
      out[3 * i] = d[i] - d[i + 2];
      out[3 * i + 1] = d[i + 2];
      out[3 * i + 2] = d[i + 2] - d[i + 4];
    }
  }
  static DDPM_FAST_INLINE void sums(const Floats (&m)[3], Floats (&out)[2]) { UpsampledTile::sums(m, out); }
};

// Returns the index, among the matrices of a panel, of row and column of the transformed weights.
template <class Kind>
constexpr int position_of(int row, int column) {
  if constexpr (Kind::kOutputs == 1) return Kind::kWeightsSide * row + column;
  return 9 * (row / 3 * 2 + column / 3) + row % 3 * 3 + column % 3;  // phase by phase
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
