// 3x3 and 1x1 convolutions in bfloat16 as sums over taps of matrix products on tiles (see tiles.h).
//
// The input of some rows is normed, activated and padded first, into a buffer that stays in the second-level cache. The
// buffer is arranged so that the 16 pixels of a tile follow each other and each tap is an offset. All taps of 32 input
// channels take a few kilobytes of it, so they read the first-level cache. The weights of 32 output channels are used for
// many tiles of pixels, and come from the second-level cache.
//
// A convolution after an upsampling by 2 is four 2x2 convolutions of the small map, one for each phase: see
// conv3x3_direct.cpp. A tile of one pixel of 16 samples could leave out taps beside small maps, which nothing here does.
#include "cpu/conv_input.h"
#include "cpu/conv_output.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace ddpm_fast::DDPM_FAST_ISA {

std::int64_t conv_tiles_workspace(const ConvArgs& a);

namespace {

constexpr int kMaxTaps = 9;
constexpr Index kPanelTiles = 2;  // tiles of output channels of a panel of weights
constexpr Index kPanelChannels = kPanelTiles * kTileSide;
constexpr Index kStepBytes = kPanelTiles * kTileBytes;  // weights of a panel for one tap and 32 input channels

constexpr Index quotient_up(Index value, Index unit) { return (value + unit - 1) / unit; }

// A tile of output pixels.
struct PixelTile {
  Index from;               // byte of its first input pixel in the buffer, for the tap at 0
  int count;                // pixels, up to 16. The others are computed too, from any values, and dropped.
  Index pixels[kTileSide];  // their numbers in the output
};

// Rows of one sample that lie in a buffer together.
struct Side {
  Index sample, top, rows;
  Index at;  // first row in the buffer
};

// A buffer of normed input: [32-channel blocks][copies][remainders][rows][columns][32 channels].
// - With a 1x1 kernel, or if rows of output are whole tiles and the stride is 1, there is one copy. It has columns of
//   padding, and the next column's tap begins one pixel later.
// - Otherwise there is one copy for each column of the kernel. It has the pixels that this column reads, without
//   padding, so a tile may go on in the next row.
// - Rows are sorted by their remainder modulo the stride. So the rows that a tap reads follow each other.
struct InputBuffer {
  // strips: rows of output. sides: parts of samples to which they belong.
  InputBuffer(const ConvArgs& args, Index strips, Index sides)
      : a(args),
        width(a.upsample ? a.width : a.out_width),
        padded(a.stride == 1 && (a.kernel == 1 || width % kTileSide == 0)),
        copies(padded ? 1 : a.kernel),
        columns(padded ? width + a.kernel - 1 : width),
        read_columns((width - 1) * a.stride + a.kernel),
        more_rows((a.kernel - 1) / a.stride),
        rows(strips + sides * more_rows),
        row_bytes(columns * kTileRowBytes),
        block_bytes(copies * a.stride * rows * row_bytes),
        blocks(quotient_up(a.channels + a.skip_channels, kTileDepth)) {}

  // Bytes of the buffer. The last tile may read pixels behind it.
  Index bytes() const { return blocks * block_bytes + kTileBytes; }

  // Bytes from the first pixel that a tile reads to that of a tap.
  Index tap(Index row, Index column) const {
    const Index copy = padded ? 0 : column, start = padded ? column * kTileRowBytes : 0;
    return ((copy * a.stride + row % a.stride) * rows + row / a.stride) * row_bytes + start;
  }

  Index input_rows(const Side& side) const { return (side.rows - 1) * a.stride + a.kernel; }

  // Fills row i of the input rows of a side. `one_row` has read_columns pixels of 32 channels.
  void fill(char* buffer, BFloat16* one_row, const Side& side, Index i) const {
    char* const row = buffer + (i % a.stride * rows + side.at + i / a.stride) * row_bytes;
    with_act(a.affine, a.silu, [&](auto normed, auto silu) {
      fill_row<normed(), silu()>(row, one_row, side.sample, side.top * a.stride - a.padding + i);
    });
  }

