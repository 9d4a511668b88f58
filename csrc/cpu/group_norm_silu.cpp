// The forward pass of group_norm_silu; the backward pass is in group_norm_silu_backward.cpp.
//   y = act(GroupNorm(x + shift) (1 + scale) + scale_shift)
//
// A thread takes a slice: some groups of one sample. x is read twice, the second time from cache: once for mean and
// variance, once for y. What follows the statistics is one multiply-add per channel:
//   y = act((x - center) slope + intercept)
// The center stays apart, because folding it into the intercept would cancel where |mean| is large beside the
// deviations. The part of it that float32 cannot hold goes into the intercept.
//
// What was tried, in ns per 16 values, bfloat16, channels_last, one image of [128, 32, 32] / [256, 4, 4], on one core
// with AVX-512 BF16 at 3.7 GHz:
//   PyTorch, group_norm and then silu                                         12.0 / 82
//   statistics by tiles (see below), one vector at a time                      3.6 / 10.5
//   two vectors at a time, narrowed to bfloat16 by one instruction             3.3 / 9.7
//   the groups' statistics finished together, no division for each             3.1 / 5.5
// The units that do vector arithmetic are busy for 2.8 of the 3.1: SiLU 1.9 (the reciprocal alone 0.5), narrowing 0.3,
// statistics 0.6. In float32 it is 4.0 from the second cache, and memory decides beyond it.
#include <cstring>

#include "cpu/group_norm.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

constexpr Index kGrain = 16384;  // below 3 us of work, waking a thread takes as long

// ------------------------------------------------------------------------------------------------------- statistics
//
// One sweep, in which each lane sums the deviations of its values from a pivot, and their squares. The pivot is the
// lane's first value, and then the mean of the lane's values whenever their number has doubled. So the squares never
// cancel: what is taken from them for the sum is at most half of them (of the first tile, 15/16), wherever the values
// lie. Values that are large beside their deviations lose nothing, since such a difference from the pivot is exact, and
// equal values give 0. That is 3 operations a value, against 2 sweeps of 1 and 2; the merge of Chan, Golub and LeVeque
// (1983) with each tile's mean, tried first, was no faster, and 4 times less accurate for x = 30 + 0.001 randn, because
// that mean was rounded.

constexpr int kTile = kVectorSize == 64 ? 16 : 8;  // values of a lane that are taken in together

template <class V, int count>
DDPM_FAST_INLINE V tree_sum(const V* values) {
  if constexpr (count == 1) {
    return values[0];
  } else {
    return tree_sum<V, count / 2>(values) + tree_sum<V, count / 2>(values + count / 2);
  }
}

// Lanes of sums of x - pivot and (x - pivot)^2.
template <class V>
struct Moments {
  V pivot, sum, squares;
};

// Takes in `count` values a lane after `seen`.
template <class V, int count>
DDPM_FAST_INLINE void absorb(Moments<V>& state, Index seen, V (&values)[count]) {
  using Real = std::remove_reference_t<decltype(V{}[0])>;
  if (seen == 0) state = {values[0], V{}, V{}};
  V squares[2] = {};
  for (int i = 0; i < count; ++i) {
    values[i] -= state.pivot;
    squares[i % 2] = fma(values[i], values[i], squares[i % 2]);
  }
  state.sum += tree_sum<V, count>(values);
  state.squares += squares[0] + squares[1];
  const Index now = seen + count;
  if ((now & (now - 1)) == 0) {
    const Real n = static_cast<Real>(now);
    const V pivot = state.pivot + state.sum * (1 / n), step = pivot - state.pivot, left = state.sum - step * n;
    state = {pivot, left, state.squares - step * (state.sum + left)};
  }
}

// Mean, sum of squared deviations from it, and number of values.
struct Statistics {
  double mean, m2, count;
};

// Of `parts` lanes that have taken in `each` values.
template <class Real>
DDPM_FAST_INLINE Statistics merge(const Real* pivot, const Real* sum, const Real* squares, Index parts, Index each) {
  const double share = 1 / static_cast<double>(each);
  const auto lane_mean = [=](Index i) { return pivot[i] + share * sum[i]; };
  double total = 0, between = 0, within = 0;
#pragma omp simd reduction(+ : total)
  for (Index i = 0; i < parts; ++i) total += lane_mean(i);
  const double mean = total / static_cast<double>(parts);
#pragma omp simd reduction(+ : between, within)
  for (Index i = 0; i < parts; ++i) {
    const double delta = lane_mean(i) - mean, s = sum[i];
    between += delta * delta;
    within += squares[i] - share * s * s;
  }
  return {mean, within + static_cast<double>(each) * between, static_cast<double>(parts * each)};
}

