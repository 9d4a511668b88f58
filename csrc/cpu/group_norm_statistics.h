// Mean and variance of groups, in one sweep.
//
// Each lane sums the deviations of its values from a pivot, and their squares. The pivot is the first value of the
// lane. It becomes the mean of the lane whenever the number of values has doubled. So the squares never cancel: the
// correction by the sum takes at most half of them, or 15/16 in the first tile. Deviations from the pivot are exact if
// the values are large beside them, and equal values give 0.
//
// The sweep takes 3 operations per value. Two sweeps, for mean and deviations, would take 1 and 2. The merge of Chan,
// Golub and LeVeque (1983) with the mean of each tile was no faster, and 4 times less accurate for
//   x = 30 + 0.001 randn
// because that mean was rounded.
#pragma once

#include <cstring>

#include "cpu/group_norm.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int kTile = kVectorSize == 64 ? 16 : 8;  // values of a lane that are added together

template <class V, int count>
DDPM_FAST_INLINE V tree_sum(const V* values) {
  if constexpr (count == 1) {
    return values[0];
  } else {
    return tree_sum<V, count / 2>(values) + tree_sum<V, count / 2>(values + count / 2);
  }
}

// Per lane, the sums of x - pivot and of (x - pivot)^2.
template <class V>
struct Moments {
  V pivot, sum, squares;
};

// Adds `count` values per lane. The lane has `seen` values already.
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

// m2 is the sum of squared deviations from the mean.
struct Statistics {
  double mean, m2, count;
};

// Merges `parts` lanes of `each` values.
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

// Calls body(row, integral_constant<int, rows>) for tiles of kTile rows, then of 8, 4, 2 and 1.
template <int tile = kTile, class Body>
DDPM_FAST_INLINE void over_tiles(Index row, Index rows, Body body) {
  for (; row + tile <= rows; row += tile) body(row, std::integral_constant<int, tile>{});
  if constexpr (tile > 1) over_tiles<tile / 2>(row, rows, body);
}

// Returns the statistics of `count` neighbours in memory.
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

// Computes the moments of each of `channels` channels of x [hw, row_stride].
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

// The values of a slice of groups.
template <class Real>
struct SliceValues {
  Real *gain, *offset, *slope, *intercept, *center, *shift;  // per channel
  double* mean;                                              // per group
  Real* variance;                                            // per group; then rstd
};

template <class Real>
Index bytes_of_values(const Slice& slice) {
  return 6 * Scratch::bytes<Real>(slice.channels) + 2 * Scratch::bytes<double>(slice.groups);
}

template <class Real>
SliceValues<Real> take_values(Scratch& scratch, const Slice& slice) {
  SliceValues<Real> values;
  for (Real** piece : {&values.gain, &values.offset, &values.slope, &values.intercept, &values.center, &values.shift}) {
    *piece = scratch.take<Real>(slice.channels);
  }
  values.mean = scratch.take<double>(slice.groups);
  values.variance = scratch.take<Real>(slice.groups);
  return values;
}

// Computes gain and offset, and reads shift:
//   gain   = weight (1 + scale)
//   offset = bias (1 + scale) + scale_shift
//   y      = act(x_hat gain + offset)
template <class Real>
void load_inputs(const GroupNormSiluArgs& a, const Slice& slice, const SliceValues<Real>& values) {
  const Index channels = slice.channels, row = slice.sample * a.shape.c + slice.first_channel;
  Real *gain = values.gain, *offset = values.offset;
  widen_input<Real>(a.weight, slice.first_channel, channels, 1, gain);
  widen_input<Real>(a.bias, slice.first_channel, channels, 0, offset);
  if (a.shift.data != nullptr) widen_input<Real>(a.shift, row, channels, 0, values.shift);
  if (a.scale.data == nullptr && a.scale_shift.data == nullptr) return;
  Real *scale = values.slope, *scale_shift = values.intercept;  // buffers that are free until finish_groups
  widen_input<Real>(a.scale, row, channels, 0, scale);
  widen_input<Real>(a.scale_shift, row, channels, 0, scale_shift);
  for (Index i = 0; i < channels; ++i) {
    gain[i] *= 1 + scale[i];
    offset[i] = offset[i] * (1 + scale[i]) + scale_shift[i];
  }
}

inline float reciprocal_root(float v) { return 1 / __builtin_sqrtf(v); }
inline double reciprocal_root(double v) { return 1 / __builtin_sqrt(v); }

