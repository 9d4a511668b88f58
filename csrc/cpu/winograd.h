// What Winograd's F(2x2, 3x3) is made of, for the convolution and for the gradient of its weights: 3x3 of stride 1 with
// 4/9 of the multiplications, as Lavin and Gray (2015) have it.
//
// Each 2x2 tile of the output comes of a 4x4 tile of the input: transformed, B^T d B, it is 16 values; each is
// multiplied with its own matrix of transformed weights, G g G^T, summed over the input channels; and the 16 sums
// become 4, A^T m A. All factors of the transforms of maps are 0 and +-1. In float32 that is about as accurate as the
// direct sum; larger tiles would be several times less so.
#pragma once

#include "cpu/conv.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int kPositions = 16;
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

// The four rows of input of a strip, one ring of rows for strips that follow each other downwards, which share two.
template <class T>
class Ring {
 public:
  Ring(const ConvArgs& a, const Tiles& tiles, Index depth, float* room)
      : a_(a), depth_(depth), row_size_(size(tiles, depth) / 4), rows_(room) {}

  static Index size(const Tiles& tiles, Index depth) { return 4 * ((2 * tiles.in_strip + 2) * depth + kApart); }

  void move_to(const Strip& strip) {
    const Index top = 2 * strip.down - 1, columns = 2 * strip.tiles + 2;
    const bool follows = strip.sample == sample_ && strip.first == first_ && top == top_ + 2;
    for (Index i = follows ? 2 : 0; i < 4; ++i) {
      input_row<T>(a_, strip.sample, top + i, 2 * strip.first - 1, columns, row(top + i), depth_);
    }
    sample_ = strip.sample, first_ = strip.first, top_ = top;
  }

  // Of row i of a tile, its first pixel.
  const float* pixel(Index i, Index tile) const { return row(top_ + i) + 2 * tile * depth_; }

 private:
  float* row(Index number) const { return rows_ + (number + 1) % 4 * row_size_; }

  const ConvArgs& a_;
  Index depth_, row_size_;
  float* rows_;
  Index sample_ = -1, first_ = -1, top_ = -1;
};

// The transformed input of `count` tiles from the strip's first on, `at_once` neighbours at a time, kWidth<float>
// channels: calls put(tile, channel, position, values of each tile; a tile beyond the strip has zeros). Neighbours
// share two columns.
template <int at_once, class T, class Put>
DDPM_FAST_INLINE void transform_tiles(const Ring<T>& ring, const Strip& strip, Index count, Index depth, Put put) {
  const float* const rows[4] = {ring.pixel(0, 0), ring.pixel(1, 0), ring.pixel(2, 0), ring.pixel(3, 0)};
  for (Index c = 0; c < depth; c += kWidth<float>) {
    Floats half[2 * at_once + 2][4];  // [column][row]
    const auto transform_column = [&](Index column, Floats(&out)[4]) {
      Floats pixels[4];
      for (int i = 0; i < 4; ++i) pixels[i] = load(rows[i] + column * depth + c);
      transform_input(pixels, out);
    };
    for (int j = 0; j < 2; ++j) transform_column(j, half[2 * at_once + j]);
    for (Index tile = 0; tile < count; tile += at_once) {
      const Index present = smaller(at_once, strip.tiles - tile);
      for (int j = 0; j < 2; ++j) {
        for (int i = 0; i < 4; ++i) half[j][i] = half[2 * at_once + j][i];
      }
      for (int s = 0; s < at_once; ++s) {
        if (s >= present) break;
        for (int j = 2; j < 4; ++j) transform_column(2 * (tile + s) + j, half[2 * s + j]);
      }
      for (int i = 0; i < 4; ++i) {
        Floats values[at_once][4] = {};
        for (int s = 0; s < at_once; ++s) {
          if (s >= present) break;
          const Floats row[4] = {half[2 * s][i], half[2 * s + 1][i], half[2 * s + 2][i], half[2 * s + 3][i]};
          transform_input(row, values[s]);
        }
        for (int j = 0; j < 4; ++j) {
          Floats neighbours[at_once];
          for (int s = 0; s < at_once; ++s) neighbours[s] = values[s][j];
          put(tile, c, 4 * i + j, neighbours);
        }
      }
    }
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
