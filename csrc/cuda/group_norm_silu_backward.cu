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
#include "cuda/group_norm.h"
#include "cuda/kernels.h"

namespace ddpm_fast::cuda {

namespace {

constexpr const char* kOp = "group_norm_silu_backward";
constexpr Limits kLimits = {1, 4, 256};

enum class Pass { kResident, kSums, kApply };

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

template <class T, int items, Pass pass>
__global__ void __launch_bounds__(contiguous_threads(items, kLimits)) contiguous_kernel(const Backward p) {
  extern __shared__ float4 shared[];
  __shared__ Sums of_part[kMaxParts];
  const SliceTiling& tiling = p.tiling;
  if (pass == Pass::kResident && tiling.parts > 1) cluster_arrive();
  constexpr bool kBackwards = pass == Pass::kApply;
  const int part = block_index<kBackwards>(blockIdx.x, gridDim.x);
  const int sample = p.first_sample + block_index<kBackwards>(blockIdx.z, gridDim.z);
  const int slice = block_index<kBackwards>(blockIdx.y, gridDim.y);
  const int wanted =
      items == kLimits.small_items ? slice * static_cast<int>(blockDim.z) + static_cast<int>(threadIdx.z) : slice;
  const int group = min(wanted, p.groups - 1), first_channel = group * p.group_channels,
            slab = sample * p.groups + group;
  const int thread = thread_of_slice(), lane = static_cast<int>(threadIdx.x), row = static_cast<int>(threadIdx.y);
  const bool exists = wanted < p.groups;

  const int length = p.hw / kWidth<T>;
  const int part_length = min(tiling.part_length, length - part * tiling.part_length);
  const int left = exists && row < p.group_channels ? part_length - lane : 0;  // vector i exists where i * lanes < left
  const std::int64_t at_group = (std::int64_t{sample} * p.c + first_channel) * p.hw;
  const int at_thread = row * p.hw + (part * tiling.part_length + lane) * kWidth<T>;
  Packed<T, kWidth<T>> x[items], dy[items];
#pragma unroll
  for (int i = 0; i < items; ++i) {
    if (i * tiling.lanes >= left) continue;
    x[i] = load<kWidth<T>>(static_cast<const T*>(p.x) + at_group + at_thread + i * tiling.lanes * kWidth<T>);
    dy[i] = load<kWidth<T>>(static_cast<const T*>(p.dy) + at_group + at_thread + i * tiling.lanes * kWidth<T>);
  }
  const int channel_index = first_channel + min(row, p.group_channels - 1);
  const Affine small = affine(p.inputs, channel_index, std::int64_t{sample} * p.c + channel_index);
  const float rstd = p.rstd[slab];
  const Channel channel = channel_of<T>(small, p.mean[slab], rstd);

  // From the sums over the group on.
  const auto finish = [&](const Sums& total) {
    const float count = static_cast<float>(length) * static_cast<float>(p.group_channels * kWidth<T>);
    const Slope slope = slope_of(total, count, rstd);
    if (p.sums != nullptr && part == 0 && thread == 0 && exists) p.slopes[slab] = slope;
    const Coefficients of_channel = coefficients_of<T>(channel, slope);
    with_silu(p.silu, [&](auto silu) {
#pragma unroll
      for (int i = 0; i < items; ++i) {
        if (i * tiling.lanes >= left) continue;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          float value[kPerWord<T>], gradients[kPerWord<T>];
          widen_word(x[i].words[w], T{}, value);
          widen_word(dy[i].words[w], T{}, gradients);
#pragma unroll
          for (int e = 0; e < kPerWord<T>; ++e) {
            value[e] = dx<T, decltype(silu)::value>(value[e], gradients[e], channel, of_channel);
          }
          x[i].words[w] = narrow_word(value, T{});
        }
        store(static_cast<T*>(p.dx) + at_group + at_thread + i * tiling.lanes * kWidth<T>, x[i]);
      }
    });
  };

  if constexpr (pass == Pass::kApply) {
    const Sums* partial = p.partial + std::int64_t{slab} * tiling.parts;
    finish(warp_total(tiling.parts, [&](int i) { return partial[i]; }));
    return;
  }

