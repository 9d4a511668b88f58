// 3x3 convolution of stride 1 by Winograd's F(2x2, 3x3): see winograd.h.
//
// A block of tiles is transformed into memory that stays in the second cache; the weights then pass by once, a panel of
// output channels at a time, and the sums of a panel are still in the first cache when they become output.
#include "cpu/winograd.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

// The sums of a tile, kPanelVectors vectors for each position, to its pixels.
template <int vectors, class T>
DDPM_FAST_INLINE void transform_output(const ConvArgs& a, const Output<T>& output, const float* sums, Index sample,
                                       Index row, Index column) {
  const Index pixel = (sample * a.out_height + row) * a.out_width + column;
  for (int v = 0; v < vectors; ++v) {
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
  const Tiles tiles(a.out_height, a.out_width);
  const int threads = a.run_on.threads();
  // Whole vectors, in the buffers alone.
  const Index depth = round_up(a.channels + a.skip_channels, kStep<T>), wide = round_up(depth, kWidth<float>);
  const Index tile_bytes = kPositions * wide * static_cast<Index>(sizeof(T));
  // Many tiles for each weight that is read, few enough for the second cache, and for every thread its own where there
  // are enough.
  constexpr Index kTransformedBytes = 1 << 20, kFewest = 24;
  const Index tiles_a_thread = a.n * tiles.segments * tiles.down * tiles.in_strip / threads;
  Index tiles_in_block = smaller(64, larger(kFewest, kTransformedBytes / tile_bytes));
  if (tiles_a_thread >= kFewest) tiles_in_block = smaller(tiles_in_block, tiles_a_thread);
  const Work work(a.n * tiles.segments * tiles.down, larger(1, tiles_in_block / larger(1, tiles.in_strip)),
                  a.out_channels, threads);
  if (work.strips == 0) return;
  const Index most = work.largest_block() * tiles.in_strip, apart = most * wide + kApart;
  constexpr Index kSums = kPositions * kPanel + kApart;  // of a tile
  const double multiplications =
      static_cast<double>(work.strips * tiles.in_strip) * kPositions * static_cast<double>(depth * a.out_channels);

  work.run(multiplications, threads, [&](const Work::Share& share) {
    Room room(RoomFor::kSlice, Room::bytes<float>(Ring<T>::size(tiles, wide)) + Room::bytes<T>(kPositions * apart) +
                                   Room::bytes<float>(most * kSums));
    Ring<T> ring(a, tiles, wide, room.take<float>(Ring<T>::size(tiles, wide)));
    T* transformed = room.take<T>(kPositions * apart);
    float* sums = room.take<float>(most * kSums);

    Index count = 0;
    for (Index s = share.first_strip; s < share.end_strip; ++s) {
      const Strip strip(tiles, s);
      ring.move_to(strip);
      transform_tiles<1>(ring, strip, strip.tiles, wide,
                         [&](Index tile, Index c, int position, const Floats(&values)[1]) {
                           store(transformed + position * apart + (count + tile) * wide + c, values[0]);
                         });
      count += strip.tiles;
    }
    for (Index panel = share.first_panel; panel < share.end_panel; ++panel) {
      with_vectors(a.out_channels - panel * kPanel, [&](auto vectors) {
        const Output<T> output(a, panel);
        const float* weights = a.weights + panel * kPositions * panel_size<T>(depth);
        for (Index position = 0; position < kPositions; ++position, weights += panel_size<T>(depth)) {
          over_rows(0, count, [&](Index tile, auto rows) {
            const T* inputs[rows()];
            for (int r = 0; r < rows(); ++r) inputs[r] = transformed + position * apart + (tile + r) * wide;
            Sums<rows(), vectors()> product{};
            multiply(product, inputs, weights, depth);
            for (int r = 0; r < rows(); ++r) {
              float* to = sums + (tile + r) * kSums + position * kPanel;
              for (int v = 0; v < vectors(); ++v) store(to + v * kWidth<float>, product.of[r][v]);
            }
          });
        }
        const float* from = sums;
        for (Index s = share.first_strip; s < share.end_strip; ++s) {
          const Strip strip(tiles, s);
          for (Index tile = 0; tile < strip.tiles; ++tile, from += kSums) {
            transform_output<vectors()>(a, output, from, strip.sample, 2 * strip.down, 2 * (strip.first + tile));
          }
        }
      });
    }
  });
}

}  // namespace

void conv_winograd(const ConvArgs& a) {
  with_conv_type(a.dtype, [&](auto type) { run<decltype(type)>(a); });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