inline Statistics merge(const Statistics& a, const Statistics& b) {
  const double count = a.count + b.count, delta = b.mean - a.mean;
  return {a.mean + delta * (b.count / count), a.m2 + b.m2 + delta * delta * (a.count * b.count / count), count};
}

// Calls body(row, integral_constant<int, rows>) over `rows` rows: tiles of kTile, then of 8, 4, 2 and 1.
template <int tile = kTile, class Body>
DDPM_FAST_INLINE void over_tiles(Index row, Index rows, Body body) {
  for (; row + tile <= rows; row += tile) body(row, std::integral_constant<int, tile>{});
  if constexpr (tile > 1) over_tiles<tile / 2>(row, rows, body);
}

// Of `count` neighbours in memory.
template <class T>
DDPM_FAST_NOINLINE Statistics statistics_of(const T* x, Index count) {
  using Real = RealOf<T>;
  using V = Vector<T>;
  constexpr int kLanes = kWidth<T>;
  const Index rows = count / kLanes;
  Moments<V> state{};
  over_tiles(0, rows, [&](Index row, auto tile_rows) {
    V tile[tile_rows()];
    for (int i = 0; i < tile_rows(); ++i) tile[i] = load(x + (row + i) * kLanes);
    absorb(state, row, tile);
  });
  Statistics all{};
  if (rows > 0) {
    Real lanes[3][kLanes];
    std::memcpy(lanes, &state, sizeof(state));
    all = merge<Real>(lanes[0], lanes[1], lanes[2], kLanes, rows);
  }
  if (const int left = static_cast<int>(count - rows * kLanes); left > 0) {
    Real lanes[kLanes];
    const Real none[kLanes] = {};
    store(lanes, load(x + rows * kLanes, left));
    const Statistics tail = merge<Real>(lanes, none, none, left, 1);
    all = rows > 0 ? merge(all, tail) : tail;
  }
  return all;
}

// Sums of each of `channels` channels of x [hw, row_stride].
template <class T>
DDPM_FAST_NOINLINE void channel_moments(const T* x, Index hw, Index row_stride, Index channels, RealOf<T>* pivot,
                                        RealOf<T>* sum, RealOf<T>* squares) {
  using V = Vector<T>;
  over_tiles(0, hw, [&](Index row, auto tile_rows) {
    const auto column = [&](Index i, auto partial, int lanes) {
      V tile[tile_rows()];
      for (int r = 0; r < tile_rows(); ++r) {
        const T* from = x + (row + r) * row_stride + i;
        __builtin_prefetch(from + tile_rows() * row_stride);
        tile[r] = load<partial()>(from, lanes);
      }
      Moments<V> state = {load(pivot + i), load(sum + i), load(squares + i)};
      absorb(state, row, tile);
      store(pivot + i, state.pivot);
      store(sum + i, state.sum);
      store(squares + i, state.squares);
    };
    Index i = 0;
    for (; i + kWidth<T> <= channels; i += kWidth<T>) column(i, std::false_type{}, 0);
    if (i < channels) column(i, std::true_type{}, static_cast<int>(channels - i));
  });
}

// ------------------------------------------------------------------------------------------------------------ apply

// `count` neighbours of one channel.
template <class T, bool silu_, class Source>
DDPM_FAST_INLINE void apply_channel(T* y, const Source* x, Index count, RealOf<T> center, RealOf<T> slope,
                                    RealOf<T> intercept) {
  using V = Vector<T>;
  const V c = broadcast(center), s = broadcast(slope), b = broadcast(intercept);
  Index i = 0;
  for (; i + 2 * kWidth<T> <= count; i += 2 * kWidth<T>) {
    store(y + i, apply<T, silu_>(load(x + i), c, s, b), apply<T, silu_>(load(x + i + kWidth<T>), c, s, b));
  }
  for (; i + kWidth<T> <= count; i += kWidth<T>) store(y + i, apply<T, silu_>(load(x + i), c, s, b));
  if (const int left = static_cast<int>(count - i); left > 0) {
    store(y + i, apply<T, silu_>(load(x + i, left), c, s, b), left);
  }
}

