// The weights of conv_winograd: packed for it, and their gradient.
#include "cpu/winograd.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

// G g: 3 values to 4.
DDPM_FAST_INLINE void transform_weights(const Floats (&g)[3], Floats (&out)[4]) {
  const Floats outer = g[0] + g[2];
  out[0] = g[0];
  out[1] = (outer + g[1]) * 0.5f;
  out[2] = (outer - g[1]) * 0.5f;
  out[3] = g[2];
}

// G^T m: 4 values to 3.
DDPM_FAST_INLINE void transform_weights_back(const Floats (&m)[4], Floats (&out)[3]) {
  const Floats sum = (m[1] + m[2]) * 0.5f;
  out[0] = m[0] + sum;
  out[1] = (m[1] - m[2]) * 0.5f;
  out[2] = sum + m[3];
}

// A y: 2 values to 4.
DDPM_FAST_INLINE void transform_output_back(Floats y_0, Floats y_1, Floats (&out)[4]) {
  out[0] = y_0;
  out[1] = y_0 + y_1;
  out[2] = y_0 - y_1;
  out[3] = -y_1;
}

// A step of a panel, of its channels `values`.
DDPM_FAST_INLINE void store_step(float* to, int v, const Floats (&values)[1]) {
  store(to + v * kWidth<float>, values[0]);
}
DDPM_FAST_INLINE void store_step(float* to, int v, const Floats (&values)[2]) {
  const Words pairs = pairs_of(values[0], values[1]);
  std::memcpy(to + v * kWidth<float>, &pairs, sizeof(pairs));
}

// kWidth<float> input channels from `first` on of a panel of output channels, of which there are `outs`; 0 where there
// are no more channels.
using Taps = float[kWidth<float>][9][kPanel];
void read_taps(const PackWinogradArgs& a, Index first, Index first_out, Index outs, Taps& taps) {
  const Index channels = smaller(kWidth<float>, a.channels - first);
  std::memset(taps, 0, sizeof(taps));
  for (int tap = 0; tap < 9; ++tap) {
    const float* from =
        a.weights + first * a.stride + first_out * a.out_stride + tap / 3 * a.row_stride + tap % 3 * a.column_stride;
    if (a.stride == 1 && channels == kWidth<float>) {
      for (Index o = 0; o < outs; o += kWidth<float>) {
        Floats square[kWidth<float>] = {};
        for (Index i = 0; i < smaller(kWidth<float>, outs - o); ++i) square[i] = load(from + (o + i) * a.out_stride);
        transpose(square);
        for (int c = 0; c < kWidth<float>; ++c) store(taps[c][tap] + o, square[c]);
      }
      continue;
    }
    for (Index c = 0; c < channels; ++c, from += a.stride) {
      if (a.out_stride == 1) {
        std::memcpy(taps[c][tap], from, static_cast<std::size_t>(outs) * sizeof(float));
      } else {
        for (Index o = 0; o < outs; ++o) taps[c][tap][o] = from[o * a.out_stride];
      }
    }
  }
}

template <class T>
void pack(const PackWinogradArgs& a) {
  const Index panels = (a.out_channels + kPanel - 1) / kPanel, size = panel_size<T>(a.channels);
  const Index chunks = (a.channels + kWidth<float> - 1) / kWidth<float>;
  parallel_for(panels * chunks, 8, a.run_on.threads(), [&](Index i) {
    const Index first_out = i / chunks * kPanel, first = i % chunks * kWidth<float>;
    Taps taps;
    read_taps(a, first, first_out, smaller(kPanel, a.out_channels - first_out), taps);
    float* panel = a.packed + i / chunks * kPositions * size;
    for (Index c = 0; c < smaller(kWidth<float>, round_up(a.channels - first, kStep<T>)); c += kStep<T>) {
      for (int v = 0; v < kPanelVectors; ++v) {
        Floats all[kStep<T>][3][4];  // [step][column of the kernel][row of the tile]
        for (int s = 0; s < kStep<T>; ++s) {
          for (int j = 0; j < 3; ++j) {
            Floats column[3];
            for (int k = 0; k < 3; ++k) column[k] = load(taps[c + s][3 * k + j] + v * kWidth<float>);
            transform_weights(column, all[s][j]);
          }
        }
        for (int row = 0; row < 4; ++row) {
          Floats out[kStep<T>][4];
          for (int s = 0; s < kStep<T>; ++s) {
            const Floats values[3] = {all[s][0][row], all[s][1][row], all[s][2][row]};
            transform_weights(values, out[s]);
          }
          for (int column = 0; column < 4; ++column) {
            Floats values[kStep<T>];
            for (int s = 0; s < kStep<T>; ++s) values[s] = out[s][column];
            store_step(panel + (4 * row + column) * size + (first + c) / kStep<T> * kPanel, v, values);
          }
        }
      }
    }
  });
}

