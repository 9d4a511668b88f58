// Winograd's algorithms (see winograd_transforms.h) for three convolutions:
//   conv_winograd: 3x3, stride 1, by F(2x2, 3x3)
//   conv_winograd with upsample: the same after an upsampling by 2, by F(2x2, 2x2) of each phase
//   conv_winograd_large: 3x3, stride 1, by F(4x4, 3x3), with products in float32
//   conv_winograd_upsampled_gradient: from the gradient of the latter's output to the gradient of the small map
//
// A block of tiles is transformed into a buffer that stays in cache. The weights are then read once, one panel of output
// channels at a time. The sums of a panel are still in cache when they become output.
#include "cpu/conv_input.h"
#include "cpu/conv_output.h"
#include "cpu/conv_partition.h"
#include "cpu/winograd_transforms.h"
#include "cpu/with_type.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

// A ring of the rows of input of a strip. Strips that follow each other downwards share two rows.
template <class T, class Kind>
class Ring {
 public:
  Ring(const ConvArgs& a, const Tiles& tiles, Index depth, float* rows)
      : a_(a), depth_(depth), row_size_(size(tiles, depth) / Kind::kTile), rows_(rows) {}

  static Index size(const Tiles& tiles, Index depth) {
    return Kind::kTile * ((Kind::kAdvance * tiles.in_strip + 2) * depth + kApart);
  }

  void move_to(const Strip& strip) {
    const Index top = Kind::kAdvance * strip.down - 1, columns = Kind::kAdvance * strip.tiles + 2;
    const bool follows = strip.sample == sample_ && strip.first == first_ && top == top_ + Kind::kAdvance;
    for (Index i = follows ? 2 : 0; i < Kind::kTile; ++i) {
      input_row<T>(a_, strip.sample, top + i, Kind::kAdvance * strip.first - 1, columns, row(top + i), depth_);
    }
    sample_ = strip.sample, first_ = strip.first, top_ = top;
  }

  // Returns the first pixel of row i of the strip's tiles.
  const float* row_of_tiles(Index i) const { return row(top_ + i); }

 private:
  float* row(Index number) const { return rows_ + (number + 1) % Kind::kTile * row_size_; }

  const ConvArgs& a_;
  Index depth_, row_size_;
  float* rows_;
  Index sample_ = -1, first_ = -1, top_ = -1;
};

// Transforms the input of a strip. Calls put(tile, channel, position, values) for vectors of channels. Neighbouring
// tiles share two columns.
template <class Kind, class T, class Put>
DDPM_FAST_INLINE void transform_tiles(const Ring<T, Kind>& ring, const Strip& strip, Index depth, Put put) {
  constexpr int columns = Kind::kTile, side = Kind::kSide, advance = Kind::kAdvance;
  const float* rows[columns];
  for (int i = 0; i < columns; ++i) rows[i] = ring.row_of_tiles(i);
  for (Index c = 0; c < depth; c += kWidth<float>) {
    Floats half[columns][side];  // [column][row]
    const auto transform_column = [&](Index column, Floats(&out)[side]) {
      Floats pixels[columns];
      for (int i = 0; i < columns; ++i) pixels[i] = load(rows[i] + column * depth + c);
      Kind::input(pixels, out);
    };
    for (int j = 0; j < 2; ++j) transform_column(j, half[advance + j]);
    for (Index tile = 0; tile < strip.tiles; ++tile) {
      for (int j = 0; j < 2; ++j) {
        for (int i = 0; i < side; ++i) half[j][i] = half[advance + j][i];
      }
      for (int j = 2; j < columns; ++j) transform_column(advance * tile + j, half[j]);
      for (int i = 0; i < side; ++i) {
        Floats row[columns], values[side];
        for (int j = 0; j < columns; ++j) row[j] = half[j][i];
        Kind::input(row, values);
        for (int j = 0; j < side; ++j) put(tile, c, side * i + j, values[j]);
      }
    }
  }
}

