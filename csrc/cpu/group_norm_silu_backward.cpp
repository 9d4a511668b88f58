// The gradients of group_norm_silu.
//
// The forward pass:
//   h      = x + shift
//   x_hat  = (h - mean) rstd
//   gain   = weight (1 + scale)
//   offset = bias (1 + scale) + scale_shift
//   t      = x_hat gain + offset
//   y      = act(t)
// The backward pass, with g = dy act'(t):
//   S1 = sum of g, for each sample and channel
//   S2 = sum of g x_hat, for each sample and channel
//   m1 = (sum of gain S1 over the group's channels) / (number of the group's values)
//   m2 = (sum of gain S2 over the group's channels) / (number of the group's values)
//   dx           = rstd (gain g - m1 - x_hat m2)
//   dshift       = sum of dx
//   dscale       = weight S2 + bias S1
//   dscale_shift = S1
//   dweight      = sum over samples of (1 + scale) S2
//   dbias        = sum over samples of (1 + scale) S1
// A thread takes a slice as in the forward pass. The first sweep computes S1 and S2. It stores g in float32 if g fits in
// cache, because computing it again costs more than writing and reading it. The second sweep computes dx.
#include "cpu/group_norm.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

constexpr Index kBackwardGrain = 8192;  // elements worth a thread: below 3 us of work, waking it takes as long
constexpr Index kKeptBytes = 1 << 20;   // g of a larger slice is computed again
constexpr Index kBlock = 16;            // values that a lane adds up before they join the sum of the others

// The values of a slice: one per channel.
//   dx = g p + (x + shift - center) q + r
template <class T>
struct BackwardSlice {
  using Real = RealOf<T>;

  const Real *mean, *rstd;  // one per group
  Index groups, channels, group_channels, hw;
  Index stride;  // elements from pixel to pixel in channels_last
  Real *weight, *bias, *scale_1, *gain, *shift, *center, *slope, *intercept, *s1, *s2, *s3, *dx_sum, *p, *q, *r;
};

template <class T>
BackwardSlice<T> take_values(const GroupNormSiluBackwardArgs& a, const Slice& slice, Scratch& scratch) {
  using Real = RealOf<T>;
  BackwardSlice<T> values;
  const Index at = slice.sample * a.num_groups + slice.first_group;
  values.mean = static_cast<const Real*>(a.mean) + at;
  values.rstd = static_cast<const Real*>(a.rstd) + at;
  values.groups = slice.groups;
  values.channels = slice.channels;
  values.group_channels = a.shape.c / a.num_groups;
  values.hw = a.shape.hw;
  values.stride = a.shape.c;
  for (Real** piece :
       {&values.weight, &values.bias, &values.scale_1, &values.gain, &values.shift, &values.center, &values.slope,
        &values.intercept, &values.s1, &values.s2, &values.s3, &values.dx_sum, &values.p, &values.q, &values.r}) {
    *piece = scratch.take<Real>(slice.channels);
  }
  return values;
}

template <class T>
void load_inputs(const GroupNormSiluBackwardArgs& a, const Slice& slice, const BackwardSlice<T>& values) {
  using Real = RealOf<T>;
  const Index channels = slice.channels, first = slice.first_channel, row = slice.sample * a.shape.c + first;
  widen_input<Real>(a.weight, first, channels, 1, values.weight);
  widen_input<Real>(a.bias, first, channels, 0, values.bias);
  widen_input<Real>(a.scale, row, channels, 0, values.scale_1);
  widen_input<Real>(a.shift, row, channels, 0, values.shift);
  widen_input<Real>(a.scale_shift, row, channels, 0, values.intercept);
  const Real factor = a.silu ? static_cast<Real>(kNegLog2EDouble) : 1;  // see silu.h
  const Index group_channels = values.group_channels;
  for (Index group = 0; group < slice.groups; ++group) {
    const Real mean = values.mean[group], rstd = values.rstd[group];
    for (Index i = group * group_channels; i < (group + 1) * group_channels; ++i) {
      values.scale_1[i] += 1;
      values.gain[i] = values.weight[i] * values.scale_1[i];
      values.center[i] = mean;
      values.slope[i] = values.gain[i] * rstd * factor;
      values.intercept[i] = (values.bias[i] * values.scale_1[i] + values.intercept[i]) * factor;
    }
  }
}

