// Shared steps of group_norm_silu and its gradient: a thread's indices, its vectors, exchanges of partial results, and
// launches. group_norm.h says how the work is cut.
//
// The order of a slice's members matters: with another one nvcc needs more registers for some kernels.
#pragma once

#include "cuda/group_norm.h"

namespace ddpm_fast::cuda {

enum class Pass { kResident, kStatistics, kApply };

template <class T>
using Vector = Packed<T, kWidth<T>>;

// -------------------------------------------------------------------------------------------------------- contiguous

// Indices of a thread and its slice, which is one group. `several`: blocks have more than one group.
template <class T, bool several, Pass pass, class P>
struct RowSlice {
  const P& p;
  const SliceTiling& tiling = p.tiling;
  static constexpr bool kBackwards = pass == Pass::kApply;
  const int part = block_index<kBackwards>(blockIdx.x, gridDim.x);
  const int sample = p.first_sample + block_index<kBackwards>(blockIdx.z, gridDim.z);
  const int slice = block_index<kBackwards>(blockIdx.y, gridDim.y);
  const int wanted = several ? slice * static_cast<int>(blockDim.z) + static_cast<int>(threadIdx.z) : slice;
  const int group = min(wanted, p.groups - 1);
  const bool exists = wanted < p.groups;
  const int first_channel = group * p.group_channels, slab = sample * p.groups + group;  // slab: in [n, groups]
  const int thread = thread_of_slice(), lane = static_cast<int>(threadIdx.x), row = static_cast<int>(threadIdx.y);
  const int length = p.hw / kWidth<T>;  // vectors of a channel
  const int part_length = min(tiling.part_length, length - part * tiling.part_length);
  const bool active = exists && row < p.group_channels;
  const int left = active ? part_length - lane : 0;  // vector i of this thread exists where i * lanes < left
  const std::int64_t at_group = (std::int64_t{sample} * p.c + first_channel) * p.hw;
  const int at_thread = row * p.hw + (part * tiling.part_length + lane) * kWidth<T>;  // from at_group
};

// Call body(i, offset) for each vector of the thread. The offset is from the thread's first vector.
template <class T, int items>
DDPM_FAST_DEVICE void over_vectors(const auto& at, auto body) {
#pragma unroll
  for (int i = 0; i < items; ++i) {
    if (i * at.tiling.lanes < at.left) body(i, i * at.tiling.lanes * kWidth<T>);
  }
}

// Call body(i, w, values) for each word w of the thread's vectors.
template <class T, int items>
DDPM_FAST_DEVICE void over_words(const auto& at, const Vector<T> (&data)[items], auto body) {
  over_vectors<T, items>(at, [&](int i, int) {
    for (int w = 0; w < kWords; ++w) {
      float values[kPerWord<T>];
      widen_word(data[i].words[w], T{}, values);
      body(i, w, values);
    }
  });
}

// Replace the values of each word w of a vector by what body(w, values) makes of them.
template <class T>
DDPM_FAST_DEVICE void map_words(Vector<T>& vector, auto body) {
  for (int w = 0; w < kWords; ++w) {
    float values[kPerWord<T>];
    widen_word(vector.words[w], T{}, values);
    body(w, values);
    vector.words[w] = narrow_word(values, T{});
  }
}

// Write the block's result to all blocks of the cluster.
template <class Partial>
DDPM_FAST_DEVICE void exchange(const auto& at, const Partial& own, Partial* of_part) {
  cluster_wait();  // the others have started: their memory exists
  if (at.thread < at.tiling.parts) *in_block(&of_part[at.part], at.thread) = own;
  cluster_sync();
}

// ------------------------------------------------------------------------------------------------------ channels_last

// Indices of a thread and its slice, which is a range of channels.
template <class T, int items, Pass pass, class P>
struct PixelSlice {
  const P& p;
  const SliceTiling& tiling = p.tiling;
  static constexpr bool kBackwards = pass == Pass::kApply;
  const int part = block_index<kBackwards>(blockIdx.x, gridDim.x);
  const int slice = block_index<kBackwards>(blockIdx.y, gridDim.y);
  const int sample = p.first_sample + block_index<kBackwards>(blockIdx.z, gridDim.z);
  const int thread = thread_of_slice(), lane = static_cast<int>(threadIdx.x), row = static_cast<int>(threadIdx.y);
  const int threads = tiling.rows * tiling.lanes, warp = thread / kWarp, warps = threads / kWarp;
  const int stride = tiling.rows * p.c;  // from a pixel of the thread to the next
  const int tiles = pass == Pass::kResident ? 1 : tiling.tiles, tile_pixels = tiling.rows * items;
  const int first_channel = slice * tiling.slice_channels;
  const int channels = min(tiling.slice_channels, p.c - first_channel);
  const int groups = min(tiling.slice_groups, p.groups - slice * tiling.slice_groups);
  const int first_slab = sample * p.groups + slice * tiling.slice_groups;  // slab: a group's index in [n, groups]
  const int first_pixel = part * tiling.part_length, pixels = min(tiling.part_length, p.hw - first_pixel);
  // The thread's pixels are row, row + rows, ..., those below `end`.
  const int end = lane * kWidth<T> < channels ? pixels : 0;
  const std::int64_t origin = std::int64_t{sample} * p.hw * p.c + first_channel;
  const std::int64_t at_part = origin + std::int64_t{first_pixel} * p.c;
  const int at_thread = row * p.c + lane * kWidth<T>;  // from at_part

