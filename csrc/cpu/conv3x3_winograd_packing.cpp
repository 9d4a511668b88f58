// Packs weights for conv_winograd and conv_winograd_large:
//   G g G^T
#include "common/args.h"
#include "cpu/panel_product.h"
#include "cpu/parallel.h"
#include "cpu/winograd_transforms.h"
#include "cpu/with_type.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

// Reads the taps of kWidth<float> input channels from `first` on, for `outs` output channels. Channels that do not
// exist are 0.
using Taps = float[kWidth<float>][9][kPanel];
void read_taps(const PackWinogradArgs& a, Index first, Index first_out, Index outs, Taps& taps) {
  const Index channels = smaller(kWidth<float>, a.channels - first);
  const Index next = first + kWidth<float> < a.channels ? kWidth<float> * a.stride : 0;  // the distance to prefetch
  std::memset(taps, 0, sizeof(taps));
  for (int tap = 0; tap < 9; ++tap) {
    const float* from =
        a.weight + first * a.stride + first_out * a.out_stride + tap / 3 * a.row_stride + tap % 3 * a.column_stride;
    if (a.stride == 1 && channels == kWidth<float>) {
      for (Index o = 0; o < outs; o += kWidth<float>) {
        Floats square[kWidth<float>] = {};
        for (Index i = 0; i < smaller(kWidth<float>, outs - o); ++i) {
          square[i] = load(from + (o + i) * a.out_stride);
          __builtin_prefetch(from + (o + i) * a.out_stride + next);
        }
        transpose(square);
        for (int c = 0; c < kWidth<float>; ++c) store(taps[c][tap] + o, square[c]);
      }
      continue;
    }
    for (Index c = 0; c < channels; ++c, from += a.stride) {
      if (a.out_stride == 1) {
        for (Index o = 0; o < outs; o += kWidth<float>) __builtin_prefetch(from + next + o);
        std::memcpy(taps[c][tap], from, static_cast<std::size_t>(outs) * sizeof(float));
      } else {  // unrolled, because the time of the short loop depends on its position in the code
#pragma GCC unroll 4
        for (Index o = 0; o < outs; ++o) taps[c][tap][o] = from[o * a.out_stride];
      }
    }
  }
}

// Transforms a kernel: first its columns, then its rows.
template <class Kind, int positions>
DDPM_FAST_INLINE void transform_weights(const Floats (&g)[9], Floats (&out)[positions]) {
  constexpr int side = Kind::kWeightsSide;
  Floats columns[3][side];
  for (int j = 0; j < 3; ++j) Kind::weights({g[j], g[3 + j], g[6 + j]}, columns[j]);
  for (int i = 0; i < side; ++i) {
    Floats row[side];
    Kind::weights({columns[0][i], columns[1][i], columns[2][i]}, row);
    for (int j = 0; j < side; ++j) out[side * i + j] = row[j];
  }
}

// The factors of F(4x4, 3x3) for the taps of a kernel. Rounded to float32, they would add an error that all channels
// share.
struct LargeFactors {
  double of[36][9];
  constexpr LargeFactors() : of{} {
    for (int i = 0; i < 36; ++i) {
      for (int tap = 0; tap < 9; ++tap) {
        of[i][tap] = LargeTile::kWeights[i / 6][tap / 3] * LargeTile::kWeights[i % 6][tap % 3];
      }
    }
  }
};

template <>
DDPM_FAST_INLINE void transform_weights<LargeTile>(const Floats (&g)[9], Floats (&out)[36]) {
  static constexpr LargeFactors factors;
  Doubles taps[9][2];
  for (int tap = 0; tap < 9; ++tap) widen(g[tap], taps[tap]);
  for (int i = 0; i < 36; ++i) {
    Doubles sums[2] = {};
    for (int tap = 0; tap < 9; ++tap) {
      const Doubles factor = broadcast(factors.of[i][tap]);
      for (int half = 0; half < 2; ++half) sums[half] = fma(factor, taps[tap][half], sums[half]);
    }
    out[i] = narrow(sums);
  }
}

template <class T, class Kind>
void pack(const PackWinogradArgs& a) {
  constexpr int side = Kind::kWeightsSide;
  const Index panels = (a.out_channels + kPanel - 1) / kPanel, size = panel_size<T>(a.channels);
  const Index chunks = (a.channels + kWidth<float> - 1) / kWidth<float>;
  parallel_for(panels * chunks, 8, a.stream_or_threads, [&](Index i) {
    const Index first_out = i / chunks * kPanel, first = i % chunks * kWidth<float>;
    Taps taps;
    read_taps(a, first, first_out, smaller(kPanel, a.out_channels - first_out), taps);
    float* panel = a.packed + i / chunks * side * side * size;
    for (Index c = 0; c < smaller(kWidth<float>, round_up(a.channels - first, kStep<T>)); c += kStep<T>) {
      for (int v = 0; v < kPanelVectors; ++v) {
        Floats transformed[kStep<T>][side * side];
        for (int s = 0; s < kStep<T>; ++s) {
          Floats g[9];
          for (int tap = 0; tap < 9; ++tap) g[tap] = load(taps[c + s][tap] + v * kWidth<float>);
          transform_weights<Kind>(g, transformed[s]);
        }
        for (int row = 0; row < side; ++row) {
          for (int column = 0; column < side; ++column) {
            Floats values[kStep<T>];
            for (int s = 0; s < kStep<T>; ++s) values[s] = transformed[s][side * row + column];
            float* to = panel + position_of<Kind>(row, column) * size;
            store_step(to + (first + c) / kStep<T> * kPanel, v, values);
          }
        }
      }
    }
  });
}

}  // namespace

void pack_winograd(const PackWinogradArgs& args) {
  PackWinogradArgs a = args;
  if (a.flipped) {
    std::swap(a.out_channels, a.channels);
    std::swap(a.out_stride, a.stride);
    a.weight += 2 * (a.row_stride + a.column_stride);  // the last tap
    a.row_stride = -a.row_stride;
    a.column_stride = -a.column_stride;
  }
  if (a.large) return pack<float, LargeTile>(a);
  with_conv_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    a.upsample ? pack<T, UpsampledTile>(a) : pack<T, SmallTile>(a);
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