// Returns dL/dt.
template <class T, bool silu_>
DDPM_FAST_INLINE Vector<T> gradient(Vector<T> dy, Vector<T> deviation, Vector<T> slope, Vector<T> intercept) {
  if constexpr (silu_) return dy * silu_derivative(fma(deviation, slope, intercept));
  return dy;
}

// Computes S2, p, q and r from the sums of a group's channels, with d = x + shift - center:
//   s1 = sum of g
//   s2 = sum of g d
//   s3 = sum of d
// The saved mean is rounded. s3 measures that error, which is large if the mean is large beside the deviations, and
// corrects what follows from d.
template <class T>
DDPM_FAST_NOINLINE void finish_group(const BackwardSlice<T>& values, Index group) {
  using Real = RealOf<T>;
  const Index hw = values.hw, group_channels = values.group_channels;
  Real *s1 = values.s1, *s2 = values.s2, *s3 = values.s3, *gain = values.gain;
  const Real rstd = hw == 0 ? 0 : values.rstd[group];  // NaN without values, and every sum is 0
  const Index first = group * group_channels, end = first + group_channels;
  const bool alone = group_channels * hw == 1;  // the only value of a group does not change y
  const double share = hw == 0 ? 0 : 1 / static_cast<double>(group_channels * hw);
  double m0 = 0, m1 = 0, m2 = 0;
  for (Index i = first; i < end; ++i) m0 += s3[i];
  m0 *= share;
  for (Index i = first; i < end; ++i) {
    s2[i] = static_cast<Real>((s2[i] - m0 * s1[i]) * rstd);
    m1 += static_cast<double>(gain[i]) * s1[i];
    m2 += static_cast<double>(gain[i]) * s2[i];
  }
  const double slope_of_d = -m2 * share * rstd * rstd;
  const Real q_group = static_cast<Real>(slope_of_d), r_group = static_cast<Real>(-m1 * share * rstd - slope_of_d * m0);
  for (Index i = first; i < end; ++i) {
    values.p[i] = alone ? 0 : gain[i] * rstd;
    values.q[i] = alone ? 0 : q_group;
    values.r[i] = alone ? 0 : r_group;
  }
}

// Writes the gradients of the small inputs. sum_1 and sum_2, [n, c], receive (1 + scale) S1 and (1 + scale) S2, unless
// they are null.
template <class T>
void save(const GroupNormSiluBackwardArgs& a, const Slice& slice, const BackwardSlice<T>& values, RealOf<T>* sum_1,
          RealOf<T>* sum_2) {
  using Real = RealOf<T>;
  const Index channels = slice.channels, at = slice.sample * a.shape.c + slice.first_channel;
  const auto copy = [&](const Real* from, void* to) {
    std::memcpy(static_cast<Real*>(to) + at, from, channels * sizeof(Real));
  };
  if (a.grad_shift != nullptr) {
    if (values.group_channels == 1) {  // a shift of a whole group does not change y
      for (Index i = 0; i < channels; ++i) values.dx_sum[i] = 0;
    }
    copy(values.dx_sum, a.grad_shift);
  }
  if (a.grad_scale_shift != nullptr) copy(values.s1, a.grad_scale_shift);
  if (a.grad_scale != nullptr) {
    Real* dscale = static_cast<Real*>(a.grad_scale) + at;
    for (Index i = 0; i < channels; ++i) dscale[i] = values.weight[i] * values.s2[i] + values.bias[i] * values.s1[i];
  }
  if (sum_1 != nullptr) {
    for (Index i = 0; i < channels; ++i) {
      sum_1[at + i] = values.scale_1[i] * values.s1[i];
      sum_2[at + i] = values.scale_1[i] * values.s2[i];
    }
  }
}

// ------------------------------------------------------------------------------------------------------- contiguous

// Calls body(channel, sums) for channels first .. end - 1, and stores the sums of the lanes of sums[0], ... in to...
// The lanes of a vector of channels are summed together, which takes 3 operations per channel instead of a dozen.
template <class T, class Body, class... To>
void over_channels(Index first, Index end, Body body, To... to) {
  using Real = RealOf<T>;
  using V = Vector<T>;
  constexpr int kLanes = kWidth<T>, kSums = sizeof...(to);
  for (Index i = first; i < end; i += kLanes) {
    const int count = static_cast<int>(smaller(kLanes, end - i));
    V lanes[kSums][kLanes];
    for (int j = 0; j < count; ++j) {
      V sums[kSums];
      body(i + j, sums);
      for (int k = 0; k < kSums; ++k) lanes[k][j] = sums[k];
    }
    for (int j = count; j < kLanes; ++j) {
      for (int k = 0; k < kSums; ++k) lanes[k][j] = V{};
    }
    int k = 0;
    (store(to + i, sums_of_lanes<Real>(lanes[k++]), count), ...);
  }
}

