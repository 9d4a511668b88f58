// y = act(GroupNorm(x + shift) (1 + scale) + scale_shift), forward; group_norm.h says how the work is cut.
//
// A thread keeps its vectors of x in registers, packed as they came, and goes over them three times: for their mean,
// for the squared deviations from it, and for y. Means and squared deviations of threads are then merged: by shuffles
// in a warp, through shared memory in a block, through distributed shared memory in a cluster. So the squares never
// cancel, wherever the values lie.
#include <climits>

#include "cuda/group_norm.h"
#include "cuda/kernels.h"

namespace ddpm_fast::cuda {

namespace {

constexpr const char* kOp = "group_norm_silu";
constexpr Limits kLimits = {2, 8, 512};

enum class Pass { kResident, kStatistics, kApply };

struct Forward {
  void* y;
  float *mean, *rstd;  // [n, groups], or absent
  const void* x;
  SmallInputs inputs;
  float2* partial;  // [n, slices, parts, groups of a slice]: mean and sum of squared deviations
  int first_sample, c, hw, groups, group_channels;
  float eps;
  bool silu, channels_last;
  SliceTiling tiling;
};

// Coefficients of a channel: act((x + shift - mean) a + b). b includes shift and mean except in float32, which would lose
// precision if the mean is large beside the deviations.
struct Coefficients {
  float a, b, shift, mean;
};

// `moments`: the group's, relative to `pivot`.
template <class T>
DDPM_FAST_DEVICE Coefficients coefficients_of(const Affine& affine, const Moments& moments, float pivot, float rstd) {
  const float mean = pivot + moments.mean, rest = moments.mean - (mean - pivot);  // rest: what rounding took from mean
  const float a = affine.gain * rstd, b = fmaf(-rest, a, affine.offset);
  if constexpr (sizeof(T) == 4) return {a, b, affine.shift, mean};
  return {a, fmaf(affine.shift - mean, a, b), 0, 0};
}

// Read a word of shared memory: a and b of two channels, or all coefficients of one.
template <class T>
DDPM_FAST_DEVICE void read_coefficients(const float4& word, Coefficients* to) {
  if constexpr (kPerWord<T> == 2) {
    to[0] = {word.x, word.y, 0, 0};
    to[1] = {word.z, word.w, 0, 0};
  } else {
    to[0] = {word.x, word.y, word.z, word.w};
  }
}

template <class T, bool silu>
DDPM_FAST_DEVICE float apply(float x, const Coefficients& of_channel) {
  const float z = fmaf(sizeof(T) == 4 ? x + of_channel.shift - of_channel.mean : x, of_channel.a, of_channel.b);
  if constexpr (silu) return z * sigmoid<T>(z);
  return z;
}

DDPM_FAST_DEVICE float rstd_of(const Moments& moments, float eps) {
  return reciprocal_root(fmaf(moments.m2, reciprocal_approx(moments.count), eps));
}

// -------------------------------------------------------------------------------------------------------- contiguous

template <class T, int items, Pass pass>
__global__ void __launch_bounds__(contiguous_threads(items, kLimits)) contiguous_kernel(const Forward p) {
  __shared__ Moments of_warp[kMaxThreads / kWarp];
  __shared__ float2 of_part[kMaxParts];
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
  const bool active = wanted < p.groups && row < p.group_channels;

  const int length = p.hw / kWidth<T>;
  const int part_length = min(tiling.part_length, length - part * tiling.part_length);
  const int left = active ? part_length - lane : 0;  // vector i of this thread exists where i * lanes < left
  const std::int64_t at_group = (std::int64_t{sample} * p.c + first_channel) * p.hw;
  const int at_thread = row * p.hw + (part * tiling.part_length + lane) * kWidth<T>;
  const T* x = static_cast<const T*>(p.x) + at_group + at_thread;
  Packed<T, kWidth<T>> data[items];
#pragma unroll
  for (int i = 0; i < items; ++i) {
    if (i * tiling.lanes < left) data[i] = load<kWidth<T>>(x + i * tiling.lanes * kWidth<T>);
  }
  const float pivot = widen(static_cast<const T*>(p.x)[at_group]);
  const int channel = first_channel + min(row, p.group_channels - 1);
  const Affine small = affine(p.inputs, channel, std::int64_t{sample} * p.c + channel);

  // From the merged moments on.
  const auto finish = [&](const Moments& moments) {
    const float rstd = rstd_of(moments, p.eps);
    if (p.mean != nullptr && part == 0 && thread == 0 && active) {
      p.mean[slab] = pivot + moments.mean;
      p.rstd[slab] = rstd;
    }
    const Coefficients of_channel = coefficients_of<T>(small, moments, pivot, rstd);
    T* y = static_cast<T*>(p.y) + at_group + at_thread;
    with_silu(p.silu, [&](auto silu) {
#pragma unroll
      for (int i = 0; i < items; ++i) {
        if (i * tiling.lanes >= left) continue;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          float value[kPerWord<T>];
          widen_word(data[i].words[w], T{}, value);
#pragma unroll
          for (float& v : value) v = apply<T, decltype(silu)::value>(v, of_channel);
          data[i].words[w] = narrow_word(value, T{});
        }
        store(y + i * tiling.lanes * kWidth<T>, data[i]);
      }
    });
  };
  const auto count_of = [&](int of) {  // the values of a part of the slice
    return static_cast<float>(min(tiling.part_length, length - of * tiling.part_length)) *
           static_cast<float>(p.group_channels * kWidth<T>);
  };