  float of_g[kWords] = {}, of_gd[kWords] = {}, of_d[kWords] = {};
  with_silu(p.silu, [&](auto silu) {
#pragma unroll
    for (int i = 0; i < items; ++i) {
      if (i * tiling.lanes >= left) continue;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        float value[kPerWord<T>], gradients[kPerWord<T>];
        widen_word(x[i].words[w], T{}, value);
        widen_word(dy[i].words[w], T{}, gradients);
#pragma unroll
        for (int e = 0; e < kPerWord<T>; ++e) {
          const float d = deviation<T>(value[e], channel);
          const float g = gradient<T, decltype(silu)::value>(gradients[e], d, channel.a, channel.b);
          of_g[w] += g;
          of_gd[w] = fmaf(g, d, of_gd[w]);
        }
      }
    }
  });
  if (p.deviations) {
#pragma unroll
    for (int i = 0; i < items; ++i) {
      if (i * tiling.lanes >= left) continue;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        float value[kPerWord<T>];
        widen_word(x[i].words[w], T{}, value);
#pragma unroll
        for (const float v : value) of_d[w] += deviation<T>(v, channel);
      }
    }
  }
  // Sums of a channel's lanes in one warp, then of channels.
  Sums own = {tree_sum(of_g), tree_sum(of_gd), tree_sum(of_d)};
  const int width = min(tiling.lanes, kWarp), slots_of_channel = tiling.lanes / width,
            slots = tiling.rows * slots_of_channel;
