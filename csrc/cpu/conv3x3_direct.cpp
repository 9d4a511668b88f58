// Convolutions as sums over taps of matrix products, without a matrix of patches: where Winograd's does not apply (1x1,
// stride 2), and where a map is so small that reading weights is what takes time.
//
// A nearest-neighbour upsampling by 2 and a 3x3 convolution are four 2x2 convolutions of the small map, one for each
// place in a 2x2 square of the output: every tap falls on one of 2x2 pixels, and those that fall on the same are summed
// beforehand.
#include "cpu/conv.h"

namespace ddpm_fast::DDPM_FAST_ISA {

extern const std::int64_t panel;
const std::int64_t panel = kPanel;

namespace {

constexpr int kMaxTaps = 9;
constexpr Index kMaxSmallMap = 64;  // pixels of the output

// What makes the sums of an output pixel: elements from its first input pixel to each tap's. With upsampling four of
// them, one for each place in the square.
struct Taps {
  int count = 0;
  Index offset[kMaxTaps];
};

Taps taps_of(const ConvArgs& a, int phase, Index columns, Index depth) {
  const int size = a.upsample ? 2 : a.kernel;
  const Index start = a.upsample ? (phase / 2) * columns + phase % 2 : 0;
  Taps taps;
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) taps.offset[taps.count++] = (start + i * columns + j) * depth;
  }
  return taps;
}

// Sums of a small map's pixels, made tap by tap, each of those pixels alone that have it inside of the map: on a map of
// 4x4 that is 100 of 144 times. They are of `rows` rows of the output from `top` on; a row of `input` has `columns`
// pixels.
template <class T>
void sum_inside(const ConvArgs& a, const T* input, Index columns, Index top, Index rows, const float* weights,
                Index depth, float* sums) {
  std::memset(sums, 0, static_cast<std::size_t>(rows * a.out_width * kPanel) * sizeof(float));
  for (Index tap = 0; tap < kMaxTaps; ++tap, weights += panel_size<T>(depth)) {
    const T* from[kMaxSmallMap];
    float* to[kMaxSmallMap];
    Index count = 0;
    for (Index y = 0; y < rows; ++y) {
      const Index row = (top + y) * a.stride - a.padding + tap / 3;
      if (row < 0 || row >= a.height) continue;
      for (Index x = 0; x < a.out_width; ++x) {
        const Index column = x * a.stride - a.padding + tap % 3;
        if (column < 0 || column >= a.width) continue;
        from[count] = input + ((y * a.stride + tap / 3) * columns + x * a.stride + tap % 3) * depth;
        to[count++] = sums + (y * a.out_width + x) * kPanel;
      }
    }
    over_rows(0, count, [&](Index first, auto at_once) {
      Sums<at_once()> some;
      const T* inputs[at_once()];
      for (int r = 0; r < at_once(); ++r) {
        inputs[r] = from[first + r];
        for (int v = 0; v < kPanelVectors; ++v) some.of[r][v] = load(to[first + r] + v * kWidth<float>);
      }
      multiply(some, inputs, weights, depth);
      for (int r = 0; r < at_once(); ++r) {
        for (int v = 0; v < kPanelVectors; ++v) store(to[first + r] + v * kWidth<float>, some.of[r][v]);
      }
    });
  }
}