  if constexpr (pass == Pass::kApply) {
    const float2* partial = p.partial + std::int64_t{slab} * tiling.parts;
    finish(warp_merge(tiling.parts, [&](int i) { return Moments{count_of(i), partial[i].x, partial[i].y}; }));
    return;
  }

  // float32 sums are of x - pivot: as small as the deviations, they lose nothing.
  const float base = sizeof(T) == 4 ? pivot : 0;
  float count = 0, sums[kWords] = {}, squares[kWords] = {};
#pragma unroll
  for (int i = 0; i < items; ++i) {
    if (i * tiling.lanes >= left) continue;
    count += kWidth<T>;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float value[kPerWord<T>];
      widen_word(data[i].words[w], T{}, value);
#pragma unroll
      for (const float v : value) sums[w] += sizeof(T) == 4 ? v - base : v;
    }
  }
  const float mean = tree_sum(sums) * reciprocal_approx(fmaxf(count, 1)), center = base + mean;
#pragma unroll
  for (int i = 0; i < items; ++i) {
    if (i * tiling.lanes >= left) continue;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float value[kPerWord<T>];
      widen_word(data[i].words[w], T{}, value);
#pragma unroll
      for (const float v : value) squares[w] = fmaf(v - center, v - center, squares[w]);
    }
  }
  Moments moments = warp_merge({count, base - pivot + mean + small.shift, tree_sum(squares)});
  const int warps = tiling.rows * tiling.lanes / kWarp;
  if (warps > 1) {
    if (thread % kWarp == 0) of_warp[thread / kWarp] = moments;
    __syncthreads();
    moments = warp_merge(warps, [&](int i) { return of_warp[i]; });
  }
  if constexpr (pass == Pass::kStatistics) {
    if (thread == 0) p.partial[std::int64_t{slab} * tiling.parts + part] = {moments.mean, moments.m2};
  } else {
    if (tiling.parts > 1) {
      cluster_wait();  // the others have started: their memory exists
      if (thread < tiling.parts) *in_block(&of_part[part], thread) = {moments.mean, moments.m2};
      cluster_sync();
      moments = warp_merge(tiling.parts, [&](int i) { return Moments{count_of(i), of_part[i].x, of_part[i].y}; });
    }
    finish(moments);
  }
}

// ------------------------------------------------------------------------------------------------------ channels_last