// sums of products over tiles: rows of `gradients`, channels of a step of tiles and `apart` words further of the next
// one, times a panel of inputs.
template <class T, int rows>
DDPM_FAST_INLINE void multiply_over_tiles(Sums<rows>& sums, const float* gradients, Index apart, const float* panel,
                                          Index steps) {
  Sums<rows> local{};  // in registers
  for (Index step = 0; step < steps; ++step, gradients += apart, panel += kPanel) {
    Floats inputs[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) inputs[v] = load(panel + v * kWidth<float>);
    for (int r = 0; r < rows; ++r) {
      const T* gradient = reinterpret_cast<const T*>(gradients + r);
      for (int v = 0; v < kPanelVectors; ++v) local.of[r][v] = multiply_add(gradient, inputs[v], local.of[r][v]);
    }
  }
  sums = local;
}

// The convolution is linear in its transformed weights, so their gradient is a product over all tiles, for each of the
// 16 positions, of the transformed input, B^T d B, and the gradient of the sums, A dy A^T; G^T m G makes it that of the
// weights. A block of tiles is transformed, then all threads multiply it: whichever does what, each sum is made of the
// same terms in the same order. In bfloat16 a multiply-add takes two neighbouring tiles of a strip; a strip's last may
// have none beside it, and zeros there.
template <class T>
void weight_gradients(const ConvWinogradWeightsArgs& a) {
  const auto map_of = [&](const void* x, Index channels) {
    ConvArgs map{};
    map.x = x, map.channels = channels, map.n = a.n;
    map.height = map.out_height = a.height, map.width = map.out_width = a.width;
    return map;
  };
  const ConvArgs input = map_of(a.x, a.channels), gradient = map_of(a.dy, a.out_channels);
  const Tiles tiles(input);
  const int threads = a.run_on.threads();
  constexpr Index kTilesInBlock = 64 * kStep<T>;  // few terms a sum, and a panel of them stays in the first cache
  const Index strips = a.n * tiles.segments * tiles.down, steps_in_strip = (tiles.in_strip + kStep<T> - 1) / kStep<T>;
  const Index strips_in_block = larger(1, kTilesInBlock / larger(1, tiles.in_strip)),
              most = strips_in_block * steps_in_strip;
  const Index depth = round_up(a.channels, kPanel), panels = depth / kPanel;
  const Index wide = round_up(a.out_channels, kWidth<float>), apart = wide + kApart;
  const Index inputs_size = most * depth + kApart, gradients_size = most * apart + kApart;  // of a position
  const Index products = kPositions * a.out_channels * depth;

  Room room(RoomFor::kCall, Room::bytes<float>(kPositions * inputs_size) +
                                Room::bytes<float>(kPositions * gradients_size) + Room::bytes<float>(products) +
                                Room::bytes<float>((strips_in_block + 1) * wide));
  float* inputs = room.take<float>(kPositions * inputs_size);        // [position, panel, step, channel of the panel]
  float* gradients = room.take<float>(kPositions * gradients_size);  // [position, step, output channel]
  float* product = room.take<float>(products);                       // [position, panel, output channel, channel]
  float* bias = room.take<float>((strips_in_block + 1) * wide);      // in all, and of each strip
  if (strips == 0) std::memset(product, 0, static_cast<std::size_t>(products) * sizeof(float));
  std::memset(bias, 0, static_cast<std::size_t>(wide) * sizeof(float));

  // Strips begin.. of a block, to the steps from 0 on.
  const auto transform_inputs = [&](Index block, Index begin, Index end) {
    Room room_for_rows(RoomFor::kSlice, Room::bytes<float>(Ring<T>::size(tiles, depth)));
    Ring<T> ring(input, tiles, depth, room_for_rows.take<float>(Ring<T>::size(tiles, depth)));
    for (Index s = begin; s < end; ++s) {
      const Strip strip(tiles, block + s);
      ring.move_to(strip);
      constexpr int step = kStep<T>;
      transform_tiles<step>(
          ring, strip, tiles.in_strip, depth, [&](Index tile, Index c, int p, const Floats(&values)[step]) {
            float* to = inputs + (c / kPanel * most + s * steps_in_strip + tile / step) * kPanel + c % kPanel;
            store_step(to + p * inputs_size, 0, values);
          });
    }
  };
  const auto transform_gradients = [&](Index block, Index begin, Index end) {
    const Index row_size = 2 * tiles.in_strip * wide + kApart;
    Room room_for_rows(RoomFor::kSlice, Room::bytes<float>(2 * row_size));
    float* rows = room_for_rows.take<float>(2 * row_size);
    for (Index s = begin; s < end; ++s) {
      const Strip strip(tiles, block + s);
      for (Index i = 0; i < 2; ++i) {
        input_row<T>(gradient, strip.sample, 2 * strip.down + i, 2 * strip.first, 2 * strip.tiles, rows + i * row_size,
                     wide);
      }
      for (Index c = 0; c < wide; c += kWidth<float>) {
        Floats sum{};
        for (Index step = 0; step < steps_in_strip; ++step) {
          Floats half[kStep<T>][2][4] = {};  // [tile][column][row]
          for (Index i = 0; i < smaller(kStep<T>, strip.tiles - step * kStep<T>); ++i) {
            for (int j = 0; j < 2; ++j) {
              const float* pixel = rows + (2 * (step * kStep<T> + i) + j) * wide + c;
              transform_output_back(load(pixel), load(pixel + row_size), half[i][j]);
            }
            sum += half[i][0][1] + half[i][1][1];
          }
          float* to = gradients + (s * steps_in_strip + step) * apart + c;
          for (int row = 0; row < 4; ++row) {
            Floats values[kStep<T>][4];
            for (int i = 0; i < kStep<T>; ++i) transform_output_back(half[i][0][row], half[i][1][row], values[i]);
            for (int column = 0; column < 4; ++column) {
              Floats neighbours[kStep<T>];
              for (int i = 0; i < kStep<T>; ++i) neighbours[i] = values[i][column];
              store_step(to + (4 * row + column) * gradients_size, 0, neighbours);
            }
          }
        }
        store(bias + (1 + s) * wide + c, sum);
      }
    }
  };

  for (Index first = 0; first < strips; first += strips_in_block) {
    const Index count = smaller(strips_in_block, strips - first), chunks = smaller(count, threads);
    parallel_for(2 * chunks, 1, threads, [&](Index i) {
      const Index chunk = i / 2, begin = chunk * count / chunks, end = (chunk + 1) * count / chunks;
      i % 2 == 0 ? transform_inputs(first, begin, end) : transform_gradients(first, begin, end);
    });
    parallel_for(kPositions * panels, 1, threads, [&](Index i) {
      const float* panel = inputs + i / panels * inputs_size + i % panels * most * kPanel;
      const float* from = gradients + i / panels * gradients_size;
      float* to = product + i * a.out_channels * kPanel;
      over_rows(0, a.out_channels, [&](Index out, auto rows) {
        Sums<rows()> sums;
        multiply_over_tiles<T>(sums, from + out, apart, panel, count * steps_in_strip);
        for (int r = 0; r < rows(); ++r) {
          for (int v = 0; v < kPanelVectors; ++v) {
            float* at = to + (out + r) * kPanel + v * kWidth<float>;
            store(at, first == 0 ? sums.of[r][v] : load(at) + sums.of[r][v]);
          }
        }
      });
    });
    for (Index strip = 1; strip <= count; ++strip) {
      for (Index c = 0; c < wide; c += kWidth<float>) store(bias + c, load(bias + c) + load(bias + strip * wide + c));
    }
  }

  if (a.dbias != nullptr) std::memcpy(a.dbias, bias, static_cast<std::size_t>(a.out_channels) * sizeof(float));
  parallel_for(a.out_channels, 8, threads, [&](Index out) {
    for (Index c = 0; c < a.channels; c += kWidth<float>) {
      const float* from = product + (c / kPanel * a.out_channels + out) * kPanel + c % kPanel;
      Floats half[4][3];  // [column of the tile][row of the kernel]
      for (int j = 0; j < 4; ++j) {
        Floats m[4];
        for (int i = 0; i < 4; ++i) m[i] = load(from + (4 * i + j) * panels * a.out_channels * kPanel);
        transform_weights_back(m, half[j]);
      }
      for (int i = 0; i < 3; ++i) {
        const Floats row[4] = {half[0][i], half[1][i], half[2][i], half[3][i]};
        Floats g[3];
        transform_weights_back(row, g);
        for (int j = 0; j < 3; ++j) {
          float* to = a.dweight + (out * 9 + 3 * i + j) * a.channels + c;
          const Index lanes = a.channels - c;
          lanes >= kWidth<float> ? store(to, g[j]) : store(to, g[j], static_cast<int>(lanes));
        }
      }
    }
  });
}

}  // namespace

void pack_winograd(const PackWinogradArgs& a) {
  with_conv_type(a.dtype, [&](auto type) { pack<decltype(type)>(a); });
}

void conv_winograd_weights(const ConvWinogradWeightsArgs& a) {
  with_conv_type(a.dtype, [&](auto type) { weight_gradients<decltype(type)>(a); });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