// Runs step(i, partial, lanes, block) over the `hw` values of a channel. It adds to block[0], ... The results are the
// sums of the blocks.
template <class T, int count, class Step>
DDPM_FAST_INLINE void over_values(Index hw, Vector<T>* sums, Step step) {
  using V = Vector<T>;
  constexpr int kLanes = kWidth<T>;
  for (int k = 0; k < count; ++k) sums[k] = V{};
  Index i = 0;
  while (i + kLanes <= hw) {
    const Index end = smaller(hw - kLanes + 1, i + kBlock * kLanes);
    V block[count] = {};
    for (; i < end; i += kLanes) step(i, std::false_type{}, 0, block);
    for (int k = 0; k < count; ++k) sums[k] += block[k];
  }
  if (i < hw) step(i, std::true_type{}, static_cast<int>(hw - i), sums);
}

template <bool silu_, bool keep, class T>
DDPM_FAST_INLINE void sum_channel(const BackwardSlice<T>& values, const T* x, const T* dy, RealOf<T>* kept,
                                  Index channel, Vector<T>* sums) {
  using V = Vector<T>;
  const V h = broadcast(values.shift[channel]), c = broadcast(values.center[channel]);
  const V s = broadcast(values.slope[channel]), b = broadcast(values.intercept[channel]);
  over_values<T, 3>(values.hw, sums, [&](Index i, auto partial, int lanes, V* block) {
    V deviation = load<partial()>(x + i, lanes) + h - c;
    if constexpr (partial()) deviation = first_lanes<T>(deviation, lanes);
    const V g = gradient<T, silu_>(load<partial()>(dy + i, lanes), deviation, s, b);
    if constexpr (keep) store<partial()>(kept + i, g, lanes);
    block[0] += g;
    block[1] = fma(g, deviation, block[1]);
    block[2] += deviation;
  });
}

// sums[0] is the sum of dx before it is rounded.
template <bool silu_, bool keep, class T>
DDPM_FAST_INLINE void dx_channel(const BackwardSlice<T>& values, const T* x, const T* dy, T* dx, const RealOf<T>* kept,
                                 Index channel, Vector<T>* sums) {
  using V = Vector<T>;
  const V h = broadcast(values.shift[channel]), c = broadcast(values.center[channel]);
  const V s = broadcast(values.slope[channel]), b = broadcast(values.intercept[channel]);
  const V pp = broadcast(values.p[channel]), qq = broadcast(values.q[channel]), rr = broadcast(values.r[channel]);
  over_values<T, 1>(values.hw, sums, [&](Index i, auto partial, int lanes, V* block) {
    const V deviation = load<partial()>(x + i, lanes) + h - c;
    V g;
    if constexpr (keep) {
      g = load<partial()>(kept + i, lanes);
    } else {
      g = gradient<T, silu_>(load<partial()>(dy + i, lanes), deviation, s, b);
    }
    V value = fma(g, pp, fma(deviation, qq, rr));
    store<partial()>(dx + i, value, lanes);
    if constexpr (partial()) value = first_lanes<T>(value, lanes);
    block[0] += value;
  });
}

template <bool silu_, bool keep, class T>
void sweep_contiguous(const BackwardSlice<T>& values, const T* x, const T* dy, T* dx, RealOf<T>* kept) {
  using V = Vector<T>;
  const Index hw = values.hw, group_channels = values.group_channels;
  const Index batch = groups_in_batch(values.groups, group_channels * hw);
  for (Index group = 0; group < values.groups; group += batch) {
    const Index end_group = smaller(values.groups, group + batch);
    const Index first = group * group_channels, end = end_group * group_channels;
    const auto kept_of = [&](Index i) { return kept + (keep ? (i - first) * hw : 0); };
    over_channels<T>(
        first, end,
        [&](Index i, V sums[3]) { sum_channel<silu_, keep>(values, x + i * hw, dy + i * hw, kept_of(i), i, sums); },
        values.s1, values.s2, values.s3);
    for (Index g = group; g < end_group; ++g) finish_group(values, g);
    over_channels<T>(
        first, end,
        [&](Index i, V sums[1]) {
          dx_channel<silu_, keep, T>(values, x + i * hw, dy + i * hw, dx + i * hw, kept_of(i), i, sums);
        },
        values.dx_sum);
  }
}

