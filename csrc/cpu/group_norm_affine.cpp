// The affine coefficients of group_norm_silu, which a convolution applies to its input.
#include "cpu/group_norm_statistics.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

template <class T>
void write_affine(const GroupNormAffineArgs& args, const GroupNormSiluArgs& a, const Slice& slice) {
  using Real = RealOf<T>;
  Scratch scratch(ScratchUse::kSlice, bytes_of_values<Real>(slice) + bytes_of_moments<Real>(slice));
  const SliceValues<Real> values = take_values<Real>(scratch, slice);
  channels_last_coefficients<T>(a, args.skip, args.skip_channels, slice, values, take_moments<Real>(scratch, slice));
  float* to = args.affine + slice.sample * 3 * a.shape.c + slice.first_channel;
  for (const float* from : {values.center, values.slope, values.intercept}) {
    std::memcpy(to, from, static_cast<std::size_t>(slice.channels) * sizeof(float));
    to += a.shape.c;
  }
}

}  // namespace

void group_norm_affine(const GroupNormAffineArgs& args) {
  GroupNormSiluArgs a{};  // the same norm without an output
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
    const Partition partition = partition_groups(a.shape, a.num_groups, sizeof(T), sizeof(T), threads);
    for_each_slice(partition, a.shape, a.num_groups, kForwardGrain, args.stream_or_threads,
                   [&](const Slice& slice) { write_affine<T>(args, a, slice); });
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
