// 3x3 and 1x1 convolutions in bfloat16 as sums over taps of matrix products on tiles (see tiles.h).
//
// The input of some rows is normed, activated and padded first, into a buffer that stays in the second-level cache. The
// buffer is arranged so that the 16 pixels of a tile follow each other and each tap is an offset. All products read the
// first-level cache then: the weights of a tile of outputs are used for many tiles of pixels, tap by tap, and 32 input
// channels of these pixels take a few kilobytes.
//
// A convolution after an upsampling by 2 is four 2x2 convolutions of the small map, one for each phase: see
// conv3x3_direct.cpp.
#include "cpu/conv_input.h"
#include "cpu/conv_output.h"
#include "cpu/conv_partition.h"
#include "cpu/tiles.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

constexpr int kMaxTaps = 9;
constexpr Index kPairPanel = 2 * kTileSide;  // output channels that threads share, which weights are padded to

// A tile of output pixels.
struct PixelTile {
  Index from;               // byte of its first input pixel in the buffer, for the tap at 0
  int count;                // pixels, up to 16. The others are computed too, from any values, and dropped.
  Index pixels[kTileSide];  // their numbers in the output
};

// Rows of one sample that lie in the buffer together.
struct Side {
  Index sample, top, rows;
};

// The buffer of normed input: [32-channel blocks][copies][remainders][rows][columns][32 channels].
// - With a 1x1 kernel, or if rows of output are whole tiles and the stride is 1, there is one copy. It has columns of
//   padding, and the next column's tap begins one pixel later.
// - Otherwise there is one copy for each column of the kernel. It has the pixels that this column reads, without
//   padding, so a tile may go on in the next row.
// - Rows are sorted by their remainder modulo the stride. So the rows that a tap reads follow each other.
struct InputBuffer {
  InputBuffer(const ConvArgs& args, Index most_rows, Index most_sides)
      : a(args),
        width(a.upsample ? a.width : a.out_width),
        padded(a.stride == 1 && (a.kernel == 1 || width % kTileSide == 0)),
        copies(padded ? 1 : a.kernel),
        columns(padded ? width + a.kernel - 1 : width),
        read_columns((width - 1) * a.stride + a.kernel),
        more_rows((a.kernel - 1) / a.stride),
        rows(most_rows + most_sides * more_rows),
        row_bytes(columns * kTileRowBytes),
        block_bytes(copies * a.stride * rows * row_bytes),
        blocks((a.channels + a.skip_channels + kTileDepth - 1) / kTileDepth) {}

  // Bytes of the buffer. The last tile may read pixels behind it.
  Index bytes() const { return blocks * block_bytes + kTileBytes; }

  // Bytes from the first pixel that a tile reads to that of a tap.
  Index tap(Index row, Index column) const {
    const Index copy = padded ? 0 : column, start = padded ? column * kTileRowBytes : 0;
    return ((copy * a.stride + row % a.stride) * rows + row / a.stride) * row_bytes + start;
  }

  // Fills the rows of a side, from row `at` of the buffer on.
  void fill(char* buffer, BFloat16* one_row, const Side& side, Index at) const {
    for (Index i = 0; i < (side.rows - 1) * a.stride + a.kernel; ++i) {
      char* row = buffer + (i % a.stride * rows + at + i / a.stride) * row_bytes;
      for (Index block = 0; block < blocks; ++block, row += block_bytes) {
        BFloat16* const to = padded ? reinterpret_cast<BFloat16*>(row) : one_row;
        input_row<BFloat16>(a, side.sample, side.top * a.stride - a.padding + i, -a.padding,
                            padded ? columns : read_columns, to, kTileDepth, block * kTileDepth);
        for (Index copy = 0; copy < (padded ? 0 : copies); ++copy) {
          char* to_pixel = row + copy * a.stride * rows * row_bytes;
          for (Index x = 0; x < columns; ++x, to_pixel += kTileRowBytes) {
            std::memcpy(to_pixel, one_row + (x * a.stride + copy) * kTileDepth, kTileRowBytes);
          }
        }
      }
    }
  }

  // Appends the tiles of a side, whose rows begin at row `at` of the buffer. Returns the end.
  PixelTile* tiles_of(const Side& side, Index at, PixelTile* tile) const {
    const Index all = side.rows * width, scale = a.upsample ? 2 : 1;
    for (Index first = 0; first < all; first += kTileSide, ++tile) {
      tile->from = at * row_bytes + (first / width * columns + first % width) * kTileRowBytes;
      tile->count = static_cast<int>(smaller(kTileSide, all - first));
      for (int i = 0; i < tile->count; ++i) {
        const Index y = side.top + (first + i) / width, x = (first + i) % width;
        tile->pixels[i] = (side.sample * a.out_height + y * scale) * a.out_width + x * scale;
      }
    }
    return tile;
  }

