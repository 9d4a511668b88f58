// Gradients of group_norm_silu.
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
// A thread takes a slice as in the forward pass. The first sweep makes S1 and S2 and keeps g, in float32, where it fits
// in cache, since making it again costs more than writing and reading it there; the second makes dx.
#include "cpu/group_norm.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

constexpr Index kGrain = 8192;         // below 3 us of work, waking a thread takes as long
constexpr Index kKeptBytes = 1 << 20;  // g of a larger slice is made again
constexpr Index kBlock = 16;           // values that a lane adds up before they join the sum of the others

template <class T>
struct Backward {
  using Real = RealOf<T>;
  using V = Vector<T>;
  static constexpr int kLanes = kWidth<T>;

  const GroupNormSiluBackwardArgs& a;
  const Slice& slice;
  Real *sum_1, *sum_2;  // [n, c]: (1 + scale) S1 and (1 + scale) S2
  const Index hw = a.shape.hw, channels = slice.channels, group_channels = a.shape.c / a.num_groups;
  // One value a channel of the slice. dx = g p + (x + shift - center) q + r.
  Real *weight, *bias, *scale_1, *gain, *shift, *center, *slope, *intercept, *s1, *s2, *s3, *dx_sum, *p, *q, *r;

  Backward(const GroupNormSiluBackwardArgs& args, const Slice& the_slice, Real* sum_1_, Real* sum_2_)
      : a(args), slice(the_slice), sum_1(sum_1_), sum_2(sum_2_) {
    const bool last = a.shape.channels_last;
    const Index batch = groups_in_batch(slice.groups, group_channels * hw);
    const Index values = hw * (last ? round_up(channels, kLanes) : batch * group_channels);
    const bool keep = a.silu && values * static_cast<Index>(sizeof(Real)) <= kKeptBytes;
    Room room(RoomFor::kSlice, 15 * Room::bytes<Real>(channels) + Room::bytes<Real>(keep ? values : 0));
    for (Real** piece :
         {&weight, &bias, &scale_1, &gain, &shift, &center, &slope, &intercept, &s1, &s2, &s3, &dx_sum, &p, &q, &r}) {
      *piece = room.take<Real>(channels);
    }
    Real* kept = keep ? room.take<Real>(values) : nullptr;
    load_inputs();
    const Index start = last ? slice.sample * hw * a.shape.c + slice.first_channel
                             : (slice.sample * a.shape.c + slice.first_channel) * hw;
    const T *x = static_cast<const T*>(a.x) + start, *dy = static_cast<const T*>(a.grad_y) + start;
    T* dx = static_cast<T*>(a.grad_x) + start;
    if (!a.silu) {
      sweep<false, false>(last, x, dy, dx, kept);
    } else {
      keep ? sweep<true, true>(last, x, dy, dx, kept) : sweep<true, false>(last, x, dy, dx, kept);
    }
    save();
  }

  template <bool silu_, bool keep>
  void sweep(bool last, const T* x, const T* dy, T* dx, Real* kept) {
    last ? channels_last<silu_, keep>(x, dy, dx, kept) : contiguous<silu_, keep>(x, dy, dx, kept);
  }

  void load_inputs() {
    const Index first = slice.first_channel, row = slice.sample * a.shape.c + first;
    widen_input<Real>(a.weight, first, channels, 1, weight);
    widen_input<Real>(a.bias, first, channels, 0, bias);
    widen_input<Real>(a.scale, row, channels, 0, scale_1);
    widen_input<Real>(a.shift, row, channels, 0, shift);
    widen_input<Real>(a.scale_shift, row, channels, 0, intercept);
    const Real factor = a.silu ? static_cast<Real>(kNegLog2EDouble) : 1;
    for (Index group = 0; group < slice.groups; ++group) {
      const Real rstd = rstd_of(group);
      for (Index i = group * group_channels; i < (group + 1) * group_channels; ++i) {
        scale_1[i] += 1;
        gain[i] = weight[i] * scale_1[i];
        center[i] = mean_of(group);
        slope[i] = gain[i] * rstd * factor;
        intercept[i] = (bias[i] * scale_1[i] + intercept[i]) * factor;
      }
    }
  }
  Real mean_of(Index group) const { return static_cast<const Real*>(a.mean)[statistic(group)]; }
  Real rstd_of(Index group) const { return static_cast<const Real*>(a.rstd)[statistic(group)]; }
  Index statistic(Index group) const { return slice.sample * a.num_groups + slice.first_group + group; }

  // dL/dt.
  template <bool silu_>
  static DDPM_FAST_INLINE V gradient(V dy, V deviation, V slope, V intercept) {
    if constexpr (silu_) return dy * silu_derivative(fma(deviation, slope, intercept));
    return dy;
  }

