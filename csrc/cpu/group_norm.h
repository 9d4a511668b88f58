// Shared parts of group_norm_silu, its gradient and group_norm_affine: the partition of the work, and the small inputs.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "common/args.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/silu.h"
#include "cpu/vector.h"
#include "cpu/with_type.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Whole groups of one sample. A thread takes one slice at a time. No sum crosses a group but those over samples, which
// come last, so the partition does not change results.
struct Slice {
  Index sample, first_group, groups, first_channel, channels;
};

struct Partition {
  Index slices, groups_per_slice;  // slices per sample
};

constexpr Index kForwardGrain = 16384;  // elements worth a thread: below 3 us of work, waking it takes as long

// A channels_last slice has whole cache lines if the groups allow it, and fits in cache between the two reads of x.
inline Partition partition_groups(const Shape& shape, Index groups, Index element_size, Index bytes_per_pixel,
                                  int threads) {
  constexpr Index kCacheBytes = 1 << 20;  // half of a core's L2
  const Index group_channels = shape.c / groups;
  Index slices = shape.n % threads != 0 && shape.n < 8 * threads ? threads : 1;
  Index unit = 1;
  if (shape.channels_last) {
    slices = larger(slices, shape.hw * shape.c * bytes_per_pixel / kCacheBytes);
    const Index line = 64 / element_size;
    while (unit * group_channels % line != 0) ++unit;
  }
  const Index groups_per_slice = smaller(groups, round_up((groups + slices - 1) / slices, unit));
  return {(groups + groups_per_slice - 1) / groups_per_slice, groups_per_slice};
}

// Calls body(slice) for every slice. A thread gets at least `grain` elements.
template <class Body>
void for_each_slice(const Partition& partition, const Shape& shape, Index groups, Index grain,
                    const StreamOrThreads& where, Body body) {
  const Index group_channels = shape.c / groups;
  const Index slice_elements = larger(1, partition.groups_per_slice * group_channels * shape.hw);
  parallel_for(shape.n * partition.slices, (grain + slice_elements - 1) / slice_elements, where, [&](Index i) {
    const Index first = i % partition.slices * partition.groups_per_slice;
    const Index count = smaller(partition.groups_per_slice, groups - first);
    body(Slice{i / partition.slices, first, count, first * group_channels, count * group_channels});
  });
}

// Returns how many contiguous groups go through a sweep together. Finishing a group's sums is a long dependency chain,
// so several groups overlap. Their values stay in the first- or second-level cache between sweeps.
inline Index groups_in_batch(Index groups, Index group_size) {
  constexpr Index kBatchElements = 8192;
  return smaller(groups, larger(1, kBatchElements / larger(group_size, 1)));
}

// Reads channels first .. first + count - 1 of a small input, or fills in `absent`. `to` holds whole vectors.
template <class Real>
DDPM_FAST_NOINLINE void widen_input(const ChannelInput& input, Index first, Index count, Real absent, Real* to) {
  const auto copy = [&](auto* from) {
    using T = std::remove_cv_t<std::remove_reference_t<decltype(*from)>>;
    if constexpr (std::is_same_v<RealOf<T>, Real>) {
      Index i = 0;
      for (; i + kWidth<T> <= count; i += kWidth<T>) store(to + i, load(from + first + i));
      if (i < count) store(to + i, load(from + first + i, static_cast<int>(count - i)));
    } else {  // a float32 input of a float64 op
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

//   act((x - center) slope + intercept)
// Slope and intercept include the factor -log2(e) of silu.h if the activation is SiLU.
template <class T, bool silu_, class V>
DDPM_FAST_INLINE V apply(V x, V center, V slope, V intercept) {
  const V z = fma(x - center, slope, intercept);
  if constexpr (silu_) return silu<T>(z);
  return z;
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