#pragma unroll 1
  for (int distance = width / 2; distance > 0; distance /= 2) {
    own.g += __shfl_xor_sync(0xFFFFFFFF, own.g, distance);
    own.gd += __shfl_xor_sync(0xFFFFFFFF, own.gd, distance);
    own.d += __shfl_xor_sync(0xFFFFFFFF, own.d, distance);
  }
  float4* of_slot = shared + threadIdx.z * slots;
  if (lane % width == 0) of_slot[thread / width] = {own.g, own.gd, own.d, small.gain};
  __syncthreads();
  if (p.sums != nullptr && exists) {
    float* to = p.sums + (std::int64_t{sample} * tiling.parts + part) * 3 * p.c + first_channel;
#pragma unroll 1
    for (int i = thread; i < p.group_channels; i += tiling.rows * tiling.lanes) {
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
  Sums total = warp_total(slots, [&](int i) {
    const float4 of = of_slot[i];
    return Sums{of.x * of.w, of.y * of.w, of.z};
  });
  if constexpr (pass == Pass::kSums) {
    if (thread == 0) p.partial[std::int64_t{slab} * tiling.parts + part] = total;
  } else {
    if (tiling.parts > 1) {
      cluster_wait();  // the others have started: their memory exists
      if (thread < tiling.parts) *in_block(&of_part[part], thread) = total;
      cluster_sync();
      total = warp_total(tiling.parts, [&](int i) { return of_part[i]; });
    }
    finish(total);
  }
}

// ------------------------------------------------------------------------------------------------------ channels_last

// Shared memory, as offsets in floats. Elements of a vector lie apart, so that neighbouring threads have neighbouring
// addresses.
struct Layout {
  int coefficients;  // [elements, lanes] Coefficients; before the sums are known: a, b and gain
  int centers;       // [elements, lanes]: mean and shift
  int sums;          // [elements, rows, lanes]: g and g d; then as many d
  int merged;        // [channels, chunks] Sums
  int of_part;       // [parts, groups] Sums
  int total;
};

__host__ __device__ inline Layout layout(const SliceTiling& tiling, int width, Pass pass) {
  const int channels = tiling.slice_channels, elements = tiling.rows * tiling.lanes * width;
  Layout at{};
  at.centers = 4 * tiling.lanes * width;
  at.sums = at.centers + 2 * tiling.lanes * width;
  at.merged = at.sums + (pass == Pass::kApply ? 0 : 3 * elements);
  at.of_part = at.merged + (pass == Pass::kApply ? 0 : 3 * channels * (tiling.rows / width));
  at.total = at.of_part + (pass == Pass::kResident ? 3 * tiling.parts * tiling.slice_groups : 0);
  return at;
}

template <class T, int items, Pass pass>
__global__ void __launch_bounds__(kLimits.channels_last_threads, kChannelsLastBlocks<pass>)
    channels_last_kernel(const Backward p) {
  extern __shared__ float4 shared[];
  constexpr int kEach = kPerWord<T>;
  const SliceTiling& tiling = p.tiling;
  const Layout at = layout(tiling, kWidth<T>, pass);
  float* const memory = reinterpret_cast<float*>(shared);
  float4* const coefficients = shared;
  float2* const centers = reinterpret_cast<float2*>(memory + at.centers);
  float2* const sums_of_g = reinterpret_cast<float2*>(memory + at.sums);
  float* const sums_of_d = memory + at.sums + 2 * tiling.rows * tiling.lanes * kWidth<T>;
  Sums* const merged = reinterpret_cast<Sums*>(memory + at.merged);
  Sums* const of_part = reinterpret_cast<Sums*>(memory + at.of_part);
  if (pass == Pass::kResident && tiling.parts > 1) cluster_arrive();

  constexpr bool kBackwards = pass == Pass::kApply;
  const int part = block_index<kBackwards>(blockIdx.x, gridDim.x);
  const int slice = block_index<kBackwards>(blockIdx.y, gridDim.y);
  const int sample = p.first_sample + block_index<kBackwards>(blockIdx.z, gridDim.z);
  const int first_channel = slice * tiling.slice_channels, first_slab = sample * p.groups + slice * tiling.slice_groups;
  const int channels = min(tiling.slice_channels, p.c - first_channel);
  const int groups = min(tiling.slice_groups, p.groups - slice * tiling.slice_groups);
  const int first_pixel = part * tiling.part_length, pixels = min(tiling.part_length, p.hw - first_pixel);
  const int thread = thread_of_slice(), lane = static_cast<int>(threadIdx.x), row = static_cast<int>(threadIdx.y);
  const int threads = tiling.rows * tiling.lanes, warp = thread / kWarp, warps = threads / kWarp;
  // The thread's pixels are row, row + rows, ..., those below `end`.
  const int end = lane * kWidth<T> < channels ? pixels : 0;
  const std::int64_t at_part = (std::int64_t{sample} * p.hw + first_pixel) * p.c + first_channel;
  const int at_thread = row * p.c + lane * kWidth<T>, stride = tiling.rows * p.c;
  const int tiles = pass == Pass::kResident ? 1 : tiling.tiles, tile_pixels = tiling.rows * items;

  // A thread beyond the last pixel reads its first pixel of the tile again, with dy = 0.
  Packed<T, kWidth<T>> x[items], dy[items];
  const auto load_tile = [&](int tile) {
    const int first = row + tile * tile_pixels;
    if (first >= end) return;
    const std::int64_t from = at_part + std::int64_t{tile * tile_pixels} * p.c + at_thread;
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const bool exists = first + i * tiling.rows < end;
      x[i] = load<kWidth<T>>(static_cast<const T*>(p.x) + from + (exists ? i * stride : 0));
      dy[i] = exists ? load<kWidth<T>>(static_cast<const T*>(p.dy) + from + i * stride) : Packed<T, kWidth<T>>{};
    }
  };
  load_tile(0);
  const auto slot_of = [&](int channel) { return channel % kWidth<T> * tiling.lanes + channel / kWidth<T>; };
#pragma unroll 1
  for (int i = thread; i < channels; i += threads) {
    const int slab = first_slab + i / p.group_channels;
    const Affine of = affine(p.inputs, first_channel + i, std::int64_t{sample} * p.c + first_channel + i);
    const Channel channel = channel_of<T>(of, p.mean[slab], p.rstd[slab]);
    coefficients[slot_of(i)] = {channel.a, channel.b, of.gain, 0};
    centers[slot_of(i)] = {channel.mean, channel.shift};
  }
  const auto channel_at = [&](int slot) {
    return Channel{centers[slot].x, centers[slot].y, coefficients[slot].x, coefficients[slot].y};
  };
  const auto line_at = [&](int slot) {
    const float4 of = coefficients[slot];
    return Coefficients{of.x, of.y, of.z, of.w};
  };
  __syncthreads();

  if constexpr (pass != Pass::kApply) {
    // Sums of the thread's channels over the tiles.
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int first = row + tile * tile_pixels;
      if (first < end) {
        with_silu(p.silu, [&](auto silu) {
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            Channel channel[kEach];
            float of_g[kEach] = {}, of_gd[kEach] = {};
#pragma unroll
            for (int e = 0; e < kEach; ++e) channel[e] = channel_at((w * kEach + e) * tiling.lanes + lane);
#pragma unroll
            for (int i = 0; i < items; ++i) {
              float value[kEach], gradients[kEach];
              widen_word(x[i].words[w], T{}, value);
              widen_word(dy[i].words[w], T{}, gradients);
#pragma unroll
              for (int e = 0; e < kEach; ++e) {
                const float d = deviation<T>(value[e], channel[e]);
                const float g = gradient<T, decltype(silu)::value>(gradients[e], d, channel[e].a, channel[e].b);
                of_g[e] += g;
                of_gd[e] = fmaf(g, d, of_gd[e]);
              }
            }
#pragma unroll
            for (int e = 0; e < kEach; ++e) {
              float2& slot = sums_of_g[(w * kEach + e) * threads + thread];
              const float2 before = tile > 0 ? slot : float2{};
              slot = {before.x + of_g[e], before.y + of_gd[e]};
            }
          }
        });
        if (p.deviations) {
          float extra = 0;
#pragma unroll
          for (int i = 0; i < items; ++i) extra += first + i * tiling.rows < end ? 0 : 1;
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            Channel channel[kEach];
            float of_d[kEach] = {}, start[kEach];
#pragma unroll
            for (int e = 0; e < kEach; ++e) channel[e] = channel_at((w * kEach + e) * tiling.lanes + lane);
#pragma unroll
            for (int i = 0; i < items; ++i) {
              float value[kEach];
              widen_word(x[i].words[w], T{}, value);
#pragma unroll
              for (int e = 0; e < kEach; ++e) of_d[e] += deviation<T>(value[e], channel[e]);
            }
            widen_word(x[0].words[w], T{}, start);
#pragma unroll
            for (int e = 0; e < kEach; ++e) {
              float& slot = sums_of_d[(w * kEach + e) * threads + thread];
              slot = fmaf(-extra, deviation<T>(start[e], channel[e]), of_d[e]) + (tile > 0 ? slot : 0);
            }
          }
        }
      }
      if (tile + 1 < tiles) load_tile(tile + 1);
    }
    __syncthreads();

    // One thread adds as many rows of a channel as a vector has elements.
    const int chunks = tiling.rows / kWidth<T>, chunk = row / kWidth<T>, element = row % kWidth<T>;
    const int channel = lane * kWidth<T> + element;
    if (channel < channels) {
      const int from_row = row - element, rows = min(kWidth<T>, pixels - from_row);
      const int from = (element * tiling.rows + from_row) * tiling.lanes + lane;
      Sums sums = {};
#pragma unroll
      for (int r = 0; r < kWidth<T>; ++r) {
        if (r >= rows) continue;
        const float2 of_row = sums_of_g[from + r * tiling.lanes];
        sums = sums + Sums{of_row.x, of_row.y, p.deviations ? sums_of_d[from + r * tiling.lanes] : 0};
      }
      merged[channel * chunks + chunk] = sums;
    }
    __syncthreads();

    // Sums of channels and groups.
    if (pass == Pass::kResident && tiling.parts > 1) cluster_wait();  // the others have started: their memory exists
