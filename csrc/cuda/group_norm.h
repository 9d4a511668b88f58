// Shared parts of the forward and the backward pass of group_norm_silu: tiling, statistics, small inputs.
//
// A slice has its own statistics and is read by wide accesses. It is one group of a contiguous tensor, or several
// adjacent groups of a channels_last tensor. `parts` blocks share its pixels. A slice that fits in the registers of a
// cluster of that many blocks is read once ("resident"): the blocks exchange their partial results through distributed
// shared memory. For a larger slice, a first kernel writes the partial results to global memory, and a second kernel
// reads the slice again.
//
// The threads of a block form a grid of `rows` by `lanes`. Lanes are neighbours in memory, a vector each. Rows are
// channels of a contiguous tensor, or pixels of a channels_last tensor. Each thread therefore serves one channel, or
// the same few channels.
//
// The tiling decides the order of every sum. It follows from the shape, the dtype, the alignment of the tensors and the
// largest cluster of the GPU's generation.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <numeric>
#include <optional>

#include "common/args.h"
#include "cuda/intrinsics.h"
#include "cuda/launch.h"
#include "cuda/vector.h"

namespace ddpm_fast::cuda {

constexpr int kSmallThreads = 256;
constexpr int kUsualThreads = 512;  // with 64 registers each, two blocks fit on a multiprocessor
constexpr int kMaxThreads = 1024;
constexpr int kMaxParts = 16;  // in a resident slice

// ------------------------------------------------------------------------------------------------------------ tiling

// Limits of a pass: vectors that a thread holds in small and in large slices, and the largest number of threads of a
// channels_last block.
struct Limits {
  int small_items, large_items, channels_last_threads;
};

struct SliceTiling {
  int slice_channels, slice_groups, slices;  // in a sample; the last slice may have fewer
  int parts, part_length;  // in pixels; contiguous: in vectors of each channel. The last part may have fewer.
  int tiles;               // in a part, one after the other (contiguous: 1)
  int lanes, rows;         // threads; rows * lanes fills warps. Lanes without a vector have nothing to do.
  int items;               // vectors that a thread holds of a tile, at most
  bool resident;

  int threads() const { return lanes * rows; }
  // Lanes, rows, slices: contiguous ones of a warp share a block.
  dim3 block(bool channels_last, const Limits& limits) const {
    const bool small = !channels_last && threads() == kWarp && parts == 1 && items == limits.small_items;
    return dim3(lanes, rows, small ? 4 : 1);
  }
};

// Return the threads of a contiguous block. The largest slices take as many as a block can have.
constexpr int contiguous_threads(int items, const Limits& limits) {
  return items == limits.large_items ? kMaxThreads : kUsualThreads;
}

class TilingRules {
 public:
  TilingRules(DType dtype, const Shape& shape, std::int64_t groups, const Limits& limits, int cluster)
      : shape_(shape),
        groups_(groups),
        group_channels_(shape.c / groups),
        element_(dtype == DType::kFloat32 ? 4 : 2),
        width_(kVectorBytes / element_),
        limits_(limits),
        cluster_(cluster) {}

  // None: the tensor is not made of whole vectors, or too large for 32 bits, or its groups are single values. Another
  // kernel takes such ones.
  std::optional<SliceTiling> tiling() const {
    constexpr std::int64_t kMost = 1 << 30, kMostSlices = 65535;  // the latter: along a grid's second dimension
    if (groups_ > kMostSlices || shape_.n * groups_ > INT_MAX) return {};
    if (shape_.n == 0 || group_channels_ * shape_.hw <= 1 || shape_.hw > kMost || shape_.c > kMost) return {};
    return shape_.channels_last ? channels_last() : contiguous();
  }

 private:
  static constexpr int kCluster = 8;       // portable
  static constexpr int kFewBlocks = 128;   // below, more and smaller ones finish sooner
  static constexpr int kSmallPart = 8192;  // bytes
  static constexpr int kTiles = 4;

  Shape shape_;
  std::int64_t groups_, group_channels_, element_, width_;
  Limits limits_;
  int cluster_;

  // -------------------------------------------------------------------------------------------------- contiguous

  std::optional<SliceTiling> contiguous() const {
    // Offsets in a group have 32 bits.
    if (shape_.hw % width_ != 0 || group_channels_ > kMaxThreads || group_channels_ * shape_.hw > INT_MAX) return {};
    const auto fit = [&](int parts, int threads) { return contiguous_part(parts, threads); };
    if (auto resident =
            smallest(fit, shape_.n * groups_, group_channels_ * shape_.hw * element_, kUsualThreads, kMaxThreads)) {
      return resident;
    }
    SliceTiling split = contiguous_grid(limits_.large_items, 1, false);
    for (SliceTiling wider = split;
         (wider = contiguous_grid(limits_.large_items, 2 * split.lanes, false)).threads() <= kUsualThreads;) {
      split = wider;
    }
    split.part_length = split.lanes * split.items;
    split.parts = static_cast<int>(divide_up(shape_.hw / width_, split.part_length));
    return split;
  }

