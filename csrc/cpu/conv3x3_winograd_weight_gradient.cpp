// The gradient of the weights and the bias of conv_winograd.
//
// The convolution is linear in its transformed weights. So their gradient m is a product over all tiles, for each
// position of the transform:
//   B^T d B   is the transformed input.
//   A dy A^T  is the gradient of the sums.
//   G^T m G   is the gradient of the weights.
//
// A task has one row of the transforms, for all tiles. It has few enough input and output channels for its sums to stay
// in the second-level cache. Threads share nothing until the end. The number of threads decides the partition of the
// channels, but neither the terms of a sum nor their order.
//
// A multiply-add takes two neighbouring tiles of a strip in bfloat16. The last tile of a strip may be paired with
// zeros.
#include "common/args.h"
#include "cpu/panel_product.h"
#include "cpu/parallel.h"
#include "cpu/winograd_transforms.h"
#include "cpu/with_type.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

// Sums products over tiles: rows of `gradients` times the first vectors of a panel of inputs. A row is an output
// channel. Steps of tiles are `apart` words from each other.
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

// Multiplies the gradients of `outs` channels by a panel of inputs over a block of tiles. Adds the result to `product`,
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

// Some channels of a channels_last map.
template <class T>
struct Map {
  const T* pixels;
  Index height, width, all_channels;
  Index first_channel, channels;  // those of a task
};

// The sum or difference of two rows of a map: one row of the transform of a strip's tiles, before that of their
// columns. A row may be kNone or lie outside the map. It is then zero.
template <class T>
class TwoRows {
 public:
  static constexpr Index kNone = -1;

  // rows_to_next: rows from here to those of the next strip, which are prefetched.
  TwoRows(const Map<T>& map, Index sample, Index plus, Index other, float sign, Index rows_to_next)
      : plus_(map, sample, plus),
        other_(map, sample, other),
        width_(map.width),
        to_next_(rows_to_next * map.width),
        sign_(sign) {}

  // Returns the rows from channel c on.
  TwoRows from(Index c) const {
    TwoRows rows = *this;
    if (plus_.apart != 0) rows.plus_.start += c;
    if (other_.apart != 0) rows.other_.start += c;
    return rows;
  }

  // Returns a column: all lanes, or the first ones if `partial`. inside: the column is in the map.
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

// Calls body(channel, whether the vector is partial, lanes) for vectors of channels.
template <class Body>
DDPM_FAST_INLINE void over_channels(Index channels, Body body) {
  Index c = 0;
  for (; c + kWidth<float> <= channels; c += kWidth<float>) body(c, std::false_type{}, 0);
  if (c < channels) body(c, std::true_type{}, static_cast<int>(channels - c));
}

// Calls body(step, is_inside) for the steps of a strip. is_inside is a compile-time constant: whether the step reads
// only pixels of the map and has all of its tiles. The first `inside` tiles of the strip do.
template <int at_once, class Body>
DDPM_FAST_INLINE void over_steps(const Strip& strip, Index steps, Index inside, Body body) {
  inside = smaller(strip.tiles, larger(0, inside)) / at_once;
  Index step = 0;
  for (; step < smaller(inside, steps); ++step) body(step, std::true_type{});
  for (; step < steps; ++step) body(step, std::false_type{});
}

// Calls put(column, values of the tiles of a step).
template <int tiles, int columns, class Put>
DDPM_FAST_INLINE void put_columns(const Floats (&values)[tiles][columns], Put put) {
  for (int j = 0; j < columns; ++j) {
    Floats neighbours[tiles];
    for (int s = 0; s < tiles; ++s) neighbours[s] = values[s][j];
    put(j, neighbours);
  }
}

// The rows of the transforms. A row of a transform is one row of a tile, plus or minus another.
//   kSide: values of a row of gradients and of weights
//   kInputs: values of a row of inputs; column j of the weights has the input input_of(j)
//   kScale: pixels of the output's side per pixel of the input's
//   kMostInputs, kMostOutputs: most channels of a task
//   kMostSums: most input channels times output channels of a task, for 512 or 384 KB of sums
struct PlainRows {
  using Tile = SmallTile;
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