  // Fills a row of the buffer with row y of a sample, which may lie outside the map.
  template <bool normed, bool silu>
  void fill_row(char* row, BFloat16* one_row, Index sample, Index y) const {
    const Index total = a.channels + a.skip_channels;
    const bool is_inside = y >= 0 && y < a.height;
    const Index before = is_inside ? smaller(read_columns, a.padding) : read_columns;
    const Index end = smaller(read_columns, a.width + before);
    const Index at = (sample * a.height + y) * a.width;
    const float* const affine = normed ? a.affine + sample * 3 * total : nullptr;
    for (Index block = 0; block < blocks; ++block, row += block_bytes) {
      BFloat16* const to = padded ? reinterpret_cast<BFloat16*>(row) : one_row;
      zero(to, 0, before);
      zero(to, end, read_columns);
      if (is_inside) {
        const Index first = block * kTileDepth, stop = smaller(first + kTileDepth, total);
        if (stop - first < kTileDepth) zero(to, before, end);
        // Copies channels first .. stop - 1, as far as they are in a source that has the channels from `start` on.
        const auto copy = [&](const void* source, Index start, Index channels) {
          const Index from = larger(first, start), until = smaller(stop, start + channels);
          if (from >= until) return;
          copy_pixels<BFloat16, BFloat16, normed, silu>(
              to + before * kTileDepth + from - first, kTileDepth,
              static_cast<const BFloat16*>(source) + at * channels + from - start, channels, end - before, until - from,
              normed ? affine + from : nullptr, total);
        };
        copy(a.x, 0, a.channels);
        if (a.skip != nullptr) copy(a.skip, a.channels, a.skip_channels);
      }
      for (Index column = 0; column < (padded ? 0 : copies); ++column) {
        char* to_pixel = row + column * a.stride * rows * row_bytes;
        for (Index x = 0; x < columns; ++x, to_pixel += kTileRowBytes) {
          std::memcpy(to_pixel, one_row + (x * a.stride + column) * kTileDepth, kTileRowBytes);
        }
      }
    }
  }

  // Sets pixels begin .. end - 1 of a row to 0. In rows of the map they are few, and a call of memset would take longer.
  static DDPM_FAST_INLINE void zero(BFloat16* row, Index begin, Index end) {
    for (; begin < end; ++begin) std::memset(row + begin * kTileDepth, 0, kTileRowBytes);
  }

  Index tiles_of(const Side& side) const { return quotient_up(side.rows * width, kTileSide); }

  PixelTile tile(const Side& side, Index number) const {
    const Index first = number * kTileSide, scale = a.upsample ? 2 : 1;
    PixelTile tile;
    tile.from = side.at * row_bytes + (first / width * columns + first % width) * kTileRowBytes;
    tile.count = static_cast<int>(smaller(kTileSide, side.rows * width - first));
    for (int i = 0; i < tile.count; ++i) {
      const Index y = side.top + (first + i) / width, x = (first + i) % width;
      tile.pixels[i] = (side.sample * a.out_height + y * scale) * a.out_width + x * scale;
    }
    return tile;
  }