  // Return the offset of the thread's first vector of a tile.
  __device__ __forceinline__ std::int64_t at_tile(int tile) const {
    return at_part + std::int64_t{tile * tile_pixels} * p.c + at_thread;
  }
};

// Return the number of the thread's pixels in the tile that begins with pixel `first`.
template <int items>
DDPM_FAST_DEVICE float pixels_in_tile(const auto& at, int first) {
  float count = 0;
#pragma unroll
  for (int i = 0; i < items; ++i) {
    if (first + i * at.tiling.rows < at.end) ++count;
  }
  return count;
}

// Call load(i, exists, from, offset) for each vector of the thread in a tile, if its first one exists.
template <int items>
DDPM_FAST_DEVICE void load_tile(const auto& at, int tile, auto load) {
  const int first = at.row + tile * at.tile_pixels;
  if (first >= at.end) return;
  const std::int64_t from = at.at_tile(tile);
#pragma unroll
  for (int i = 0; i < items; ++i) load(i, first + i * at.tiling.rows < at.end, from, i * at.stride);
}

// Call body(tile, first) for each tile in which the thread has pixels, the first of them given. load(tile) reads the
// next tile when the one before is done: both do not fit in the registers.
DDPM_FAST_DEVICE void over_tiles(const auto& at, auto load, auto body) {
#pragma unroll 1
  for (int tile = 0; tile < at.tiles; ++tile) {
    const int first = at.row + tile * at.tile_pixels;
    if (first < at.end) body(tile, first);
    if (tile + 1 < at.tiles) load(tile + 1);
  }
}

// Let a warp compute of_group(group), and write it to the workspace or to all blocks of the cluster.
template <Pass pass, class Partial>
DDPM_FAST_DEVICE void exchange(const auto& at, Partial* partial, Partial* of_part, auto of_group) {
  const SliceTiling& tiling = at.tiling;
  if (pass == Pass::kResident && tiling.parts > 1) cluster_wait();  // the others have started: their memory exists
#pragma unroll 1
  for (int group = at.warp; group < at.groups; group += at.warps) {
    const Partial own = of_group(group);
    if constexpr (pass == Pass::kStatistics) {
      const std::int64_t slot = std::int64_t{at.sample * tiling.slices + at.slice} * tiling.parts + at.part;
      if (at.thread % kWarp == 0) partial[slot * tiling.slice_groups + group] = own;
    } else if (at.thread % kWarp < tiling.parts) {
      *in_block(of_part + at.part * at.groups + group, at.thread % kWarp) = own;
    }
  }
  if constexpr (pass == Pass::kStatistics) return;
  if (tiling.parts > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
}

// Let a warp finish(group, get): get(i) is what part i has written.
template <Pass pass, class Partial>
DDPM_FAST_DEVICE void finish_groups(const auto& at, const Partial* partial, const Partial* of_part, auto finish) {
  const SliceTiling& tiling = at.tiling;
  const Partial* of_parts = pass == Pass::kResident ? of_part
                                                    : partial + std::int64_t{at.sample * tiling.slices + at.slice} *
                                                                    tiling.parts * tiling.slice_groups;
  const int step = pass == Pass::kResident ? at.groups : tiling.slice_groups;
#pragma unroll 1
  for (int group = at.warp; group < at.groups; group += at.warps) {
    finish(group, [&](int i) { return of_parts[i * step + group]; });
  }
  __syncthreads();
}

// ----------------------------------------------------------------------------------------------------------- launches

// Set the parameters that both directions have.
template <class Args, class P>
void set_shared(const char* op, const Args& a, P& p) {
  p.inputs = {a.weight, a.bias, a.shift, a.scale, a.scale_shift};
  p.c = to_int(op, a.shape.c);
  p.hw = to_int(op, a.shape.hw);
  p.groups = static_cast<int>(a.num_groups);
  p.group_channels = p.c / p.groups;
  p.silu = a.silu;
  p.channels_last = a.shape.channels_last;
}

// Launch a kernel over the slices of all samples.
template <class P>
void launch_slices(const char* op, void (*kernel)(P), P p, const Limits& limits, Pass pass, std::size_t shared_bytes,
                   std::int64_t samples, void* stream) {
  const SliceTiling& tiling = p.tiling;
  Dims dims;
  dims.block = tiling.block(p.channels_last, limits);
  dims.grid.x = static_cast<unsigned>(tiling.parts);
  dims.grid.y = static_cast<unsigned>(divide_up(tiling.slices, dims.block.z));
  dims.cluster = pass == Pass::kResident ? static_cast<unsigned>(tiling.parts) : 1;
  dims.shared_bytes = shared_bytes;
  over_samples(samples, [&](std::int64_t first, std::int64_t count) {
    p.first_sample = static_cast<int>(first);
    dims.grid.z = static_cast<unsigned>(count);
    launch(op, kernel, dims, stream, p);
  });
}

}  // namespace ddpm_fast::cuda
