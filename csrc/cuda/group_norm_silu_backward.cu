// Gradients of group_norm_silu; group_norm.h says how the work is cut.
//
// The forward pass:
//   h      = x + shift
//   x_hat  = (h - mean) rstd
//   gain   = weight (1 + scale)
//   offset = bias (1 + scale) + scale_shift
//   z      = x_hat gain + offset
//   y      = act(z)
// The backward pass, with g = dy act'(z):
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
// x and dy stay in registers in their own dtype if a slice fits. g is computed twice, which takes no registers.
// The kernel sums g d and d, with d = h - mean. The sum of d is not 0, as the saved mean is rounded. It corrects the
// results for that rounding. A last kernel makes the gradients of the small inputs from the sums of every sample, part
// and channel.
#include "cuda/group_norm_slices.h"
#include "cuda/kernels.h"

namespace ddpm_fast::cuda {

namespace {

constexpr const char* kOp = "group_norm_silu_backward";
constexpr Limits kLimits = {1, 4, 256};

// Blocks that fit on a multiprocessor.
template <Pass pass>
constexpr int kChannelsLastBlocks = pass == Pass::kResident ? 3 : 2;

// Sums over the values of a channel or a group.
struct Sums {
  float g, gd, d;
};

// Coefficients from the sums over a group: dx = g a + d q + r. m0 is the mean of d.
struct Slope {
  float q, r, m0;
};

struct Backward {
  void* dx;
  const void *dy, *x;
  const float *mean, *rstd;  // [n, groups]
  SmallInputs inputs;
  float* sums;    // [n, parts, 3, c]: of g, g d and d; absent where no gradient of a small input is wanted
  Slope* slopes;  // [n, groups]
  Sums* partial;  // [n, slices, parts, groups of a slice]: of gain g, gain g d and d
  int first_sample, c, hw, groups, group_channels;
  bool deviations;  // whether sums of d are made; without them they count as 0
  bool silu, channels_last;
  SliceTiling tiling;
};

//   d = x + shift - mean
//   z = d a + b
// But for float32 shift is part of mean; there it is added first, as in the
// reference: a rounding error of a whole channel would be magnified by its gain twice.
struct Channel {
  float mean, shift, a, b;
};

template <class T>
DDPM_FAST_DEVICE Channel channel_of(const Affine& affine, float mean, float rstd) {
  if constexpr (sizeof(T) == 4) return {mean, affine.shift, affine.gain * rstd, affine.offset};
  return {mean - affine.shift, 0, affine.gain * rstd, affine.offset};
}

template <class T>
DDPM_FAST_DEVICE float deviation(float x, const Channel& channel) {
  if constexpr (sizeof(T) == 4) return x + channel.shift - channel.mean;
  return x - channel.mean;
}

template <class T, bool silu>
DDPM_FAST_DEVICE float gradient(float dy, float d, float a, float b) {
  if constexpr (!silu) return dy;
  const float z = fmaf(d, a, b), s = sigmoid<T>(z);
  return dy * fmaf(z * s, 1 - s, s);
}

// dx = g a + d q + r. But for float32 mean is folded into b and r, and d is x.
struct Coefficients {
  float a, b, q, r;
};

template <class T>
DDPM_FAST_DEVICE Coefficients coefficients_of(const Channel& channel, const Slope& slope) {
  if constexpr (sizeof(T) == 4) return {channel.a, channel.b, slope.q, slope.r};
  return {channel.a, fmaf(-channel.mean, channel.a, channel.b), slope.q, fmaf(-channel.mean, slope.q, slope.r)};
}

template <class T, bool silu>
DDPM_FAST_DEVICE float dx(float x, float dy, const Channel& channel, const Coefficients& of_channel) {
  const float d = sizeof(T) == 4 ? deviation<T>(x, channel) : x;
  return fmaf(gradient<T, silu>(dy, d, of_channel.a, of_channel.b), of_channel.a, fmaf(d, of_channel.q, of_channel.r));
}

// `total`: of gain g, gain g d and d over a group of `count` values.
DDPM_FAST_DEVICE Slope slope_of(const Sums& total, float count, float rstd) {
  const float share = reciprocal_approx(count), m0 = total.d * share, m1 = total.g * share;
  const float m2 = (total.gd - m0 * total.g) * rstd * share, q = -m2 * rstd * rstd;
  return {q, fmaf(-q, m0, -m1 * rstd), m0};
}

DDPM_FAST_DEVICE Sums warp_total(const Sums& own) { return {warp_sum(own.g), warp_sum(own.gd), warp_sum(own.d)}; }

DDPM_FAST_DEVICE Sums operator+(const Sums& a, const Sums& b) { return {a.g + b.g, a.gd + b.gd, a.d + b.d}; }

// Add get(0), ..., get(number - 1). Every lane of the warp gets the result.
template <class Get>
DDPM_FAST_DEVICE Sums warp_total(int number, Get get) {
  Sums own = {};
#pragma unroll 1
  for (int i = warp_lane(); i < number; i += kWarp) own = own + get(i);
  return warp_total(own);
}

// -------------------------------------------------------------------------------------------------------- contiguous

// Return the sums over the thread's vectors.
template <class T, int items>
DDPM_FAST_DEVICE Sums sums_of_thread(const Backward& p, const auto& at, const Vector<T> (&x)[items],
                                     const Vector<T> (&dy)[items], const Channel& channel) {
  float of_g[kWords] = {}, of_gd[kWords] = {}, of_d[kWords] = {};
  with_silu(p.silu, [&](auto silu) {
    over_words<T>(at, x, [&](int i, int w, const float (&values)[kPerWord<T>]) {
      float gradients[kPerWord<T>];
      widen_word(dy[i].words[w], T{}, gradients);
      for (int e = 0; e < kPerWord<T>; ++e) {
        const float d = deviation<T>(values[e], channel);
        const float g = gradient<T, decltype(silu)::value>(gradients[e], d, channel.a, channel.b);
        of_g[w] += g;
        of_gd[w] = fmaf(g, d, of_gd[w]);
      }
    });
  });
  if (p.deviations) {
    over_words<T>(at, x, [&](int, int w, const float (&values)[kPerWord<T>]) {
      for (const float v : values) of_d[w] += deviation<T>(v, channel);
    });
  }
  return {tree_sum(of_g), tree_sum(of_gd), tree_sum(of_d)};
}

// Save the sums of the block's channels, if they are wanted, and return the group's. `own`: the thread's.
DDPM_FAST_DEVICE Sums sums_of_block(const Backward& p, const auto& at, Sums own, float gain, float4* shared) {
  const SliceTiling& tiling = p.tiling;
  // Sums of a channel's lanes in one warp, then of channels.
  const int width = min(tiling.lanes, kWarp), slots_of_channel = tiling.lanes / width,
            slots = tiling.rows * slots_of_channel;
#pragma unroll 1
  for (int distance = width / 2; distance > 0; distance /= 2) {
    own.g += __shfl_xor_sync(0xFFFFFFFF, own.g, distance);
    own.gd += __shfl_xor_sync(0xFFFFFFFF, own.gd, distance);
    own.d += __shfl_xor_sync(0xFFFFFFFF, own.d, distance);
  }
  float4* of_slot = shared + threadIdx.z * slots;
  if (at.lane % width == 0) of_slot[at.thread / width] = {own.g, own.gd, own.d, gain};
  __syncthreads();
  if (p.sums != nullptr && at.exists) {
    float* to = p.sums + (std::int64_t{at.sample} * tiling.parts + at.part) * 3 * p.c + at.first_channel;
#pragma unroll 1
    for (int i = at.thread; i < p.group_channels; i += tiling.rows * tiling.lanes) {
      Sums sums = {};
#pragma unroll 1
      for (int j = 0; j < slots_of_channel; ++j) {
        const float4 of = of_slot[i * slots_of_channel + j];
        sums = sums + Sums{of.x, of.y, of.z};
      }
      to[i] = sums.g;
      to[p.c + i] = sums.gd;
      to[2 * p.c + i] = sums.d;
    }
  }
  return warp_total(slots, [&](int i) {
    const float4 of = of_slot[i];
    return Sums{of.x * of.w, of.y * of.w, of.z};
  });
}

template <class T, int items, Pass pass>
__global__ void __launch_bounds__(contiguous_threads(items, kLimits)) contiguous_kernel(const Backward p) {
  extern __shared__ float4 shared[];
  __shared__ Sums of_part[kMaxParts];
  const SliceTiling& tiling = p.tiling;
  if (pass == Pass::kResident && tiling.parts > 1) cluster_arrive();
  const RowSlice<T, items == kLimits.small_items, pass, Backward> at{p};
  Vector<T> x[items], dy[items];
  over_vectors<T, items>(at, [&](int i, int offset) {
    x[i] = load<kWidth<T>>(static_cast<const T*>(p.x) + at.at_group + at.at_thread + offset);
    dy[i] = load<kWidth<T>>(static_cast<const T*>(p.dy) + at.at_group + at.at_thread + offset);
  });
  const int index = at.first_channel + min(at.row, p.group_channels - 1);
  const Affine small = affine(p.inputs, index, std::int64_t{at.sample} * p.c + index);
  const float rstd = p.rstd[at.slab];
  const Channel channel = channel_of<T>(small, p.mean[at.slab], rstd);

  Sums total;
  if constexpr (pass == Pass::kApply) {
    const Sums* partial = p.partial + std::int64_t{at.slab} * tiling.parts;
    total = warp_total(tiling.parts, [&](int i) { return partial[i]; });
  } else {
    total = sums_of_block(p, at, sums_of_thread<T>(p, at, x, dy, channel), small.gain, shared);
    if constexpr (pass == Pass::kStatistics) {
      if (at.thread == 0) p.partial[std::int64_t{at.slab} * tiling.parts + at.part] = total;
      return;
    } else if (tiling.parts > 1) {
      exchange(at, total, of_part);
      total = warp_total(tiling.parts, [&](int i) { return of_part[i]; });
    }
  }
  const float count = static_cast<float>(at.length) * static_cast<float>(p.group_channels * kWidth<T>);
  const Slope slope = slope_of(total, count, rstd);
  if (p.sums != nullptr && at.part == 0 && at.thread == 0 && at.exists) p.slopes[at.slab] = slope;
  const Coefficients of_channel = coefficients_of<T>(channel, slope);
  T* to = static_cast<T*>(p.dx) + at.at_group + at.at_thread;
  with_silu(p.silu, [&](auto silu) {
    over_vectors<T, items>(at, [&](int i, int offset) {
      map_words<T>(x[i], [&](int w, float (&values)[kPerWord<T>]) {
        float gradients[kPerWord<T>];
        widen_word(dy[i].words[w], T{}, gradients);
        for (int e = 0; e < kPerWord<T>; ++e) {
          values[e] = dx<T, decltype(silu)::value>(values[e], gradients[e], channel, of_channel);
        }
      });
      store(to + offset, x[i]);
    });
  });
}

// ------------------------------------------------------------------------------------------------------ channels_last

// Shared memory, as offsets in floats. Elements of a vector lie apart, so that neighbouring threads have neighbouring
// addresses.
struct Layout {
  const SliceTiling& tiling;
  const int width;
  const Pass pass;
  const int elements = tiling.rows * tiling.lanes * width, channels = tiling.slice_channels;
  const int coefficients = 0;  // [elements, lanes] Coefficients; before the sums are known: a, b and gain
  const int centers = 4 * tiling.lanes * width;                         // [elements, lanes]: mean and shift
  const int sums = centers + 2 * tiling.lanes * width;                  // [elements, rows, lanes]: g and g d
  const int deviations = sums + 2 * elements;                           // [elements, rows, lanes]: d
  const int merged = sums + (pass == Pass::kApply ? 0 : 3 * elements);  // [channels, chunks] Sums
  // [parts, groups] Sums
  const int of_part = merged + (pass == Pass::kApply ? 0 : 3 * channels * (tiling.rows / width));
  const int total = of_part + (pass == Pass::kResident ? 3 * tiling.parts * tiling.slice_groups : 0);
};

// Return the place of a channel's values in shared memory.
template <class T>
DDPM_FAST_DEVICE int slot_of(const SliceTiling& tiling, int channel) {
  return channel % kWidth<T> * tiling.lanes + channel / kWidth<T>;
}

// The channels' values in shared memory, as Layout has them.
struct Channels {
  float4* coefficients;
  float2* centers;