  const ConvArgs& a;
  Index width;  // output pixels of a row, or input pixels before an upsampling
  bool padded;
  Index copies, columns, read_columns;
  Index more_rows;  // that a side has beyond one for each row of output, of each remainder
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

// Tiles of pixels times panels of output channels.
struct Products {
  const ConvArgs& a;
  const InputBuffer& input;
  const char* buffer;
  const PixelTile* tiles;
  Index count;  // tiles of pixels, a multiple of those of a block
  Index first_panel, end_panel;
  Taps taps;
  const char* weights;  // the phase's
  Index pixel_offset;   // from a pixel's first phase
};

// Computes blocks of `rows` tiles of pixels and a panel. While the tiles of a block are multiplied, the sums of the one
// before are written, a few pixels a step, and weights are fetched into the second-level cache.
template <int rows>
DDPM_FAST_NOINLINE void multiply_blocks(const Products& products) {
  constexpr int vectors = kPanelChannels / kWidth<float>;
  constexpr unsigned pixels = rows * kTileSide;
  using Block = TileSums<rows>;
  const Products p = products;  // a copy, which no store can change
  const Index steps = p.input.blocks * p.taps.count, panel_bytes = steps * kStepBytes;
  const unsigned pixels_a_step = static_cast<unsigned>(quotient_up(pixels, steps));
  // If few blocks read a panel, the first one fetches what follows, because the others take too little time. Many
  // blocks fetch the next panel in equal parts of at least a cache line. Fetching the weights of the next convolution,
  // too, gained nothing: memory is busy already.
  constexpr Index kFewBlocks = 4, kAheadBytes = 32 << 10;
  const Index blocks_of_panel = p.count / rows;
  const bool are_few = blocks_of_panel <= kFewBlocks;
  const char* ahead = p.weights + p.first_panel * panel_bytes;
  const char* const end_ahead = p.weights + p.end_panel * panel_bytes;
  const auto fetch = [&](Index bytes) {
    for (; bytes > 0 && ahead < end_ahead; bytes -= kTileRowBytes, ahead += kTileRowBytes) {
      __builtin_prefetch(ahead, 0, 2);
    }
  };
  fetch(are_few ? smaller(kAheadBytes, panel_bytes) : panel_bytes);
  const Index fetched_a_step = are_few ? kStepBytes : quotient_up(kStepBytes, blocks_of_panel);

  FrequentStores stores;
  alignas(64) float sums[2][pixels * kPanelChannels];
  Output<BFloat16, vectors> outputs[2] = {{p.a, p.first_panel}, {p.a, p.first_panel}};
  int turn = 0;
  unsigned written = pixels;  // nothing is left to write
  const PixelTile* last = nullptr;
  const Output<BFloat16, vectors>* last_output = nullptr;
  const auto write = [&](unsigned more) {
    for (; more > 0 && written < pixels; --more, ++written) {
      const PixelTile& tile = last[written / kTileSide];
      const unsigned i = written % kTileSide;
      if (i >= static_cast<unsigned>(tile.count)) continue;
      last_output->write(tile.pixels[i] + p.pixel_offset, sums[turn ^ 1] + written * kPanelChannels);
    }
  };
  for (Index panel = p.first_panel; panel < p.end_panel; ++panel) {
    Output<BFloat16, vectors>& to = outputs[panel % 2];
    to = Output<BFloat16, vectors>(p.a, panel);
    for (Index tile = 0; tile < p.count; tile += rows) {
      const char* weights = p.weights + panel * panel_bytes;
      Block::clear();
      for (Index block = 0; block < p.input.blocks; ++block) {
        for (int tap = 0; tap < p.taps.count; ++tap, weights += kStepBytes) {
          const char* a[rows];
          for (int i = 0; i < rows; ++i) {
            a[i] = p.buffer + p.tiles[tile + i].from + block * p.input.block_bytes + p.taps.offset[tap];
          }
          Block::add(a, kTileRowBytes, {weights, weights + kTileBytes});
          if (!are_few || tile == 0) fetch(fetched_a_step);
          write(pixels_a_step);
          stores.after_step();
        }
      }
      write(pixels);
      Block::store(sums[turn], kPanelChannels);
      turn ^= 1, written = 0, last = p.tiles + tile, last_output = &to;
    }
  }
  write(pixels);
}

// Multiplies `count` tiles of pixels with panels of output channels, in all phases. There is memory for a tile more.
void multiply(const ConvArgs& a, const InputBuffer& input, const char* buffer, PixelTile* tiles, Index count,
              Index first_panel, Index end_panel) {
  if (count > 1 && count % 2 != 0) tiles[count++] = {tiles->from, 0, {}};
  Products products{a, input, buffer, tiles, count, first_panel, end_panel, {}, nullptr, 0};
  const Index panels = quotient_up(a.out_channels, kPanelChannels);
  const TileUse in_use;
  for (int phase = 0; phase < (a.upsample ? 4 : 1); ++phase) {
    products.taps = taps_of(a, input, phase);
    products.weights =
        reinterpret_cast<const char*>(a.packed) + phase * panels * input.blocks * products.taps.count * kStepBytes;
    products.pixel_offset = phase / 2 * a.out_width + phase % 2;
    count == 1 ? multiply_blocks<1>(products) : multiply_blocks<2>(products);
  }
}

Index height_of(const ConvArgs& a) { return a.upsample ? a.height : a.out_height; }

// Returns the buffer of the whole input.
InputBuffer whole_input(const ConvArgs& a) { return InputBuffer(a, a.n * height_of(a), a.n); }
constexpr Index kMostShared = 8 << 20;  // bytes of a buffer that threads share

// Few pixels: all threads fill one buffer, and then each takes some of the outputs, so that one thread alone reads their
// weights.
void share_outputs(const ConvArgs& a, int threads) {
  const InputBuffer input = whole_input(a);
  const Index height = height_of(a);
  char* const buffer = static_cast<char*>(a.workspace);
  const auto side_of = [&](Index sample) { return Side{sample, 0, height, sample * (height + input.more_rows)}; };
  const Index input_rows = input.input_rows(side_of(0));
  const Index values = a.n * input_rows * input.read_columns * input.blocks * kTileDepth;
  constexpr Index kValuesWorthAThread = 1 << 13;  // norm and SiLU take 1.5 us for as many, and the threads are awake
  const Index grain = quotient_up(a.n * input_rows * kValuesWorthAThread, larger(1, values));
  parallel_for(a.n * input_rows, threads == 1 ? a.n * input_rows : grain, a.stream_or_threads, [&](Index i) {
    Scratch scratch(ScratchUse::kSlice, Scratch::bytes<BFloat16>(input.read_columns * kTileDepth));
    BFloat16* const one_row = scratch.take<BFloat16>(input.read_columns * kTileDepth);
    input.fill(buffer, one_row, side_of(i / input_rows), i % input_rows);
  });

  const Index tiles_of_sample = input.tiles_of(side_of(0)), all_tiles = a.n * tiles_of_sample;
  const Index panels = quotient_up(a.out_channels, kPanelChannels);
  const Index parts = smaller(panels, threads), pieces = smaller(all_tiles, quotient_up(threads, parts));
  const Index most_tiles = quotient_up(all_tiles, pieces) + 1;
  parallel_for(parts * pieces, threads == 1 ? parts * pieces : 1, a.stream_or_threads, [&](Index i) {
    const Index part = i / pieces, piece = i % pieces;
    Scratch scratch(ScratchUse::kSlice, Scratch::bytes<PixelTile>(most_tiles));
    PixelTile* const tiles = scratch.take<PixelTile>(most_tiles);
    Index count = 0;
    for (Index t = piece * all_tiles / pieces; t < (piece + 1) * all_tiles / pieces; ++t) {
      tiles[count++] = input.tile(side_of(t / tiles_of_sample), t % tiles_of_sample);
    }
    multiply(a, input, buffer, tiles, count, part * panels / parts, (part + 1) * panels / parts);
  });
}

// Many pixels: a thread takes a block of strips at a time, for all outputs. A strip is a row of one sample.
void share_pixels(const ConvArgs& a, int threads) {
  const Index height = height_of(a), strips = a.n * height;
  // Blocks leave room in the second-level cache for two panels of weights, and every thread gets as many.
  constexpr Index kInputBytes = 640 << 10;
  const Index fewest = quotient_up(strips * (InputBuffer(a, 1, 0).bytes() - kTileBytes), kInputBytes);
  const Index blocks = smaller(strips, round_up(fewest, threads));
  const Index most = quotient_up(strips, blocks), most_sides = (most - 1) / height + 2;
  const InputBuffer input(a, most, most_sides);
  const Index most_tiles = most * input.width / kTileSide + most_sides + 1;
  parallel_for(blocks, threads == 1 ? blocks : 1, a.stream_or_threads, [&](Index i) {
    const Index end = (i + 1) * strips / blocks;
    Scratch scratch(ScratchUse::kSlice, Scratch::bytes<char>(input.bytes()) +
                                            Scratch::bytes<BFloat16>(input.read_columns * kTileDepth) +
                                            Scratch::bytes<PixelTile>(most_tiles));
    char* const buffer = scratch.take<char>(input.bytes());
    BFloat16* const one_row = scratch.take<BFloat16>(input.read_columns * kTileDepth);
    PixelTile* const tiles = scratch.take<PixelTile>(most_tiles);
    Index count = 0, at = 0;
    for (Index strip = i * strips / blocks; strip < end;) {  // a block may have rows of several samples
      const Index top = strip % height, rows = smaller(end - strip, height - top);
      const Side side{strip / height, top, rows, at};
      for (Index row = 0; row < input.input_rows(side); ++row) input.fill(buffer, one_row, side, row);
      for (Index tile = 0; tile < input.tiles_of(side); ++tile) tiles[count++] = input.tile(side, tile);
      at += rows + input.more_rows;
      strip += rows;
    }
    multiply(a, input, buffer, tiles, count, 0, quotient_up(a.out_channels, kPanelChannels));
  });
}

}  // namespace

void conv_tiles(const ConvArgs& a) {
  const Index pixels = a.n * height_of(a) * (a.upsample ? a.width : a.out_width);
  const Index channels = a.channels + a.skip_channels;
  if (pixels * a.out_channels * channels == 0) return;
  // Waking a thread takes as long as so many multiplications: 3 us at 2.5 TFLOP/s.
  constexpr double kWorthAThread = 1 << 22;
  const Index taps = a.upsample ? 16 : a.kernel * a.kernel;
  const bool is_small =
      static_cast<double>(pixels * taps) * static_cast<double>(channels * a.out_channels) < 2 * kWorthAThread;
  const int threads = is_small ? 1 : a.stream_or_threads.threads();
  // With fewer pixels for a thread, reading the weights takes longer than filling a buffer together.
  constexpr Index kManyPixels = 256;
  const bool can_share = conv_tiles_workspace(a) > 0;
  pixels < kManyPixels * threads && can_share ? share_outputs(a, threads) : share_pixels(a, threads);
}

std::int64_t conv_tiles_workspace(const ConvArgs& a) {
  const Index bytes = whole_input(a).bytes();
  return bytes <= kMostShared ? bytes : 0;
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