// Computes rstd, center, slope and intercept from the mean and variance of groups first .. first + groups - 1, and
// saves mean and rstd. With SiLU, slope and intercept include the factor of silu.h.
//
// added: the shift, if the mean includes it and x does not; or null.
template <class Real>
void finish_groups(const GroupNormSiluArgs& a, const Slice& slice, const SliceValues<Real>& values, Index first,
                   Index groups, const Real* added) {
  const Index at = slice.sample * a.num_groups + slice.first_group, group_channels = a.shape.c / a.num_groups;
  const Real factor = a.silu ? static_cast<Real>(kNegLog2EDouble) : 1, eps = static_cast<Real>(a.eps);
  const Real *gain = values.gain, *offset = values.offset;
  Real *slope = values.slope, *intercept = values.intercept, *center = values.center;
  const double* mean = values.mean;
  for (Index g = first; g < first + groups; ++g) {
    values.variance[g] = reciprocal_root(values.variance[g] + eps);
    if (a.mean == nullptr) continue;
    static_cast<Real*>(a.mean)[at + g] = static_cast<Real>(mean[g]);
    static_cast<Real*>(a.rstd)[at + g] = values.variance[g];
  }
  for (Index g = first; g < first + groups; ++g) {
    const Real rstd = values.variance[g], rounded = static_cast<Real>(mean[g]);
    const Real rest = static_cast<Real>(mean[g] - rounded);
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

// ------------------------------------------------------------------------------------------------------ channels_last

// The moments of each channel of a slice.
template <class Real>
struct ChannelMoments {
  double* mean;
  Real *pivot, *sum, *squares;
};

// Moments of skip begin within a vector of those of x. So they may end up to one vector later.
template <class Real>
Index moment_channels(const Slice& slice) {
  return slice.channels + kWidth<Real>;
}

template <class Real>
Index bytes_of_moments(const Slice& slice) {
  return Scratch::bytes<double>(slice.channels) + 3 * Scratch::bytes<Real>(moment_channels<Real>(slice));
}

template <class Real>
ChannelMoments<Real> take_moments(Scratch& scratch, const Slice& slice) {
  ChannelMoments<Real> moments;
  moments.mean = scratch.take<double>(slice.channels);
  for (Real** piece : {&moments.pivot, &moments.sum, &moments.squares}) {
    *piece = scratch.take<Real>(moment_channels<Real>(slice));
  }
  return moments;
}

// Merges channels to groups. shift: added to x; or null.
template <class Real>
void merge_channels(const ChannelMoments<Real>& moments, const Slice& slice, Index hw, Index group_channels,
                    const Real* shift, const SliceValues<Real>& values) {
  const double n = static_cast<double>(hw), share = 1 / n, channel_share = 1 / static_cast<double>(group_channels);
  const Real *pivot = moments.pivot, *sum = moments.sum, *squares = moments.squares;
  double *channel_mean = moments.mean, *mean = values.mean;
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
    values.variance[g] = static_cast<Real>((within * share + between) * channel_share);
  }
}

// Computes the affine coefficients of a channels_last slice of x and skip.
template <class T>
void channels_last_coefficients(const GroupNormSiluArgs& a, const void* skip, Index skip_channels, const Slice& slice,
                                const SliceValues<RealOf<T>>& values, const ChannelMoments<RealOf<T>>& moments) {
  using Real = RealOf<T>;
  load_inputs(a, slice, values);
  const Index hw = a.shape.hw, row = slice.sample * hw, x_channels = a.shape.c - skip_channels;
  const Index first = slice.first_channel, end = first + slice.channels, seam = smaller(larger(first, x_channels), end);
  if (first < seam) {
    channel_moments(static_cast<const T*>(a.x) + row * x_channels + first, hw, x_channels, seam - first, moments.pivot,
                    moments.sum, moments.squares);
  }
  if (seam < end) {
    const Index done = seam - first;
    channel_moments(static_cast<const T*>(skip) + row * skip_channels + seam - x_channels, hw, skip_channels,
                    end - seam, moments.pivot + done, moments.sum + done, moments.squares + done);
  }
  const Real* shift = a.shift.data == nullptr ? nullptr : values.shift;
  merge_channels(moments, slice, hw, a.shape.c / a.num_groups, shift, values);
  finish_groups(a, slice, values, 0, slice.groups, shift);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