  std::optional<SliceTiling> contiguous_part(int parts, int threads) const {
    const std::int64_t length = shape_.hw / width_, part_length = divide_up(length, parts);
    if ((parts - 1) * part_length >= length) return {};
    for (const int items : {limits_.small_items, limits_.large_items}) {
      // Take as many threads as a small block can have, neighbours first.
      int lanes = 1;
      while (lanes * items < part_length) lanes *= 2;
      while (lanes < part_length && contiguous_grid(items, 2 * lanes, true).threads() <= kSmallThreads) lanes *= 2;
      SliceTiling tiling = contiguous_grid(items, lanes, true);
      tiling.parts = parts;
      tiling.part_length = static_cast<int>(part_length);
      if (tiling.threads() <= (items == limits_.small_items ? kUsualThreads : threads)) return tiling;
    }
    return {};
  }

  SliceTiling contiguous_grid(int items, int lanes, bool resident) const {
    const int channels = static_cast<int>(group_channels_), slices = static_cast<int>(groups_);
    const int rows = static_cast<int>(round_up(group_channels_, std::max(1, kWarp / lanes)));
    return {channels, 1, slices, 1, 0, 1, lanes, rows, items, resident};
  }

  // ------------------------------------------------------------------------------------------------ channels_last

  std::optional<SliceTiling> channels_last() const {
    constexpr std::int64_t kMostChannels = 1 << 18;  // offsets in a tile have 32 bits
    if (shape_.c % width_ != 0 || shape_.c > kMostChannels) return {};
    // A row of a cache line; a narrower one where that makes the slice fit, or more blocks of a small tensor.
    const int threads = limits_.channels_last_threads;
    std::optional<SliceTiling> resident;
    for (const int row_bytes : {128, 64, 32}) {
      if (row_bytes == 32 && !resident) break;
      if (resident && blocks(*resident) >= kFewBlocks) break;
      const SliceTiling row = channels_last_row(row_bytes);
      const auto fit = [&](int parts, int threads) { return channels_last_part(row, parts, threads); };
      const std::int64_t slice_bytes = shape_.hw * row.slice_channels * element_;
      if (auto found = smallest(fit, shape_.n * row.slices, slice_bytes, threads, threads)) resident = found;
    }
    if (resident) return resident;
    SliceTiling split = channels_last_row(128);
    split.items = limits_.large_items;
    split.rows = std::max(split.rows, kSmallThreads / split.threads() * split.rows);
    if (split.threads() > kSmallThreads) return {};
    for (split.tiles = kTiles;; split.tiles /= 2) {
      split.part_length = split.rows * split.items * split.tiles;
      split.parts = static_cast<int>(divide_up(shape_.hw, split.part_length));
      if (split.tiles == 1 || blocks(split) >= 2 * kFewBlocks) return split;
    }
  }

  std::optional<SliceTiling> channels_last_part(const SliceTiling& row, int parts, int threads) const {
    const std::int64_t part_length = divide_up(shape_.hw, parts);
    if ((parts - 1) * part_length >= shape_.hw) return {};
    for (const int items : {limits_.small_items, limits_.large_items}) {
      const std::int64_t rows = round_up(divide_up(part_length, items), row.rows);
      if (rows * row.lanes > threads) continue;
      SliceTiling tiling = row;
      tiling.parts = parts;
      tiling.part_length = static_cast<int>(part_length);
      tiling.items = items;
      // Take as many threads as a small block can have.
      const std::int64_t most =
          std::min<std::int64_t>(kSmallThreads / row.threads() * row.rows, round_up(part_length, row.rows));
      tiling.rows = static_cast<int>(std::max(rows, most));
      tiling.resident = true;
      return tiling;
    }
    return {};
  }

  // Return a slice whose row has at least so many bytes, in the smallest block that holds all its channels. If the number
  // of vectors is odd or nearly so, some lanes are idle, or the row does not fill whole 32-byte sectors.
  SliceTiling channels_last_row(int bytes) const {
    constexpr int kSector = 32;
    SliceTiling row{};
    for (const int aligned : {kSector, kVectorBytes}) {
      for (const int lanes : {1, 2, 4, 8}) {
        row = channels_last_row(bytes, aligned, lanes);
        if (row.threads() <= kSmallThreads) return row;
      }
    }
    return row;
  }