// Shared memory, as offsets in floats. Elements of a vector lie apart, so that neighbouring threads have neighbouring
// addresses.
struct Layout {
  int moments;       // [elements, rows, lanes]: mean and m2 of a thread's channels
  int merged;        // [channels, chunks] Moments, padded to four floats
  int small;         // [channels]: gain, offset, shift, pivot
  int coefficients;  // [words, lanes]: a and b of two channels, or a Coefficients of one
  int of_part;       // [parts, groups]: mean and m2
  int total;
};

__host__ __device__ inline Layout layout(const SliceTiling& tiling, int width, Pass pass) {
  const int channels = tiling.slice_channels, elements = tiling.rows * tiling.lanes * width;
  Layout at{};
  at.merged = pass == Pass::kApply ? 0 : (2 * elements + 3) / 4 * 4;
  at.small = at.merged + (pass == Pass::kApply ? 0 : 4 * channels * (tiling.rows / width));
  at.coefficients = at.small + 4 * channels;
  at.of_part = at.coefficients + 4 * kWords * tiling.lanes;
  at.total = at.of_part + (pass == Pass::kResident ? 2 * tiling.parts * tiling.slice_groups : 0);
  return at;
}

template <class T, int items, Pass pass>
__global__ void __launch_bounds__(pass == Pass::kResident ? kLimits.channels_last_threads : kSmallThreads,
                                  pass == Pass::kResident ? 2 : 3) channels_last_kernel(const Forward p) {
  extern __shared__ float4 shared[];
  constexpr int kEach = kPerWord<T>;
  const SliceTiling& tiling = p.tiling;
  const Layout at = layout(tiling, kWidth<T>, pass);
  float* const memory = reinterpret_cast<float*>(shared);
  float2* const moments = reinterpret_cast<float2*>(memory + at.moments);
  float4* const merged = reinterpret_cast<float4*>(memory + at.merged);
  float4* const small = reinterpret_cast<float4*>(memory + at.small);
  float4* const coefficients = reinterpret_cast<float4*>(memory + at.coefficients);
  float2* const of_part = reinterpret_cast<float2*>(memory + at.of_part);
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
  const std::int64_t origin = std::int64_t{sample} * p.hw * p.c + first_channel;
  const std::int64_t at_part = origin + std::int64_t{first_pixel} * p.c;
  const int at_thread = row * p.c + lane * kWidth<T>, stride = tiling.rows * p.c;
  const int tiles = pass == Pass::kResident ? 1 : tiling.tiles, tile_pixels = tiling.rows * items;

  // A thread beyond the last pixel reads its first pixel of the tile again.
  Packed<T, kWidth<T>> data[items];
  const auto load_tile = [&](int tile) {
    const int first = row + tile * tile_pixels;
    if (first >= end) return;
    const T* x = static_cast<const T*>(p.x) + at_part + std::int64_t{tile * tile_pixels} * p.c + at_thread;
#pragma unroll
    for (int i = 0; i < items; ++i) {
      data[i] = load<kWidth<T>>(x + (first + i * tiling.rows < end ? i * stride : 0));
    }
  };
  load_tile(0);
#pragma unroll 1
  for (int i = thread; i < channels; i += threads) {
    const Affine of = affine(p.inputs, first_channel + i, std::int64_t{sample} * p.c + first_channel + i);
    const T* pivot = static_cast<const T*>(p.x) + origin + i / p.group_channels * p.group_channels;
    small[i] = {of.gain, of.offset, of.shift, widen(*pivot)};
  }
  __syncthreads();

  // A warp saves a group's mean and rstd, and computes the coefficients of its channels.
  const auto finish = [&](int group, const Moments& of_group) {
    const float rstd = rstd_of(of_group, p.eps), pivot = small[group * p.group_channels].w;
    if (p.mean != nullptr && part == 0 && thread % kWarp == 0) {
      const int slab = first_slab + group;
      p.mean[slab] = pivot + of_group.mean;
      p.rstd[slab] = rstd;
    }
#pragma unroll 1
    for (int i = thread % kWarp; i < p.group_channels; i += kWarp) {
      const int channel = group * p.group_channels + i, element = channel % kWidth<T>;
      const float4 of = small[channel];
      const Coefficients of_channel = coefficients_of<T>({of.x, of.y, of.z}, of_group, pivot, rstd);
      float4* to = coefficients + element / kEach * tiling.lanes + channel / kWidth<T>;
      if constexpr (kEach == 2) {
        reinterpret_cast<float2*>(to)[element % 2] = {of_channel.a, of_channel.b};
      } else {
        *to = {of_channel.a, of_channel.b, of_channel.shift, of_channel.mean};
      }
    }
  };
  // The mean and m2 of a group in a part, with their count.
  const auto moments_of_part = [&](int of, const float2& values) {
    const int of_pixels = min(tiling.part_length, p.hw - of * tiling.part_length);
    return Moments{static_cast<float>(of_pixels) * static_cast<float>(p.group_channels), values.x, values.y};
  };

  if constexpr (pass != Pass::kApply) {
    // Moments of the thread's channels over the tiles.
    float before = 0;  // pixels
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int first = row + tile * tile_pixels;
      if (first < end) {
        float count = 0;
#pragma unroll
        for (int i = 0; i < items; ++i) count += first + i * tiling.rows < end ? 1 : 0;
        const float extra = items - count, share = reciprocal_approx(count);
        const float weight = count * reciprocal_approx(before + count);
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          float start[kEach], sum[kEach] = {}, m2[kEach] = {};
          widen_word(data[0].words[w], T{}, start);
#pragma unroll
          for (int i = 0; i < items; ++i) {
            float value[kEach];
            widen_word(data[i].words[w], T{}, value);
#pragma unroll
            for (int e = 0; e < kEach; ++e) sum[e] += sizeof(T) == 4 ? value[e] - start[e] : value[e];
          }
          float base[kEach], mean[kEach];
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            base[e] = sizeof(T) == 4 ? start[e] : 0;
            mean[e] = (sizeof(T) == 4 ? sum[e] : fmaf(-extra, start[e], sum[e])) * share;
          }
#pragma unroll
          for (int i = 0; i < items; ++i) {
            float value[kEach];
            widen_word(data[i].words[w], T{}, value);
#pragma unroll
            for (int e = 0; e < kEach; ++e) {
              const float deviation = value[e] - (base[e] + mean[e]);
              m2[e] = fmaf(deviation, deviation, m2[e]);
            }
          }
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            const int element = w * kEach + e;
            float2& slot = moments[element * tiling.rows * tiling.lanes + thread];
            const float off = start[e] - (base[e] + mean[e]), pivot = small[lane * kWidth<T> + element].w;
            float2 all = {base[e] - pivot + mean[e], fmaxf(fmaf(-extra * off, off, m2[e]), 0)};
            if (tile > 0) {
              const float2 old = slot;
              const float delta = all.x - old.x;
              all = {fmaf(delta, weight, old.x), fmaf(delta * delta, before * weight, old.y + all.y)};
            }
            slot = all;
          }
        }
        before += count;
      }
      if (tile + 1 < tiles) load_tile(tile + 1);
    }
    __syncthreads();

    // One thread merges as many rows of a channel as a vector has elements.
    const int chunks = tiling.rows / kWidth<T>, chunk = row / kWidth<T>, element = row % kWidth<T>;
    const int channel = lane * kWidth<T> + element;
    if (channel < channels) {
      const int from_row = row - element, each = pixels / tiling.rows, more = pixels - each * tiling.rows - from_row;
      const int rows = min(kWidth<T>, pixels - from_row);
      const float few = static_cast<float>(each), many = few + 1;  // pixels of a row
      const float count = static_cast<float>(each * max(rows, 0) + min(max(more, 0), kWidth<T>));
      const float2* from = moments + (element * tiling.rows + from_row) * tiling.lanes + lane;
      float sum = 0, m2 = 0;
#pragma unroll
      for (int r = 0; r < kWidth<T>; ++r) {
        if (r < rows) sum = fmaf(r < more ? many : few, from[r * tiling.lanes].x, sum);
      }
      const float mean = sum * reciprocal_approx(fmaxf(count, 1));
#pragma unroll
      for (int r = 0; r < kWidth<T>; ++r) {
        if (r >= rows) continue;
        const float2 of_row = from[r * tiling.lanes];
        const float delta = of_row.x - mean;
        m2 = fmaf((r < more ? many : few) * delta, delta, m2 + of_row.y);
      }
      merged[channel * chunks + chunk] = {count, mean + small[channel].z, m2, 0};
    }
    __syncthreads();

    // Moments of groups.
    if (pass == Pass::kResident && tiling.parts > 1) cluster_wait();  // the others have started: their memory exists
