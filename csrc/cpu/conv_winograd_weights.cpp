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
  const Index next = first + kWidth<float> < a.channels ? kWidth<float> * a.stride : 0;  // what is read then
  std::memset(taps, 0, sizeof(taps));
  for (int tap = 0; tap < 9; ++tap) {
    const float* from =
        a.weights + first * a.stride + first_out * a.out_stride + tap / 3 * a.row_stride + tap % 3 * a.column_stride;
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
// one, times the first vectors of a panel of inputs.
template <class T, int rows, int vectors>
DDPM_FAST_INLINE void multiply_over_tiles(Sums<rows, vectors>& sums, const float* gradients, Index apart,
                                          const float* panel, Index steps) {
  Sums<rows, vectors> local{};  // in registers
  for (Index step = 0; step < steps; ++step, gradients += apart, panel += kPanel) {
    Floats inputs[vectors];
    for (int v = 0; v < vectors; ++v) inputs[v] = load(panel + v * kWidth<float>);
    for (int r = 0; r < rows; ++r) {
      const T* gradient = reinterpret_cast<const T*>(gradients + r);
      for (int v = 0; v < vectors; ++v) local.of[r][v] = multiply_add(gradient, inputs[v], local.of[r][v]);
    }
  }
  sums = local;
}

// What is transformed: a channels_last map, and some of its channels.
template <class T>
struct Map {
  const T* pixels;
  Index height, width, all_channels;
  Index first_channel, channels;  // a task's
};

// One row of the transform of a strip's tiles, before that of their columns: the sum or difference of two rows of the
// map. Either may be none, or lie outside; there are zeros.
template <class T>
class TwoRows {
 public:
  static constexpr Index kNone = -1;

  TwoRows(const Map<T>& map, Index sample, Index plus, Index other, float sign)
      : plus_(map, sample, plus), other_(map, sample, other), width_(map.width), sign_(sign) {}

  // Channels from c on.
  TwoRows from(Index c) const {
    TwoRows rows = *this;
    if (plus_.apart != 0) rows.plus_.start += c;
    if (other_.apart != 0) rows.other_.start += c;
    return rows;
  }

  // All lanes of a column, or the first ones; `inside`: the column is.
  template <bool inside, bool partial>
  DDPM_FAST_INLINE Floats at(Index column, int lanes) const {
    if (!inside && (column < 0 || column >= width_)) return Floats{};
    const T *plus = plus_.start + column * plus_.apart, *other = other_.start + column * other_.apart;
    __builtin_prefetch(plus + 2 * width_ * plus_.apart);  // what the next strip needs
    __builtin_prefetch(other + 2 * width_ * other_.apart);
    return load<partial>(plus, lanes) + sign_ * load<partial>(other, lanes);
  }

 private:
  struct Row {
    const T* start;
    Index apart;  // elements from column to column

    Row(const Map<T>& map, Index sample, Index number) {
      alignas(kVectorSize) static const T zeros[kWidth<float>] = {};
      const bool inside = number >= 0 && number < map.height;
      start = inside ? map.pixels + (sample * map.height + number) * map.width * map.all_channels + map.first_channel
                     : zeros;
      apart = inside ? map.all_channels : 0;
    }
  };

  Row plus_, other_;
  Index width_;
  float sign_;
};

// Calls body(channel, whether the vector is partial, lanes) for the vectors of some channels.
template <class Body>
DDPM_FAST_INLINE void over_channels(Index channels, Body body) {
  Index c = 0;
  for (; c + kWidth<float> <= channels; c += kWidth<float>) body(c, std::false_type{}, 0);
  if (c < channels) body(c, std::true_type{}, static_cast<int>(channels - c));
}

// Calls body(step, whether all that it reads is inside of the map and all of its tiles are there) for the steps of a
// strip, whose tiles read two columns each, of so many.
template <int at_once, class Body>
DDPM_FAST_INLINE void over_steps(const Strip& strip, Index steps, Index columns, Body body) {
  const Index inside = smaller(strip.tiles, columns / 2) / at_once;
  Index step = 0;
  for (; step < smaller(inside, steps); ++step) body(step, std::true_type{});
  for (; step < steps; ++step) body(step, std::false_type{});
}

// Calls put(column, values of a step's tiles).
template <int tiles, class Put>
DDPM_FAST_INLINE void put_columns(const Floats (&values)[tiles][4], Put put) {
  for (int j = 0; j < 4; ++j) {
    Floats neighbours[tiles];
    for (int s = 0; s < tiles; ++s) neighbours[s] = values[s][j];
    put(j, neighbours);
  }
}

// Row `row` of B^T d B, of a strip's tiles: calls put(step, channel, column, values of its tiles).
template <class T, class Put>
void transform_inputs(const Map<T>& map, const Strip& strip, int row, Index steps, Put put) {
  constexpr int plus[4] = {0, 1, 2, 1}, other[4] = {2, 2, 1, 3}, at_once = kStep<T>;
  const Index top = 2 * strip.down - 1, left = 2 * strip.first - 1;
  const TwoRows<T> rows(map, strip.sample, top + plus[row], top + other[row], row == 1 ? 1.f : -1.f);
  over_channels(map.channels, [&](Index c, auto partial, int lanes) {
    const TwoRows<T> from = rows.from(c);
    Floats columns[2 * at_once + 2];  // tiles share two with their neighbours
    for (int j = 0; j < 2; ++j) columns[2 * at_once + j] = from.template at<false, partial()>(left + j, lanes);
    over_steps<at_once>(strip, steps, map.width - left - 2, [&](Index step, auto inside) {
      for (int j = 0; j < 2; ++j) columns[j] = columns[2 * at_once + j];
      for (int j = 2; j < 2 * at_once + 2; ++j) {
        columns[j] = from.template at<inside(), partial()>(left + 2 * step * at_once + j, lanes);
      }
      Floats values[at_once][4] = {};
      for (int s = 0; s < at_once; ++s) {
        if (!inside() && step * at_once + s >= strip.tiles) break;
        const Floats tile[4] = {columns[2 * s], columns[2 * s + 1], columns[2 * s + 2], columns[2 * s + 3]};
        transform_input(tile, values[s]);
      }
      put_columns(values, [&](int j, const auto& neighbours) { put(step, c, j, neighbours); });
    });
  });
}

// Row `row` of A dy A^T; and sum(channel, sum over the strip of its row 1: over all of its pixels).
template <class T, class Put, class Sum>
void transform_gradients(const Map<T>& map, const Strip& strip, int row, Index steps, Put put, Sum sum) {
  constexpr int at_once = kStep<T>;
  const Index top = 2 * strip.down, left = 2 * strip.first;
  const TwoRows<T> rows(map, strip.sample, row < 3 ? top : TwoRows<T>::kNone, row > 0 ? top + 1 : TwoRows<T>::kNone,
                        row < 2 ? 1.f : -1.f);
  over_channels(map.channels, [&](Index c, auto partial, int lanes) {
    const TwoRows<T> from = rows.from(c);
    Floats total{};
    over_steps<at_once>(strip, steps, map.width - left, [&](Index step, auto inside) {
      Floats values[at_once][4] = {};
      for (int s = 0; s < at_once; ++s) {
        const Index tile = step * at_once + s;
        if (!inside() && tile >= strip.tiles) break;
        const Floats y_0 = from.template at<inside(), partial()>(left + 2 * tile, lanes),
                     y_1 = from.template at<inside(), partial()>(left + 2 * tile + 1, lanes);
        values[s][0] = y_0, values[s][1] = y_0 + y_1, values[s][2] = y_0 - y_1, values[s][3] = -y_1;
        total += values[s][1];
      }
      put_columns(values, [&](int j, const auto& neighbours) { put(step, c, j, neighbours); });
    });
    sum(c, total);
  });
}

// Channels of a task: the most, or fewer where threads would wait for others.
struct Cut {
  static constexpr Index kMost = 1 << 15;  // inputs times outputs: 512 KB of sums
  Index in_size, out_size = 256, in_parts, out_parts, tasks;

  Cut(Index channels, Index out_channels, int threads) {
    even_out(out_channels, out_size, out_parts, kWidth<float>);
    in_size = smaller(256, kMost / out_size);
    for (;;) {
      even_out(channels, in_size, in_parts, kPanel);
      even_out(out_channels, out_size, out_parts, kWidth<float>);
      tasks = 4 * in_parts * out_parts;
      if (4 * round_up(tasks, threads) <= 5 * tasks) break;
      if (out_size > in_size || (in_size == kPanel && out_size > kWidth<float>)) {
        out_size /= 2;
      } else if (in_size > kPanel) {
        in_size /= 2;
      } else {
        break;
      }
    }
  }

 private:
  static Index divided(Index a, Index b) { return larger(1, (a + b - 1) / b); }

  static void even_out(Index channels, Index& size, Index& parts, Index unit) {
    size = round_up(divided(channels, divided(channels, size)), unit);
    parts = divided(channels, size);
  }
};

// The convolution is linear in its transformed weights, so their gradient is a product over all tiles, for each of the
// 16 positions, of the transformed input, B^T d B, and the gradient of the sums, A dy A^T; G^T m G makes it that of the
// weights.
//
// A task has four positions, a row of the transforms, and some input and output channels: so few that its sums stay in
// the second cache while it goes through all tiles, block after block. Threads share nothing until the end. How many
// they are decides how the channels are cut, but not which terms a sum is made of, nor their order. In bfloat16 a
// multiply-add takes two neighbouring tiles of a strip; a strip's last may have none beside it, and zeros there.
template <class T>
void weight_gradients(const ConvWinogradWeightsArgs& a) {
  constexpr Index kStepsInBlock = 64;  // few terms a sum, and a panel of them stays in the first cache
  const int threads = a.run_on.threads();
  const Tiles tiles(a.height, a.width);
  const Index strips = a.n * tiles.segments * tiles.down, steps_in_strip = (tiles.in_strip + kStep<T> - 1) / kStep<T>;
  const Index strips_in_block = larger(1, kStepsInBlock / larger(1, steps_in_strip)),
              most = strips_in_block * steps_in_strip;
  const Index depth = round_up(a.channels, kWidth<float>);

  const Cut cut(a.channels, a.out_channels, threads);
  const Index panels = (cut.in_size + kPanel - 1) / kPanel, apart = cut.out_size + kApart;
  const Index inputs_size = panels * most * kPanel + kApart, gradients_size = most * apart;  // of a position
  const Index product_size = panels * cut.out_size * kPanel;

  Room room(RoomFor::kCall, Room::bytes<float>(12 * a.out_channels * depth) + Room::bytes<float>(a.out_channels));
  float* sums =
      room.take<float>(12 * a.out_channels * depth);  // [row of the tile, column of the kernel, output, input]
  float* bias = room.take<float>(a.out_channels);

  parallel_for(cut.tasks, 1, threads, [&](Index task) {
    const int row = static_cast<int>(task / (cut.in_parts * cut.out_parts));
    const Index in_part = task % cut.in_parts, out_part = task / cut.in_parts % cut.out_parts;
    const auto map_of = [&](const void* x, Index channels, Index part, Index size) {
      return Map<T>{
          static_cast<const T*>(x), a.height, a.width, channels, part * size, smaller(size, channels - part * size)};
    };
    const Map<T> input = map_of(a.x, a.channels, in_part, cut.in_size),
                 gradient = map_of(a.dy, a.out_channels, out_part, cut.out_size);

    Room pieces(RoomFor::kSlice, Room::bytes<float>(4 * inputs_size) + Room::bytes<float>(4 * gradients_size) +
                                     Room::bytes<float>(4 * product_size) + Room::bytes<float>(cut.out_size));
    float* inputs = pieces.take<float>(4 * inputs_size);        // [position, panel, step, channel of the panel]
    float* gradients = pieces.take<float>(4 * gradients_size);  // [position, step, output channel]
    float* product = pieces.take<float>(4 * product_size);      // [position, panel, output channel, channel]
    float* total = pieces.take<float>(cut.out_size);            // of the output's gradient
    if (input.channels % kPanel != 0) {                         // lanes that count for nothing, but take part
      std::memset(inputs, 0, static_cast<std::size_t>(4 * inputs_size) * sizeof(float));
    }
    if (strips == 0) std::memset(product, 0, static_cast<std::size_t>(4 * product_size) * sizeof(float));
    std::memset(total, 0, static_cast<std::size_t>(cut.out_size) * sizeof(float));

    for (Index first = 0; first < strips; first += strips_in_block) {
      const Index count = smaller(strips_in_block, strips - first);
      for (Index s = 0; s < count; ++s) {
        const Strip strip(tiles, first + s);
        transform_inputs(input, strip, row, steps_in_strip, [&](Index step, Index c, int j, const auto& values) {
          const Index at = (c / kPanel * most + s * steps_in_strip + step) * kPanel + c % kPanel;
          store_step(inputs + j * inputs_size + at, 0, values);
        });
        transform_gradients(
            gradient, strip, row, steps_in_strip,
            [&](Index step, Index c, int j, const auto& values) {
              store_step(gradients + j * gradients_size + (s * steps_in_strip + step) * apart + c, 0, values);
            },
            [&](Index c, Floats sum) { store(total + c, load(total + c) + sum); });
      }
      for (int j = 0; j < 4; ++j) {
        for (Index panel = 0; panel * kPanel < input.channels; ++panel) {
          with_vectors(input.channels - panel * kPanel, [&](auto vectors) {
            over_rows(0, gradient.channels, [&](Index out, auto rows) {
              float* to = product + j * product_size + (panel * cut.out_size + out) * kPanel;
              Sums<rows(), vectors()> terms;
              multiply_over_tiles<T>(terms, gradients + j * gradients_size + out, apart,
                                     inputs + j * inputs_size + panel * most * kPanel, count * steps_in_strip);
              for (int r = 0; r < rows(); ++r) {
                for (int v = 0; v < vectors(); ++v) {
                  float* at = to + r * kPanel + v * kWidth<float>;
                  store(at, first == 0 ? terms.of[r][v] : load(at) + terms.of[r][v]);
                }
              }
            });
          });
        }
      }
    }

    for (Index out = 0; out < gradient.channels; ++out) {
      for (Index c = 0; c < input.channels; c += kWidth<float>) {
        Floats m[4], g[3];
        const Index at = (c / kPanel * cut.out_size + out) * kPanel + c % kPanel;
        for (int j = 0; j < 4; ++j) m[j] = load(product + j * product_size + at);
        transform_weights_back(m, g);
        for (int j = 0; j < 3; ++j) {
          store(
              sums + ((3 * row + j) * a.out_channels + gradient.first_channel + out) * depth + input.first_channel + c,
              g[j]);
        }
      }
    }
    if (row == 1 && in_part == 0) {
      std::memcpy(bias + gradient.first_channel, total, static_cast<std::size_t>(gradient.channels) * sizeof(float));
    }
  });

  if (a.dbias != nullptr) std::memcpy(a.dbias, bias, static_cast<std::size_t>(a.out_channels) * sizeof(float));
  parallel_for(a.out_channels, 8, threads, [&](Index out) {
    over_channels(a.channels, [&](Index c, auto partial, int lanes) {
      for (int j = 0; j < 3; ++j) {
        Floats m[4], g[3];
        for (int i = 0; i < 4; ++i) m[i] = load(sums + ((3 * i + j) * a.out_channels + out) * depth + c);
        transform_weights_back(m, g);
        for (int i = 0; i < 3; ++i) {
          store<partial()>(a.dweight + (out * 9 + 3 * i + j) * a.channels + c, g[i], lanes);
        }
      }
    });
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
