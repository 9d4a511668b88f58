// Tiles of the elementwise kernels, and their noise.
//
// A sample is rows of columns in memory. A row is one element of a contiguous tensor, or the channels of a pixel in
// channels_last. A block handles a tile of one sample, so values of the sample (t, seed, coefficients) are the same for
// all its threads. A thread handles 16 elements, in vectors of 16 bytes. There are two ways:
//
// - In registers: the elements are aligned and in C, H, W order. A thread generates the noise of its own elements.
// - Staged: the block generates the noise of the tile in shared memory, no Philox block twice, and reads it in memory
//   order. Vectors have one element if the tensors are not aligned.
#pragma once

#include <cstdint>

#include "common/args.h"
#include "cuda/launch.h"
#include "cuda/philox_normal.h"
#include "cuda/vector.h"

namespace ddpm_fast::cuda {

constexpr int kMostThreads = 256;
constexpr int kPerThread = 16;
constexpr int kStagedVectors = 2;  // vectors that a thread reads before it handles the first
constexpr int kMostInTile = kPerThread * kMostThreads;

// ----------------------------------------------------------------------------------------------------------- tiling

struct Tiling {
  std::int64_t rows, cols, numel;  // per sample; numel is rows * cols
  std::uint32_t n, row_tiles, col_tiles;
  int tile_rows, tile_cols, last_rows, last_cols;  // the last tile may be smaller
  int threads;
  std::uint32_t reciprocal;  // 2^31 / tile_cols, rounded up
  bool staged, vectors;
  bool by_row;  // whether `find` computes the row of an element

  // ordered: whether the kernel depends on the C, H, W order. If not, every sample is treated as contiguous.
  // aligned: whether the tensors can be accessed in vectors of `width` elements.
  // interleaved: whether a tensor has longer rows than the others. Vectors then must not cross rows.
  Tiling(const Shape& shape, bool ordered, int width, bool aligned, bool interleaved = false) {
    constexpr int kRowUnit = 8;  // whole Philox blocks and whole vectors
    constexpr std::int64_t kMostCols = kMostInTile / kRowUnit;
    const bool pixels = ordered && shape.channels_last && shape.hw > 1;
    rows = pixels ? shape.hw : shape.c * shape.hw;
    cols = pixels ? shape.c : 1;
    numel = rows * cols;
    n = static_cast<std::uint32_t>(shape.n);
    tile_cols = static_cast<int>(cols < kMostCols ? cols : kMostCols);
    col_tiles = static_cast<std::uint32_t>(divide_up(cols, tile_cols));
    row_tiles = static_cast<std::uint32_t>(divide_up(rows, kMostInTile / tile_cols / kRowUnit * kRowUnit));
    tile_rows = static_cast<int>(round_up(divide_up(rows, row_tiles), kRowUnit));
    row_tiles = static_cast<std::uint32_t>(divide_up(rows, tile_rows));
    last_rows = static_cast<int>(rows - std::int64_t{row_tiles - 1} * tile_rows);
    last_cols = static_cast<int>(cols - std::int64_t{col_tiles - 1} * tile_cols);
    threads = static_cast<int>(round_up(divide_up(tile_rows * tile_cols, kPerThread), kWarp));
    reciprocal = static_cast<std::uint32_t>(divide_up(std::int64_t{1} << 31, tile_cols));
    by_row = interleaved || col_tiles > 1;
    vectors = aligned && numel % width == 0 && (!by_row || cols % width == 0);
    staged = !vectors || cols > 1 || interleaved;
  }

  // Returns index / tile_cols. Requires index * tile_cols < 2^31.
  __device__ int row_of(int index) const {
    return static_cast<int>(std::uint64_t{static_cast<std::uint32_t>(index)} * reciprocal >> 31);
  }

  std::int64_t tiles_per_sample() const { return std::int64_t{row_tiles} * col_tiles; }

