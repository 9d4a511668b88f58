// The weights of conv_winograd: packed for it, and their gradient.
#include "cpu/winograd.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

// G g.
DDPM_FAST_INLINE void transform_weights(const Floats (&g)[3], Floats (&out)[4]) {
  const Floats outer = g[0] + g[2];
  out[0] = g[0];
  out[1] = (outer + g[1]) * 0.5f;
  out[2] = (outer - g[1]) * 0.5f;
  out[3] = g[2];
}

// Of the two phases: their two taps, and between them the sum, which is that of all three.
DDPM_FAST_INLINE void transform_weights(const Floats (&g)[3], Floats (&out)[6]) {
  const Floats first = g[0] + g[1], last = g[1] + g[2], sum = first + g[2];
  out[0] = g[0], out[1] = sum, out[2] = last;
  out[3] = first, out[4] = sum, out[5] = g[2];
}

// Where the weights of a row and a column of the transform are among the matrices of a panel.
template <int side>
constexpr int position_of(int row, int column) {
  if constexpr (side == 4) return side * row + column;
  return 9 * (row / 3 * 2 + column / 3) + row % 3 * 3 + column % 3;  // phase after phase
}

// G^T m.
DDPM_FAST_INLINE void transform_weights_back(const Floats (&m)[4], Floats (&out)[3]) {
  const Floats sum = (m[1] + m[2]) * 0.5f;
  out[0] = m[0] + sum;
  out[1] = (m[1] - m[2]) * 0.5f;
  out[2] = sum + m[3];
}
DDPM_FAST_INLINE void transform_weights_back(const Floats (&m)[6], Floats (&out)[3]) {
  const Floats sum = m[1] + m[4];
  out[0] = m[0] + m[3] + sum;
  out[1] = m[2] + m[3] + sum;
  out[2] = m[2] + m[5] + sum;
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
      } else {
        for (Index o = 0; o < outs; ++o) taps[c][tap][o] = from[o * a.out_stride];
      }
    }
  }
}