template <class T>
void run(const ConvArgs& a) {
  const int threads = a.stream_or_threads.threads(), phases = a.upsample ? 4 : 1;
  // Pixels that sums are made for: of the small map with upsampling.
  const Index height = a.upsample ? a.height : a.out_height, width = a.upsample ? a.width : a.out_width;
  constexpr Index kMaxStrip = 64, kPixelsInBlock = 96;
  const Index segments = (width + kMaxStrip - 1) / kMaxStrip, segment = (width + segments - 1) / larger(segments, 1);
  const Index depth = round_up(a.channels + a.skip_channels, kStep<T>);
  const Index taps = a.upsample ? 4 : a.kernel * a.kernel;
  // Strips of a block are rows of one segment of one sample.
  const Index most_rows = larger(1, smaller(height, kPixelsInBlock / larger(1, segment)));
  const Work work(a.n * segments * height, most_rows, a.out_channels, threads);
  if (work.strips == 0) return;
  const Index most = work.largest_block();
  const Index columns = (segment - 1) * a.stride + a.kernel, most_input_rows = (most - 1) * a.stride + a.kernel;
  const double multiplications =
      static_cast<double>(work.strips * segment * phases * taps) * static_cast<double>(depth * a.out_channels);
  work.run(multiplications, threads, [&](const Work::Share& share) {
    const bool small = a.kernel == 3 && !a.upsample && height * width <= kMaxSmallMap;
    Room room(RoomFor::kSlice, Room::bytes<T>(most_input_rows * columns * depth) +
                                   Room::bytes<const T*>(most * segment) + Room::bytes<Index>(most * segment) +
                                   Room::bytes<float>(small ? kMaxSmallMap * kPanel : 0));
    T* input = room.take<T>(most_input_rows * columns * depth);
    const T** inputs = room.take<const T*>(most * segment);
    Index* pixels = room.take<Index>(most * segment);
    float* small_sums = room.take<float>(small ? kMaxSmallMap * kPanel : 0);
    // A block may reach over the end of a segment: what lies on either side is done in turn.
    for (Index begin = share.first_strip; begin < share.end_strip;) {
      const Index top = begin % height, rows = smaller(share.end_strip - begin, height - top);
      const Index sample = begin / height / segments, left = begin / height % segments * segment;
      const Index across = smaller(segment, width - left);
      for (Index i = 0; i < (rows - 1) * a.stride + a.kernel; ++i) {
        input_row<T>(a, sample, top * a.stride - a.padding + i, left * a.stride - a.padding, columns,
                     input + i * columns * depth, depth);
      }
      Index count = 0;
      const Index scale = a.upsample ? 2 : 1;
      for (Index y = 0; y < rows; ++y) {
        for (Index x = 0; x < across; ++x, ++count) {
          inputs[count] = input + (y * columns + x) * a.stride * depth;
          pixels[count] = (sample * a.out_height + (top + y) * scale) * a.out_width + (left + x) * scale;
        }
      }
      for (Index p = share.first_panel; p < share.end_panel; ++p) {
        const Output<T> output(a, p);
        if (small) {
          sum_inside(a, input, columns, top, rows, a.packed + p * taps * panel_size<T>(depth), depth, small_sums);
          for (Index i = 0; i < count; ++i) {
            for (int v = 0; v < kPanelVectors; ++v) {
              output.write(pixels[i], v, load(small_sums + i * kPanel + v * kWidth<float>));
            }
          }
          continue;
        }
        for (int phase = 0; phase < phases; ++phase) {
          const Taps at = taps_of(a, phase, columns, depth);
          const float* weights = a.packed + (p * phases + phase) * taps * panel_size<T>(depth);
          const Index place = phase / 2 * a.out_width + phase % 2;
          with_vectors(a.out_channels - p * kPanel, [&](auto vectors) {
            over_rows(0, count, [&](Index pixel, auto rows_at_once) {
              Sums<rows_at_once(), vectors()> sums{};
              for (int tap = 0; tap < at.count; ++tap) {
                const T* from[rows_at_once()];
                for (int r = 0; r < rows_at_once(); ++r) from[r] = inputs[pixel + r] + at.offset[tap];
                multiply(sums, from, weights + tap * panel_size<T>(depth), depth);
              }
              for (int r = 0; r < rows_at_once(); ++r) {
                for (int v = 0; v < vectors(); ++v) output.write(pixels[pixel + r] + place, v, sums.of[r][v]);
              }
            });
          });
        }
      }
      begin += rows;
    }
  });
}

}  // namespace

void conv_direct(const ConvArgs& args) {
  ConvArgs a = args;
  if (a.kernel == 1 && a.stride == 1) {  // a map of one row
    a.width *= a.height;
    a.out_width *= a.out_height;
    a.height = a.out_height = 1;
  }
  with_conv_type(a.dtype, [&](auto type) { run<decltype(type)>(a); });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