#pragma unroll 1
    for (int group = warp; group < groups; group += warps) {
      const float4* from = merged + group * p.group_channels * chunks;
      const Moments of_group = warp_merge(p.group_channels * chunks, [&](int i) {
        const float4 of = from[i];
        return Moments{of.x, of.y, of.z};
      });
      const float2 result = {of_group.mean, of_group.m2};
      if constexpr (pass == Pass::kStatistics) {
        const std::int64_t slot = std::int64_t{sample * tiling.slices + slice} * tiling.parts + part;
        if (thread % kWarp == 0) p.partial[slot * tiling.slice_groups + group] = result;
      } else if (thread % kWarp < tiling.parts) {
        *in_block(of_part + part * groups + group, thread % kWarp) = result;
      }
    }
    if constexpr (pass == Pass::kStatistics) return;
    if (tiling.parts > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }
  const float2* of_parts = pass == Pass::kResident ? of_part
                                                   : p.partial + std::int64_t{sample * tiling.slices + slice} *
                                                                     tiling.parts * tiling.slice_groups;
  const int step = pass == Pass::kResident ? groups : tiling.slice_groups;
#pragma unroll 1
  for (int group = warp; group < groups; group += warps) {
    finish(group, warp_merge(tiling.parts, [&](int i) { return moments_of_part(i, of_parts[i * step + group]); }));
  }
  __syncthreads();

  with_silu(p.silu, [&](auto silu) {
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int first = row + tile * tile_pixels;
      if (first < end) {
        Coefficients of[kWidth<T>];
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          read_coefficients<T>(coefficients[w * tiling.lanes + lane], of + w * kEach);
        }
        T* y = static_cast<T*>(p.y) + at_part + std::int64_t{tile * tile_pixels} * p.c + at_thread;
        // Some vectors at a time: with all of them the compiler would run out of registers.
        constexpr int kTogether = 2;
#pragma unroll 1
        for (int pixel = first; pixel < end; pixel += kTogether * tiling.rows, y += kTogether * stride) {
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
#pragma unroll
            for (int w = 0; w < kWords; ++w) {
              float value[kEach];
              widen_word(data[i].words[w], T{}, value);
#pragma unroll
              for (int e = 0; e < kEach; ++e) value[e] = apply<T, decltype(silu)::value>(value[e], of[w * kEach + e]);
              data[i].words[w] = narrow_word(value, T{});
            }
            if (pixel + i * tiling.rows < end) store(y + i * stride, data[i]);
          }
#pragma unroll
          for (int i = kTogether; i < items; ++i) data[i - kTogether] = data[i];
        }
      }
      if (tile + 1 < tiles) load_tile(tile + 1);
    }
  });
}

