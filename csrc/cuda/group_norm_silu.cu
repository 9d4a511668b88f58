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
constexpr Items kItems = {2, 8};

enum class Pass { kResident, kStatistics, kApply };

struct Forward {
  void* y;
  float *mean, *rstd;  // [n, groups], or absent
  const void* x;
  SmallInputs inputs;
  float2* partial;            // [n, slices, parts, groups of a slice]: mean and sum of squared deviations
  std::int64_t slabs, c, hw;  // slabs: n * groups
  int groups, group_channels;
  float eps;
  bool silu, channels_last;
  Tiling tiling;
};

// What is done to the values of a channel: act((x - center) a + b). center is folded into b except for float32, whose
// precision that would spoil where the mean is large beside the deviations.
struct Line {
  float a, b, center;
};

template <class T>
constexpr bool kKeepCenter = sizeof(T) == 4;

// `moments`: the group's, relative to `pivot`.
template <class T>
DDPM_FAST_DEVICE Line line(const Affine& affine, const Moments& moments, float pivot, float rstd) {
  const float mean = pivot + moments.mean, rest = moments.mean - (mean - pivot);  // rest: what rounding took from mean
  const float a = affine.gain * rstd, center = mean - affine.shift, b = fmaf(-rest, a, affine.offset);
  if constexpr (kKeepCenter<T>) return {a, b, center};
  return {a, fmaf(-center, a, b), 0};
}

template <class T, bool silu>
DDPM_FAST_DEVICE float apply(float x, const Line& line) {
  const float z = fmaf(kKeepCenter<T> ? x - line.center : x, line.a, line.b);
  if constexpr (silu) return z * sigmoid<T>(z);
  return z;
}

DDPM_FAST_DEVICE float rstd_of(const Moments& moments, float eps) {
  return reciprocal_root(fmaf(moments.m2, reciprocal_approx(moments.count), eps));
}

// -------------------------------------------------------------------------------------------------------- contiguous

// Blocks hold blockDim.y slices of blockDim.x threads.
template <class T, int items, Pass pass>
__global__ void __launch_bounds__(kMaxThreads) contiguous_kernel(const Forward p) {
  __shared__ Moments of_warp[kMaxThreads / kWarp];
  __shared__ float2 of_part[kMaxParts];
  const Tiling& tiling = p.tiling;
  const unsigned block = pass == Pass::kApply ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int part = static_cast<int>(block % tiling.parts);
  const std::int64_t wanted = std::int64_t{block / tiling.parts} * blockDim.y + threadIdx.y;
  const std::int64_t slab = wanted < p.slabs ? wanted : p.slabs - 1;
  const int row = static_cast<int>(threadIdx.x) / tiling.lanes, lane = static_cast<int>(threadIdx.x) % tiling.lanes;
  const bool active = wanted < p.slabs && row < tiling.rows;

  const int length = static_cast<int>(p.hw) / kWidth<T>;
  const int part_length = min(tiling.part_length, length - part * tiling.part_length);
  const int left = active ? part_length - lane : 0;  // vector i of this thread exists where i * lanes < left
  const std::int64_t first = slab * p.group_channels * p.hw;
  const std::int64_t at = first + row * p.hw + std::int64_t{part * tiling.part_length + lane} * kWidth<T>;
  const T* x = static_cast<const T*>(p.x) + at;
  Packed<T, kWidth<T>> data[items];
#pragma unroll
  for (int i = 0; i < items; ++i) {
    if (i * tiling.lanes < left) data[i] = load<kWidth<T>>(x + i * tiling.lanes * kWidth<T>);
  }
  const float pivot = widen(static_cast<const T*>(p.x)[first]);
  const std::int64_t channel_at = slab * p.group_channels + min(row, p.group_channels - 1);  // in [n, c]
  const Affine small = affine(p.inputs, channel_at % p.c, channel_at);

  // From the merged moments on.
  const auto finish = [&](const Moments& moments) {
    const float rstd = rstd_of(moments, p.eps);
    if (p.mean != nullptr && part == 0 && threadIdx.x == 0 && active) {
      p.mean[slab] = pivot + moments.mean;
      p.rstd[slab] = rstd;
    }
    const Line of_channel = line<T>(small, moments, pivot, rstd);
    T* y = static_cast<T*>(p.y) + at;
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
    const float2* partial = p.partial + slab * tiling.parts;
    finish(warp_merge(tiling.parts, [&](int i) { return Moments{count_of(i), partial[i].x, partial[i].y}; }));
    return;
  }

  if (pass == Pass::kResident && tiling.parts > 1) cluster_sync();  // the others have started: their memory exists
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
  if (blockDim.x > kWarp) {
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = moments;
    __syncthreads();
    moments = warp_merge(static_cast<int>(blockDim.x) / kWarp, [&](int i) { return of_warp[i]; });
  }
  if constexpr (pass == Pass::kStatistics) {
    if (threadIdx.x == 0) p.partial[slab * tiling.parts + part] = {moments.mean, moments.m2};
  } else {
    if (tiling.parts > 1) {
      if (static_cast<int>(threadIdx.x) < tiling.parts) *in_block(&of_part[part], threadIdx.x) = {moments.mean, moments.m2};
      cluster_sync();
      moments = warp_merge(tiling.parts, [&](int i) { return Moments{count_of(i), of_part[i].x, of_part[i].y}; });
    }
    finish(moments);
  }
}

