// 3x3 convolution of stride 1, the same after an upsampling by 2, and what takes the gradient of the latter's output to
// the small map, by Winograd's algorithms: see winograd.h.
//
// A block of tiles is transformed into memory that stays in the second cache; the weights then pass by once, a panel of
// output channels at a time, and the sums of a panel are still in the first cache when they become output.
#include "cpu/winograd.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

// kTile: pixels of the input that a tile is made of, a side; kAdvance: from tile to tile. kSide: of the square of
// transformed values. kSumsSide: of the square of sums that become 2x2 pixels of the output; kOutputs: squares, one for
// each phase of the output, whose pixels are kScale apart; kTerms: products of a sum, one for each phase of the input;
// kPhaseApart: transformed values from phase to phase.
struct Plain {
  static constexpr int kTile = 4, kAdvance = 2, kSide = 4, kSumsSide = 4;
  static constexpr int kOutputs = 1, kScale = 1, kTerms = 1, kPhaseApart = 0;
};
struct Upsampled {
  static constexpr int kTile = 4, kAdvance = 2, kSide = 5, kSumsSide = 3;
  static constexpr int kOutputs = 4, kScale = 2, kTerms = 1, kPhaseApart = 2;
};
struct UpsampledGradient {
  static constexpr int kTile = 6, kAdvance = 4, kSide = 6, kSumsSide = 3;
  static constexpr int kOutputs = 1, kScale = 1, kTerms = 4, kPhaseApart = 3;
};

// The rows of input of a strip, one ring of rows for strips that follow each other downwards, which share two.
template <class T, class Kind>
class Ring {
 public:
  Ring(const ConvArgs& a, const Tiles& tiles, Index depth, float* room)
      : a_(a), depth_(depth), row_size_(size(tiles, depth) / Kind::kTile), rows_(room) {}

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

  // The first pixel of row i of the strip's tiles.
  const float* row_of_tiles(Index i) const { return row(top_ + i); }

 private:
  float* row(Index number) const { return rows_ + (number + 1) % Kind::kTile * row_size_; }

  const ConvArgs& a_;
  Index depth_, row_size_;
  float* rows_;
  Index sample_ = -1, first_ = -1, top_ = -1;
};

// The transformed input of a strip: calls put(tile, channel, position, values) for vectors of channels. Neighbours
// share two columns.
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
      transform_input(pixels, out);
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
        transform_input(row, values);
        for (int j = 0; j < side; ++j) put(tile, c, side * i + j, values[j]);
      }
    }
  }
}

// A^T m.
DDPM_FAST_INLINE void transform_sums(const Floats (&m)[4], Floats (&out)[2]) {
  out[0] = m[0] + m[1] + m[2];
  out[1] = m[1] - m[2] - m[3];
}
DDPM_FAST_INLINE void transform_sums(const Floats (&m)[3], Floats (&out)[2]) {
  out[0] = m[0] + m[1];
  out[1] = m[1] - m[2];
}

// The sums of a tile in a phase, kPanelVectors vectors for each position, to its pixels: `rows` by `columns` of them,
// from this one on.
template <class Kind, int vectors, class T>
DDPM_FAST_INLINE void transform_output(const ConvArgs& a, const Output<T>& output, const float* sums, Index pixel,
                                       Index rows, Index columns) {
  constexpr int side = Kind::kSumsSide, scale = Kind::kScale;
  for (int v = 0; v < vectors; ++v) {
    Floats half[2][side];
    for (int j = 0; j < side; ++j) {
      Floats m[side], y[2];
      for (int i = 0; i < side; ++i) m[i] = load(sums + (side * i + j) * kPanel + v * kWidth<float>);
      transform_sums(m, y);
      for (int i = 0; i < 2; ++i) half[i][j] = y[i];
    }
    for (int i = 0; i < 2; ++i) {
      if (i >= rows) break;
      Floats y[2];
      transform_sums(half[i], y);
      output.write(pixel + i * scale * a.out_width, v, y[0]);
      if (columns > 1) output.write(pixel + i * scale * a.out_width + scale, v, y[1]);
    }
  }
}