  Dims dims() const {
    constexpr std::uint32_t kMostInY = 65535;
    const std::uint32_t y = n < kMostInY ? n : kMostInY;
    return {.grid = dim3(row_tiles * col_tiles, y, (n + y - 1) / y), .block = dim3(static_cast<unsigned>(threads))};
  }
};

// Returns whether an address is aligned for vectors of `width` elements of type T. A null pointer is.
template <class T>
bool aligned(const void* address, int width) {
  return reinterpret_cast<std::uintptr_t>(address) % (sizeof(T) * static_cast<std::size_t>(width)) == 0;
}

// The tile of a block. Its first element is in row `row` and column `col` of the sample.
struct Tile {
  std::uint32_t sample;
  std::int64_t row, col;
  int rows, cols;
  std::int64_t offset;  // offset of the first element in a tensor of the tiling's shape
};

// Returns the tile of this block. The sample may not exist. The block then has nothing to do.
template <bool staged>
DDPM_FAST_DEVICE Tile current_tile(const Tiling& tiling) {
  const std::uint32_t sample = blockIdx.z * gridDim.y + blockIdx.y;
  const std::uint32_t row_tile = staged ? blockIdx.x / tiling.col_tiles : blockIdx.x;
  const std::uint32_t col_tile = staged ? blockIdx.x % tiling.col_tiles : 0;
  const auto row = static_cast<std::int64_t>(std::uint64_t{row_tile} * static_cast<std::uint32_t>(tiling.tile_rows));
  const std::int64_t col = std::int64_t{col_tile} * tiling.tile_cols;
  return {sample,
          row,
          col,
          row_tile + 1 == tiling.row_tiles ? tiling.last_rows : tiling.tile_rows,
          col_tile + 1 == tiling.col_tiles ? tiling.last_cols : tiling.tile_cols,
          sample * tiling.numel + (staged ? row * tiling.cols + col : row)};
}

// The location of an element: its offset in the tensor, and its row in the tile if the tiling is by_row.
struct Location {
  std::int64_t offset;
  int row;
};

// Finds an element by its index, which counts as if the tile had tile_cols columns. Returns whether it exists.
DDPM_FAST_DEVICE bool find(const Tiling& tiling, const Tile& tile, int index, Location& at) {
  at = {tile.offset + index, 0};
  if (!tiling.by_row) return true;
  at.row = tiling.row_of(index);
  at.offset += at.row * (tiling.cols - tiling.tile_cols);
  return index - at.row * tiling.tile_cols < tile.cols;
}

// ------------------------------------------------------------------------------------------------------------ noise

// The source of noise: a tensor, the samples' seeds, or neither.
template <class T>
struct Noise {
  const T* given;
  const std::int64_t* seeds;
  std::uint32_t stream;
  bool generated;