// side: of the square of transformed weights.
template <class T, int side>
void pack(const PackWinogradArgs& a) {
  const Index panels = (a.out_channels + kPanel - 1) / kPanel, size = panel_size<T>(a.channels);
  const Index chunks = (a.channels + kWidth<float> - 1) / kWidth<float>;
  parallel_for(panels * chunks, 8, a.stream_or_threads.threads(), [&](Index i) {
    const Index first_out = i / chunks * kPanel, first = i % chunks * kWidth<float>;
    Taps taps;
    read_taps(a, first, first_out, smaller(kPanel, a.out_channels - first_out), taps);
    float* panel = a.packed + i / chunks * side * side * size;
    for (Index c = 0; c < smaller(kWidth<float>, round_up(a.channels - first, kStep<T>)); c += kStep<T>) {
      for (int v = 0; v < kPanelVectors; ++v) {
        Floats all[kStep<T>][3][side];  // [step][column of the kernel][row]
        for (int s = 0; s < kStep<T>; ++s) {
          for (int j = 0; j < 3; ++j) {
            Floats column[3];
            for (int k = 0; k < 3; ++k) column[k] = load(taps[c + s][3 * k + j] + v * kWidth<float>);
            transform_weights(column, all[s][j]);
          }
        }
        for (int row = 0; row < side; ++row) {
          Floats out[kStep<T>][side];
          for (int s = 0; s < kStep<T>; ++s) {
            const Floats values[3] = {all[s][0][row], all[s][1][row], all[s][2][row]};
            transform_weights(values, out[s]);
          }
          for (int column = 0; column < side; ++column) {
            Floats values[kStep<T>];
            for (int s = 0; s < kStep<T>; ++s) values[s] = out[s][column];
            float* to = panel + position_of<side>(row, column) * size;
            store_step(to + (first + c) / kStep<T> * kPanel, v, values);
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

// Multiplies the gradients of `outs` channels by a panel of inputs, over a block of tiles. Adds the result to `product`,
// or stores it there if the block is the first.
template <bool first, int vectors, class T>
DDPM_FAST_NOINLINE void add_products(float* product, const T* gradients, Index apart, Index outs, const float* panel,
                                     Index steps) {
  const float* words = reinterpret_cast<const float*>(gradients);
  over_rows(0, outs, [&](Index out, auto rows) {
    float* to = product + out * kPanel;
    Sums<rows(), vectors> terms;
    multiply_over_tiles<T>(terms, words + out, apart, panel, steps);
    for (int r = 0; r < rows(); ++r) {
      for (int v = 0; v < vectors; ++v) {
        float* at = to + r * kPanel + v * kWidth<float>;
        store(at, first ? terms.of[r][v] : load(at) + terms.of[r][v]);
      }
    }
  });
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

  // rows_to_next: further down, the next strip will want the same.
  TwoRows(const Map<T>& map, Index sample, Index plus, Index other, float sign, Index rows_to_next)
      : plus_(map, sample, plus),
        other_(map, sample, other),
        width_(map.width),
        to_next_(rows_to_next * map.width),
        sign_(sign) {}

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
    __builtin_prefetch(plus + to_next_ * plus_.apart);
    __builtin_prefetch(other + to_next_ * other_.apart);
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
  Index width_, to_next_;
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
// strip, `inside` of whose tiles read nothing else.
template <int at_once, class Body>
DDPM_FAST_INLINE void over_steps(const Strip& strip, Index steps, Index inside, Body body) {
  inside = smaller(strip.tiles, larger(0, inside)) / at_once;
  Index step = 0;
  for (; step < smaller(inside, steps); ++step) body(step, std::true_type{});
  for (; step < steps; ++step) body(step, std::false_type{});
}

// Calls put(column, values of a step's tiles).
template <int tiles, int columns, class Put>
DDPM_FAST_INLINE void put_columns(const Floats (&values)[tiles][columns], Put put) {
  for (int j = 0; j < columns; ++j) {
    Floats neighbours[tiles];
    for (int s = 0; s < tiles; ++s) neighbours[s] = values[s][j];
    put(j, neighbours);
  }
}

// What a row of the transforms is made of, rows of a tile of the input and of the output's gradient: one plus or minus
// another. kInputs: transformed values of a row of inputs; kSide: of gradients, and of weights, where column j's input
// is the one at input_of(j). kScale: of the output's side to the input's. kMostInputs, kMostOutputs and kMostSums, the
// product of both: channels of a task, for 512 or 384 KB of sums.
struct Plain {
  static constexpr int kSide = 4, kInputs = 4, kScale = 1;
  static constexpr Index kMostInputs = 256, kMostOutputs = 256, kMostSums = 1 << 15;
  static constexpr int input_of(int j) { return j; }

  template <class T>
  static TwoRows<T> input_rows(const Map<T>& map, const Strip& strip, int row) {
    constexpr int plus[kSide] = {0, 1, 2, 1}, other[kSide] = {2, 2, 1, 3};
    const Index top = 2 * strip.down - 1;
    return {map, strip.sample, top + plus[row], top + other[row], row == 1 ? 1.f : -1.f, 2};
  }

  template <class T>
  static TwoRows<T> gradient_rows(const Map<T>& map, const Strip& strip, int row) {
    constexpr Index none = TwoRows<T>::kNone;
    const Index top = 2 * strip.down;
    return {map, strip.sample, row < 3 ? top : none, row > 0 ? top + 1 : none, row < 2 ? 1.f : -1.f, 2};
  }

  // A y of a row of a tile.
  static DDPM_FAST_INLINE void transform_gradient(const Floats (&y)[2], Floats (&out)[kSide]) {
    out[0] = y[0], out[1] = y[0] + y[1], out[2] = y[0] - y[1], out[3] = -y[1];
  }

  // Of its row in which there is the sum of all rows, the sum of all columns.
  static constexpr bool is_sum(int row) { return row == 1; }
  static DDPM_FAST_INLINE Floats sum(const Floats (&values)[kSide]) { return values[1]; }
};

// Of a phase, the first, the sum and the last.
struct Upsampled {
  static constexpr int kSide = 6, kInputs = 5, kScale = 2;
  static constexpr Index kMostInputs = 256, kMostOutputs = 128, kMostSums = 1 << 14;
  static constexpr int input_of(int j) { return j / 3 * 2 + j % 3; }

  template <class T>
  static TwoRows<T> input_rows(const Map<T>& map, const Strip& strip, int row) {
    constexpr int plus[kInputs] = {0, 1, 1, 2, 2}, other[kInputs] = {1, -1, 2, -1, 3};
    const Index top = 2 * strip.down - 1;
    const int i = input_of(row);
    return {map, strip.sample, top + plus[i], other[i] < 0 ? TwoRows<T>::kNone : top + other[i], -1, 2};
  }

  template <class T>
  static TwoRows<T> gradient_rows(const Map<T>& map, const Strip& strip, int row) {
    constexpr Index none = TwoRows<T>::kNone;
    const Index top = 4 * strip.down + row / 3;
    return {map, strip.sample, row % 3 < 2 ? top : none, row % 3 > 0 ? top + 2 : none, row % 3 < 2 ? 1.f : -1.f, 4};
  }

  static DDPM_FAST_INLINE void transform_gradient(const Floats (&y)[4], Floats (&out)[kSide]) {
    for (int phase = 0; phase < 2; ++phase) {
      out[3 * phase] = y[phase];
      out[3 * phase + 1] = y[phase] + y[phase + 2];
      out[3 * phase + 2] = -y[phase + 2];
    }
  }

  static constexpr bool is_sum(int row) { return row % 3 == 1; }
  static DDPM_FAST_INLINE Floats sum(const Floats (&values)[kSide]) { return values[1] + values[4]; }
};

// Row `row` of B^T d B, of a strip's tiles: calls put(step, channel, column, values of its tiles).
template <class Kind, class T, class Put>
void transform_inputs(const Map<T>& map, const Strip& strip, int row, Index steps, Put put) {
  constexpr int at_once = kStep<T>;
  const Index left = 2 * strip.first - 1;
  const TwoRows<T> rows = Kind::input_rows(map, strip, row);
  over_channels(map.channels, [&](Index c, auto partial, int lanes) {
    const TwoRows<T> from = rows.from(c);
    Floats columns[2 * at_once + 2];  // tiles share two with their neighbours
    for (int j = 0; j < 2; ++j) columns[2 * at_once + j] = from.template at<false, partial()>(left + j, lanes);
    over_steps<at_once>(strip, steps, (map.width - left - 2) / 2, [&](Index step, auto inside) {
      for (int j = 0; j < 2; ++j) columns[j] = columns[2 * at_once + j];
      for (int j = 2; j < 2 * at_once + 2; ++j) {
        columns[j] = from.template at<inside(), partial()>(left + 2 * step * at_once + j, lanes);
      }
      Floats values[at_once][Kind::kInputs] = {};
      for (int s = 0; s < at_once; ++s) {
        if (!inside() && step * at_once + s >= strip.tiles) break;
        const Floats tile[4] = {columns[2 * s], columns[2 * s + 1], columns[2 * s + 2], columns[2 * s + 3]};
        transform_input(tile, values[s]);
      }
      put_columns(values, [&](int j, const auto& neighbours) { put(step, c, j, neighbours); });
    });
  });
}

// Row `row` of A dy A^T; and sum(channel, sum over the strip of what `Kind::sum` says).
template <class Kind, class T, class Put, class Sum>
void transform_gradients(const Map<T>& map, const Strip& strip, int row, Index steps, Put put, Sum sum) {
  constexpr int at_once = kStep<T>, pixels = 2 * Kind::kScale;  // of a row of a tile
  const Index left = pixels * strip.first;
  const TwoRows<T> rows = Kind::gradient_rows(map, strip, row);
  over_channels(map.channels, [&](Index c, auto partial, int lanes) {
    const TwoRows<T> from = rows.from(c);
    Floats total{};
    over_steps<at_once>(strip, steps, (map.width - left) / pixels, [&](Index step, auto inside) {
      Floats values[at_once][Kind::kSide] = {};
      for (int s = 0; s < at_once; ++s) {
        const Index tile = step * at_once + s;
        if (!inside() && tile >= strip.tiles) break;
        Floats y[pixels];
        for (int j = 0; j < pixels; ++j) {
          y[j] = from.template at<inside(), partial()>(left + pixels * tile + j, lanes);
        }
        Kind::transform_gradient(y, values[s]);
        total += Kind::sum(values[s]);
      }
      put_columns(values, [&](int j, const auto& neighbours) { put(step, c, j, neighbours); });
    });
    sum(c, total);
  });
}

// Channels of a task: the most, or fewer where threads would wait for others.
template <class Kind>
struct Cut {
  Index in_size, out_size = Kind::kMostOutputs, in_parts, out_parts, tasks;

  Cut(Index channels, Index out_channels, int threads) {
    even_out(out_channels, out_size, out_parts, kWidth<float>);
    in_size = smaller(Kind::kMostInputs, Kind::kMostSums / out_size);
    for (;;) {
      even_out(channels, in_size, in_parts, kPanel);
      even_out(out_channels, out_size, out_parts, kWidth<float>);
      tasks = Kind::kSide * in_parts * out_parts;
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

// The convolution is linear in its transformed weights. So their gradient m is a product over all tiles, for each
// position of the transform:
//   B^T d B   is the transformed input.
//   A dy A^T  is the gradient of the sums.
//   G^T m G   is the gradient of the weights.
//
// A task has a row of the transforms, and some input and output channels: so few that its sums stay in the second cache
// while it goes through all tiles, block after block. Threads share nothing until the end. How many they are decides
// how the channels are cut, but not which terms a sum is made of, nor their order. In bfloat16 a multiply-add takes two
// neighbouring tiles of a strip; a strip's last may have none beside it, and zeros there.
template <class T, class Kind>
void weight_gradients(const ConvWinogradWeightGradientArgs& a) {
  constexpr int side = Kind::kSide;
  constexpr Index kStepsInBlock = 64;  // few terms a sum, and a panel of them stays in the first cache
  const int threads = a.stream_or_threads.threads();
  const Tiles tiles(a.height, a.width);
  const Index strips = a.n * tiles.segments * tiles.down, steps_in_strip = (tiles.in_strip + kStep<T> - 1) / kStep<T>;
  const Index strips_in_block = larger(1, kStepsInBlock / larger(1, steps_in_strip)),
              most = strips_in_block * steps_in_strip;
  const Index depth = round_up(a.channels, kWidth<float>), wide = round_up(a.out_channels, kWidth<float>);

  const Cut<Kind> cut(a.channels, a.out_channels, threads);
  const Index panels = (cut.in_size + kPanel - 1) / kPanel, apart = cut.out_size + kApart;
  const Index inputs_size = panels * most * kPanel + kApart, gradients_size = most * apart;  // of a position
  const Index product_size = panels * cut.out_size * kPanel;

  Room room(RoomFor::kCall, Room::bytes<float>(side * 3 * a.out_channels * depth) + Room::bytes<float>(side * wide));
  float* sums = room.take<float>(side * 3 * a.out_channels * depth);  // [row, column of the kernel, output, input]
  float* bias = room.take<float>(side * wide);                        // [row, output]

  parallel_for(cut.tasks, 1, threads, [&](Index task) {
    const int row = static_cast<int>(task / (cut.in_parts * cut.out_parts));
    const Index in_part = task % cut.in_parts, out_part = task / cut.in_parts % cut.out_parts;
    const auto map_of = [&](const void* x, Index scale, Index channels, Index part, Index size) {
      const Index first = part * size;
      return Map<T>{static_cast<const T*>(x),       scale * a.height, scale * a.width, channels, first,
                    smaller(size, channels - first)};
    };
    const Map<T> input = map_of(a.x, 1, a.channels, in_part, cut.in_size),
                 gradient = map_of(a.grad_y, Kind::kScale, a.out_channels, out_part, cut.out_size);

    Room pieces(RoomFor::kSlice, Room::bytes<float>(Kind::kInputs * inputs_size) +
                                     Room::bytes<float>(side * gradients_size) +
                                     Room::bytes<float>(side * product_size) + Room::bytes<float>(cut.out_size));
    float* inputs = pieces.take<float>(Kind::kInputs * inputs_size);  // [column, panel, step, channel of the panel]
    float* gradients = pieces.take<float>(side * gradients_size);     // [column, step, output channel]
    float* product = pieces.take<float>(side * product_size);         // [column, panel, output channel, channel]
    float* total = pieces.take<float>(cut.out_size);                  // of the output's gradient
    if (input.channels % kPanel != 0) {                               // lanes that count for nothing, but take part
      std::memset(inputs, 0, static_cast<std::size_t>(Kind::kInputs * inputs_size) * sizeof(float));
    }
    if (strips == 0) std::memset(product, 0, static_cast<std::size_t>(side * product_size) * sizeof(float));
    std::memset(total, 0, static_cast<std::size_t>(cut.out_size) * sizeof(float));

    for (Index first = 0; first < strips; first += strips_in_block) {
      const Index count = smaller(strips_in_block, strips - first);
      for (Index s = 0; s < count; ++s) {
        const Strip strip(tiles, first + s);
        transform_inputs<Kind>(input, strip, row, steps_in_strip, [&](Index step, Index c, int j, const auto& values) {
          const Index at = (c / kPanel * most + s * steps_in_strip + step) * kPanel + c % kPanel;
          store_step(inputs + j * inputs_size + at, 0, values);
        });
        transform_gradients<Kind>(
            gradient, strip, row, steps_in_strip,
            [&](Index step, Index c, int j, const auto& values) {
              store_step(gradients + j * gradients_size + (s * steps_in_strip + step) * apart + c, 0, values);
            },
            [&](Index c, Floats sum) { store(total + c, load(total + c) + sum); });
      }
      for (int j = 0; j < side; ++j) {
        for (Index panel = 0; panel * kPanel < input.channels; ++panel) {
          const float* inputs_here = inputs + Kind::input_of(j) * inputs_size + panel * most * kPanel;
          with_vectors(input.channels - panel * kPanel, [&](auto vectors) {
            const auto add = first == 0 ? &add_products<true, vectors(), T> : &add_products<false, vectors(), T>;
            add(product + j * product_size + panel * cut.out_size * kPanel,
                reinterpret_cast<const T*>(gradients + j * gradients_size), apart, gradient.channels, inputs_here,
                count * steps_in_strip);
          });
        }
      }
    }

    for (Index out = 0; out < gradient.channels; ++out) {
      for (Index c = 0; c < input.channels; c += kWidth<float>) {
        Floats m[side], g[3];
        const Index at = (c / kPanel * cut.out_size + out) * kPanel + c % kPanel;
        for (int j = 0; j < side; ++j) m[j] = load(product + j * product_size + at);
        transform_weights_back(m, g);
        float* to = sums + (3 * row * a.out_channels + gradient.first_channel + out) * depth + input.first_channel + c;
        for (int j = 0; j < 3; ++j) store(to + j * a.out_channels * depth, g[j]);
      }
    }
    if (in_part == 0) {
      std::memcpy(bias + row * wide + gradient.first_channel, total,
                  static_cast<std::size_t>(gradient.channels) * sizeof(float));
    }
  });

  parallel_for(a.out_channels, 8, threads, [&](Index out) {
    over_channels(a.channels, [&](Index c, auto partial, int lanes) {
      for (int j = 0; j < 3; ++j) {
        Floats m[side], g[3];
        for (int i = 0; i < side; ++i) m[i] = load(sums + ((3 * i + j) * a.out_channels + out) * depth + c);
        transform_weights_back(m, g);
        for (int i = 0; i < 3; ++i) {
          store<partial()>(a.grad_weight + (out * 9 + 3 * i + j) * a.channels + c, g[i], lanes);
        }
      }
    });
    if (a.grad_bias != nullptr) {
      float sum = 0;
      for (int row = 0; row < side; ++row) sum += Kind::is_sum(row) ? bias[row * wide + out] : 0;
      a.grad_bias[out] = sum;
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
  with_conv_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    a.upsample ? pack<T, 6>(a) : pack<T, 4>(a);
  });
}

void conv_winograd_weight_gradient(const ConvWinogradWeightGradientArgs& a) {
  with_conv_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    a.upsample ? weight_gradients<T, Upsampled>(a) : weight_gradients<T, Plain>(a);
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