  // Return a slice of whole groups and vectors, whose bytes are a multiple of `aligned`. Its rows are the fewest that fill
  // warps and are a multiple of a vector's elements, as one thread merges the moments of that many threads.
  SliceTiling channels_last_row(int bytes, int aligned, int lanes_unit) const {
    const std::int64_t unit = std::lcm(group_channels_, aligned / element_);
    const int channels = static_cast<int>(std::min(shape_.c, round_up(bytes / element_, unit)));
    const int groups = static_cast<int>(channels / group_channels_);
    const int slices = static_cast<int>(divide_up(shape_.c, channels));
    const int lanes = static_cast<int>(round_up(channels / width_, lanes_unit));
    const int rows = static_cast<int>(std::lcm(width_, kWarp / std::gcd(lanes, kWarp)));
    return {channels, groups, slices, 1, 0, 1, lanes, rows, limits_.small_items, false};
  }

  // -------------------------------------------------------------------------------------------------------- either

  std::int64_t blocks(const SliceTiling& tiling) const { return shape_.n * tiling.slices * tiling.parts; }

  // Return the cluster with the fewest blocks that fits, or a larger one if blocks would be few and not small. Blocks of
  // which a multiprocessor holds only one come last, and at most in the portable number.
  template <class Fit>
  std::optional<SliceTiling> smallest(Fit fit, std::int64_t slices, std::int64_t slice_bytes, int threads,
                                      int most_threads) const {
    for (int parts = 1; parts <= cluster_; parts *= 2) {
      if (parts > kCluster) {
        if (auto found = fit(kCluster, most_threads)) return found;
      }
      const bool few = slices * parts < kFewBlocks && slice_bytes / parts > kSmallPart;
      const auto found = fit(parts, threads);
      if (found && !(few && 2 * parts <= std::min(cluster_, kCluster) && fit(2 * parts, threads))) return found;
    }
    return fit(std::min(cluster_, kCluster), most_threads);
  }
};

// ------------------------------------------------------------------------------------------------------ small inputs

DDPM_FAST_DEVICE float channel_input(const ChannelInput& input, std::int64_t index, float absent) {
  if (input.data == nullptr) return absent;
  if (input.dtype == DType::kFloat32) return static_cast<const float*>(input.data)[index];
  float value[2];
  const std::uint32_t bits = static_cast<const std::uint16_t*>(input.data)[index];
  if (input.dtype == DType::kFloat16) {
    unpack_float16(bits, value[0], value[1]);
  } else {
    unpack_bfloat16(bits, value[0], value[1]);
  }
  return value[0];
}

struct SmallInputs {
  ChannelInput weight, bias, shift, scale, scale_shift;
};

// The result is act(x_hat gain + offset), x_hat being x + shift normalised.
struct Affine {
  float gain, offset, shift;
};

// `at`: of the channel in [n, c].
DDPM_FAST_DEVICE Affine affine(const SmallInputs& inputs, std::int64_t channel, std::int64_t at) {
  const float factor = 1 + channel_input(inputs.scale, at, 0);
  return {channel_input(inputs.weight, channel, 1) * factor,
          fmaf(channel_input(inputs.bias, channel, 0), factor, channel_input(inputs.scale_shift, at, 0)),
          channel_input(inputs.shift, at, 0)};
}

template <class T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));  // elements
constexpr int kWords = kVectorBytes / 4;

// ------------------------------------------------------------------------------------------------------ warps, blocks

// A block's index along a dimension of the grid. The second of two kernels goes backwards: what the first one has read
// last may still be in the cache.
template <bool backwards>
DDPM_FAST_DEVICE int block_index(unsigned index, unsigned blocks) {
  return static_cast<int>(backwards ? blocks - 1 - index : index);
}

// Return the thread's number in lanes and rows. A slice has whole warps.
DDPM_FAST_DEVICE int thread_of_slice() { return static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); }
DDPM_FAST_DEVICE int warp_lane() { return thread_of_slice() % kWarp; }

// The sum over a warp's lanes, for each of them.
DDPM_FAST_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, distance);
  return value;
}

// a / b, good to half a unit in the last place and a little.
DDPM_FAST_DEVICE float quotient(float a, float b) {
  const float reciprocal = reciprocal_approx(b), first = a * reciprocal;
  return fmaf(fmaf(-b, first, a), reciprocal, first);
}

// Number of values, their mean, and the sum of squared deviations from it. Merged as in Chan, Golub and LeVeque 1983.
struct Moments {
  float count, mean, m2;
};