  __device__ Noise(const void* tensor, const std::int64_t* seeds, std::uint32_t stream)
      : given(static_cast<const T*>(tensor)),
        seeds(seeds),
        stream(stream),
        generated(tensor == nullptr && seeds != nullptr) {}
};

// Generates the noise of a tile in shared memory.
DDPM_FAST_DEVICE void stage(const Tiling& tiling, const Tile& tile, std::uint64_t seed, std::uint32_t stream,
                            float* staged_noise) {
  // The elements of a column are neighbours in C, H, W order. If `rest` is not 0, columns begin within Philox blocks.
  const auto col_blocks = static_cast<std::uint32_t>(tiling.rows >> 2);
  const std::uint32_t rest = tiling.rows & 3;
  const int blocks = (tile.rows + 3) / 4 + (rest != 0), blocks_of_columns = blocks * tiling.tile_cols;
  constexpr int kInFlight = kPerThread / 4;
  const int threads = static_cast<int>(blockDim.x);
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < blocks_of_columns; first += kInFlight * threads) {
    float normals[kInFlight][4];
    int row[kInFlight], col[kInFlight];  // position of the first normal in the tile
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int block = tiling.row_of(first + i * threads);
      col[i] = first + i * threads - block * tiling.tile_cols;
      const std::uint32_t col_in_sample = static_cast<std::uint32_t>(tile.col) + static_cast<std::uint32_t>(col[i]);
      const std::uint32_t rests = col_in_sample * rest;
      row[i] = 4 * block - static_cast<int>(rests & 3);
      const std::uint32_t first_block =
          col_in_sample * col_blocks + rests / 4 + static_cast<std::uint32_t>(tile.row >> 2);
      philox_normal(seed, stream, first_block + static_cast<std::uint32_t>(block), normals[i]);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      float* const to = staged_noise + row[i] * tiling.tile_cols + col[i];
      if (row[i] >= 0 && row[i] + 4 <= tile.rows) {
        for (int j = 0; j < 4; ++j) to[j * tiling.tile_cols] = normals[i][j];
      } else {  // the ends of a column, or past the last block
        for (int j = 0; j < 4; ++j) {
          if (row[i] + j >= 0 && row[i] + j < tile.rows) to[j * tiling.tile_cols] = normals[i][j];
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------- all together

// An op has these members. They are called in this order, so that memory is read while noise is computed.
//   Inputs<width> load<width>(location);
//   Noise<T> noise();
//   void start();  reads the coefficients
//   void finish<width>(location, inputs, normals);

// The noise of an op without noise. Adding it changes no number.
constexpr float kNoNoise = -0.0f;

template <int width, class Op>
DDPM_FAST_DEVICE void run_in_registers(const Tile& tile, Op& op) {
  constexpr int kVectors = kPerThread / width, kApart = kWarp * width;
  // The elements of a warp are neighbours, so those of a thread have a constant distance.
  const std::uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first = static_cast<int>(warp * kWarp * kPerThread + lane * width), count = tile.rows - first;
  if (count <= 0) return;
  const auto exists = [=](int v) { return v * kApart < count; };
  const auto location = [&](int v) { return Location{tile.offset + first + v * kApart, 0}; };
  typename Op::template Inputs<width> inputs[kVectors];
  float normals[kVectors][width];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (exists(v)) inputs[v] = op.template load<width>(location(v));
  }
  const auto noise = op.noise();
  if (noise.generated) {
    const auto seed = static_cast<std::uint64_t>(noise.seeds[tile.sample]);
    const std::uint32_t block = static_cast<std::uint32_t>(tile.row >> 2) + static_cast<std::uint32_t>(first) / 4;
#pragma unroll
    for (int call = 0; call < kPerThread / 4; ++call) {
      const int v = 4 * call / width, i = 4 * call % width;
      philox_normal(seed, noise.stream, block + (v * kApart + i) / 4, normals[v] + i);
    }
  } else {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      for (float& normal : normals[v]) normal = kNoNoise;
      if (noise.given != nullptr && exists(v)) load(noise.given + location(v).offset, normals[v]);
    }
  }
  op.start();
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (exists(v)) op.template finish<width>(location(v), inputs[v], normals[v]);
  }
}

// Handles the tile. staged_noise holds generated noise.
template <int width, class Op, class T>
DDPM_FAST_DEVICE void run_staged(const Tiling& tiling, const Tile& tile, Op& op, const Noise<T>& noise,
                                 const float* staged_noise) {
  const int apart = static_cast<int>(blockDim.x) * width, count = tile.rows * tiling.tile_cols;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x) * width; first < count; first += kStagedVectors * apart) {
    typename Op::template Inputs<width> inputs[kStagedVectors];
    Location at[kStagedVectors];
    bool exists[kStagedVectors];
#pragma unroll
    for (int v = 0; v < kStagedVectors; ++v) {
      const int index = first + v * apart;
      exists[v] = index < count && find(tiling, tile, index, at[v]);
      if (exists[v]) inputs[v] = op.template load<width>(at[v]);
    }
#pragma unroll
    for (int v = 0; v < kStagedVectors; ++v) {
      if (!exists[v]) continue;
      float normals[width];
      for (float& normal : normals) normal = kNoNoise;
      if (noise.generated) load(staged_noise + first + v * apart, normals);
      if (noise.given != nullptr) load(noise.given + at[v].offset, normals);
      op.template finish<width>(at[v], inputs[v], normals);
    }
  }
}

// Runs an op over the block's tile.
template <bool staged, int width, class Op>
DDPM_FAST_DEVICE void run(const Tiling& tiling, const Tile& tile, Op& op) {
  if constexpr (staged) {
    alignas(kVectorBytes) __shared__ float staged_noise[kMostInTile];
    const auto noise = op.noise();
    if (noise.generated) {
      stage(tiling, tile, static_cast<std::uint64_t>(noise.seeds[tile.sample]), noise.stream, staged_noise);
      __syncthreads();
    }
    op.start();
    if (tiling.vectors) {
      run_staged<width>(tiling, tile, op, noise, staged_noise);
    } else {
      run_staged<1>(tiling, tile, op, noise, staged_noise);
    }
  } else {
    run_in_registers<width>(tile, op);
  }
}

}  // namespace ddpm_fast::cuda