  __device__ __forceinline__ Channel operator[](int slot) const {
    return {centers[slot].x, centers[slot].y, coefficients[slot].x, coefficients[slot].y};
  }
};

template <class T, bool silu, int items>
DDPM_FAST_DEVICE void sum_gradients(const Backward& p, const auto& at, const Vector<T> (&x)[items],
                                    const Vector<T> (&dy)[items], int tile, const Channels& channels,
                                    float2* sums_of_g) {
  for (int w = 0; w < kWords; ++w) {
    Channel channel[kPerWord<T>];
    float of_g[kPerWord<T>] = {}, of_gd[kPerWord<T>] = {};
    for (int e = 0; e < kPerWord<T>; ++e) channel[e] = channels[(w * kPerWord<T> + e) * p.tiling.lanes + at.lane];
#pragma unroll
    for (int i = 0; i < items; ++i) {
      float value[kPerWord<T>], gradients[kPerWord<T>];
      widen_word(x[i].words[w], T{}, value);
      widen_word(dy[i].words[w], T{}, gradients);
      for (int e = 0; e < kPerWord<T>; ++e) {
        const float d = deviation<T>(value[e], channel[e]);
        const float g = gradient<T, silu>(gradients[e], d, channel[e].a, channel[e].b);
        of_g[e] += g;
        of_gd[e] = fmaf(g, d, of_gd[e]);
      }
    }
    for (int e = 0; e < kPerWord<T>; ++e) {
      float2& slot = sums_of_g[(w * kPerWord<T> + e) * at.threads + at.thread];
      const float2 before = tile > 0 ? slot : float2{};
      slot = {before.x + of_g[e], before.y + of_gd[e]};
    }
  }
}

template <class T, int items>
DDPM_FAST_DEVICE void sum_deviations(const Backward& p, const auto& at, const Vector<T> (&x)[items], int tile,
                                     int first, const Channels& channels, float* sums_of_d) {
  const float extra = items - pixels_in_tile<items>(at, first);
  for (int w = 0; w < kWords; ++w) {
    Channel channel[kPerWord<T>];
    float of_d[kPerWord<T>] = {}, start[kPerWord<T>];
    for (int e = 0; e < kPerWord<T>; ++e) channel[e] = channels[(w * kPerWord<T> + e) * p.tiling.lanes + at.lane];
#pragma unroll
    for (int i = 0; i < items; ++i) {
      float value[kPerWord<T>];
      widen_word(x[i].words[w], T{}, value);
      for (int e = 0; e < kPerWord<T>; ++e) of_d[e] += deviation<T>(value[e], channel[e]);
    }
    widen_word(x[0].words[w], T{}, start);
    for (int e = 0; e < kPerWord<T>; ++e) {
      float& slot = sums_of_d[(w * kPerWord<T> + e) * at.threads + at.thread];
      slot = fmaf(-extra, deviation<T>(start[e], channel[e]), of_d[e]) + (tile > 0 ? slot : 0);
    }
  }
}

// Let one thread add as many rows of a channel as a vector has elements.
template <class T>
DDPM_FAST_DEVICE void merge_rows(const Backward& p, const auto& at, const float2* sums_of_g, const float* sums_of_d,
                                 Sums* merged) {
  const SliceTiling& tiling = p.tiling;
  const int chunks = tiling.rows / kWidth<T>, chunk = at.row / kWidth<T>, element = at.row % kWidth<T>;
  const int channel = at.lane * kWidth<T> + element;
  if (channel >= at.channels) return;
  const int from_row = at.row - element, rows = min(kWidth<T>, at.pixels - from_row);
  const int from = (element * tiling.rows + from_row) * tiling.lanes + at.lane;
  Sums sums = {};
  for (int r = 0; r < kWidth<T>; ++r) {
    if (r >= rows) continue;
    const float2 of_row = sums_of_g[from + r * tiling.lanes];
    sums = sums + Sums{of_row.x, of_row.y, p.deviations ? sums_of_d[from + r * tiling.lanes] : 0};
  }
  merged[channel * chunks + chunk] = sums;
}

// Return a channel's sums, and save them if they are wanted.
DDPM_FAST_DEVICE Sums sums_of_channel(const Backward& p, const auto& at, int channel, const Sums* merged, int chunks) {
  Sums sums = {};
#pragma unroll 1
  for (int i = 0; i < chunks; ++i) sums = sums + merged[channel * chunks + i];
  if (p.sums != nullptr) {
    float* to = p.sums + (std::int64_t{at.sample} * p.tiling.parts + at.part) * 3 * p.c + at.first_channel + channel;
    to[0] = sums.g;
    to[p.c] = sums.gd;
    to[2 * p.c] = sums.d;
  }
  return sums;
}

// Let a warp save a group's slope, and compute the coefficients of its channels.
template <class T>
DDPM_FAST_DEVICE void finish_group(const Backward& p, const auto& at, int group, const Sums& total,
                                   const Channels& channels) {
  const float count = static_cast<float>(p.hw) * static_cast<float>(p.group_channels);
  const Slope slope = slope_of(total, count, p.rstd[at.first_slab + group]);
  if (p.sums != nullptr && at.part == 0 && at.thread % kWarp == 0) p.slopes[at.first_slab + group] = slope;
#pragma unroll 1
  for (int i = at.thread % kWarp; i < p.group_channels; i += kWarp) {
    const int slot = slot_of<T>(p.tiling, group * p.group_channels + i);
    const Coefficients of_channel = coefficients_of<T>(channels[slot], slope);
    channels.coefficients[slot] = {of_channel.a, of_channel.b, of_channel.q, of_channel.r};
  }
}

template <class T, bool silu, int items>
DDPM_FAST_DEVICE void apply_tile(const Backward& p, const auto& at, Vector<T> (&x)[items], const Vector<T> (&dy)[items],
                                 int tile, int first, const Channels& channels) {
  for (int w = 0; w < kWords; ++w) {
    Channel channel[kPerWord<T>];
    Coefficients of_channel[kPerWord<T>];
    for (int e = 0; e < kPerWord<T>; ++e) {
      const int slot = (w * kPerWord<T> + e) * p.tiling.lanes + at.lane;
      const float4& line = channels.coefficients[slot];
      of_channel[e] = {line.x, line.y, line.z, line.w};
      if (sizeof(T) == 4) channel[e] = channels[slot];
    }
#pragma unroll
    for (int i = 0; i < items; ++i) {
      float value[kPerWord<T>], gradients[kPerWord<T>];
      widen_word(x[i].words[w], T{}, value);
      widen_word(dy[i].words[w], T{}, gradients);
      for (int e = 0; e < kPerWord<T>; ++e) value[e] = dx<T, silu>(value[e], gradients[e], channel[e], of_channel[e]);
      x[i].words[w] = narrow_word(value, T{});
    }
  }
  T* to = static_cast<T*>(p.dx) + at.at_tile(tile);
#pragma unroll
  for (int i = 0; i < items; ++i) {
    if (first + i * p.tiling.rows < at.end) store(to + i * at.stride, x[i]);
  }
}

template <class T, int items, Pass pass>
__global__ void __launch_bounds__(kLimits.channels_last_threads, kChannelsLastBlocks<pass>)
    channels_last_kernel(const Backward p) {
  extern __shared__ float4 shared[];
  const SliceTiling& tiling = p.tiling;
  const Layout of{tiling, kWidth<T>, pass};
  float* const memory = reinterpret_cast<float*>(shared);
  const Channels channels = {shared, reinterpret_cast<float2*>(memory + of.centers)};
  float2* const sums_of_g = reinterpret_cast<float2*>(memory + of.sums);
  float* const sums_of_d = memory + of.deviations;
  Sums* const merged = reinterpret_cast<Sums*>(memory + of.merged);
  Sums* const of_part = reinterpret_cast<Sums*>(memory + of.of_part);
  if (pass == Pass::kResident && tiling.parts > 1) cluster_arrive();
  const PixelSlice<T, items, pass, Backward> at{p};

  // A thread beyond the last pixel reads its first pixel of the tile again, with dy = 0.
  Vector<T> x[items], dy[items];
  const auto load = [&](int tile) {
    load_tile<items>(at, tile, [&](int i, bool exists, std::int64_t from, int offset) {
      x[i] = cuda::load<kWidth<T>>(static_cast<const T*>(p.x) + from + (exists ? offset : 0));
      dy[i] = exists ? cuda::load<kWidth<T>>(static_cast<const T*>(p.dy) + from + offset) : Vector<T>{};
    });
  };
  load(0);
#pragma unroll 1
  for (int i = at.thread; i < at.channels; i += at.threads) {
    const int slab = at.first_slab + i / p.group_channels;
    const Affine small = affine(p.inputs, at.first_channel + i, std::int64_t{at.sample} * p.c + at.first_channel + i);
    const Channel channel = channel_of<T>(small, p.mean[slab], p.rstd[slab]);
    channels.coefficients[slot_of<T>(tiling, i)] = {channel.a, channel.b, small.gain, 0};
    channels.centers[slot_of<T>(tiling, i)] = {channel.mean, channel.shift};
  }
  __syncthreads();

  if constexpr (pass != Pass::kApply) {
    over_tiles(at, load, [&](int tile, int first) {
      with_silu(p.silu,
                [&](auto silu) { sum_gradients<T, decltype(silu)::value>(p, at, x, dy, tile, channels, sums_of_g); });
      if (p.deviations) sum_deviations<T>(p, at, x, tile, first, channels, sums_of_d);
    });
    __syncthreads();
    const int chunks = tiling.rows / kWidth<T>;
    merge_rows<T>(p, at, sums_of_g, sums_of_d, merged);
    __syncthreads();
    exchange<pass>(at, p.partial, of_part, [&](int group) {
      return warp_total(p.group_channels, [&](int i) {
        const int channel = group * p.group_channels + i;
        const Sums sums = sums_of_channel(p, at, channel, merged, chunks);
        const float gain = channels.coefficients[slot_of<T>(tiling, channel)].z;
        return Sums{sums.g * gain, sums.gd * gain, sums.d};
      });
    });
    if constexpr (pass == Pass::kStatistics) return;
  }
  finish_groups<pass>(at, p.partial, of_part, [&](int group, auto get) {
    finish_group<T>(p, at, group, warp_total(tiling.parts, get), channels);
  });
  with_silu(p.silu, [&](auto silu) {
    over_tiles(at, load,
               [&](int tile, int first) { apply_tile<T, decltype(silu)::value>(p, at, x, dy, tile, first, channels); });
  });
}

// ----------------------------------------------------------------------------------------------------------- any shape

// Blocks of the kernel for any shape that fit on a multiprocessor. Without a number the compiler aims for more on some
// GPUs, and spills.
constexpr int kScalarBlocks = 5;

// A block for each group, one value at a time: for tensors that are not made of whole vectors.
template <class T>
__global__ void __launch_bounds__(kScalarThreads, kScalarBlocks) scalar_kernel(const Backward p) {
  const std::int64_t slab = blockIdx.x, sample = slab / p.groups, first_channel = slab % p.groups * p.group_channels;
  const std::int64_t origin = p.channels_last ? sample * p.hw * p.c + first_channel : slab * p.group_channels * p.hw;
  const float mean = p.mean[slab], rstd = p.rstd[slab];
  const T *const x = static_cast<const T*>(p.x) + origin, *const dy = static_cast<const T*>(p.dy) + origin;
  const auto affine_at = [&](std::int64_t channel) {
    return affine(p.inputs, first_channel + channel, sample * p.c + first_channel + channel);
  };
  // This order gives 0 for a value that is all of its group, as it should be.
  const auto d_of = [&](std::int64_t at, const Affine& small) { return widen(x[at]) + small.shift - mean; };
  const auto gradient_at = [&](std::int64_t at, float d, const Channel& channel) {
    const float of_y = widen(dy[at]);
    return p.silu ? gradient<T, true>(of_y, d, channel.a, channel.b)
                  : gradient<T, false>(of_y, d, channel.a, channel.b);
  };

  Sums total = {};
  for (std::int64_t i = 0; i < p.group_channels; ++i) {
    const Affine small = affine_at(i);
    const Channel channel = channel_of<T>(small, mean, rstd);
    Sums sums = {};
#pragma unroll 1  // an unrolled one needs more registers
    for (std::int64_t pixel = threadIdx.x; pixel < p.hw; pixel += blockDim.x) {
      const std::int64_t at = p.channels_last ? pixel * p.c + i : i * p.hw + pixel;
      const float d = d_of(at, small), g = gradient_at(at, d, channel);
      sums = sums + Sums{g, g * d, d};
    }
    sums = {block_sum(sums.g), block_sum(sums.gd), block_sum(sums.d)};
    total = total + Sums{small.gain * sums.g, small.gain * sums.gd, sums.d};
    if (p.sums == nullptr || threadIdx.x != 0) continue;
    float* to = p.sums + sample * 3 * p.c + first_channel + i;
    to[0] = sums.g;
    to[p.c] = sums.gd;
    to[2 * p.c] = sums.d;
  }
  const std::int64_t values = std::int64_t{p.group_channels} * p.hw;
  const Slope slope = slope_of(total, static_cast<float>(values), rstd);
  if (p.sums != nullptr && threadIdx.x == 0) p.slopes[slab] = slope;
  walk(p.group_channels, p.hw, p.c, p.channels_last, [&](std::int64_t i, std::int64_t at) {
    const Affine small = affine_at(i);
    const Channel channel = channel_of<T>(small, mean, rstd);
    const float d = d_of(at, small);
    const float g = gradient_at(at, d, channel);
    // A value that is all of its group does not change the result.
    const float result[] = {values == 1 ? 0 : fmaf(g, channel.a, fmaf(d, slope.q, slope.r))};
    store<1>(static_cast<T*>(p.dx) + origin + at, result);
  });
}

// -------------------------------------------------------------------------------------------------------- small inputs

struct SmallGradients {
  float *dweight, *dbias;                 // [c]
  float *dshift, *dscale, *dscale_shift;  // [n, c]
  const float* rstd;                      // [n, groups]
  SmallInputs inputs;
  const float* sums;  // as in Backward
  const Slope* slopes;
  std::int64_t n, c, hw;
  int groups, group_channels, parts;
};

constexpr int kSamples = 16;  // that a block has in hand

// A warp's threads have neighbouring channels, a block's warps every kSamples-th sample.
__global__ void __launch_bounds__(kWarp* kSamples) small_gradients_kernel(const SmallGradients p) {
  __shared__ float of_weight[kSamples][kWarp], of_bias[kSamples][kWarp];
  const std::int64_t channel = std::int64_t{blockIdx.x} * kWarp + threadIdx.x;
  float dweight = 0, dbias = 0;
  for (std::int64_t sample = threadIdx.y; sample < p.n && channel < p.c; sample += kSamples) {
    const std::int64_t at = sample * p.c + channel, slab = sample * p.groups + channel / p.group_channels;
    const float scale = 1 + channel_input(p.inputs.scale, at, 0);
    float g = 0, g_x_hat = 0, of_shift = 0;
    if (p.hw > 0) {
      Sums sums = {};
      const float* from = p.sums + sample * p.parts * 3 * p.c + channel;
      for (int part = 0; part < p.parts; ++part, from += 3 * p.c) sums = sums + Sums{from[0], from[p.c], from[2 * p.c]};
      const Slope slope = p.slopes[slab];
      const float rstd = p.rstd[slab], a = channel_input(p.inputs.weight, channel, 1) * scale * rstd;
      g = sums.g;
      g_x_hat = (sums.gd - slope.m0 * sums.g) * rstd;
      // A constant added to a whole group does not change the result.
      if (p.group_channels > 1) of_shift = fmaf(a, sums.g, fmaf(slope.q, sums.d, slope.r * static_cast<float>(p.hw)));
    }
    if (p.dshift != nullptr) p.dshift[at] = of_shift;
    if (p.dscale_shift != nullptr) p.dscale_shift[at] = g;
    if (p.dscale != nullptr) {
      p.dscale[at] =
          fmaf(channel_input(p.inputs.weight, channel, 1), g_x_hat, channel_input(p.inputs.bias, channel, 0) * g);
    }
    dweight = fmaf(scale, g_x_hat, dweight);
    dbias = fmaf(scale, g, dbias);
  }
  of_weight[threadIdx.y][threadIdx.x] = dweight;
  of_bias[threadIdx.y][threadIdx.x] = dbias;
  __syncthreads();
  if (threadIdx.y != 0 || channel >= p.c) return;
  for (int i = 1; i < kSamples; ++i) {
    dweight += of_weight[i][threadIdx.x];
    dbias += of_bias[i][threadIdx.x];
  }
  if (p.dweight != nullptr) p.dweight[channel] = dweight;
  if (p.dbias != nullptr) p.dbias[channel] = dbias;
}

// ----------------------------------------------------------------------------------------------------------- launches

std::optional<SliceTiling> tiling_of(DType dtype, const Shape& shape, std::int64_t groups) {
  return TilingRules(dtype, shape, groups, kLimits, largest_cluster(kOp)).tiling();
}

// The parts of the workspace, in bytes from its start.
struct Workspace {
  std::int64_t slopes, partial, sums, total;