// The arguments of multiply_tiles. For `count` tiles it computes the sums of a phase at all positions, each the sum of
// `terms` products of inputs and weights.
template <class T, int terms>
struct Products {
  const T* inputs[terms];  // of each term, at the first position
  Index row_apart, apart,
      tile_apart;  // elements from row to row of the positions, from column to column, from tile to tile
  Index count, depth;
  int side;              // of the square of positions
  const float* weights;  // of the first term, a matrix for each position
  float* sums;           // a panel for each position
  Index sums_apart;      // from tile to tile
};

// Compiled once for all kinds of tiles.
template <int vectors, class T, int terms>
DDPM_FAST_NOINLINE void multiply_tiles(const Products<T, terms>& products) {
  const Products<T, terms> p = products;  // which no store can change
  const Index matrix = panel_size<T>(p.depth), term_apart = p.side * p.side * matrix;
  for (int position = 0; position < p.side * p.side; ++position) {
    const Index at = position / p.side * p.row_apart + position % p.side * p.apart;
    const float* weights = p.weights + position * matrix;
    over_rows(0, p.count, [&](Index tile, auto rows) {
      Sums<rows(), vectors> product{};
      for (int term = 0; term < terms; ++term) {
        const T* inputs[rows()];
        for (int r = 0; r < rows(); ++r) inputs[r] = p.inputs[term] + at + (tile + r) * p.tile_apart;
        multiply(product, inputs, weights + term * term_apart, p.depth);
      }
      for (int r = 0; r < rows(); ++r) {
        float* to = p.sums + (tile + r) * p.sums_apart + position * kPanel;
        for (int v = 0; v < vectors; ++v) store(to + v * kWidth<float>, product.of[r][v]);
      }
    });
  }
}

template <class T, class Kind>
void run(const ConvArgs& a) {
  constexpr int positions = Kind::kSumsSide * Kind::kSumsSide;
  constexpr Index transformed_values = Kind::kSide * Kind::kSide;
  const Tiles tiles(a.out_height / Kind::kScale, a.out_width / Kind::kScale);
  const int threads = a.stream_or_threads.threads();
  // Whole vectors, in the buffers alone.
  const Index depth = round_up(a.channels + a.skip_channels, kStep<T>), wide = round_up(depth, kWidth<float>);
  const Index tile_bytes = transformed_values * wide * static_cast<Index>(sizeof(T));
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
  constexpr Index kSums = positions * kPanel + kApart;                    // of a tile
  constexpr Index kMatrices = Kind::kOutputs * Kind::kTerms * positions;  // of weights, for a panel
  const double multiplications = static_cast<double>(work.strips * tiles.in_strip) * static_cast<double>(kMatrices) *
                                 static_cast<double>(depth * a.out_channels);

  work.run(multiplications, threads, [&](const Work::Share& share) {
    Room room(RoomFor::kSlice, Room::bytes<float>(Ring<T, Kind>::size(tiles, wide)) +
                                   Room::bytes<T>(transformed_values * apart) + Room::bytes<float>(most * kSums));
    Ring<T, Kind> ring(a, tiles, wide, room.take<float>(Ring<T, Kind>::size(tiles, wide)));
    T* transformed = room.take<T>(transformed_values * apart);
    float* sums = room.take<float>(most * kSums);

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
          const float* weights = a.packed + (panel * kMatrices + phase * positions) * panel_size<T>(depth);
          Products<T, Kind::kTerms> products{{},    Kind::kSide * apart, apart,   wide, count,
                                             depth, Kind::kSumsSide,     weights, sums, kSums};
          for (int term = 0; term < Kind::kTerms; ++term) products.inputs[term] = inputs_of(phase + term);
          multiply_tiles<vectors()>(products);
          const float* from = sums;
          for (Index s = share.first_strip; s < share.end_strip; ++s) {
            const Strip strip(tiles, s);
            const Index top = 2 * strip.down, row = strip.sample * a.out_height + top * Kind::kScale + phase / 2;
            for (Index tile = 0; tile < strip.tiles; ++tile, from += kSums) {
              const Index left = 2 * (strip.first + tile);
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
  with_conv_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    a.upsample ? run<T, Upsampled>(a) : run<T, Plain>(a);
  });
}

void conv_winograd_upsampled_gradient(const ConvArgs& a) {
  with_conv_type(a.dtype, [&](auto type) { run<decltype(type), UpsampledGradient>(a); });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