  const ConvArgs& a;
  Index width;  // output pixels of a row, or input pixels before an upsampling
  bool padded;
  Index copies, columns, read_columns;
  Index more_rows;  // that a side reads beyond one for each row of output and remainder
  Index rows, row_bytes, block_bytes, blocks;
};

// The taps of a phase: offsets in the buffer, in the order of the weights.
struct Taps {
  int count = 0;
  Index offset[kMaxTaps];
};

Taps taps_of(const ConvArgs& a, const InputBuffer& input, int phase) {
  const int size = a.upsample ? 2 : a.kernel, top = a.upsample ? phase / 2 : 0, left = a.upsample ? phase % 2 : 0;
  Taps taps;
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) taps.offset[taps.count++] = input.tap(top + i, left + j);
  }
  return taps;
}

// Tiles of pixels times panels of weights.
struct Products {
  const ConvArgs& a;
  const InputBuffer& input;
  const char* buffer;
  const PixelTile* tiles;
  Index count;  // tiles, a multiple of those of a block
  Taps taps;
  const char* weights;             // the phase's
  Index first_output, end_output;  // tiles of output channels, multiples of those of a block
  Index pixel_offset;              // from a pixel's first phase
};

// A tile store that comes more than about 0.7 us after the last one takes 0.3 us (Sapphire Rapids). So one is made after
// every 32 channels, which nobody reads.
struct alignas(64) Unread {
  char bytes[kTileBytes];
};

// Computes blocks of rows x columns tiles. While the tiles of a block are multiplied, the sums of the last one are
// written, a few pixels a step, and the weights of the next panel are fetched into the second-level cache.
template <int rows, int columns>
DDPM_FAST_NOINLINE void multiply_blocks(const Products& products, Unread& unread) {
  constexpr int vectors = columns * kTileSide / kWidth<float>, pixels = rows * kTileSide;
  constexpr int pixels_a_step = columns == 1 ? 2 : 1;
  using Sums = TileSums<rows, columns>;
  const Products p = products;  // a copy, which no store can change
  const Index column_bytes = p.input.blocks * p.taps.count * kTileBytes, steps = p.count / rows * p.input.blocks;
  const Index lines = (columns * column_bytes / kTileRowBytes + steps * p.taps.count - 1) / (steps * p.taps.count);
  alignas(64) float sums[2][pixels * columns * kTileSide];
  Output<BFloat16, vectors> outputs[2] = {{p.a, p.first_output / columns}, {p.a, p.first_output / columns}};
  int turn = 0, written = pixels;  // nothing is left to write
  const PixelTile* last = nullptr;
  const Output<BFloat16, vectors>* last_output = nullptr;
  const auto write = [&](int more) {
    for (; more > 0 && written < pixels; --more, ++written) {
      const PixelTile& tile = last[written / kTileSide];
      const int i = written % kTileSide;
      if (i >= tile.count) continue;
      const float* from = sums[turn ^ 1] + written * columns * kTileSide;
      for (int v = 0; v < vectors; ++v) {
        last_output->write(tile.pixels[i] + p.pixel_offset, v, load(from + v * kWidth<float>));
      }
    }
  };
  for (Index output = p.first_output; output < p.end_output; output += columns) {
    const char* const weights = p.weights + output * column_bytes;
    const char* ahead = weights + columns * column_bytes;
    const char* const end_ahead = output + columns < p.end_output ? ahead + columns * column_bytes : ahead;
    Output<BFloat16, vectors>& to = outputs[output / columns % 2];
    to = Output<BFloat16, vectors>(p.a, output / columns);
    for (Index tile = 0; tile < p.count; tile += rows) {
      const char* b[columns];
      for (int j = 0; j < columns; ++j) b[j] = weights + j * column_bytes;
      Sums::clear();
      for (Index block = 0; block < p.input.blocks; ++block) {
        for (int tap = 0; tap < p.taps.count; ++tap) {
          const char* a[rows];
          for (int i = 0; i < rows; ++i) {
            a[i] = p.buffer + p.tiles[tile + i].from + block * p.input.block_bytes + p.taps.offset[tap];
          }
          Sums::add(a, kTileRowBytes, b);
          for (int j = 0; j < columns; ++j) b[j] += kTileBytes;
          for (Index line = 0; line < lines && ahead < end_ahead; ++line, ahead += kTileRowBytes) {
            __builtin_prefetch(ahead, 0, 2);
          }
          write(pixels_a_step);
        }
        store_tile<4>(unread.bytes, kTileRowBytes);
      }
      write(pixels);
      Sums::store(sums[turn], columns * kTileSide);
      turn ^= 1, written = 0, last = p.tiles + tile, last_output = &to;
    }
  }
  write(pixels);
}

}  // namespace