// ----------------------------------------------------------------------------------------------------------- any shape

// A block for each group, one value at a time, x read three times: for tensors that are not made of whole vectors.
template <class T>
__global__ void __launch_bounds__(kScalarThreads) scalar_kernel(const Forward p) {
  const std::int64_t slab = blockIdx.x, sample = slab / p.groups, first_channel = slab % p.groups * p.group_channels;
  const std::int64_t origin = p.channels_last ? sample * p.hw * p.c + first_channel : slab * p.group_channels * p.hw;
  const T* const x = static_cast<const T*>(p.x) + origin;
  const auto over_values = [&](auto body) { walk(p.group_channels, p.hw, p.c, p.channels_last, body); };
  const auto small = [&](std::int64_t channel) {
    return affine(p.inputs, first_channel + channel, sample * p.c + first_channel + channel);
  };
  const auto shift = [&](std::int64_t channel) {
    return channel_input(p.inputs.shift, sample * p.c + first_channel + channel, 0);
  };
  const auto value_at = [&](std::int64_t channel, std::int64_t at) { return widen(x[at]) + shift(channel); };
  const std::int64_t values = std::int64_t{p.group_channels} * p.hw;
  const float count = static_cast<float>(values), pivot = values > 0 ? value_at(0, 0) : 0;
  float sum = 0, m2 = 0;
  over_values([&](std::int64_t channel, std::int64_t at) { sum += value_at(channel, at) - pivot; });
  Moments moments = {count, block_sum(sum) / count, 0};
  over_values([&](std::int64_t channel, std::int64_t at) {
    const float deviation = value_at(channel, at) - pivot - moments.mean;
    m2 = fmaf(deviation, deviation, m2);
  });
  moments.m2 = block_sum(m2);
  const float rstd = rstd_of(moments, p.eps);
  if (p.mean != nullptr && threadIdx.x == 0) {
    p.mean[slab] = pivot + moments.mean;
    p.rstd[slab] = rstd;
  }
  T* const y = static_cast<T*>(p.y) + origin;
  over_values([&](std::int64_t channel, std::int64_t at) {
    const Coefficients of_channel = coefficients_of<T>(small(channel), moments, pivot, rstd);
    const float value = widen(x[at]);
    const float result[] = {p.silu ? apply<T, true>(value, of_channel) : apply<T, false>(value, of_channel)};
    store<1>(y + at, result);
  });
}

