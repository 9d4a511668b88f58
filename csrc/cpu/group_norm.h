// What the forward and the backward pass of group_norm_silu share: how the work is cut, room to work in, and the small
// inputs of a slice of channels.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "common/args.h"
#include "cpu/parallel.h"
#include "cpu/room.h"
#include "cpu/silu.h"
#include "cpu/vector.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// A thread takes whole groups of one sample. No sum crosses a group but those over samples, which come last: the cut
// changes no result.
struct Slice {
  Index sample, first_group, groups, first_channel, channels;
};

struct Cut {
  Index slices, groups_per_slice;

  // channels_last slices have whole cache lines where groups allow, and are read from cache the second time.
  Cut(const Shape& shape, Index groups, Index element_size, Index bytes_per_pixel, int threads) {
    const Index group_channels = shape.c / groups;
    slices = shape.n % threads != 0 && shape.n < 8 * threads ? threads : 1;
    Index unit = 1;
    if (shape.channels_last) {
      slices = larger(slices, shape.hw * shape.c * bytes_per_pixel / kCacheBytes);
      const Index line = 64 / element_size;
      while (unit * group_channels % line != 0) ++unit;
    }
    groups_per_slice = smaller(groups, round_up((groups + slices - 1) / slices, unit));
    slices = (groups + groups_per_slice - 1) / groups_per_slice;
  }

  // Calls body(slice) for every slice; `grain` elements are worth a thread.
  template <class Body>
  void run(const Shape& shape, Index groups, Index grain, int threads, Body body) const {
    const Index group_channels = shape.c / groups;
    const Index slice_elements = larger(1, groups_per_slice * group_channels * shape.hw);
    parallel_for(shape.n * slices, (grain + slice_elements - 1) / slice_elements, threads, [&](Index i) {
      const Index first = i % slices * groups_per_slice, count = smaller(groups_per_slice, groups - first);
      body(Slice{i / slices, first, count, first * group_channels, count * group_channels});
    });
  }

  static constexpr Index kCacheBytes = 1 << 20;  // of a slice; half a core's L2
};

// Contiguous groups that go through a sweep together: what finishes a group's sums is a long chain of operations, and
// more than one can be under way. Their values stay in the first or second cache from one sweep to the next.
inline Index groups_in_batch(Index groups, Index group_size) {
  constexpr Index kBatchElements = 8192;
  return smaller(groups, larger(1, kBatchElements / larger(group_size, 1)));
}

// Channels first .. first + count - 1 of a small input, or `absent` where there is none. `to` has whole vectors.
template <class Real>
DDPM_FAST_NOINLINE void widen_input(const ChannelInput& input, Index first, Index count, Real absent, Real* to) {
  const auto copy = [&](auto* from) {
    using T = std::remove_cv_t<std::remove_reference_t<decltype(*from)>>;
    if constexpr (std::is_same_v<RealOf<T>, Real>) {
      Index i = 0;
      for (; i + kWidth<T> <= count; i += kWidth<T>) store(to + i, load(from + first + i));
      if (i < count) store(to + i, load(from + first + i, static_cast<int>(count - i)));
    } else {  // float32 beside float64
      for (Index i = 0; i < count; ++i) to[i] = static_cast<Real>(from[first + i]);
    }
  };
  if (input.data == nullptr) {
    for (Index i = 0; i < round_up(count, kWidth<Real>); i += kWidth<Real>) store(to + i, broadcast(absent));
  } else if (input.dtype == DType::kFloat32) {
    copy(static_cast<const float*>(input.data));
  } else if constexpr (std::is_same_v<Real, double>) {
    copy(static_cast<const double*>(input.data));
  } else if (input.dtype == DType::kFloat16) {
    copy(static_cast<const Float16*>(input.data));
  } else {
    copy(static_cast<const BFloat16*>(input.data));
  }
}

// (x - center) slope + intercept is the activation's argument; with SiLU, times -log2(e) (see silu.h).
template <class T, bool silu_, class V>
DDPM_FAST_INLINE V apply(V x, V center, V slope, V intercept) {
  const V z = fma(x - center, slope, intercept);
  if constexpr (silu_) return silu<T>(z);
  return z;
}

// Calls body(T{}).
template <class Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kFloat16:
      return body(Float16{});
    default:  // kBFloat16: images of kUInt8 are not normed
      return body(BFloat16{});
  }
}

// Calls body(T{}) for the dtypes that networks are frozen to.
template <class Body>
void with_conv_type(DType dtype, Body body) {
  dtype == DType::kBFloat16 ? body(BFloat16{}) : body(float{});  // Python passes these two alone
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