void conv_tiles(const ConvArgs& a) {
  const int threads = a.stream_or_threads.threads(), phases = a.upsample ? 4 : 1;
  // The map whose pixels have sums: the small map with upsampling, the output otherwise.
  const Index height = a.upsample ? a.height : a.out_height, width = a.upsample ? a.width : a.out_width;
  const Index strips = a.n * height;  // a strip is a row of one sample
  if (strips * width * a.out_channels == 0) return;
  const InputBuffer strip(a, 1, 0);
  // A block has few enough strips for the second-level cache, and for every thread to get a block. But a thread reads all
  // weights of its outputs, so it takes some of the outputs rather than a few tiles of pixels.
  constexpr Index kInputBytes = 1 << 20, kFewestPixels = 256;
  const Index fewest = larger(strips / threads, (kFewestPixels + width - 1) / width);
  const Index strips_in_block = larger(1, smaller(fewest, kInputBytes / (strip.blocks * strip.block_bytes)));
  const ConvPartition partition = partition_strips(strips, strips_in_block, a.out_channels, threads, kPairPanel);
  const Index most = largest_block(partition), most_sides = (most - 1) / height + 2;
  const InputBuffer input(a, most, most_sides);
  const Index most_tiles = most * width / kTileSide + most_sides + 1;
  const int taps = a.upsample ? 4 : a.kernel * a.kernel;
  const Index phase_bytes = partition.panels * kPairPanel / kTileSide * strip.blocks * taps * kTileBytes;
  constexpr double kTimesAsFast = 16;  // as products of vectors, by which a thread's share is judged
  const double multiplications = static_cast<double>(strips * width * phases * taps) *
                                 static_cast<double>(strip.blocks * kTileDepth * a.out_channels) / kTimesAsFast;

  for_each_share(partition, multiplications, a.stream_or_threads, [&](const ConvShare& share) {
    Scratch scratch(ScratchUse::kSlice, Scratch::bytes<char>(input.bytes()) +
                                            Scratch::bytes<BFloat16>(input.read_columns * kTileDepth) +
                                            Scratch::bytes<PixelTile>(most_tiles));
    char* const buffer = scratch.take<char>(input.bytes());
    BFloat16* const one_row = scratch.take<BFloat16>(input.read_columns * kTileDepth);
    PixelTile* const tiles = scratch.take<PixelTile>(most_tiles);
    PixelTile* end = tiles;
    // A block may have rows of several samples.
    for (Index begin = share.first_strip, at = 0; begin < share.end_strip;) {
      const Index top = begin % height, rows = smaller(share.end_strip - begin, height - top);
      const Side side{begin / height, top, rows};
      input.fill(buffer, one_row, side, at);
      end = input.tiles_of(side, at, end);
      at += rows + input.more_rows;
      begin += rows;
    }
    const TileUse in_use;
    Unread unread;
    constexpr Index kOutputs = kPairPanel / kTileSide;
    Products products{
        a, input, buffer, tiles, end - tiles, {}, nullptr, share.first_panel * kOutputs, share.end_panel * kOutputs, 0};
    const bool in_fours = products.first_output % 4 == 0 && products.end_output % 4 == 0;
    for (int phase = 0; phase < phases; ++phase) {
      products.taps = taps_of(a, input, phase);
      products.weights = reinterpret_cast<const char*>(a.packed) + phase * phase_bytes;
      products.pixel_offset = phase / 2 * a.out_width + phase % 2;
      if (products.count == 1 && in_fours) {
        multiply_blocks<1, 4>(products, unread);
      } else if (products.count % 4 == 0 && partition.parts > 1) {
        multiply_blocks<4, 1>(products, unread);
      } else {
        if (products.count % 2 != 0) tiles[products.count++] = {tiles->from, 0, {}};
        multiply_blocks<2, 2>(products, unread);
      }
    }
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