// ----------------------------------------------------------------------------------------------------------- launches

std::optional<SliceTiling> tiling_of(DType dtype, const Shape& shape, std::int64_t groups) {
  return TilingRules(dtype, shape, groups, kLimits, largest_cluster(kOp)).tiling();
}

template <class T, int items, Pass pass>
void launch_pass(Forward p, std::int64_t samples, void* stream) {
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
    run(contiguous_kernel<T, items, pass>);
  }
}

}  // namespace

std::int64_t group_norm_silu_workspace(const GroupNormSiluArgs& a) {
  const auto tiling = tiling_of(a.dtype, a.shape, a.num_groups);
  if (!tiling || tiling->resident) return 0;
  const std::int64_t slice_groups = tiling->slice_channels / (a.shape.c / a.num_groups);
  return a.shape.n * tiling->slices * tiling->parts * slice_groups * static_cast<std::int64_t>(sizeof(float2));
}

void group_norm_silu(const GroupNormSiluArgs& a) {
  if (a.shape.n * a.shape.c == 0) return;
  Forward p = {};
  p.y = a.y;
  p.mean = static_cast<float*>(a.mean);
  p.rstd = static_cast<float*>(a.rstd);
  p.x = a.x;
  p.inputs = {a.weight, a.bias, a.shift, a.scale, a.scale_shift};
  p.partial = static_cast<float2*>(a.workspace);
  p.c = to_int(kOp, a.shape.c);
  p.hw = to_int(kOp, a.shape.hw);
  p.groups = static_cast<int>(a.num_groups);
  p.group_channels = p.c / p.groups;
  p.eps = static_cast<float>(a.eps);
  p.silu = a.silu;
  p.channels_last = a.shape.channels_last;
  const auto tiling = tiling_of(a.dtype, a.shape, a.num_groups);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    void* stream = a.stream_or_threads.stream();
    if (!tiling || !is_aligned({a.x, a.y})) {
      launch(kOp, scalar_kernel<T>, {grid(kOp, a.shape.n * a.num_groups), dim3(kScalarThreads)}, stream, p);
      return;
    }
    p.tiling = *tiling;
    // A cluster may have been refused after the workspace was allocated.
    if (!tiling->resident && a.workspace == nullptr) throw PlanAgain(std::string(kOp) + ": clusters are refused");
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

}  // namespace ddpm_fast::cuda