// Transforms the sums of a tile in one phase to its pixels: `rows` by `columns` of them, from `pixel` on. Each position
// of the sums has kPanelVectors vectors.
template <class Kind, int vectors, class T>
DDPM_FAST_INLINE void transform_output(const ConvArgs& a, const Output<T>& output, const float* sums, Index pixel,
                                       Index rows, Index columns) {
  constexpr int side = Kind::kSumsSide, out = Kind::kOut, scale = Kind::kScale;
  for (int v = 0; v < vectors; ++v) {
    Floats half[out][side];
    for (int j = 0; j < side; ++j) {
      Floats m[side], y[out];
      for (int i = 0; i < side; ++i) m[i] = load(sums + (side * i + j) * kPanel + v * kWidth<float>);
      Kind::sums(m, y);
      for (int i = 0; i < out; ++i) half[i][j] = y[i];
    }
    for (int i = 0; i < out; ++i) {
      if (i >= rows) break;
      Floats y[out];
      Kind::sums(half[i], y);
      for (int j = 0; j < out; ++j) {
        if (j < columns) output.write(pixel + (i * a.out_width + j) * scale, v, y[j]);
      }
    }
  }
}

// The arguments of multiply_tiles. It computes the sums of one phase for `count` tiles at all positions. A sum has
// `terms` products of inputs and weights.
template <class T, int terms>
struct Products {
  const T* inputs[terms];  // each term's inputs at the first position
  // Elements from row to row of the positions, from column to column, and from tile to tile.
  Index row_apart, apart, tile_apart;
  Index count, depth;
  int side;              // side of the square of positions
  const float* weights;  // the first term's; each position has a matrix
  float* sums;           // a panel for each position
  Index sums_apart;      // from tile to tile
};

// The first `parts` groups of kRows tiles each prefetch a part of the next position's weights. At batch 1 these come from
// memory. This function is not inlined, so that it is compiled once for all kinds of tiles.
template <int parts, int vectors, class T, int terms>
DDPM_FAST_NOINLINE void multiply_tiles(const Products<T, terms>& products) {
  const Products<T, terms> p = products;  // a copy, which no store can change
  const Index matrix = panel_size<T>(p.depth), term_apart = p.side * p.side * matrix;
  for (int position = 0; position < p.side * p.side; ++position) {
    const Index at = position / p.side * p.row_apart + position % p.side * p.apart;
    const float* weights = p.weights + position * matrix;
    over_rows(0, p.count, [&](Index tile, auto rows) {
      Sums<rows(), vectors> product{};
      const float* next = weights + matrix + smaller(tile / kRows, parts - 1) * matrix / parts;
      for (int term = 0; term < terms; ++term, next += term_apart) {
        const T* inputs[rows()];
        for (int r = 0; r < rows(); ++r) inputs[r] = p.inputs[term] + at + (tile + r) * p.tile_apart;
        multiply<kPanelVectors / parts>(product, inputs, weights + term * term_apart, p.depth, next);
      }
      for (int r = 0; r < rows(); ++r) {
        float* to = p.sums + (tile + r) * p.sums_apart + position * kPanel;
        for (int v = 0; v < vectors; ++v) store(to + v * kWidth<float>, product.of[r][v]);
      }
    });
  }
}