#pragma unroll 1
    for (int group = warp; group < groups; group += warps) {
      const Sums total = warp_total(p.group_channels, [&](int i) {
        const int of = group * p.group_channels + i;
        Sums sums = {};
#pragma unroll 1
        for (int j = 0; j < chunks; ++j) sums = sums + merged[of * chunks + j];
        if (p.sums != nullptr) {
          float* to = p.sums + (std::int64_t{sample} * tiling.parts + part) * 3 * p.c + first_channel + of;
          to[0] = sums.g;
          to[p.c] = sums.gd;
          to[2 * p.c] = sums.d;
        }
        const float gain = coefficients[slot_of(of)].z;
        return Sums{sums.g * gain, sums.gd * gain, sums.d};
      });
      if constexpr (pass == Pass::kSums) {
        const std::int64_t slot = std::int64_t{sample * tiling.slices + slice} * tiling.parts + part;
        if (thread % kWarp == 0) p.partial[slot * tiling.slice_groups + group] = total;
      } else if (thread % kWarp < tiling.parts) {
        *in_block(of_part + part * groups + group, thread % kWarp) = total;
      }
    }
    if constexpr (pass == Pass::kSums) return;
    if (tiling.parts > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }
  const Sums* of_parts = pass == Pass::kResident ? of_part
                                                 : p.partial + std::int64_t{sample * tiling.slices + slice} *
                                                                   tiling.parts * tiling.slice_groups;
  const int step = pass == Pass::kResident ? groups : tiling.slice_groups;
