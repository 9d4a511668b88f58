// 3x3 convolution of stride 1 by Winograd's F(2x2, 3x3): see winograd.h.
//
// A block of tiles is transformed into memory that stays in the second cache; the weights then pass by once, a panel of
// output channels at a time, and the sums of a panel are still in the first cache when they become output.
#include "cpu/winograd.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

// The sums of a tile, kPanelVectors vectors for each position, to its pixels.
template <class T>
DDPM_FAST_INLINE void transform_output(const ConvArgs& a, const Output<T>& output, const float* sums, Index sample,
                                       Index row, Index column) {
  const Index pixel = (sample * a.out_height + row) * a.out_width + column;
  for (int v = 0; v < kPanelVectors; ++v) {
    Floats half[2][4];
    for (int j = 0; j < 4; ++j) {
      Floats m[4];
      for (int i = 0; i < 4; ++i) m[i] = load(sums + (4 * i + j) * kPanel + v * kWidth<float>);
      half[0][j] = m[0] + m[1] + m[2];
      half[1][j] = m[1] - m[2] - m[3];
    }
    for (int i = 0; i < 2; ++i) {
      if (row + i >= a.out_height) break;
      output.write(pixel + i * a.out_width, v, half[i][0] + half[i][1] + half[i][2]);
      if (column + 1 < a.out_width) {
        output.write(pixel + i * a.out_width + 1, v, half[i][1] - half[i][2] - half[i][3]);
      }
    }
  }
}

template <class T>
void run(const ConvArgs& a) {
  const Tiles tiles(a);
  const int threads = a.run_on.threads();
  // Whole vectors, in the buffers alone.
  const Index depth = round_up(a.channels + a.skip_channels, kStep<T>), wide = round_up(depth, kWidth<float>);
  const Index tile_bytes = kPositions * wide * static_cast<Index>(sizeof(T));
  // Many tiles for each weight that is read, few enough for the second cache.
  constexpr Index kTransformedBytes = 1 << 20;
  const Index tiles_in_block = smaller(128, larger(24, kTransformedBytes / tile_bytes));
  const Work work(a.n * tiles.segments * tiles.down, larger(1, tiles_in_block / larger(1, tiles.in_strip)),
                  a.out_channels, threads);
  if (work.strips == 0) return;
  const Index most = work.largest_block() * tiles.in_strip, apart = most * wide + kApart;
  constexpr Index kSums = kPositions * kPanel + kApart;  // of a tile
  const double multiplications =
      static_cast<double>(work.strips * tiles.in_strip) * kPositions * static_cast<double>(depth * a.out_channels);
  work.run(multiplications, threads, [&](Index first_strip, Index end_strip, Index first_panel, Index end_panel) {
    Room room(RoomFor::kSlice, Room::bytes<float>(Ring<T>::size(tiles, wide)) + Room::bytes<T>(kPositions * apart) +
                                   Room::bytes<float>(most * kSums));
    Ring<T> ring(a, tiles, wide, room.take<float>(Ring<T>::size(tiles, wide)));
    T* transformed = room.take<T>(kPositions * apart);
    float* sums = room.take<float>(most * kSums);

    Index count = 0;
    for (Index s = first_strip; s < end_strip; ++s) {
      const Strip strip(tiles, s);
      ring.move_to(strip);
      for (Index tile = 0; tile < strip.tiles; ++tile, ++count) {
        const float* const rows[4] = {ring.pixel(0, tile), ring.pixel(1, tile), ring.pixel(2, tile),
                                      ring.pixel(3, tile)};
        T* to = transformed + count * wide;
        for (Index c = 0; c < wide; c += kWidth<float>) {
          Floats values[kPositions];
          transform_tile(rows, wide, c, values);
          for (int p = 0; p < kPositions; ++p) store(to + p * apart + c, values[p]);
        }
      }
    }
    for (Index panel = first_panel; panel < end_panel; ++panel) {
      const float* weights = a.weights + panel * kPositions * panel_size<T>(depth);
      for (Index position = 0; position < kPositions; ++position, weights += panel_size<T>(depth)) {
        over_rows(0, count, [&](Index tile, auto rows) {
          const T* inputs[rows()];
          for (int r = 0; r < rows(); ++r) inputs[r] = transformed + position * apart + (tile + r) * wide;
          Sums<rows()> product{};
          multiply(product, inputs, weights, depth);
          for (int r = 0; r < rows(); ++r) {
            float* to = sums + (tile + r) * kSums + position * kPanel;
            for (int v = 0; v < kPanelVectors; ++v) store(to + v * kWidth<float>, product.of[r][v]);
          }
        });
      }
      const Output<T> output(a, panel);
      const float* from = sums;
      for (Index s = first_strip; s < end_strip; ++s) {
        const Strip strip(tiles, s);
        for (Index tile = 0; tile < strip.tiles; ++tile, from += kSums) {
          transform_output(a, output, from, strip.sample, 2 * strip.down, 2 * (strip.first + tile));
        }
      }
    }
  });
}

}  // namespace

void conv_winograd(const ConvArgs& a) {
  with_conv_type(a.dtype, [&](auto type) { run<decltype(type)>(a); });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