// Two vectors of channels over `rows` rows.
template <class T, bool silu_>
DDPM_FAST_INLINE void apply_row_pairs(T* y, const T* x, Index rows, Index row_stride, const RealOf<T>* center,
                                      const RealOf<T>* slope, const RealOf<T>* intercept) {
  constexpr int kNext = kWidth<T>;
  const Vector<T> c0 = load(center), s0 = load(slope), b0 = load(intercept);
  const Vector<T> c1 = load(center + kNext), s1 = load(slope + kNext), b1 = load(intercept + kNext);
  for (Index i = 0; i < rows; ++i, x += row_stride, y += row_stride) {
    store(y, apply<T, silu_>(load(x), c0, s0, b0), apply<T, silu_>(load(x + kNext), c1, s1, b1));
  }
}

// One vector of channels over `rows` rows.
template <bool partial, class T, bool silu_>
DDPM_FAST_INLINE void apply_rows(T* y, const T* x, Index rows, Index row_stride, int lanes, const RealOf<T>* center,
                                 const RealOf<T>* slope, const RealOf<T>* intercept) {
  const Vector<T> c = load(center), s = load(slope), b = load(intercept);
  for (Index i = 0; i < rows; ++i) {
    const Vector<T> value = apply<T, silu_>(load<partial>(x + i * row_stride, lanes), c, s, b);
    store<partial>(y + i * row_stride, value, lanes);
  }
}

// ---------------------------------------------------------------------------------------------------------- a slice

inline float reciprocal_root(float v) { return 1 / __builtin_sqrtf(v); }
inline double reciprocal_root(double v) { return 1 / __builtin_sqrt(v); }

template <class T>
struct Forward {
  using Real = RealOf<T>;

  const GroupNormSiluArgs& a;
  const Slice& slice;
  const GroupNormAffineArgs* affine;  // coefficients to write instead of y; may be absent
  const Index hw = a.shape.hw, group_channels = a.shape.c / a.num_groups;
  const Real* shift = nullptr;              // the input, or none
  Real *gain, *offset, *slope, *intercept;  // one value a channel of the slice
  Real* center;
  double* mean;    // of a group
  Real* variance;  // of a group; then rstd

  Forward(const GroupNormSiluArgs& args, const Slice& the_slice, const GroupNormAffineArgs* the_affine = nullptr)
      : a(args), slice(the_slice), affine(the_affine) {
    const Index channels = slice.channels, group_size = group_channels * hw;
    const Index batch = groups_in_batch(slice.groups, group_size);
    const bool shifted_copy = a.shift.data != nullptr && !a.shape.channels_last;
    // Moments of a skip connection end up to a vector later: they begin where those of x end, within one.
    const Index moment_channels = channels + kWidth<T>;
    const Index extra = a.shape.channels_last ? Room::bytes<double>(channels) + 3 * Room::bytes<Real>(moment_channels)
                                              : Room::bytes<Real>(shifted_copy ? batch * group_size : 0);
    Room room(RoomFor::kSlice, 6 * Room::bytes<Real>(channels) + 2 * Room::bytes<double>(slice.groups) + extra);
    for (Real** piece : {&gain, &offset, &slope, &intercept, &center}) *piece = room.take<Real>(channels);
    mean = room.take<double>(slice.groups);
    variance = room.take<Real>(slice.groups);
    load_inputs(room.take<Real>(channels));
    if (a.shape.channels_last) {
      double* channel_mean = room.take<double>(channels);
      Real *pivot = room.take<Real>(moment_channels), *sum = room.take<Real>(moment_channels);
      Real* squares = room.take<Real>(moment_channels);
      moments(pivot, sum, squares);
      merge_channels(channel_mean, pivot, sum, squares);
      finish(0, slice.groups, shift);
      if (affine != nullptr) {
        write_affine();
      } else {
        a.silu ? apply_channels_last<true>() : apply_channels_last<false>();
      }
    } else {
      Real* shifted = shifted_copy ? room.take<Real>(batch * group_size) : nullptr;
      for (Index first = 0; first < slice.groups; first += batch) {
        contiguous(first, smaller(batch, slice.groups - first), shifted);
      }
    }
  }