#pragma unroll 1
  for (int group = warp; group < groups; group += warps) {
    const Sums total = warp_total(tiling.parts, [&](int i) { return of_parts[i * step + group]; });
    const float count = static_cast<float>(p.hw) * static_cast<float>(p.group_channels);
    const Slope slope = slope_of(total, count, p.rstd[first_slab + group]);
    if (p.sums != nullptr && part == 0 && thread % kWarp == 0) p.slopes[first_slab + group] = slope;
#pragma unroll 1
    for (int i = thread % kWarp; i < p.group_channels; i += kWarp) {
      const int slot = slot_of(group * p.group_channels + i);
      const Coefficients of_channel = coefficients_of<T>(channel_at(slot), slope);
      coefficients[slot] = {of_channel.a, of_channel.b, of_channel.q, of_channel.r};
    }
  }
  __syncthreads();

  with_silu(p.silu, [&](auto silu) {
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int first = row + tile * tile_pixels;
      if (first < end) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          Channel channel[kEach];
          Coefficients of_channel[kEach];
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            const int slot = (w * kEach + e) * tiling.lanes + lane;
            of_channel[e] = line_at(slot);
            if (sizeof(T) == 4) channel[e] = channel_at(slot);
          }
#pragma unroll
          for (int i = 0; i < items; ++i) {
            float value[kEach], gradients[kEach];
            widen_word(x[i].words[w], T{}, value);
            widen_word(dy[i].words[w], T{}, gradients);
#pragma unroll
            for (int e = 0; e < kEach; ++e) {
              value[e] = dx<T, decltype(silu)::value>(value[e], gradients[e], channel[e], of_channel[e]);
            }
            x[i].words[w] = narrow_word(value, T{});
          }
        }
        T* to = static_cast<T*>(p.dx) + at_part + std::int64_t{tile * tile_pixels} * p.c + at_thread;
#pragma unroll
        for (int i = 0; i < items; ++i) {
          if (first + i * tiling.rows < end) store(to + i * stride, x[i]);
        }
      }
      if (tile + 1 < tiles) load_tile(tile + 1);
    }
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
void launch_pass(Backward p, std::int64_t samples, void* stream) {
  const SliceTiling& tiling = p.tiling;
  Dims dims;
  dims.block = tiling.block(p.channels_last, kLimits);
  dims.grid.x = static_cast<unsigned>(tiling.parts);
  dims.grid.y = static_cast<unsigned>(divide_up(tiling.slices, dims.block.z));
  dims.cluster = pass == Pass::kResident ? static_cast<unsigned>(tiling.parts) : 1;
  const auto run = [&](auto kernel) {
    over_samples(samples, [&](std::int64_t first, std::int64_t count) {
      p.first_sample = static_cast<int>(first);
      dims.grid.z = static_cast<unsigned>(count);
      launch(kOp, kernel, dims, stream, p);
    });
  };
  if (p.channels_last) {
    dims.shared_bytes = layout(tiling, kWidth<T>, pass).total * sizeof(float);
    run(channels_last_kernel<T, items, pass>);
  } else {
    const int slots = tiling.rows * std::max(1, tiling.lanes / kWarp);
    dims.shared_bytes = pass == Pass::kApply ? 0 : dims.block.z * slots * sizeof(float4);
    run(contiguous_kernel<T, items, pass>);
  }
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
  p.dx = a.grad_x;
  p.dy = a.grad_y;
  p.x = a.x;
  p.mean = static_cast<const float*>(a.mean);
  p.rstd = static_cast<const float*>(a.rstd);
  p.inputs = {a.weight, a.bias, a.shift, a.scale, a.scale_shift};
  p.sums = small ? reinterpret_cast<float*>(at(workspace.sums)) : nullptr;
  p.slopes = reinterpret_cast<Slope*>(at(workspace.slopes));
  p.partial = reinterpret_cast<Sums*>(at(workspace.partial));
  p.c = to_int(kOp, a.shape.c);
  p.hw = to_int(kOp, a.shape.hw);
  p.groups = static_cast<int>(a.num_groups);
  p.group_channels = p.c / p.groups;
  p.deviations = a.dtype == DType::kFloat32 || a.grad_shift != nullptr;
  p.silu = a.silu;
  p.channels_last = a.shape.channels_last;
  if (a.shape.n * a.shape.hw > 0) {
    with_type(a.dtype, [&](auto type) {
      using T = decltype(type);
      if (!vectors) {
        launch(kOp, scalar_kernel<T>, {grid(kOp, a.shape.n * a.num_groups), dim3(kScalarThreads)}, stream, p);
        return;
      }
      p.tiling = *tiling;
      if (!tiling->resident) {
        launch_pass<T, kLimits.large_items, Pass::kSums>(p, a.shape.n, stream);
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
