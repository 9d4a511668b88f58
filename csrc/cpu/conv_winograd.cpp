// 3x3 convolution of stride 1 with 4/9 of the multiplications: Winograd's F(2x2, 3x3), as Lavin and Gray (2015) have
// it.
//
// Each 2x2 tile of the output comes of a 4x4 tile of the input: transformed, B^T d B, it is 16 values; each is
// multiplied with its own matrix of transformed weights, G g G^T, summed over the input channels; and the 16 sums
// become 4, A^T m A. All factors of the transforms of maps are 0 and +-1. In float32 that is about as accurate as the
// direct sum; larger tiles would be several times less so.
//
// A block of tiles is transformed into memory that stays in the second cache; the weights then pass by once, a panel of
// output channels at a time, and the sums of a panel are still in the first cache when they become output.
#include "cpu/conv.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

constexpr Index kPositions = 16;
constexpr Index kMaxTilesInStrip = 32;
constexpr Index kApart = 16;  // floats that keep neighbours in memory out of the same set of a cache

struct Tiles {
  Index down, across, segments, in_strip;  // in_strip: at most

  explicit Tiles(const ConvArgs& a) : down((a.out_height + 1) / 2), across((a.out_width + 1) / 2) {
    segments = (across + kMaxTilesInStrip - 1) / kMaxTilesInStrip;
    in_strip = (across + segments - 1) / larger(segments, 1);
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
  const float* pixel(Index i, Index tile) { return row(top_ + i) + 2 * tile * depth_; }

 private:
  float* row(Index number) { return rows_ + (number + 1) % 4 * row_size_; }

  const ConvArgs& a_;
  Index depth_, row_size_;
  float* rows_;
  Index sample_ = -1, first_ = -1, top_ = -1;
};

// The transformed input of a tile, all channels, to 16 rows of `to`, `apart` elements from each other.
template <class T>
void transform_tile(const float* const (&rows)[4], Index depth, T* to, Index apart) {
  for (Index c = 0; c < depth; c += kWidth<float>) {
    Floats half[4][4];  // [column][row]
    for (int j = 0; j < 4; ++j) {
      Floats column[4];
      for (int i = 0; i < 4; ++i) column[i] = load(rows[i] + j * depth + c);
      transform_input(column, half[j]);
    }
    for (int i = 0; i < 4; ++i) {
      const Floats row[4] = {half[0][i], half[1][i], half[2][i], half[3][i]};
      Floats out[4];
      transform_input(row, out);
      for (int j = 0; j < 4; ++j) store(to + (4 * i + j) * apart + c, out[j]);
    }
  }
}

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
        transform_tile(rows, wide, transformed + count * wide, apart);
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