// T: type of the maps. P: type of the packed weights and the transformed values.
template <class T, class P, class Kind>
void run(const ConvArgs& a) {
  constexpr int positions = Kind::kSumsSide * Kind::kSumsSide;
  constexpr Index transformed_values = Kind::kSide * Kind::kSide;
  const Tiles tiles(a.out_height / Kind::kScale, a.out_width / Kind::kScale, Kind::kOut);
  const int threads = a.stream_or_threads.threads();
  // Only the buffers have whole vectors.
  const Index depth = round_up(a.channels + a.skip_channels, kStep<P>), wide = round_up(depth, kWidth<float>);
  const Index tile_bytes = transformed_values * wide * static_cast<Index>(sizeof(P));
  // A block has many tiles, because each reads all weights. It has few enough for the second-level cache, and few
  // enough for every thread to get a block.
  constexpr Index kTransformedBytes = 1 << 20, kFewest = 24;
  const Index tiles_a_thread = a.n * tiles.segments * tiles.down * tiles.in_strip / threads;
  Index tiles_in_block = smaller(64, larger(kFewest, kTransformedBytes / tile_bytes));
  if (tiles_a_thread >= kFewest) tiles_in_block = smaller(tiles_in_block, tiles_a_thread);
  const ConvPartition partition =
      partition_strips(a.n * tiles.segments * tiles.down, larger(1, tiles_in_block / larger(1, tiles.in_strip)),
                       a.out_channels, threads);
  if (partition.strips == 0) return;
  const Index most = largest_block(partition) * tiles.in_strip, apart = most * wide + kApart;
  constexpr Index kSums = positions * kPanel + kApart;                    // per tile
  constexpr Index kMatrices = Kind::kOutputs * Kind::kTerms * positions;  // matrices of weights per panel
  const double multiplications = static_cast<double>(partition.strips * tiles.in_strip) *
                                 static_cast<double>(kMatrices) * static_cast<double>(depth * a.out_channels);

  for_each_share(partition, multiplications, a.stream_or_threads, [&](const ConvShare& share) {
    Scratch scratch(ScratchUse::kSlice, Scratch::bytes<float>(Ring<T, Kind>::size(tiles, wide)) +
                                            Scratch::bytes<P>(transformed_values * apart) +
                                            Scratch::bytes<float>(most * kSums));
    Ring<T, Kind> ring(a, tiles, wide, scratch.take<float>(Ring<T, Kind>::size(tiles, wide)));
    P* transformed = scratch.take<P>(transformed_values * apart);
    float* sums = scratch.take<float>(most * kSums);

    Index count = 0;
    for (Index s = share.first_strip; s < share.end_strip; ++s) {
      const Strip strip(tiles, s);
      ring.move_to(strip);
      transform_tiles(ring, strip, wide, [&](Index tile, Index c, int position, Floats values) {
        store(transformed + position * apart + (count + tile) * wide + c, values);
      });
      count += strip.tiles;
    }
    const auto inputs_of = [&](int phase) {
      return transformed + (phase / 2 * Kind::kSide + phase % 2) * Kind::kPhaseApart * apart;
    };
    for (Index panel = share.first_panel; panel < share.end_panel; ++panel) {
      with_vectors(a.out_channels - panel * kPanel, [&](auto vectors) {
        const Output<T> output(a, panel);
        for (int phase = 0; phase < Kind::kOutputs; ++phase) {
          const float* weights = a.packed + (panel * kMatrices + phase * positions) * panel_size<P>(depth);
          Products<P, Kind::kTerms> products{{},    Kind::kSide * apart, apart,   wide, count,
                                             depth, Kind::kSumsSide,     weights, sums, kSums};
          for (int term = 0; term < Kind::kTerms; ++term) products.inputs[term] = inputs_of(phase + term);
          if (count > 3 * kRows) {
            multiply_tiles<kPanelVectors, vectors()>(products);
          } else {
            count > kRows ? multiply_tiles<2, vectors()>(products) : multiply_tiles<1, vectors()>(products);
          }
          const float* from = sums;
          for (Index s = share.first_strip; s < share.end_strip; ++s) {
            const Strip strip(tiles, s);
            const Index top = Kind::kOut * strip.down,
                        row = strip.sample * a.out_height + top * Kind::kScale + phase / 2;
            for (Index tile = 0; tile < strip.tiles; ++tile, from += kSums) {
              const Index left = Kind::kOut * (strip.first + tile);
              transform_output<Kind, vectors()>(a, output, from, row * a.out_width + left * Kind::kScale + phase % 2,
                                                a.out_height / Kind::kScale - top, a.out_width / Kind::kScale - left);
            }
          }
        }
      });
    }
  });
}

}  // namespace

void conv_winograd(const ConvArgs& a) {
  with_conv_types(a.dtype, a.packed_dtype, [&](auto type, auto product) {
    using T = decltype(type);
    using P = decltype(product);
    a.upsample ? run<T, P, UpsampledTile>(a) : run<T, P, SmallTile>(a);
  });
}

void conv_winograd_large(const ConvArgs& a) {
  with_conv_type(a.dtype, [&](auto type) { run<decltype(type), float, LargeTile>(a); });
}

void conv_winograd_upsampled_gradient(const ConvArgs& a) {
  with_conv_types(a.dtype, a.packed_dtype,
                  [&](auto type, auto product) { run<decltype(type), decltype(product), UpsampledGradientTile>(a); });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
