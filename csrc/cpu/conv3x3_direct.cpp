// 3x3 and 1x1 convolutions as sums over taps of matrix products, without a matrix of patches. They serve what
// conv_winograd does not: 1x1, stride 2, and maps so small that reading the weights takes most of the time.
//
// A 3x3 convolution after a nearest-neighbour upsampling by 2 is four 2x2 convolutions of the small map, one for each
// phase: one pixel of each 2x2 square of the output. Taps that fall on the same pixel are summed beforehand.
#include "cpu/conv_input.h"
#include "cpu/conv_output.h"
#include "cpu/conv_partition.h"
#include "cpu/with_type.h"

namespace ddpm_fast::DDPM_FAST_ISA {

extern const std::int64_t panel;
const std::int64_t panel = kPanel;

namespace {

constexpr int kMaxTaps = 9;
constexpr Index kMaxSmallMap = 64;  // pixels of the output

// The offset in elements of each tap from the first input pixel of an output pixel. With upsampling each phase has its
// own taps.
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

// Computes the sums of `rows` rows of a small map, from row `top` on, tap by tap. A tap counts only for pixels that
// have it inside the map: on a 4x4 map these are 100 of 144. A row of `input` has `columns` pixels.
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

// T: type of the maps. P: type of the packed weights.
template <class T, class P>
void run(const ConvArgs& a) {
  const int threads = a.stream_or_threads.threads(), phases = a.upsample ? 4 : 1;
  // The map whose pixels have sums: the small map with upsampling, the output otherwise.
  const Index height = a.upsample ? a.height : a.out_height, width = a.upsample ? a.width : a.out_width;
  constexpr Index kMaxStrip = 64, kPixelsInBlock = 96;
  const Index segments = (width + kMaxStrip - 1) / kMaxStrip, segment = (width + segments - 1) / larger(segments, 1);
  const Index depth = round_up(a.channels + a.skip_channels, kStep<P>);
  const Index taps = a.upsample ? 4 : a.kernel * a.kernel;
  // A strip is a row of one segment of one sample.
  const Index most_rows = larger(1, smaller(height, kPixelsInBlock / larger(1, segment)));
  const ConvPartition partition = partition_strips(a.n * segments * height, most_rows, a.out_channels, threads);
  if (partition.strips == 0) return;
  const Index most = largest_block(partition);
  const Index columns = (segment - 1) * a.stride + a.kernel, most_input_rows = (most - 1) * a.stride + a.kernel;
  const double multiplications =
      static_cast<double>(partition.strips * segment * phases * taps) * static_cast<double>(depth * a.out_channels);
  for_each_share(partition, multiplications, a.stream_or_threads, [&](const ConvShare& share) {
    const bool small = a.kernel == 3 && !a.upsample && height * width <= kMaxSmallMap;
    Scratch scratch(ScratchUse::kSlice, Scratch::bytes<P>(most_input_rows * columns * depth) +
                                            Scratch::bytes<const P*>(most * segment) +
                                            Scratch::bytes<Index>(most * segment) +
                                            Scratch::bytes<float>(small ? kMaxSmallMap * kPanel : 0));
    P* input = scratch.take<P>(most_input_rows * columns * depth);
    const P** inputs = scratch.take<const P*>(most * segment);
    Index* pixels = scratch.take<Index>(most * segment);
    float* small_sums = scratch.take<float>(small ? kMaxSmallMap * kPanel : 0);
    // A block may cross the end of a segment. Each side is computed in turn.
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
          sum_inside(a, input, columns, top, rows, a.packed + p * taps * panel_size<P>(depth), depth, small_sums);
          for (Index i = 0; i < count; ++i) output.write(pixels[i], small_sums + i * kPanel);
          continue;
        }
        for (int phase = 0; phase < phases; ++phase) {
          const Taps at = taps_of(a, phase, columns, depth);
          const float* weights = a.packed + (p * phases + phase) * taps * panel_size<P>(depth);
          const Index offset = phase / 2 * a.out_width + phase % 2;
          with_vectors(a.out_channels - p * kPanel, [&](auto vectors) {
            over_rows(0, count, [&](Index pixel, auto rows_at_once) {
              Sums<rows_at_once(), vectors()> sums{};
              for (int tap = 0; tap < at.count; ++tap) {
                const P* from[rows_at_once()];
                for (int r = 0; r < rows_at_once(); ++r) from[r] = inputs[pixel + r] + at.offset[tap];
                multiply(sums, from, weights + tap * panel_size<P>(depth), depth);
              }
              for (int r = 0; r < rows_at_once(); ++r) {
                for (int v = 0; v < vectors(); ++v) output.write(pixels[pixel + r] + offset, v, sums.of[r][v]);
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
  if (a.kernel == 1 && a.stride == 1) {  // as a map of one row
    a.width *= a.height;
    a.out_width *= a.out_height;
    a.height = a.out_height = 1;
  }
  with_conv_types(a.dtype, a.packed_dtype, [&](auto type, auto product) { run<decltype(type), decltype(product)>(a); });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