  // Computes S2, p, q and r from the sums of a group's channels, with d = x + shift - center:
  //   s1 = sum of g
  //   s2 = sum of g d
  //   s3 = sum of d
  // The saved mean is rounded, by much where it is large beside the deviations; s3 tells by how much, and what follows
  // from d is set right.
  DDPM_FAST_NOINLINE void finish(Index group) {
    const Real rstd = hw == 0 ? 0 : rstd_of(group);  // of no values it is NaN, and every sum is 0
    const Index first = group * group_channels, end = first + group_channels;
    const bool alone = group_channels * hw == 1;  // such a value does not change the result
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
    const Real q_group = static_cast<Real>(slope_of_d),
               r_group = static_cast<Real>(-m1 * share * rstd - slope_of_d * m0);
    for (Index i = first; i < end; ++i) {
      p[i] = alone ? 0 : gain[i] * rstd;
      q[i] = alone ? 0 : q_group;
      r[i] = alone ? 0 : r_group;
    }
  }

  // The sums of the slice's channels to where they are wanted. s1 and s2 are used up.
  void save() {
    const Index at = slice.sample * a.shape.c + slice.first_channel;
    if (a.grad_shift != nullptr) {
      if (group_channels == 1) {  // what is added to all of a group does not matter
        for (Index i = 0; i < channels; ++i) dx_sum[i] = 0;
      }
      copy(dx_sum, static_cast<Real*>(a.grad_shift) + at);
    }
    if (a.grad_scale_shift != nullptr) copy(s1, static_cast<Real*>(a.grad_scale_shift) + at);
    if (a.grad_scale != nullptr) {
      Real* dscale = static_cast<Real*>(a.grad_scale) + at;
      for (Index i = 0; i < channels; ++i) dscale[i] = weight[i] * s2[i] + bias[i] * s1[i];
    }
    if (sum_1 != nullptr) {
      for (Index i = 0; i < channels; ++i) {
        sum_1[at + i] = scale_1[i] * s1[i];
        sum_2[at + i] = scale_1[i] * s2[i];
      }
    }
  }
  void copy(const Real* from, Real* to) const { std::memcpy(to, from, channels * sizeof(Real)); }

  // ---------------------------------------------------------------------------------------------------- contiguous

  template <bool silu_, bool keep>
  void contiguous(const T* x, const T* dy, T* dx, Real* kept) {
    const Index batch = groups_in_batch(slice.groups, group_channels * hw);
    for (Index group = 0; group < slice.groups; group += batch) {
      const Index end_group = smaller(slice.groups, group + batch);
      const Index first = group * group_channels, end = end_group * group_channels;
      over_channels(
          first, end,
          [&](Index i, V sums[3]) {
            sum_channel<silu_, keep>(x + i * hw, dy + i * hw, kept + (keep ? (i - first) * hw : 0), i, sums);
          },
          s1, s2, s3);
      for (Index g = group; g < end_group; ++g) finish(g);
      over_channels(
          first, end,
          [&](Index i, V sums[1]) {
            dx_channel<silu_, keep>(x + i * hw, dy + i * hw, dx + i * hw, kept + (keep ? (i - first) * hw : 0), i,
                                    sums);
          },
          dx_sum);
    }
  }