  //   gain   = weight (1 + scale)
  //   offset = bias (1 + scale) + scale_shift
  //   y      = act(x_hat gain + offset)
  void load_inputs(Real* room_for_shift) {
    const Index channels = slice.channels, row = slice.sample * a.shape.c + slice.first_channel;
    widen_input<Real>(a.weight, slice.first_channel, channels, 1, gain);
    widen_input<Real>(a.bias, slice.first_channel, channels, 0, offset);
    if (a.shift.data != nullptr) {
      widen_input<Real>(a.shift, row, channels, 0, room_for_shift);
      shift = room_for_shift;
    }
    if (a.scale.data != nullptr || a.scale_shift.data != nullptr) {
      widen_input<Real>(a.scale, row, channels, 0, slope);
      widen_input<Real>(a.scale_shift, row, channels, 0, intercept);
      for (Index i = 0; i < channels; ++i) {
        gain[i] *= 1 + slope[i];
        offset[i] = offset[i] * (1 + slope[i]) + intercept[i];
      }
    }
  }

  // From mean and variance of groups first .. first + groups - 1: what is saved, and center, slope and intercept of
  // their channels. `added`: to x when it is read for the statistics only.
  void finish(Index first, Index groups, const Real* added) {
    const Index at = slice.sample * a.num_groups + slice.first_group;
    const Real factor = a.silu ? static_cast<Real>(kNegLog2EDouble) : 1, eps = static_cast<Real>(a.eps);
    for (Index g = first; g < first + groups; ++g) {
      variance[g] = reciprocal_root(variance[g] + eps);
      if (a.mean == nullptr) continue;
      static_cast<Real*>(a.mean)[at + g] = static_cast<Real>(mean[g]);
      static_cast<Real*>(a.rstd)[at + g] = variance[g];
    }
    for (Index g = first; g < first + groups; ++g) {
      const Real rstd = variance[g], rounded = static_cast<Real>(mean[g]), rest = static_cast<Real>(mean[g] - rounded);
      for (Index i = g * group_channels; i < (g + 1) * group_channels; ++i) {
        const Real step = gain[i] * rstd;
        slope[i] = step * factor;
        center[i] = rounded;
        intercept[i] = (offset[i] - rest * step) * factor;
      }
      if (added == nullptr) continue;
      for (Index i = g * group_channels; i < (g + 1) * group_channels; ++i) {
        const double exact = mean[g] - added[i];
        center[i] = static_cast<Real>(exact);
        intercept[i] = (offset[i] - static_cast<Real>(exact - center[i]) * (gain[i] * rstd)) * factor;
      }
    }
  }

  void contiguous(Index first_group, Index groups, Real* shifted) {
    const Index first = first_group * group_channels, channels = groups * group_channels;
    const Index start = (slice.sample * a.shape.c + slice.first_channel + first) * hw;
    const T* x = static_cast<const T*>(a.x) + start;
    T* y = static_cast<T*>(a.y) + start;
    if (shifted == nullptr) {
      contiguous(first_group, groups, x, y);
    } else {
      for (Index i = 0; i < channels; ++i) add(shifted + i * hw, x + i * hw, shift[first + i]);
      contiguous(first_group, groups, shifted, y);
    }
  }
  template <class Source>
  void contiguous(Index first_group, Index groups, const Source* x, T* y) {
    const Index group_size = group_channels * hw;
    const double share = 1 / static_cast<double>(group_size);
    for (Index g = 0; g < groups; ++g) {
      const Statistics statistics = statistics_of(x + g * group_size, group_size);
      mean[first_group + g] = statistics.mean;
      variance[first_group + g] = static_cast<Real>(statistics.m2 * share);
    }
    finish(first_group, groups, nullptr);
    const Index first = first_group * group_channels, channels = groups * group_channels;
    a.silu ? apply_channels<true>(first, channels, x, y) : apply_channels<false>(first, channels, x, y);
  }
  template <bool silu_, class Source>
  void apply_channels(Index first, Index channels, const Source* x, T* y) {
    for (Index i = 0; i < channels; ++i) {
      apply_channel<T, silu_>(y + i * hw, x + i * hw, hw, center[first + i], slope[first + i], intercept[first + i]);
    }
  }
  void add(Real* to, const T* x, Real value) {
    Index i = 0;
    for (; i + kWidth<T> <= hw; i += kWidth<T>) store(to + i, load(x + i) + value);
    if (const int left = static_cast<int>(hw - i); left > 0) store(to + i, load(x + i, left) + value, left);
  }

