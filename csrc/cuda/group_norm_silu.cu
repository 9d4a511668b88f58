// y = act(GroupNorm(x + shift) (1 + scale) + scale_shift), forward; group_norm.h says how the work is cut.
//
// A thread keeps its vectors of x in registers, packed as they came, and goes over them three times: for their mean,
// for the squared deviations from it, and for y. Means and squared deviations of threads are then merged: by shuffles
// in a warp, through shared memory in a block, through distributed shared memory in a cluster. So the squares never
// cancel, wherever the values lie.
#include <climits>

#include "cuda/group_norm_slices.h"
#include "cuda/kernels.h"

namespace ddpm_fast::cuda {

namespace {

constexpr const char* kOp = "group_norm_silu";
constexpr Limits kLimits = {2, 8, 512};

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
// precision if the mean is large relative to the deviations.
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

// Return the moments of a part of a slice, whose groups have `values` at each of `length` positions.
DDPM_FAST_DEVICE Moments moments_of_part(const SliceTiling& tiling, int part, int length, int values,
                                         const float2& of_part) {
  const int part_length = min(tiling.part_length, length - part * tiling.part_length);
  return {static_cast<float>(part_length) * static_cast<float>(values), of_part.x, of_part.y};
}

// -------------------------------------------------------------------------------------------------------- contiguous

// Return the moments of x + shift in the thread's vectors, relative to `pivot`.
template <class T, int items>
DDPM_FAST_DEVICE Moments moments_of_thread(const Forward& p, const auto& at, const Vector<T> (&data)[items],
                                           float pivot, float shift) {
  // float32 sums are of x - pivot: as small as the deviations, they lose nothing.
  const float base = sizeof(T) == 4 ? pivot : 0;
  float count = 0, sums[kWords] = {}, squares[kWords] = {};
  over_words<T>(at, data, [&](int, int w, const float (&values)[kPerWord<T>]) {
    if (w == 0) count += kWidth<T>;
    for (const float v : values) sums[w] += sizeof(T) == 4 ? v - base : v;
  });
  const float mean = tree_sum(sums) * reciprocal_approx(fmaxf(count, 1)), center = base + mean;
  over_words<T>(at, data, [&](int, int w, const float (&values)[kPerWord<T>]) {
    for (const float v : values) squares[w] = fmaf(v - center, v - center, squares[w]);
  });
  return {count, base - pivot + mean + shift, tree_sum(squares)};
}

template <class T, int items, Pass pass>
__global__ void __launch_bounds__(contiguous_threads(items, kLimits)) contiguous_kernel(const Forward p) {
  __shared__ Moments of_warp[kMaxThreads / kWarp];
  __shared__ float2 of_part[kMaxParts];
  const SliceTiling& tiling = p.tiling;
  if (pass == Pass::kResident && tiling.parts > 1) cluster_arrive();
  const RowSlice<T, items == kLimits.small_items, pass, Forward> at{p};
  const T* x = static_cast<const T*>(p.x) + at.at_group + at.at_thread;
  Vector<T> data[items];
  over_vectors<T, items>(at, [&](int i, int offset) { data[i] = load<kWidth<T>>(x + offset); });
  const float pivot = widen(static_cast<const T*>(p.x)[at.at_group]);
  const int channel = at.first_channel + min(at.row, p.group_channels - 1);
  const Affine small = affine(p.inputs, channel, std::int64_t{at.sample} * p.c + channel);

  Moments moments;
  const auto merge_all = [&](const float2* parts) {
    moments = warp_merge(tiling.parts, [&](int i) {
      return moments_of_part(tiling, i, at.length, p.group_channels * kWidth<T>, parts[i]);
    });
  };
  if constexpr (pass == Pass::kApply) {
    merge_all(p.partial + std::int64_t{at.slab} * tiling.parts);
  } else {
    moments = warp_merge(moments_of_thread<T>(p, at, data, pivot, small.shift));
    const int warps = tiling.rows * tiling.lanes / kWarp;
    if (warps > 1) {
      if (at.thread % kWarp == 0) of_warp[at.thread / kWarp] = moments;
      __syncthreads();
      moments = warp_merge(warps, [&](int i) { return of_warp[i]; });
    }
    if constexpr (pass == Pass::kStatistics) {
      if (at.thread == 0) p.partial[std::int64_t{at.slab} * tiling.parts + at.part] = {moments.mean, moments.m2};
      return;
    } else if (tiling.parts > 1) {
      exchange(at, {moments.mean, moments.m2}, of_part);
      merge_all(of_part);
    }
  }
  const float rstd = rstd_of(moments, p.eps);
  if (at.active && at.thread == 0 && at.part == 0 && p.mean != nullptr) {
    p.mean[at.slab] = pivot + moments.mean;
    p.rstd[at.slab] = rstd;
  }
  const Coefficients of_channel = coefficients_of<T>(small, moments, pivot, rstd);
  T* y = static_cast<T*>(p.y) + at.at_group + at.at_thread;
  with_silu(p.silu, [&](auto silu) {
    over_vectors<T, items>(at, [&](int i, int offset) {
      map_words<T>(data[i], [&](int, float (&values)[kPerWord<T>]) {
        for (float& v : values) v = apply<T, decltype(silu)::value>(v, of_channel);
      });
      store(y + offset, data[i]);
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
  const int moments = 0;  // [elements, rows, lanes]: mean and m2 of a thread's channels
  // [channels, chunks] Moments, padded to four floats
  const int merged = pass == Pass::kApply ? 0 : (2 * elements + 3) / 4 * 4;
  // [channels]: gain, offset, shift, pivot
  const int small = merged + (pass == Pass::kApply ? 0 : 4 * channels * (tiling.rows / width));
  const int coefficients = small + 4 * channels;  // [words, lanes]: a and b of two channels, or a Coefficients of one
  const int of_part = coefficients + 4 * kWords * tiling.lanes;  // [parts, groups]: mean and m2
  const int total = of_part + (pass == Pass::kResident ? 2 * tiling.parts * tiling.slice_groups : 0);
};

// Find the moments of the thread's channels in a tile, and merge them with those of the `before` pixels of earlier tiles.
template <class T, int items>
DDPM_FAST_DEVICE void sum_tile(const Forward& p, const auto& at, const Vector<T> (&data)[items], int tile, int first,
                               const float4* small, float2* moments, float& before) {
  const float count = pixels_in_tile<items>(at, first);
  const float extra = items - count, share = reciprocal_approx(count);
  const float weight = count * reciprocal_approx(before + count);
  for (int w = 0; w < kWords; ++w) {
    float start[kPerWord<T>], sum[kPerWord<T>] = {}, m2[kPerWord<T>] = {};
    widen_word(data[0].words[w], T{}, start);
#pragma unroll
    for (int i = 0; i < items; ++i) {
      float value[kPerWord<T>];
      widen_word(data[i].words[w], T{}, value);
      for (int e = 0; e < kPerWord<T>; ++e) sum[e] += sizeof(T) == 4 ? value[e] - start[e] : value[e];
    }
    float base[kPerWord<T>], mean[kPerWord<T>];
    for (int e = 0; e < kPerWord<T>; ++e) {
      base[e] = sizeof(T) == 4 ? start[e] : 0;
      mean[e] = (sizeof(T) == 4 ? sum[e] : fmaf(-extra, start[e], sum[e])) * share;
    }
#pragma unroll
    for (int i = 0; i < items; ++i) {
      float value[kPerWord<T>];
      widen_word(data[i].words[w], T{}, value);
      for (int e = 0; e < kPerWord<T>; ++e) {
        const float deviation = value[e] - (base[e] + mean[e]);
        m2[e] = fmaf(deviation, deviation, m2[e]);
      }
    }
    for (int e = 0; e < kPerWord<T>; ++e) {
      const int element = w * kPerWord<T> + e;
      float2& slot = moments[element * p.tiling.rows * p.tiling.lanes + at.thread];
      const float off = start[e] - (base[e] + mean[e]), pivot = small[at.lane * kWidth<T> + element].w;
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

// Let one thread merge as many rows of a channel as a vector has elements.
template <class T>
DDPM_FAST_DEVICE void merge_rows(const Forward& p, const auto& at, const float4* small, const float2* moments,
                                 float4* merged) {
  const SliceTiling& tiling = p.tiling;
  const int chunks = tiling.rows / kWidth<T>, chunk = at.row / kWidth<T>, element = at.row % kWidth<T>;
  const int channel = at.lane * kWidth<T> + element;
  if (channel >= at.channels) return;
  const int from_row = at.row - element, each = at.pixels / tiling.rows,
            more = at.pixels - each * tiling.rows - from_row;
  const int rows = min(kWidth<T>, at.pixels - from_row);
  const float few = static_cast<float>(each), many = few + 1;  // pixels of a row
  const float count = static_cast<float>(each * max(rows, 0) + min(max(more, 0), kWidth<T>));
  const float2* from = moments + ((element * tiling.rows + from_row) * tiling.lanes + at.lane);
  float sum = 0, m2 = 0;
  for (int r = 0; r < kWidth<T>; ++r) {
    if (r < rows) sum = fmaf(r < more ? many : few, from[r * tiling.lanes].x, sum);
  }
  const float mean = sum * reciprocal_approx(fmaxf(count, 1));
  for (int r = 0; r < kWidth<T>; ++r) {
    if (r >= rows) continue;
    const float2 of_row = from[r * tiling.lanes];
    const float delta = of_row.x - mean;
    m2 = fmaf((r < more ? many : few) * delta, delta, m2 + of_row.y);
  }
  merged[channel * chunks + chunk] = {count, mean + small[channel].z, m2, 0};
}

// Let a warp save a group's mean and rstd, and compute the coefficients of its channels.
template <class T>
DDPM_FAST_DEVICE void finish_group(const Forward& p, const auto& at, int group, const Moments& of_group,
                                   const float4* small, float4* coefficients) {
  const float rstd = rstd_of(of_group, p.eps), pivot = small[group * p.group_channels].w;
  if (p.mean != nullptr && at.part == 0 && at.thread % kWarp == 0) {
    const int slab = at.first_slab + group;
    p.mean[slab] = pivot + of_group.mean;
    p.rstd[slab] = rstd;
  }
#pragma unroll 1
  for (int i = at.thread % kWarp; i < p.group_channels; i += kWarp) {
    const int channel = group * p.group_channels + i, element = channel % kWidth<T>;
    const float4 of = small[channel];
    const Coefficients of_channel = coefficients_of<T>({of.x, of.y, of.z}, of_group, pivot, rstd);
    float4* to = coefficients + element / kPerWord<T> * p.tiling.lanes + channel / kWidth<T>;
    if constexpr (kPerWord<T> == 2) {
      reinterpret_cast<float2*>(to)[element % 2] = {of_channel.a, of_channel.b};
    } else {
      *to = {of_channel.a, of_channel.b, of_channel.shift, of_channel.mean};
    }
  }
}

template <class T, bool silu, int items>
DDPM_FAST_DEVICE void apply_tile(const Forward& p, const auto& at, Vector<T> (&data)[items], int tile, int first,
                                 const float4* coefficients) {
  Coefficients of[kWidth<T>];
  for (int w = 0; w < kWords; ++w) {
    read_coefficients<T>(coefficients[w * p.tiling.lanes + at.lane], of + w * kPerWord<T>);
  }
  T* y = static_cast<T*>(p.y) + at.at_tile(tile);
  // Some vectors at a time: with all of them the compiler would run out of registers.
  constexpr int kTogether = 2;
#pragma unroll 1
  for (int pixel = first; pixel < at.end; pixel += kTogether * p.tiling.rows, y += kTogether * at.stride) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      map_words<T>(data[i], [&](int w, float (&values)[kPerWord<T>]) {
        for (int e = 0; e < kPerWord<T>; ++e) values[e] = apply<T, silu>(values[e], of[w * kPerWord<T> + e]);
      });
      if (pixel + i * p.tiling.rows < at.end) store(y + i * at.stride, data[i]);
    }
#pragma unroll
    for (int i = kTogether; i < items; ++i) data[i - kTogether] = data[i];
  }
}

template <class T, int items, Pass pass>
__global__ void __launch_bounds__(pass == Pass::kResident ? kLimits.channels_last_threads : kSmallThreads,
                                  pass == Pass::kResident ? 2 : 3) channels_last_kernel(const Forward p) {
  extern __shared__ float4 shared[];
  const SliceTiling& tiling = p.tiling;
  const Layout of{tiling, kWidth<T>, pass};
  float* const memory = reinterpret_cast<float*>(shared);
  float2* const moments = reinterpret_cast<float2*>(memory + of.moments);
  float4* const merged = reinterpret_cast<float4*>(memory + of.merged);
  float4* const small = reinterpret_cast<float4*>(memory + of.small);
  float4* const coefficients = reinterpret_cast<float4*>(memory + of.coefficients);
  float2* const of_part = reinterpret_cast<float2*>(memory + of.of_part);
  if (pass == Pass::kResident && tiling.parts > 1) cluster_arrive();
  const PixelSlice<T, items, pass, Forward> at{p};

  // A thread beyond the last pixel reads its first pixel of the tile again.
  Vector<T> data[items];
  const auto load = [&](int tile) {
    load_tile<items>(at, tile, [&](int i, bool exists, std::int64_t from, int offset) {
      data[i] = cuda::load<kWidth<T>>(static_cast<const T*>(p.x) + from + (exists ? offset : 0));
    });
  };
  load(0);
#pragma unroll 1
  for (int i = at.thread; i < at.channels; i += at.threads) {
    const Affine of = affine(p.inputs, at.first_channel + i, std::int64_t{at.sample} * p.c + at.first_channel + i);
    const T* pivot = static_cast<const T*>(p.x) + at.origin + i / p.group_channels * p.group_channels;
    small[i] = {of.gain, of.offset, of.shift, widen(*pivot)};
  }
  __syncthreads();

  if constexpr (pass != Pass::kApply) {
    float before = 0;  // pixels
    over_tiles(at, load, [&](int tile, int first) { sum_tile<T>(p, at, data, tile, first, small, moments, before); });
    __syncthreads();
    const int chunks = tiling.rows / kWidth<T>;
    merge_rows<T>(p, at, small, moments, merged);
    __syncthreads();
    exchange<pass>(at, p.partial, of_part, [&](int group) {
      const float4* from = merged + group * p.group_channels * chunks;
      const Moments of_group = warp_merge(p.group_channels * chunks, [&](int i) {
        const float4 of = from[i];
        return Moments{of.x, of.y, of.z};
      });
      return float2{of_group.mean, of_group.m2};
    });
    if constexpr (pass == Pass::kStatistics) return;
  }
  finish_groups<pass>(at, p.partial, of_part, [&](int group, auto get) {
    const Moments of_group =
        warp_merge(tiling.parts, [&](int i) { return moments_of_part(tiling, i, p.hw, p.group_channels, get(i)); });
    finish_group<T>(p, at, group, of_group, small, coefficients);
  });
  with_silu(p.silu, [&](auto silu) {
    over_tiles(at, load, [&](int tile, int first) {
      apply_tile<T, decltype(silu)::value>(p, at, data, tile, first, coefficients);
    });
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
void launch_pass(const Forward& p, std::int64_t samples, void* stream) {
  const auto kernel = p.channels_last ? channels_last_kernel<T, items, pass> : contiguous_kernel<T, items, pass>;
  const int floats = p.channels_last ? Layout{p.tiling, kWidth<T>, pass}.total : 0;
  launch_slices(kOp, kernel, p, kLimits, pass, floats * sizeof(float), samples, stream);
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
  set_shared(kOp, a, p);
  p.y = a.y;
  p.mean = static_cast<float*>(a.mean);
  p.rstd = static_cast<float*>(a.rstd);
  p.x = a.x;
  p.partial = static_cast<float2*>(a.workspace);
  p.eps = static_cast<float>(a.eps);
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
