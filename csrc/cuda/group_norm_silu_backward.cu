// Gradients of group_norm_silu; group_norm.h says how the work is cut.
//
// With h = x + shift, x_hat = (h - mean) rstd, z = x_hat gain + offset, gain = weight (1 + scale), offset = bias (1 +
// scale) + scale_shift, y = act(z) and g = dy act'(z):
//   S1 = sum of g, S2 = sum of g x_hat, for each sample and channel
//   dscale_shift = S1, dscale = weight S2 + bias S1
//   dweight = sum over samples of (1 + scale) S2, dbias = sum over samples of (1 + scale) S1
//   m1, m2 = sum of gain S1, gain S2 over the group's channels, by its number of values
//   dx = rstd (gain g - m1 - x_hat m2), dshift = sum of dx
// x and dy stay in registers, packed as they came, where a slice fits; g is made twice, which takes no room. The sums
// are of g d and d with d = h - mean; that of d is not 0, since the saved mean is rounded, and sets right what follows
// from d. A last kernel makes the gradients of the small inputs from the sums of every sample, part and channel.
#include "cuda/group_norm.h"
#include "cuda/kernels.h"

namespace ddpm_fast::cuda {

namespace {

constexpr const char* kOp = "group_norm_silu_backward";
constexpr Items kItems = {1, 4};

enum class Pass { kResident, kSums, kApply };

// Of a channel's or a group's values.
struct Sums {
  float g, gd, d;
};

// dx = g a + d q + r. m0: the mean of d.
struct Slope {
  float q, r, m0;
};

struct Backward {
  void* dx;
  const void *dy, *x;
  const float *mean, *rstd;  // [n, groups]
  SmallInputs inputs;
  float* sums;                // [n, parts, 3, c]: of g, g d and d; absent where no gradient of a small input is wanted
  Slope* slopes;              // [n, groups]
  Sums* partial;              // [n, slices, parts, groups of a slice]: of gain g, gain g d and d
  std::int64_t slabs, c, hw;  // slabs: n * groups
  int groups, group_channels;
  bool deviations;  // whether sums of d are made; without them they count as 0
  bool silu, channels_last;
  Tiling tiling;
};

// What is known of a channel before the sums: d = x - center, z = d a + offset.
struct Channel {
  float center, a, offset, gain;
};

DDPM_FAST_DEVICE Channel channel_of(const Affine& affine, float mean, float rstd) {
  return {mean - affine.shift, affine.gain * rstd, affine.offset, affine.gain};
}

template <class T, bool silu>
DDPM_FAST_DEVICE float gradient(float dy, float d, const Channel& channel) {
  if constexpr (!silu) return dy;
  const float z = fmaf(d, channel.a, channel.offset), s = sigmoid<T>(z);
  return dy * fmaf(z * s, 1 - s, s);
}

DDPM_FAST_DEVICE float dx(float g, float d, float a, const Slope& slope) {
  return fmaf(g, a, fmaf(d, slope.q, slope.r));
}

// `total`: of gain g, gain g d and d over a group of `count` values.
DDPM_FAST_DEVICE Slope slope_of(const Sums& total, float count, float rstd) {
  const float share = 1 / count, m0 = total.d * share, m1 = total.g * share;
  const float m2 = (total.gd - m0 * total.g) * rstd * share, q = -m2 * rstd * rstd;
  return {q, fmaf(-q, m0, -m1 * rstd), m0};
}

DDPM_FAST_DEVICE Sums warp_total(const Sums& own) { return {warp_sum(own.g), warp_sum(own.gd), warp_sum(own.d)}; }

DDPM_FAST_DEVICE Sums operator+(const Sums& a, const Sums& b) { return {a.g + b.g, a.gd + b.gd, a.d + b.d}; }

// Of get(0), ..., get(number - 1), for every lane of a warp.
template <class Get>
DDPM_FAST_DEVICE Sums warp_total(int number, Get get) {
  Sums own = {};
  for (int i = threadIdx.x % kWarp; i < number; i += kWarp) own = own + get(i);
  return warp_total(own);
}

// -------------------------------------------------------------------------------------------------------- contiguous

// Blocks hold blockDim.y slices of blockDim.x threads.
template <class T, int items, Pass pass>
__global__ void __launch_bounds__(kMaxThreads) contiguous_kernel(const Backward p) {
  extern __shared__ float4 shared[];
  __shared__ Sums of_part[kMaxParts];
  const Tiling& tiling = p.tiling;
  const unsigned block = pass == Pass::kApply ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int part = static_cast<int>(block % tiling.parts);
  const std::int64_t wanted = std::int64_t{block / tiling.parts} * blockDim.y + threadIdx.y;
  const std::int64_t slab = wanted < p.slabs ? wanted : p.slabs - 1;
  const int row = static_cast<int>(threadIdx.x) / tiling.lanes, lane = static_cast<int>(threadIdx.x) % tiling.lanes;
  const bool exists = wanted < p.slabs, active = exists && row < tiling.rows;

  const int length = static_cast<int>(p.hw) / kWidth<T>;
  const int part_length = min(tiling.part_length, length - part * tiling.part_length);
  const int left = active ? part_length - lane : 0;  // vector i of this thread exists where i * lanes < left
  const std::int64_t first = slab * p.group_channels * p.hw;
  const std::int64_t at = first + row * p.hw + std::int64_t{part * tiling.part_length + lane} * kWidth<T>;
  Packed<T, kWidth<T>> x[items], dy[items];
#pragma unroll
  for (int i = 0; i < items; ++i) {
    if (i * tiling.lanes >= left) continue;
    x[i] = load<kWidth<T>>(static_cast<const T*>(p.x) + at + i * tiling.lanes * kWidth<T>);
    dy[i] = load<kWidth<T>>(static_cast<const T*>(p.dy) + at + i * tiling.lanes * kWidth<T>);
  }
  const std::int64_t first_channel = slab * p.group_channels, channel_at = first_channel + min(row, tiling.rows - 1);
  const float mean = p.mean[slab], rstd = p.rstd[slab];
  const Channel channel = channel_of(affine(p.inputs, channel_at % p.c, channel_at), mean, rstd);

  // From the sums over the group on.
  const auto finish = [&](const Sums& total) {
    const float count = static_cast<float>(length) * static_cast<float>(p.group_channels * kWidth<T>);
    const Slope slope = slope_of(total, count, rstd);
    if (p.sums != nullptr && part == 0 && threadIdx.x == 0 && exists) p.slopes[slab] = slope;
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
            const float d = value[e] - channel.center;
            value[e] = dx(gradient<T, decltype(silu)::value>(gradients[e], d, channel), d, channel.a, slope);
          }
          x[i].words[w] = narrow_word(value, T{});
        }
        store(static_cast<T*>(p.dx) + at + i * tiling.lanes * kWidth<T>, x[i]);
      }
    });
  };

  if constexpr (pass == Pass::kApply) {
    const Sums* partial = p.partial + slab * tiling.parts;
    finish(warp_total(tiling.parts, [&](int i) { return partial[i]; }));
    return;
  }

  if (pass == Pass::kResident && tiling.parts > 1) cluster_sync();  // the others have started: their memory exists
  float g[kWords] = {}, gd[kWords] = {}, d[kWords] = {};
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
          const float deviation = value[e] - channel.center;
          const float of_value = gradient<T, decltype(silu)::value>(gradients[e], deviation, channel);
          g[w] += of_value;
          gd[w] = fmaf(of_value, deviation, gd[w]);
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
        for (const float v : value) d[w] += v - channel.center;
      }
    }
  }
  // Of the lanes of a channel that are in one warp, then of channels.
  Sums own = {tree_sum(g), tree_sum(gd), tree_sum(d)};
  const int width = min(tiling.lanes, kWarp), slots_of_channel = tiling.lanes / width,
            slots = tiling.rows * slots_of_channel;
  for (int distance = width / 2; distance > 0; distance /= 2) {
    own.g += __shfl_xor_sync(0xFFFFFFFF, own.g, distance);
    own.gd += __shfl_xor_sync(0xFFFFFFFF, own.gd, distance);
    own.d += __shfl_xor_sync(0xFFFFFFFF, own.d, distance);
  }
  float4* of_slot = shared + threadIdx.y * slots;
  if (row < tiling.rows && lane % width == 0) {
    of_slot[static_cast<int>(threadIdx.x) / width] = {own.g, own.gd, own.d, channel.gain};
  }
  __syncthreads();
  if (p.sums != nullptr && exists) {
    const std::int64_t sample = slab / p.groups;
    float* to = p.sums + (sample * tiling.parts + part) * 3 * p.c + first_channel % p.c;
    for (int i = static_cast<int>(threadIdx.x); i < tiling.rows; i += static_cast<int>(blockDim.x)) {
      Sums sums = {};
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
    if (threadIdx.x == 0) p.partial[slab * tiling.parts + part] = total;
  } else {
    if (tiling.parts > 1) {
      if (static_cast<int>(threadIdx.x) < tiling.parts) *in_block(&of_part[part], threadIdx.x) = total;
      cluster_sync();
      total = warp_total(tiling.parts, [&](int i) { return of_part[i]; });
    }
    finish(total);
  }
}