  // Calls body(channel, sums) for channels first .. end - 1, and stores the sums of the lanes of sums[0], ... in to...
  // The sums of a vector of channels are made together, which takes 3 operations for each instead of a dozen.
  template <class Body, class... To>
  void over_channels(Index first, Index end, Body body, To... to) {
    constexpr int kSums = sizeof...(to);
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

  // Runs step(i, partial, lanes, block), which adds to block[0], ..., over a channel; sums: the blocks' sums.
  template <int count, class Step>
  DDPM_FAST_INLINE void over_values(V* sums, Step step) {
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

  template <bool silu_, bool keep>
  DDPM_FAST_INLINE void sum_channel(const T* x, const T* dy, Real* kept, Index channel, V* sums) {
    const V h = broadcast(shift[channel]), c = broadcast(center[channel]);
    const V s = broadcast(slope[channel]), b = broadcast(intercept[channel]);
    over_values<3>(sums, [&](Index i, auto partial, int lanes, V* block) {
      V deviation = load<partial()>(x + i, lanes) + h - c;
      if constexpr (partial()) deviation = first_lanes<T>(deviation, lanes);
      const V g = gradient<silu_>(load<partial()>(dy + i, lanes), deviation, s, b);
      if constexpr (keep) store<partial()>(kept + i, g, lanes);
      block[0] += g;
      block[1] = fma(g, deviation, block[1]);
      block[2] += deviation;
    });
  }

  // The sum is that of dx before it is rounded.
  template <bool silu_, bool keep>
  DDPM_FAST_INLINE void dx_channel(const T* x, const T* dy, T* dx, const Real* kept, Index channel, V* sums) {
    const V h = broadcast(shift[channel]), c = broadcast(center[channel]);
    const V s = broadcast(slope[channel]), b = broadcast(intercept[channel]);
    const V pp = broadcast(p[channel]), qq = broadcast(q[channel]), rr = broadcast(r[channel]);
    over_values<1>(sums, [&](Index i, auto partial, int lanes, V* block) {
      const V deviation = load<partial()>(x + i, lanes) + h - c;
      V g;
      if constexpr (keep) {
        g = load<partial()>(kept + i, lanes);
      } else {
        g = gradient<silu_>(load<partial()>(dy + i, lanes), deviation, s, b);
      }
      V value = fma(g, pp, fma(deviation, qq, rr));
      store<partial()>(dx + i, value, lanes);
      if constexpr (partial()) value = first_lanes<T>(value, lanes);
      block[0] += value;
    });
  }

  // ------------------------------------------------------------------------------------------------- channels_last

  template <bool silu_, bool keep>
  void channels_last(const T* x, const T* dy, T* dx, Real* kept) {
    const Index pitch = round_up(channels, kLanes);
    for (Index i = 0; i < channels; i += kLanes) {
      store(s1 + i, V{});
      store(s2 + i, V{});
      store(s3 + i, V{});
      store(dx_sum + i, V{});
    }
    over_tiles([&](Index row, Index rows, Index i, auto partial, int lanes) {
      const Index at = row * a.shape.c + i;
      sum_rows<silu_, keep, partial()>(x + at, dy + at, kept + (keep ? row * pitch + i : 0), rows, i, lanes);
    });
    for (Index group = 0; group < slice.groups; ++group) finish(group);
    over_tiles([&](Index row, Index rows, Index i, auto partial, int lanes) {
      const Index at = row * a.shape.c + i;
      dx_rows<silu_, keep, partial()>(x + at, dy + at, dx + at, kept + (keep ? row * pitch + i : 0), rows, i, lanes);
    });
  }

  // Calls body(first row, rows, first channel, whether the vector of channels is partial, its lanes) for blocks of
  // rows.
  template <class Body>
  void over_tiles(Body body) {
    for (Index row = 0; row < hw; row += kBlock) {
      const Index rows = smaller(kBlock, hw - row);
      Index i = 0;
      for (; i + kLanes <= channels; i += kLanes) body(row, rows, i, std::false_type{}, 0);
      if (i < channels) body(row, rows, i, std::true_type{}, static_cast<int>(channels - i));
    }
  }

  template <bool silu_, bool keep, bool partial>
  DDPM_FAST_INLINE void sum_rows(const T* x, const T* dy, Real* kept, Index rows, Index i, int lanes) {
    const Index stride = a.shape.c, pitch = round_up(channels, kLanes);
    const V h = load(shift + i), c = load(center + i), s = load(slope + i), b = load(intercept + i);
    V block_1{}, block_2{}, block_3{};
    for (; rows > 0; --rows, x += stride, dy += stride) {
      const V deviation = load<partial>(x, lanes) + h - c;
      const V g = gradient<silu_>(load<partial>(dy, lanes), deviation, s, b);
      if constexpr (keep) {
        store(kept, g);
        kept += pitch;
      }
      block_1 += g;
      block_2 = fma(g, deviation, block_2);
      block_3 += deviation;
    }
    store(s1 + i, load(s1 + i) + block_1);
    store(s2 + i, load(s2 + i) + block_2);
    store(s3 + i, load(s3 + i) + block_3);
  }

  template <bool silu_, bool keep, bool partial>
  DDPM_FAST_INLINE void dx_rows(const T* x, const T* dy, T* dx, const Real* kept, Index rows, Index i, int lanes) {
    const Index stride = a.shape.c, pitch = round_up(channels, kLanes);
    const V h = load(shift + i), c = load(center + i), s = load(slope + i), b = load(intercept + i);
    const V pp = load(p + i), qq = load(q + i), rr = load(r + i);
    V block{};
    for (; rows > 0; --rows, x += stride, dy += stride, dx += stride) {
      const V deviation = load<partial>(x, lanes) + h - c;
      V g;
      if constexpr (keep) {
        g = load(kept);
        kept += pitch;
      } else {
        g = gradient<silu_>(load<partial>(dy, lanes), deviation, s, b);
      }
      const V value = fma(g, pp, fma(deviation, qq, rr));
      store<partial>(dx, value, lanes);
      block += value;
    }
    store(dx_sum + i, load(dx_sum + i) + block);
  }
};

// out[i] = sum over samples of sums[sample, i], in order.
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
    Room room(RoomFor::kCall, parameters ? 2 * Room::bytes<Real>(sums) : 0);
    Real* sum_1 = parameters ? room.take<Real>(sums) : nullptr;
    Real* sum_2 = parameters ? room.take<Real>(sums) : nullptr;
    const Cut cut(a.shape, a.num_groups, sizeof(T), 3 * sizeof(T) + sizeof(Real), a.stream_or_threads.threads());
    cut.run(a.shape, a.num_groups, kGrain, a.stream_or_threads.threads(),
            [&](const Slice& slice) { Backward<T>(a, slice, sum_1, sum_2); });
    if (a.grad_weight != nullptr) sum_samples(sum_2, a.shape.n, a.shape.c, static_cast<Real*>(a.grad_weight));
    if (a.grad_bias != nullptr) sum_samples(sum_1, a.shape.n, a.shape.c, static_cast<Real*>(a.grad_bias));
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