// ------------------------------------------------------------------------------------------------------ channels_last

// Shared memory, as offsets in floats. In slot order neighbouring threads have neighbouring addresses: of the elements
// of a vector those of the first word, of all lanes, come first.
struct Layout {
  int moments;  // [words, rows, lanes, elements of a word]: mean and m2 of a thread's channels
  int merged;   // [channels, chunks]: mean and m2 of some rows of a channel
  int small;    // [channels]: gain, offset, shift, pivot
  int lines;    // [words, lanes]: a and b of two channels, or a, b and center of one
  int of_part;  // [parts, groups]: mean and m2
  int total;
};

__host__ __device__ inline Layout layout(const Tiling& tiling, int width, int group_channels, Pass pass) {
  const int channels = tiling.slice_channels, elements = tiling.rows * tiling.lanes * width;
  Layout at{};
  at.merged = pass == Pass::kApply ? 0 : 2 * elements;
  at.small = at.merged + (pass == Pass::kApply ? 0 : (2 * channels * chunks_of(tiling, width) + 3) / 4 * 4);
  at.lines = at.small + 4 * channels;
  at.of_part = at.lines + 4 * kWords * tiling.lanes;
  at.total = at.of_part + (pass == Pass::kResident ? 2 * tiling.parts * (channels / group_channels) : 0);
  return at;
}