  // Of the channels of a channels_last slice, those of x and those of skip.
  void moments(Real* pivot, Real* sum, Real* squares) {
    const Index skip_channels = affine == nullptr ? 0 : affine->skip_channels, channels = a.shape.c - skip_channels;
    const Index first = slice.first_channel, end = first + slice.channels, seam = smaller(larger(first, channels), end);
    const Index row = slice.sample * hw;
    if (first < seam) {
      channel_moments(static_cast<const T*>(a.x) + row * channels + first, hw, channels, seam - first, pivot, sum,
                      squares);
    }
    if (seam < end) {
      const Index done = seam - first;
      channel_moments(static_cast<const T*>(affine->skip) + row * skip_channels + seam - channels, hw, skip_channels,
                      end - seam, pivot + done, sum + done, squares + done);
    }
  }

  void write_affine() {
    if constexpr (std::is_same_v<Real, float>) {
      float* to = affine->affine + slice.sample * 3 * a.shape.c + slice.first_channel;
      for (const Real* from : {center, slope, intercept}) {
        std::memcpy(to, from, static_cast<std::size_t>(slice.channels) * sizeof(float));
        to += a.shape.c;
      }
    }
  }

  template <bool silu_>
  void apply_channels_last() {
    const Index stride = a.shape.c, start = slice.sample * hw * stride + slice.first_channel;
    const T* x = static_cast<const T*>(a.x) + start;
    T* y = static_cast<T*>(a.y) + start;
    for (Index row = 0; row < hw; row += kTile) {
      const Index rows = smaller(kTile, hw - row);
      Index i = 0;
      for (; i + 2 * kWidth<T> <= slice.channels; i += 2 * kWidth<T>) {
        apply_row_pairs<T, silu_>(y + row * stride + i, x + row * stride + i, rows, stride, center + i, slope + i,
                                  intercept + i);
      }
      for (; i + kWidth<T> <= slice.channels; i += kWidth<T>) {
        apply_rows<false, T, silu_>(y + row * stride + i, x + row * stride + i, rows, stride, 0, center + i, slope + i,
                                    intercept + i);
      }
      if (i < slice.channels) {
        apply_rows<true, T, silu_>(y + row * stride + i, x + row * stride + i, rows, stride,
                                   static_cast<int>(slice.channels - i), center + i, slope + i, intercept + i);
      }
    }
  }

  // Mean and variance of the groups, from the sums of their channels.
  void merge_channels(double* channel_mean, const Real* pivot, const Real* sum, const Real* squares) {
    const double n = static_cast<double>(hw), share = 1 / n, channel_share = 1 / static_cast<double>(group_channels);
    for (Index i = 0; i < slice.channels; ++i) channel_mean[i] = pivot[i] + share * sum[i];
    if (shift != nullptr) {
      for (Index i = 0; i < slice.channels; ++i) channel_mean[i] += shift[i];
    }
    for (Index g = 0; g < slice.groups; ++g) {
      const Index first = g * group_channels, end = first + group_channels;
      double total = 0, between = 0, within = 0;
      for (Index i = first; i < end; ++i) total += channel_mean[i];
      mean[g] = total * channel_share;
      for (Index i = first; i < end; ++i) {
        const double delta = channel_mean[i] - mean[g], s = sum[i];
        between += delta * delta;
        within += squares[i] - share * s * s;
      }
      variance[g] = static_cast<Real>((within * share + between) * channel_share);
    }
  }
};

}  // namespace

void group_norm_silu(const GroupNormSiluArgs& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    GroupNormSiluArgs a = args;
    if (a.shape.hw == 1) a.shape.channels_last = true;  // the same memory, and vectors across channels
    const Cut cut(a.shape, a.num_groups, sizeof(T), 2 * sizeof(T), a.stream_or_threads.threads());
    cut.run(a.shape, a.num_groups, kGrain, a.stream_or_threads.threads(),
            [&](const Slice& slice) { Forward<T>(a, slice); });
  });
}

void group_norm_affine(const GroupNormAffineArgs& args) {
  GroupNormSiluArgs a{};
  a.dtype = args.dtype;
  a.x = args.x;
  a.weight = args.weight, a.bias = args.bias;
  a.shift = args.shift, a.scale = args.scale, a.scale_shift = args.scale_shift;
  a.shape = {args.n, args.channels + args.skip_channels, args.hw, true};
  a.num_groups = args.num_groups;
  a.eps = args.eps;
  const int threads = args.stream_or_threads.threads();
  with_conv_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const Cut cut(a.shape, a.num_groups, sizeof(T), sizeof(T), threads);
    cut.run(a.shape, a.num_groups, kGrain, threads, [&](const Slice& slice) { Forward<T>(a, slice, &args); });
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