DDPM_FAST_DEVICE Moments merge(const Moments& a, const Moments& b) {
  const float count = a.count + b.count, share = b.count * reciprocal_approx(fmaxf(count, 1)), delta = b.mean - a.mean;
  return {count, fmaf(delta, share, a.mean), fmaf(delta * delta, a.count * share, a.m2 + b.m2)};
}

// Merge the moments of all lanes of a warp.
DDPM_FAST_DEVICE Moments warp_merge(const Moments& own) {
  const float count = warp_sum(own.count);
  const float mean = quotient(warp_sum(own.count * own.mean), fmaxf(count, 1));
  const float delta = own.mean - mean;
  return {count, mean, warp_sum(fmaf(own.count * delta, delta, own.m2))};
}

// Merge get(0), ..., get(number - 1). Every lane of the warp gets the result.
template <class Get>
DDPM_FAST_DEVICE Moments warp_merge(int number, Get get) {
  const int lane = warp_lane();
  Moments own = lane < number ? get(lane) : Moments{};
#pragma unroll 1
  for (int i = lane + kWarp; i < number; i += kWarp) own = merge(own, get(i));
  return warp_merge(own);
}

// The sum over a block's threads, for each of them. Blocks have whole warps in one dimension.
DDPM_FAST_DEVICE float block_sum(float value) {
  __shared__ float of_warp[kWarp];
  value = warp_sum(value);
  __syncthreads();  // what an earlier call has left there has been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_sum(threadIdx.x % kWarp < blockDim.x / kWarp ? of_warp[threadIdx.x % kWarp] : 0);
}

DDPM_FAST_DEVICE float tree_sum(const float (&values)[4]) { return (values[0] + values[1]) + (values[2] + values[3]); }

// 1 / sqrt(x), as good as float32 can tell.
DDPM_FAST_DEVICE float reciprocal_root(float x) {
  const float root = rsqrt_approx(x);
  return fmaf(root * 0.5f, fmaf(-x * root, root, 1), root);
}

// Calls body(true_type) or body(false_type).
template <class Body>
DDPM_FAST_DEVICE void with_silu(bool silu, Body body) {
  if (silu) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

// ------------------------------------------------------------------------------------------------------ any shape

constexpr unsigned kScalarThreads = 256;

// Calls body(channel, offset) for the block's share of the values of a group: a block of threads side by side goes
// through what lies side by side in memory.
template <class Body>
DDPM_FAST_DEVICE void walk(std::int64_t group_channels, std::int64_t hw, std::int64_t c, bool channels_last,
                           Body body) {
  const std::int64_t width = channels_last ? group_channels : hw, height = channels_last ? hw : group_channels;
  const std::int64_t stride = channels_last ? c : hw;
  if (width == 0) return;
  const std::int64_t down = blockDim.x / width, right = blockDim.x % width;
  std::int64_t row = threadIdx.x / width, column = threadIdx.x % width;
  while (row < height) {
    body(channels_last ? column : row, row * stride + column);
    row += down;
    column += right;
    if (column >= width) {
      column -= width;
      ++row;
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- SiLU

constexpr float kNegLog2E = -1.44269504f;

// 1 / (1 + exp(-z)). For float32 (T) a step of Newton's method follows the approximate reciprocal; its argument has to
// stay finite.
template <class T>
DDPM_FAST_DEVICE float sigmoid(float z) {
  if constexpr (sizeof(T) == 4) {
    const float d = 1 + exp2_approx(fminf(z * kNegLog2E, 126));
    const float s = reciprocal_approx(d);
    return fmaf(s, fmaf(-d, s, 1), s);
  } else {
    return reciprocal_approx(1 + exp2_approx(z * kNegLog2E));
  }
}

// ----------------------------------------------------------------------------------------------------------- launches

// Sizes that kernels reckon with in 32 bits. A tensor may still have any number of elements.
inline int to_int(const char* op, std::int64_t size) {
  if (size > INT_MAX) throw std::runtime_error(std::string(op) + ": CUDA: a size of more than 2^31");
  return static_cast<int>(size);
}

// One dimension of that many blocks.
inline dim3 grid(const char* op, std::int64_t blocks) { return dim3(static_cast<unsigned>(to_int(op, blocks))); }

// Calls body(first sample, samples): a grid has no more than so many in its third dimension.
template <class Body>
void over_samples(std::int64_t samples, Body body) {
  constexpr std::int64_t kMost = 65535;
  for (std::int64_t first = 0; first < samples; first += kMost) body(first, std::min(kMost, samples - first));
}

inline bool is_aligned(std::initializer_list<const void*> addresses) {
  return std::all_of(addresses.begin(), addresses.end(),
                     [](const void* address) { return reinterpret_cast<std::uintptr_t>(address) % kVectorBytes == 0; });
}

}  // namespace ddpm_fast::cuda