// ---------------------------------------------------------------------------------------------------- channels_last

// Calls body(first row, rows, first channel, whether the vector of channels is partial, its lanes) for blocks of rows.
template <int lanes, class Body>
void over_tiles(Index hw, Index channels, Body body) {
  for (Index row = 0; row < hw; row += kBlock) {
    const Index rows = smaller(kBlock, hw - row);
    Index i = 0;
    for (; i + lanes <= channels; i += lanes) body(row, rows, i, std::false_type{}, 0);
    if (i < channels) body(row, rows, i, std::true_type{}, static_cast<int>(channels - i));
  }
}

template <bool silu_, bool keep, bool partial, class T>
DDPM_FAST_INLINE void sum_rows(const BackwardSlice<T>& values, const T* x, const T* dy, RealOf<T>* kept, Index rows,
                               Index i, int lanes) {
  using V = Vector<T>;
  const Index stride = values.stride, pitch = round_up(values.channels, kWidth<T>);
  const V h = load(values.shift + i), c = load(values.center + i), s = load(values.slope + i),
          b = load(values.intercept + i);
  V block_1{}, block_2{}, block_3{};
  for (; rows > 0; --rows, x += stride, dy += stride) {
    const V deviation = load<partial>(x, lanes) + h - c;
    const V g = gradient<T, silu_>(load<partial>(dy, lanes), deviation, s, b);
    if constexpr (keep) {
      store(kept, g);
      kept += pitch;
    }
    block_1 += g;
    block_2 = fma(g, deviation, block_2);
    block_3 += deviation;
  }
  store(values.s1 + i, load(values.s1 + i) + block_1);
  store(values.s2 + i, load(values.s2 + i) + block_2);
  store(values.s3 + i, load(values.s3 + i) + block_3);
}

template <bool silu_, bool keep, bool partial, class T>
DDPM_FAST_INLINE void dx_rows(const BackwardSlice<T>& values, const T* x, const T* dy, T* dx, const RealOf<T>* kept,
                              Index rows, Index i, int lanes) {
  using V = Vector<T>;
  const Index stride = values.stride, pitch = round_up(values.channels, kWidth<T>);
  const V h = load(values.shift + i), c = load(values.center + i), s = load(values.slope + i),
          b = load(values.intercept + i);
  const V pp = load(values.p + i), qq = load(values.q + i), rr = load(values.r + i);
  V block{};
  for (; rows > 0; --rows, x += stride, dy += stride, dx += stride) {
    const V deviation = load<partial>(x, lanes) + h - c;
    V g;
    if constexpr (keep) {
      g = load(kept);
      kept += pitch;
    } else {
      g = gradient<T, silu_>(load<partial>(dy, lanes), deviation, s, b);
    }
    const V value = fma(g, pp, fma(deviation, qq, rr));
    store<partial>(dx, value, lanes);
    block += value;
  }
  store(values.dx_sum + i, load(values.dx_sum + i) + block);
}

template <bool silu_, bool keep, class T>
void sweep_channels_last(const BackwardSlice<T>& values, const T* x, const T* dy, T* dx, RealOf<T>* kept) {
  constexpr int kLanes = kWidth<T>;
  const Index channels = values.channels, pitch = round_up(channels, kLanes);
  for (Index i = 0; i < channels; i += kLanes) {
    for (RealOf<T>* sum : {values.s1, values.s2, values.s3, values.dx_sum}) store(sum + i, Vector<T>{});
  }
  over_tiles<kLanes>(values.hw, channels, [&](Index row, Index rows, Index i, auto partial, int lanes) {
    const Index at = row * values.stride + i;
    sum_rows<silu_, keep, partial()>(values, x + at, dy + at, kept + (keep ? row * pitch + i : 0), rows, i, lanes);
  });
  for (Index group = 0; group < values.groups; ++group) finish_group(values, group);
  over_tiles<kLanes>(values.hw, channels, [&](Index row, Index rows, Index i, auto partial, int lanes) {
    const Index at = row * values.stride + i;
    dx_rows<silu_, keep, partial(), T>(values, x + at, dy + at, dx + at, kept + (keep ? row * pitch + i : 0), rows, i,
                                       lanes);
  });
}