  // Multiplies a row of a tile by A:
  //   A y
  static DDPM_FAST_INLINE void transform_gradient(const Floats (&y)[2], Floats (&out)[kSide]) {
    out[0] = y[0], out[1] = y[0] + y[1], out[2] = y[0] - y[1], out[3] = -y[1];
  }

  // The sum of a tile is in one row of the transform, the one that sums all rows.
  static constexpr bool is_sum(int row) { return row == 1; }
  static DDPM_FAST_INLINE Floats sum(const Floats (&values)[kSide]) { return values[1]; }
};

// Each phase has three rows: its first, the sum and its last.
struct UpsampledRows {
  using Tile = UpsampledTile;
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

// Computes row `row` of B^T d B for the tiles of a strip. Calls put(step, channel, column, values of the step's tiles).
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
        Kind::Tile::input(tile, values[s]);
      }
      put_columns(values, [&](int j, const auto& neighbours) { put(step, c, j, neighbours); });
    });
  });
}

// Computes row `row` of A dy A^T for the tiles of a strip. Calls put as above, and sum(channel, sum of Kind::sum over
// the strip).
template <class Kind, class T, class Put, class Sum>
void transform_gradients(const Map<T>& map, const Strip& strip, int row, Index steps, Put put, Sum sum) {
  constexpr int at_once = kStep<T>, pixels = 2 * Kind::kScale;  // pixels of a row of a tile
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

// The partition of the channels into tasks.
struct ChannelPartition {
  Index in_size, out_size, in_parts, out_parts, tasks;
};

inline Index divided(Index a, Index b) { return larger(1, (a + b - 1) / b); }

// Makes parts of about the same size, which is a multiple of `unit`.
inline void even_out(Index channels, Index& size, Index& parts, Index unit) {
  size = round_up(divided(channels, divided(channels, size)), unit);
  parts = divided(channels, size);
}

// A task gets the most channels, or fewer if threads would wait for others.
template <class Kind>
ChannelPartition partition_channels(Index channels, Index out_channels, int threads) {
  ChannelPartition p{};
  p.out_size = Kind::kMostOutputs;
  even_out(out_channels, p.out_size, p.out_parts, kWidth<float>);
  p.in_size = smaller(Kind::kMostInputs, Kind::kMostSums / p.out_size);
  for (;;) {
    even_out(channels, p.in_size, p.in_parts, kPanel);
    even_out(out_channels, p.out_size, p.out_parts, kWidth<float>);
    p.tasks = Kind::kSide * p.in_parts * p.out_parts;
    if (4 * round_up(p.tasks, threads) <= 5 * p.tasks) return p;
    if (p.out_size > p.in_size || (p.in_size == kPanel && p.out_size > kWidth<float>)) {
      p.out_size /= 2;
    } else if (p.in_size > kPanel) {
      p.in_size /= 2;
    } else {
      return p;
    }
  }
}

template <class T, class Kind>
void weight_gradients(const ConvWinogradWeightGradientArgs& a) {
  constexpr int side = Kind::kSide;
  constexpr Index kStepsInBlock = 64;  // few terms per sum, and a panel of them stays in the first-level cache
  const int threads = a.stream_or_threads.threads();
  const Tiles tiles(a.height, a.width, Kind::Tile::kOut);
  const Index strips = a.n * tiles.segments * tiles.down, steps_in_strip = (tiles.in_strip + kStep<T> - 1) / kStep<T>;
  const Index strips_in_block = larger(1, kStepsInBlock / larger(1, steps_in_strip)),
              most = strips_in_block * steps_in_strip;
  const Index depth = round_up(a.channels, kWidth<float>), wide = round_up(a.out_channels, kWidth<float>);

  const ChannelPartition partition = partition_channels<Kind>(a.channels, a.out_channels, threads);
  const Index panels = (partition.in_size + kPanel - 1) / kPanel, apart = partition.out_size + kApart;
  const Index inputs_size = panels * most * kPanel + kApart, gradients_size = most * apart;  // per position
  const Index product_size = panels * partition.out_size * kPanel;

  Scratch scratch(ScratchUse::kCall,
                  Scratch::bytes<float>(side * 3 * a.out_channels * depth) + Scratch::bytes<float>(side * wide));
  float* sums = scratch.take<float>(side * 3 * a.out_channels * depth);  // [row, column of the kernel, output, input]
  float* bias = scratch.take<float>(side * wide);                        // [row, output]

  parallel_for(partition.tasks, 1, a.stream_or_threads, [&](Index task) {
    const int row = static_cast<int>(task / (partition.in_parts * partition.out_parts));
    const Index in_part = task % partition.in_parts, out_part = task / partition.in_parts % partition.out_parts;
    const auto map_of = [&](const void* x, Index scale, Index channels, Index part, Index size) {
      const Index first = part * size;
      return Map<T>{static_cast<const T*>(x),       scale * a.height, scale * a.width, channels, first,
                    smaller(size, channels - first)};
    };
    const Map<T> input = map_of(a.x, 1, a.channels, in_part, partition.in_size),
                 gradient = map_of(a.grad_y, Kind::kScale, a.out_channels, out_part, partition.out_size);

    Scratch task_scratch(ScratchUse::kSlice, Scratch::bytes<float>(Kind::kInputs * inputs_size) +
                                                 Scratch::bytes<float>(side * gradients_size) +
                                                 Scratch::bytes<float>(side * product_size) +
                                                 Scratch::bytes<float>(partition.out_size));
    float* inputs =
        task_scratch.take<float>(Kind::kInputs * inputs_size);           // [column, panel, step, channel of the panel]
    float* gradients = task_scratch.take<float>(side * gradients_size);  // [column, step, output channel]
    float* product = task_scratch.take<float>(side * product_size);      // [column, panel, output channel, channel]
    float* total = task_scratch.take<float>(partition.out_size);         // sum of the output's gradient
    if (input.channels % kPanel != 0) {  // unused lanes, which take part in the products
      std::memset(inputs, 0, static_cast<std::size_t>(Kind::kInputs * inputs_size) * sizeof(float));
    }
    if (strips == 0) std::memset(product, 0, static_cast<std::size_t>(side * product_size) * sizeof(float));
    std::memset(total, 0, static_cast<std::size_t>(partition.out_size) * sizeof(float));

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
            add(product + j * product_size + panel * partition.out_size * kPanel,
                reinterpret_cast<const T*>(gradients + j * gradients_size), apart, gradient.channels, inputs_here,
                count * steps_in_strip);
          });
        }
      }
    }

    for (Index out = 0; out < gradient.channels; ++out) {
      for (Index c = 0; c < input.channels; c += kWidth<float>) {
        Floats m[side], g[3];
        const Index at = (c / kPanel * partition.out_size + out) * kPanel + c % kPanel;
        for (int j = 0; j < side; ++j) m[j] = load(product + j * product_size + at);
        Kind::Tile::weights_back(m, g);
        float* to = sums + (3 * row * a.out_channels + gradient.first_channel + out) * depth + input.first_channel + c;
        for (int j = 0; j < 3; ++j) store(to + j * a.out_channels * depth, g[j]);
      }
    }
    if (in_part == 0) {
      std::memcpy(bias + row * wide + gradient.first_channel, total,
                  static_cast<std::size_t>(gradient.channels) * sizeof(float));
    }
  });

  parallel_for(a.out_channels, 8, a.stream_or_threads, [&](Index out) {
    over_channels(a.channels, [&](Index c, auto partial, int lanes) {
      for (int j = 0; j < 3; ++j) {
        Floats m[side], g[3];
        for (int i = 0; i < side; ++i) m[i] = load(sums + ((3 * i + j) * a.out_channels + out) * depth + c);
        Kind::Tile::weights_back(m, g);
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

void conv_winograd_weight_gradient(const ConvWinogradWeightGradientArgs& a) {
  with_conv_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    a.upsample ? weight_gradients<T, UpsampledRows>(a) : weight_gradients<T, PlainRows>(a);
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