  Workspace(const std::optional<SliceTiling>& tiling, const Shape& shape, std::int64_t groups) : slopes(0) {
    const std::int64_t parts = tiling ? tiling->parts : 1;
    const std::int64_t slice_groups = tiling ? tiling->slice_channels / (shape.c / groups) : 0;
    partial = slopes + shape.n * groups * static_cast<std::int64_t>(sizeof(Slope));
    sums = partial;
    if (tiling && !tiling->resident) {
      sums += shape.n * tiling->slices * parts * slice_groups * static_cast<std::int64_t>(sizeof(Sums));
    }
    total = sums + shape.n * parts * 3 * shape.c * static_cast<std::int64_t>(sizeof(float));
  }
};

template <class T, int items, Pass pass>
void launch_pass(const Backward& p, std::int64_t samples, void* stream) {
  const SliceTiling& tiling = p.tiling;
  const auto kernel = p.channels_last ? channels_last_kernel<T, items, pass> : contiguous_kernel<T, items, pass>;
  const int slots = tiling.block(false, kLimits).z * tiling.rows * std::max(1, tiling.lanes / kWarp);
  const int floats = p.channels_last ? Layout{tiling, kWidth<T>, pass}.total : pass == Pass::kApply ? 0 : 4 * slots;
  launch_slices(kOp, kernel, p, kLimits, pass, floats * sizeof(float), samples, stream);
}

}  // namespace

std::int64_t group_norm_silu_backward_workspace(const GroupNormSiluBackwardArgs& a) {
  // Enough without clusters too: one may be refused before the kernel is launched.
  const auto bytes = [&](int cluster) {
    const auto tiling = TilingRules(a.dtype, a.shape, a.num_groups, kLimits, cluster).tiling();
    return Workspace(tiling, a.shape, a.num_groups).total;
  };
  return std::max(bytes(largest_cluster(kOp)), bytes(1));
}

void group_norm_silu_backward(const GroupNormSiluBackwardArgs& a) {
  if (a.shape.c == 0) return;
  const auto tiling = tiling_of(a.dtype, a.shape, a.num_groups);
  const Workspace workspace(tiling, a.shape, a.num_groups);
  const auto at = [&](std::int64_t offset) { return static_cast<char*>(a.workspace) + offset; };
  const bool small = a.grad_weight != nullptr || a.grad_bias != nullptr || a.grad_shift != nullptr ||
                     a.grad_scale != nullptr || a.grad_scale_shift != nullptr;
  void* stream = a.stream_or_threads.stream();
  const bool vectors = tiling && is_aligned({a.grad_y, a.x, a.grad_x});
  Backward p = {};
  set_shared(kOp, a, p);
  p.dx = a.grad_x;
  p.dy = a.grad_y;
  p.x = a.x;
  p.mean = static_cast<const float*>(a.mean);
  p.rstd = static_cast<const float*>(a.rstd);
  p.sums = small ? reinterpret_cast<float*>(at(workspace.sums)) : nullptr;
  p.slopes = reinterpret_cast<Slope*>(at(workspace.slopes));
  p.partial = reinterpret_cast<Sums*>(at(workspace.partial));
  p.deviations = a.dtype == DType::kFloat32 || a.grad_shift != nullptr;
  if (a.shape.n * a.shape.hw > 0) {
    with_type(a.dtype, [&](auto type) {
      using T = decltype(type);
      if (!vectors) {
        launch(kOp, scalar_kernel<T>, {grid(kOp, a.shape.n * a.num_groups), dim3(kScalarThreads)}, stream, p);
        return;
      }
      p.tiling = *tiling;
      if (!tiling->resident) {
        launch_pass<T, kLimits.large_items, Pass::kStatistics>(p, a.shape.n, stream);
        launch_pass<T, kLimits.large_items, Pass::kApply>(p, a.shape.n, stream);
      } else if (tiling->items == kLimits.large_items) {
        launch_pass<T, kLimits.large_items, Pass::kResident>(p, a.shape.n, stream);
      } else {
        launch_pass<T, kLimits.small_items, Pass::kResident>(p, a.shape.n, stream);
      }
    });
  }
  if (!small) return;
  const SmallGradients gradients = {static_cast<float*>(a.grad_weight),
                                    static_cast<float*>(a.grad_bias),
                                    static_cast<float*>(a.grad_shift),
                                    static_cast<float*>(a.grad_scale),
                                    static_cast<float*>(a.grad_scale_shift),
                                    p.rstd,
                                    p.inputs,
                                    p.sums,
                                    p.slopes,
                                    a.shape.n,
                                    a.shape.c,
                                    a.shape.hw,
                                    p.groups,
                                    p.group_channels,
                                    vectors ? tiling->parts : 1};
  launch(kOp, small_gradients_kernel, {grid(kOp, divide_up(a.shape.c, kWarp)), dim3(kWarp, kSamples)}, stream,
         gradients);
}

}  // namespace ddpm_fast::cuda