// ---------------------------------------------------------------------------------------------------------- a slice

template <class T>
void gradients_of_slice(const GroupNormSiluBackwardArgs& a, const Slice& slice, RealOf<T>* sum_1, RealOf<T>* sum_2) {
  using Real = RealOf<T>;
  const bool last = a.shape.channels_last;
  const Index hw = a.shape.hw, channels = slice.channels, group_channels = a.shape.c / a.num_groups;
  const Index batch = groups_in_batch(slice.groups, group_channels * hw);
  const Index kept_values = hw * (last ? round_up(channels, kWidth<T>) : batch * group_channels);
  const bool keep = a.silu && kept_values * static_cast<Index>(sizeof(Real)) <= kKeptBytes;
  Scratch scratch(ScratchUse::kSlice,
                  15 * Scratch::bytes<Real>(channels) + Scratch::bytes<Real>(keep ? kept_values : 0));
  const BackwardSlice<T> values = take_values<T>(a, slice, scratch);
  Real* kept = keep ? scratch.take<Real>(kept_values) : nullptr;
  load_inputs(a, slice, values);
  const Index start = last ? slice.sample * hw * a.shape.c + slice.first_channel
                           : (slice.sample * a.shape.c + slice.first_channel) * hw;
  const T *x = static_cast<const T*>(a.x) + start, *dy = static_cast<const T*>(a.grad_y) + start;
  T* dx = static_cast<T*>(a.grad_x) + start;
  const auto sweep = [&](auto silu, auto keeps) {
    last ? sweep_channels_last<silu(), keeps()>(values, x, dy, dx, kept)
         : sweep_contiguous<silu(), keeps()>(values, x, dy, dx, kept);
  };
  if (!a.silu) {
    sweep(std::false_type{}, std::false_type{});
  } else if (keep) {
    sweep(std::true_type{}, std::true_type{});
  } else {
    sweep(std::true_type{}, std::false_type{});
  }
  save(a, slice, values, sum_1, sum_2);
}

// The samples are added in order:
//   out[i] = sum over samples of sums[sample, i]
template <class Real>
void sum_samples(const Real* sums, Index n, Index c, Real* out) {
  constexpr Index kColumns = 64;
  for (Index first = 0; first < c; first += kColumns) {
    const Index columns = smaller(kColumns, c - first);
    double total[kColumns] = {};
    for (Index sample = 0; sample < n; ++sample) {
      for (Index i = 0; i < columns; ++i) total[i] += sums[sample * c + first + i];
    }
    for (Index i = 0; i < columns; ++i) out[first + i] = static_cast<Real>(total[i]);
  }
}

}  // namespace

void group_norm_silu_backward(const GroupNormSiluBackwardArgs& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using Real = RealOf<T>;
    GroupNormSiluBackwardArgs a = args;
    if (a.shape.hw == 1) a.shape.channels_last = true;  // the same memory, and vectors across channels
    const Index sums = a.shape.n * a.shape.c;
    const bool parameters = a.grad_weight != nullptr || a.grad_bias != nullptr;
    Scratch scratch(ScratchUse::kCall, parameters ? 2 * Scratch::bytes<Real>(sums) : 0);
    Real* sum_1 = parameters ? scratch.take<Real>(sums) : nullptr;
    Real* sum_2 = parameters ? scratch.take<Real>(sums) : nullptr;
    const int threads = a.stream_or_threads.threads();
    const Partition partition =
        partition_groups(a.shape, a.num_groups, sizeof(T), 3 * sizeof(T) + sizeof(Real), threads);
    for_each_slice(partition, a.shape, a.num_groups, kBackwardGrain, a.stream_or_threads,
                   [&](const Slice& slice) { gradients_of_slice<T>(a, slice, sum_1, sum_2); });
    if (a.grad_weight != nullptr) sum_samples(sum_2, a.shape.n, a.shape.c, static_cast<Real*>(a.grad_weight));
    if (a.grad_bias != nullptr) sum_samples(sum_1, a.shape.n, a.shape.c, static_cast<Real*>(a.grad_bias));
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