// ------------------------------------------------------------------------------------------------------ channels_last

// Shared memory, as offsets in floats. Neighbouring threads have neighbouring addresses: of the elements of a vector
// the first one, of all lanes, comes first.
struct Layout {
  int channels;  // [elements, lanes] Channel
  int slopes;    // [groups] Slope
  int sums;      // [elements, rows, lanes] g and g d, then as many d
  int merged;    // [channels, chunks] Sums
  int of_part;   // [parts, groups] Sums
  int total;
};

__host__ __device__ inline Layout layout(const Tiling& tiling, int width, int group_channels, Pass pass) {
  const int channels = tiling.slice_channels, groups = channels / group_channels;
  const int elements = tiling.rows * tiling.lanes * width;
  Layout at{};
  at.slopes = 4 * width * tiling.lanes;
  at.sums = at.slopes + (3 * groups + 3) / 4 * 4;
  at.merged = at.sums + (pass == Pass::kApply ? 0 : 3 * elements);
  at.of_part = at.merged + (pass == Pass::kApply ? 0 : 3 * channels * chunks_of(tiling, width));
  at.total = at.of_part + (pass == Pass::kResident ? 3 * tiling.parts * groups : 0);
  return at;
}

template <class T, int items, Pass pass>
__global__ void __launch_bounds__(kMaxThreads) channels_last_kernel(const Backward p) {
  extern __shared__ float4 shared[];
  constexpr int kEach = kPerWord<T>;
  const Tiling& tiling = p.tiling;
  const Layout at = layout(tiling, kWidth<T>, p.group_channels, pass);
  float* const memory = reinterpret_cast<float*>(shared);
  float4* const table = shared;
  Slope* const slopes = reinterpret_cast<Slope*>(memory + at.slopes);
  const int elements = tiling.rows * tiling.lanes * kWidth<T>;
  float2* const sums_of_g = reinterpret_cast<float2*>(memory + at.sums);
  float* const sums_of_d = memory + at.sums + 2 * elements;
  Sums* const merged = reinterpret_cast<Sums*>(memory + at.merged);
  Sums* const of_part = reinterpret_cast<Sums*>(memory + at.of_part);

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
  const std::int64_t at_lane = (sample * p.hw + first_pixel) * p.c + first_channel + lane * kWidth<T>;
  const int tiles = pass == Pass::kResident ? 1 : tiling.tiles, tile_pixels = tiling.rows * items;
  const int stride = tiling.rows * static_cast<int>(p.c);
  const std::int64_t first_slab = sample * p.groups + first_channel / p.group_channels;

  // In place of pixels that do not exist the thread has its first one of the tile, with dy = 0.
  Packed<T, kWidth<T>> x[items], dy[items];
  const auto load_tile = [&](int tile) {
    const int first = row + tile * tile_pixels;
    if (first >= end) return;
    const std::int64_t from = at_lane + first * p.c;
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const bool exists = first + i * tiling.rows < end;
      x[i] = load<kWidth<T>>(static_cast<const T*>(p.x) + from + (exists ? i * stride : 0));
      dy[i] = exists ? load<kWidth<T>>(static_cast<const T*>(p.dy) + from + i * stride) : Packed<T, kWidth<T>>{};
    }
  };
  load_tile(0);
  const auto slot_of = [&](int channel) { return channel % kWidth<T> * tiling.lanes + channel / kWidth<T>; };
  for (int i = thread; i < channels; i += static_cast<int>(blockDim.x)) {
    const std::int64_t slab = first_slab + i / p.group_channels;
    const Affine of = affine(p.inputs, first_channel + i, sample * p.c + first_channel + i);
    const Channel channel = channel_of(of, p.mean[slab], p.rstd[slab]);
    table[slot_of(i)] = {channel.center, channel.a, channel.offset, channel.gain};
  }
  const auto channel_at = [&](int element) {
    const float4 of = table[element * tiling.lanes + lane];
    return Channel{of.x, of.y, of.z, of.w};
  };

  // From the sums over a group on. By a warp.
  const auto finish = [&](int group, const Sums& total) {
    const float count = static_cast<float>(p.hw) * static_cast<float>(p.group_channels);
    const Slope slope = slope_of(total, count, p.rstd[first_slab + group]);
    if (thread % kWarp != 0) return;
    slopes[group] = slope;
    if (p.sums != nullptr && part == 0) p.slopes[first_slab + group] = slope;
  };

  if (pass == Pass::kResident && tiling.parts > 1) {
    cluster_sync();  // the others have started: their memory exists
  } else {
    __syncthreads();
  }
  if constexpr (pass != Pass::kApply) {
    // Of the thread's channels, over the tiles.
    for (int tile = 0; tile < tiles; ++tile) {
      const int first = row + tile * tile_pixels;
      if (first < end) {
        const auto add = [&](int element, const Sums& sums) {
          const int slot = element * tiling.rows * tiling.lanes + thread;
          const float2 before = tile > 0 ? sums_of_g[slot] : float2{};
          sums_of_g[slot] = {before.x + sums.g, before.y + sums.gd};
        };
        with_silu(p.silu, [&](auto silu) {
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            Channel channel[kEach];
            Sums sums[kEach] = {};
#pragma unroll
            for (int e = 0; e < kEach; ++e) channel[e] = channel_at(w * kEach + e);
#pragma unroll
            for (int i = 0; i < items; ++i) {
              float value[kEach], gradients[kEach];
              widen_word(x[i].words[w], T{}, value);
              widen_word(dy[i].words[w], T{}, gradients);
#pragma unroll
              for (int e = 0; e < kEach; ++e) {
                const float d = value[e] - channel[e].center;
                const float g = gradient<T, decltype(silu)::value>(gradients[e], d, channel[e]);
                sums[e].g += g;
                sums[e].gd = fmaf(g, d, sums[e].gd);
              }
            }
#pragma unroll
            for (int e = 0; e < kEach; ++e) add(w * kEach + e, sums[e]);
          }
        });
        if (p.deviations) {
          float count = 0;
#pragma unroll
          for (int i = 0; i < items; ++i) count += first + i * tiling.rows < end ? 1 : 0;
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            float sum[kEach] = {}, start[kEach];
            widen_word(x[0].words[w], T{}, start);
#pragma unroll
            for (int i = 0; i < items; ++i) {
              float value[kEach];
              widen_word(x[i].words[w], T{}, value);
#pragma unroll
              for (int e = 0; e < kEach; ++e) sum[e] += value[e] - start[e];
            }
#pragma unroll
            for (int e = 0; e < kEach; ++e) {
              const int slot = (w * kEach + e) * tiling.rows * tiling.lanes + thread;
              const float of_tile = fmaf(start[e] - channel_at(w * kEach + e).center, count, sum[e]);
              sums_of_d[slot] = (tile > 0 ? sums_of_d[slot] : 0) + of_tile;
            }
          }
        }
      }
      if (tile + 1 < tiles) load_tile(tile + 1);
    }
    __syncthreads();

    // Of stretches of rows of a channel.
    const int chunks = chunks_of(tiling, kWidth<T>), chunk_rows = (tiling.rows + chunks - 1) / chunks;
    const int rows = min(tiling.rows, pixels), slots = tiling.lanes * kWidth<T>;
    for (int i = thread; i < chunks * slots; i += static_cast<int>(blockDim.x)) {
      const int chunk = i / slots, slot = i % slots;
      const int element = slot / tiling.lanes, in_row = slot % tiling.lanes, channel = in_row * kWidth<T> + element;
      if (channel >= channels) continue;
      Sums sums = {};
      for (int r = chunk * chunk_rows; r < min(rows, (chunk + 1) * chunk_rows); ++r) {
        const int from = (element * tiling.rows + r) * tiling.lanes + in_row;
        sums = sums + Sums{sums_of_g[from].x, sums_of_g[from].y, p.deviations ? sums_of_d[from] : 0};
      }
      merged[channel * chunks + chunk] = sums;
    }
    __syncthreads();

    // Of channels and groups.
    for (int group = warp; group < groups; group += warps) {
      const Sums total = warp_total(p.group_channels, [&](int i) {
        const int channel = group * p.group_channels + i;
        Sums sums = {};
        for (int chunk = 0; chunk < chunks; ++chunk) sums = sums + merged[channel * chunks + chunk];
        if (p.sums != nullptr) {
          float* to = p.sums + (sample * tiling.parts + part) * 3 * p.c + first_channel + channel;
          to[0] = sums.g;
          to[p.c] = sums.gd;
          to[2 * p.c] = sums.d;
        }
        const float gain = table[slot_of(channel)].w;
        return Sums{sums.g * gain, sums.gd * gain, sums.d};
      });
      if constexpr (pass == Pass::kSums) {
        const std::int64_t slot = (sample * tiling.slices + slice) * tiling.parts + part;
        if (thread % kWarp == 0) p.partial[slot * (tiling.slice_channels / p.group_channels) + group] = total;
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
    for (int group = warp; group < groups; group += warps) {
      finish(group, warp_total(tiling.parts, [&](int i) { return of_part[i * groups + group]; }));
    }
  } else {
    const int most_groups = tiling.slice_channels / p.group_channels;
    const Sums* partial = p.partial + (sample * tiling.slices + slice) * tiling.parts * most_groups;
    for (int group = warp; group < groups; group += warps) {
      finish(group, warp_total(tiling.parts, [&](int i) { return partial[i * most_groups + group]; }));
    }
  }
  __syncthreads();

  with_silu(p.silu, [&](auto silu) {
    for (int tile = 0; tile < tiles; ++tile) {
      const int first = row + tile * tile_pixels;
      if (first < end) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          Channel channel[kEach];
          Slope slope[kEach];
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            channel[e] = channel_at(w * kEach + e);
            slope[e] = slopes[(lane * kWidth<T> + w * kEach + e) / p.group_channels];
          }
#pragma unroll
          for (int i = 0; i < items; ++i) {
            float value[kEach], gradients[kEach];
            widen_word(x[i].words[w], T{}, value);
            widen_word(dy[i].words[w], T{}, gradients);
#pragma unroll
            for (int e = 0; e < kEach; ++e) {
              const float d = value[e] - channel[e].center;
              const float g = gradient<T, decltype(silu)::value>(gradients[e], d, channel[e]);
              value[e] = dx(g, d, channel[e].a, slope[e]);
            }
            x[i].words[w] = narrow_word(value, T{});
          }
        }
        T* to = static_cast<T*>(p.dx) + at_lane + first * p.c;
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

// A block for each group, one value at a time: for tensors that are not made of whole vectors.
template <class T>
__global__ void __launch_bounds__(kScalarThreads) scalar_kernel(const Backward p) {
  const std::int64_t slab = blockIdx.x, sample = slab / p.groups, first_channel = slab % p.groups * p.group_channels;
  const std::int64_t origin = p.channels_last ? sample * p.hw * p.c + first_channel : slab * p.group_channels * p.hw;
  const float mean = p.mean[slab], rstd = p.rstd[slab];
  const T *const x = static_cast<const T*>(p.x) + origin, *const dy = static_cast<const T*>(p.dy) + origin;
  const auto affine_at = [&](std::int64_t channel) {
    return affine(p.inputs, first_channel + channel, sample * p.c + first_channel + channel);
  };
  // In this order it is 0 for a value that is all of its group, as it should be.
  const auto deviation = [&](std::int64_t at, const Affine& small) { return widen(x[at]) + small.shift - mean; };
  const auto gradient_at = [&](std::int64_t at, float d, const Channel& channel) {
    const float of_y = widen(dy[at]);
    return p.silu ? gradient<T, true>(of_y, d, channel) : gradient<T, false>(of_y, d, channel);
  };

  Sums total = {};
  for (std::int64_t i = 0; i < p.group_channels; ++i) {
    const Affine small = affine_at(i);
    const Channel channel = channel_of(small, mean, rstd);
    Sums sums = {};
    for (std::int64_t pixel = threadIdx.x; pixel < p.hw; pixel += blockDim.x) {
      const std::int64_t at = p.channels_last ? pixel * p.c + i : i * p.hw + pixel;
      const float d = deviation(at, small), g = gradient_at(at, d, channel);
      sums = sums + Sums{g, g * d, d};
    }
    sums = {block_sum(sums.g), block_sum(sums.gd), block_sum(sums.d)};
    total = total + Sums{channel.gain * sums.g, channel.gain * sums.gd, sums.d};
    if (p.sums == nullptr || threadIdx.x != 0) continue;
    float* to = p.sums + sample * 3 * p.c + first_channel + i;
    to[0] = sums.g;
    to[p.c] = sums.gd;
    to[2 * p.c] = sums.d;
  }
  const std::int64_t values = p.group_channels * p.hw;
  const Slope slope = slope_of(total, static_cast<float>(values), rstd);
  if (p.sums != nullptr && threadIdx.x == 0) p.slopes[slab] = slope;
  walk(p.group_channels, p.hw, p.c, p.channels_last, [&](std::int64_t i, std::int64_t at) {
    const Affine small = affine_at(i);
    const Channel channel = channel_of(small, mean, rstd);
    const float d = deviation(at, small);
    // A value that is all of its group does not change the result.
    const float result[] = {values == 1 ? 0 : dx(gradient_at(at, d, channel), d, channel.a, slope)};
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
      // What is added to all of a group does not change the result.
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

std::optional<Tiling> tiling_of(DType dtype, const Shape& shape, std::int64_t groups) {
  return TilingRules(dtype, shape, groups, kItems, card(kOp).clusters).tiling();
}

// The parts of the workspace, in bytes from its start.
struct Workspace {
  std::int64_t slopes, partial, sums, total;

  Workspace(const std::optional<Tiling>& tiling, const Shape& shape, std::int64_t groups) : slopes(0) {
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
void launch_pass(const Backward& p, void* stream) {
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
    const int slots = tiling.rows * std::max(1, tiling.lanes / kWarp);
    dims.shared_bytes = pass == Pass::kApply ? 0 : dims.block.y * slots * sizeof(float4);
    launch(kOp, contiguous_kernel<T, items, pass>, dims, stream, p);
  }
}

}  // namespace

std::int64_t group_norm_silu_backward_workspace(DType dtype, const Shape& shape, std::int64_t groups) {
  return Workspace(tiling_of(dtype, shape, groups), shape, groups).total;
}

void group_norm_silu_backward(const GroupNormSiluBackwardArgs& a) {
  if (a.shape.c == 0) return;
  const auto tiling = tiling_of(a.dtype, a.shape, a.groups);
  const Workspace workspace(tiling, a.shape, a.groups);
  const auto at = [&](std::int64_t offset) { return static_cast<char*>(a.workspace) + offset; };
  const bool small = a.dweight != nullptr || a.dbias != nullptr || a.dshift != nullptr || a.dscale != nullptr ||
                     a.dscale_shift != nullptr;
  void* stream = a.run_on.stream();
  const bool vectors = tiling && is_aligned({a.dy, a.x, a.dx});
  Backward p = {};
  p.dx = a.dx;
  p.dy = a.dy;
  p.x = a.x;
  p.mean = static_cast<const float*>(a.mean);
  p.rstd = static_cast<const float*>(a.rstd);
  p.inputs = {a.weight, a.bias, a.shift, a.scale, a.scale_shift};
  p.sums = small ? reinterpret_cast<float*>(at(workspace.sums)) : nullptr;
  p.slopes = reinterpret_cast<Slope*>(at(workspace.slopes));
  p.partial = reinterpret_cast<Sums*>(at(workspace.partial));
  p.slabs = a.shape.n * a.groups;
  p.c = a.shape.c;
  p.hw = a.shape.hw;
  p.groups = static_cast<int>(a.groups);
  p.group_channels = static_cast<int>(a.shape.c / a.groups);
  p.deviations = a.dtype == DType::kFloat32 || a.dshift != nullptr;
  p.silu = a.silu;
  p.channels_last = a.shape.channels_last;
  if (a.shape.n * a.shape.hw > 0) {
    with_type(a.dtype, [&](auto type) {
      using T = decltype(type);
      if (!vectors) {
        launch(kOp, scalar_kernel<T>, {grid(kOp, p.slabs), dim3(kScalarThreads)}, stream, p);
        return;
      }
      p.tiling = *tiling;
      if (!tiling->resident) {
        launch_pass<T, kItems.many, Pass::kSums>(p, stream);
        launch_pass<T, kItems.many, Pass::kApply>(p, stream);
      } else if (tiling->items == kItems.many) {
        launch_pass<T, kItems.many, Pass::kResident>(p, stream);
      } else {
        launch_pass<T, kItems.few, Pass::kResident>(p, stream);
      }
    });
  }
  if (!small) return;
  const SmallGradients gradients = {static_cast<float*>(a.dweight),
                                    static_cast<float*>(a.dbias),
                                    static_cast<float*>(a.dshift),
                                    static_cast<float*>(a.dscale),
                                    static_cast<float*>(a.dscale_shift),
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