template <class T, int items, Pass pass>
__global__ void __launch_bounds__(kMaxThreads) channels_last_kernel(const Forward p) {
  extern __shared__ float4 shared[];
  constexpr int kEach = kPerWord<T>;
  const Tiling& tiling = p.tiling;
  const Layout at = layout(tiling, kWidth<T>, p.group_channels, pass);
  float* const memory = reinterpret_cast<float*>(shared);
  float2* const moments = reinterpret_cast<float2*>(memory + at.moments);
  float2* const merged = reinterpret_cast<float2*>(memory + at.merged);
  float4* const small = reinterpret_cast<float4*>(memory + at.small);
  float4* const lines = reinterpret_cast<float4*>(memory + at.lines);
  float2* const of_part = reinterpret_cast<float2*>(memory + at.of_part);

  const unsigned block = pass == Pass::kApply ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int part = static_cast<int>(block % tiling.parts),
            slice = static_cast<int>(block / tiling.parts % tiling.slices);
  const std::int64_t sample = block / tiling.parts / tiling.slices;
  const int first_channel = slice * tiling.slice_channels;
  const int channels = min(tiling.slice_channels, static_cast<int>(p.c) - first_channel);
  const int groups = channels / p.group_channels;
  const int first_pixel = part * tiling.part_length,
            pixels = min(tiling.part_length, static_cast<int>(p.hw) - first_pixel);
  const int thread = static_cast<int>(threadIdx.x), row = thread / tiling.lanes, lane = thread % tiling.lanes;
  const int warp = thread / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  // The thread's pixels are row, row + rows, ..., those below `end`.
  const int end = row < tiling.rows && lane * kWidth<T> < channels ? pixels : 0;
  const std::int64_t origin = sample * p.hw * p.c + first_channel;
  const std::int64_t at_lane = origin + first_pixel * p.c + lane * kWidth<T>;
  const int tiles = pass == Pass::kResident ? 1 : tiling.tiles, tile_pixels = tiling.rows * items;

  // In place of pixels that do not exist the thread has its first one of the tile.
  Packed<T, kWidth<T>> data[items];
  const auto load_tile = [&](int tile) {
    const int first = row + tile * tile_pixels;
    if (first >= end) return;
    const T* x = static_cast<const T*>(p.x) + at_lane + first * p.c;
    const int stride = tiling.rows * static_cast<int>(p.c);
#pragma unroll
    for (int i = 0; i < items; ++i) {
      data[i] = load<kWidth<T>>(x + (first + i * tiling.rows < end ? i * stride : 0));
    }
  };
  load_tile(0);
  for (int i = thread; i < channels; i += static_cast<int>(blockDim.x)) {
    const Affine of = affine(p.inputs, first_channel + i, sample * p.c + first_channel + i);
    const T* pivot = static_cast<const T*>(p.x) + origin + i / p.group_channels * p.group_channels;
    small[i] = {of.gain, of.offset, of.shift, widen(*pivot)};
  }

  // From a group's merged moments on: what is saved, and its channels' lines. By a warp.
  const auto finish = [&](int group, const Moments& of_group) {
    const float rstd = rstd_of(of_group, p.eps), pivot = small[group * p.group_channels].w;
    if (p.mean != nullptr && part == 0 && thread % kWarp == 0) {
      const std::int64_t slab = sample * p.groups + first_channel / p.group_channels + group;
      p.mean[slab] = pivot + of_group.mean;
      p.rstd[slab] = rstd;
    }
    for (int i = thread % kWarp; i < p.group_channels; i += kWarp) {
      const int channel = group * p.group_channels + i;
      const float4 of = small[channel];
      const Line of_channel = line<T>({of.x, of.y, of.z}, of_group, pivot, rstd);
      const int element = channel % kWidth<T>;
      float4* to = lines + element / kEach * tiling.lanes + channel / kWidth<T>;
      if constexpr (kEach == 2) {
        reinterpret_cast<float2*>(to)[element % 2] = {of_channel.a, of_channel.b};
      } else {
        *to = {of_channel.a, of_channel.b, of_channel.center, 0};
      }
    }
  };
  const auto count_of = [&](int of) {  // the values of a group in a part
    return static_cast<float>(min(tiling.part_length, static_cast<int>(p.hw) - of * tiling.part_length)) *
           static_cast<float>(p.group_channels);
  };

  if constexpr (pass != Pass::kApply) {
    if (pass == Pass::kResident && tiling.parts > 1) {
      cluster_sync();  // the others have started: their memory exists
    } else {
      __syncthreads();
    }
    // Of the thread's channels, over the tiles.
    float before = 0;  // pixels
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
          float2* slot = moments + (w * tiling.rows * tiling.lanes + thread) * kEach;
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            const float off = start[e] - (base[e] + mean[e]), pivot = small[lane * kWidth<T> + w * kEach + e].w;
            Moments all = {0, base[e] - pivot + mean[e], fmaxf(fmaf(-extra * off, off, m2[e]), 0)};
            if (tile > 0) {
              const float2 old = slot[e];
              const float delta = all.mean - old.x;
              all.mean = fmaf(delta, weight, old.x);
              all.m2 += fmaf(delta * delta, before * weight, old.y);
            }
            slot[e] = {all.mean, all.m2};
          }
        }
        before += count;
      }
      if (tile + 1 < tiles) load_tile(tile + 1);
    }
    __syncthreads();

    // Of stretches of rows of a channel.
    const int chunks = chunks_of(tiling, kWidth<T>), chunk_rows = (tiling.rows + chunks - 1) / chunks;
    const int each = pixels / tiling.rows, more = pixels % tiling.rows;  // pixels of a row: one more of the first ones
    const auto rows_before = [&](int chunk) { return min(chunk * chunk_rows, min(tiling.rows, pixels)); };
    const auto pixels_before = [&](int chunk) { return rows_before(chunk) * each + min(rows_before(chunk), more); };
    const auto pixels_of = [&](int chunk) {
      return static_cast<float>(pixels_before(chunk + 1) - pixels_before(chunk));
    };
    const int slots = tiling.lanes * kWidth<T>;
    for (int i = thread; i < chunks * slots; i += static_cast<int>(blockDim.x)) {
      const int chunk = i / slots, slot = i % slots, word = slot / (tiling.lanes * kEach),
                rest = slot % (tiling.lanes * kEach);
      const int channel = rest / kEach * kWidth<T> + word * kEach + rest % kEach;
      if (channel >= channels) continue;
      const float2* from = moments + word * tiling.rows * tiling.lanes * kEach + rest;
      const int from_row = rows_before(chunk), to_row = rows_before(chunk + 1);
      float sum = 0, m2 = 0;
      for (int r = from_row; r < to_row; ++r) {
        sum = fmaf(from[r * tiling.lanes * kEach].x, static_cast<float>(each + (r < more)), sum);
      }
      const float mean = sum * reciprocal_approx(fmaxf(pixels_of(chunk), 1));
      for (int r = from_row; r < to_row; ++r) {
        const float2 of_row = from[r * tiling.lanes * kEach];
        const float delta = of_row.x - mean;
        m2 = fmaf(delta * delta, static_cast<float>(each + (r < more)), m2 + of_row.y);
      }
      merged[channel * chunks + chunk] = {mean + small[channel].z, m2};
    }
    __syncthreads();

    // Of groups.
    for (int group = warp; group < groups; group += warps) {
      const float2* from = merged + group * p.group_channels * chunks;
      const Moments of_group = warp_merge(p.group_channels * chunks,
                                          [&](int i) { return Moments{pixels_of(i % chunks), from[i].x, from[i].y}; });
      const float2 result = {of_group.mean, of_group.m2};
      if constexpr (pass == Pass::kStatistics) {
        const std::int64_t slot = (sample * tiling.slices + slice) * tiling.parts + part;
        if (thread % kWarp == 0) p.partial[slot * (tiling.slice_channels / p.group_channels) + group] = result;
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
    for (int group = warp; group < groups; group += warps) {
      finish(group, warp_merge(tiling.parts, [&](int i) {
               const float2 of = of_part[i * groups + group];
               return Moments{count_of(i), of.x, of.y};
             }));
    }
  } else {
    __syncthreads();
    const int most_groups = tiling.slice_channels / p.group_channels;
    const float2* partial = p.partial + (sample * tiling.slices + slice) * tiling.parts * most_groups;
    for (int group = warp; group < groups; group += warps) {
      finish(group, warp_merge(tiling.parts, [&](int i) {
               const float2 of = partial[i * most_groups + group];
               return Moments{count_of(i), of.x, of.y};
             }));
    }
  }
  __syncthreads();

  with_silu(p.silu, [&](auto silu) {
    for (int tile = 0; tile < tiles; ++tile) {
      const int first = row + tile * tile_pixels;
      if (first < end) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const float4 of_word = lines[w * tiling.lanes + lane];
          const Line of[2] = {{of_word.x, of_word.y, of_word.z}, {of_word.z, of_word.w, 0}};
#pragma unroll
          for (int i = 0; i < items; ++i) {
            float value[kEach];
            widen_word(data[i].words[w], T{}, value);
#pragma unroll
            for (int e = 0; e < kEach; ++e) value[e] = apply<T, decltype(silu)::value>(value[e], of[e]);
            data[i].words[w] = narrow_word(value, T{});
          }
        }
        T* y = static_cast<T*>(p.y) + at_lane + first * p.c;
        const int stride = tiling.rows * static_cast<int>(p.c);
#pragma unroll
        for (int i = 0; i < items; ++i) {
          if (first + i * tiling.rows < end) store(y + i * stride, data[i]);
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
  const std::int64_t values = p.group_channels * p.hw;
  const float count = static_cast<float>(values), pivot = values > 0 ? widen(*x) : 0;
  float sum = 0, m2 = 0;
  over_values([&](std::int64_t channel, std::int64_t at) { sum += widen(x[at]) - pivot + shift(channel); });
  Moments moments = {count, block_sum(sum) / count, 0};
  over_values([&](std::int64_t channel, std::int64_t at) {
    const float deviation = widen(x[at]) - pivot + shift(channel) - moments.mean;
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
    const Line of_channel = line<T>(small(channel), moments, pivot, rstd);
    const float value = widen(x[at]);
    const float result[] = {p.silu ? apply<T, true>(value, of_channel) : apply<T, false>(value, of_channel)};
    store<1>(y + at, result);
  });
}

// ----------------------------------------------------------------------------------------------------------- launches

std::optional<Tiling> tiling_of(DType dtype, const Shape& shape, std::int64_t groups) {
  return TilingRules(dtype, shape, groups, kItems, card(kOp).clusters).tiling();
}

template <class T, int items, Pass pass>
void launch_pass(const Forward& p, void* stream) {
  const Tiling& tiling = p.tiling;
  const unsigned threads = static_cast<unsigned>(tiling.threads());
  Dims dims;
  dims.cluster = pass == Pass::kResident ? static_cast<unsigned>(tiling.parts) : 1;
  if (p.channels_last) {
    dims.block = dim3(threads);
    dims.grid = grid(kOp, p.slabs / p.groups * tiling.slices * tiling.parts);
    dims.shared_bytes = layout(tiling, kWidth<T>, p.group_channels, pass).total * sizeof(float);
    launch(kOp, channels_last_kernel<T, items, pass>, dims, stream, p);
  } else {
    dims.block = dim3(threads, slices_of_block(tiling));
    dims.grid = grid(kOp, divide_up(p.slabs, dims.block.y) * tiling.parts);
    launch(kOp, contiguous_kernel<T, items, pass>, dims, stream, p);
  }
}

}  // namespace

std::int64_t group_norm_silu_workspace(DType dtype, const Shape& shape, std::int64_t groups) {
  const auto tiling = tiling_of(dtype, shape, groups);
  if (!tiling || tiling->resident) return 0;
  const std::int64_t slice_groups = tiling->slice_channels / (shape.c / groups);
  return shape.n * tiling->slices * tiling->parts * slice_groups * static_cast<std::int64_t>(sizeof(float2));
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
  p.slabs = a.shape.n * a.groups;
  p.c = a.shape.c;
  p.hw = a.shape.hw;
  p.groups = static_cast<int>(a.groups);
  p.group_channels = static_cast<int>(a.shape.c / a.groups);
  p.eps = static_cast<float>(a.eps);
  p.silu = a.silu;
  p.channels_last = a.shape.channels_last;
  const auto tiling = tiling_of(a.dtype, a.shape, a.groups);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    void* stream = a.run_on.stream();
    if (!tiling || !is_aligned({a.x, a.y})) {
      launch(kOp, scalar_kernel<T>, {grid(kOp, p.slabs), dim3(kScalarThreads)}, stream, p);
      return;
    }
    p.tiling = *tiling;
    if (!tiling->resident) {
      launch_pass<T, kItems.many, Pass::kStatistics>(p, stream);
      launch_pass<T, kItems.many, Pass::kApply>(p, stream);
    } else if (tiling->items == kItems.many) {
      launch_pass<T, kItems.many, Pass::kResident>(p, stream);
    } else {
      launch_pass<T, kItems.few, Pass::kResident>(p, stream);
    }
  });
}

}  // namespace ddpm_fast::cuda
