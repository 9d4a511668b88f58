// How the elementwise kernels cut samples into tiles, and how the elements of a tile meet their noise.
//
// In memory a sample is rows of columns: one element a row where it is contiguous, the channels of a pixel in
// channels_last. A block handles a tile of one sample, so that what depends on the sample (t, seed, coefficients) is
// the same for all its threads; a thread handles 16 elements of it, in vectors of 16 bytes. There are two ways:
//
// - In registers: memory has the elements in C, H, W order, and aligned. A thread draws the noise of its own elements.
// - Staged: the block draws the noise of the tile into shared memory, no Philox block twice, and finds it there in the
//   order of memory. Where something is not aligned, vectors are of one element.
#pragma once

#include <cstdint>

#include "common/args.h"
#include "cuda/draw.h"
#include "cuda/launch.h"
#include "cuda/vector.h"

namespace ddpm_fast::cuda {

constexpr int kMostThreads = 256;
constexpr int kPerThread = 16;
constexpr int kStagedVectors = 2;  // that a thread reads before it handles the first of them
constexpr int kMostInTile = kPerThread * kMostThreads;

// ----------------------------------------------------------------------------------------------------------- tiling

struct Tiling {
  std::int64_t rows, cols, numel;  // of a sample; numel: rows * cols
  std::uint32_t n, row_tiles, col_tiles;
  int tile_rows, tile_cols, last_rows, last_cols;  // of a tile, and of the last one, which may be smaller
  int threads;
  std::uint32_t reciprocal;  // 2^31 / tile_cols, rounded up
  bool staged, vectors;
  bool by_row;  // whether the row of an element has to be known

  // ordered: whether the kernel depends on the C, H, W order. If not, a sample is a line whatever its layout.
  // aligned: whether the tensors can be accessed in vectors of `width` elements.
  // interleaved: whether a tensor has more in a row than the others, so that vectors must not cross rows.
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

  // index / tile_cols, where index * tile_cols < 2^31.
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

// Whether an address is one of a vector of `width` elements of type T; an absent tensor does not matter.
template <class T>
bool aligned(const void* address, int width) {
  return reinterpret_cast<std::uintptr_t>(address) % (sizeof(T) * static_cast<std::size_t>(width)) == 0;
}

// The tile of a block; its first element is in row `row` and column `col` of the sample.
struct Tile {
  std::uint32_t sample;
  std::int64_t row, col;
  int rows, cols;
  std::int64_t offset;  // the first element's, in a tensor of the tiling's shape
};

// The last samples of a grid may not exist: their blocks have nothing to do.
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

// Where an element is: `offset` in the tensor, and in row `row` of the tile, which is told if the tiling is by_row.
struct Place {
  std::int64_t offset;
  int row;
};

// `index` counts a tile's elements as if it had tile_cols columns. Returns whether there is such an element.
DDPM_FAST_DEVICE bool find(const Tiling& tiling, const Tile& tile, int index, Place& at) {
  at = {tile.offset + index, 0};
  if (!tiling.by_row) return true;
  at.row = tiling.row_of(index);
  at.offset += at.row * (tiling.cols - tiling.tile_cols);
  return index - at.row * tiling.tile_cols < tile.cols;
}

// ------------------------------------------------------------------------------------------------------------ noise

// Where noise comes from: a tensor, or the samples' seeds, or there is none.
template <class T>
struct Noise {
  const T* given;
  const std::int64_t* seeds;
  std::uint32_t stream;
  bool drawn;

  __device__ Noise(const void* tensor, const std::int64_t* seeds, std::uint32_t stream)
      : given(static_cast<const T*>(tensor)),
        seeds(seeds),
        stream(stream),
        drawn(tensor == nullptr && seeds != nullptr) {}
};

// Draws the noise of a tile into shared memory.
DDPM_FAST_DEVICE void stage(const Tiling& tiling, const Tile& tile, std::uint64_t seed, std::uint32_t stream,
                            float* room) {
  // The elements of a column are neighbours in C, H, W order. Where `rest` is not 0, columns begin within Philox
  // blocks.
  const auto col_blocks = static_cast<std::uint32_t>(tiling.rows >> 2);
  const std::uint32_t rest = tiling.rows & 3;
  const int blocks = (tile.rows + 3) / 4 + (rest != 0), draws = blocks * tiling.tile_cols;
  constexpr int kInFlight = kPerThread / 4;
  const int threads = static_cast<int>(blockDim.x);
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < draws; first += kInFlight * threads) {
    float normals[kInFlight][4];
    int row[kInFlight], col[kInFlight];  // of the first of them, in the tile
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int block = tiling.row_of(first + i * threads);
      col[i] = first + i * threads - block * tiling.tile_cols;
      const std::uint32_t col_in_sample = static_cast<std::uint32_t>(tile.col) + static_cast<std::uint32_t>(col[i]);
      const std::uint32_t rests = col_in_sample * rest;
      row[i] = 4 * block - static_cast<int>(rests & 3);
      const std::uint32_t first_block =
          col_in_sample * col_blocks + rests / 4 + static_cast<std::uint32_t>(tile.row >> 2);
      draw(seed, stream, first_block + static_cast<std::uint32_t>(block), normals[i]);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      float* const to = room + row[i] * tiling.tile_cols + col[i];
      if (row[i] >= 0 && row[i] + 4 <= tile.rows) {
        for (int j = 0; j < 4; ++j) to[j * tiling.tile_cols] = normals[i][j];
      } else {  // the ends of a column, or past the last draw
        for (int j = 0; j < 4; ++j) {
          if (row[i] + j >= 0 && row[i] + j < tile.rows) to[j * tiling.tile_cols] = normals[i][j];
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------- all together

// An op has, in the order in which it is asked, so that memory answers while noise is drawn:
//   Inputs<width> load<width>(place);
//   Noise<T> noise();
//   void start();  reads what the rest needs
//   void finish<width>(place, inputs, normals);

// Where there is no noise: the one number whose addition changes nothing.
constexpr float kNoNoise = -0.0f;

template <int width, class Op>
DDPM_FAST_DEVICE void run_in_registers(const Tile& tile, Op& op) {
  constexpr int kVectors = kPerThread / width, kApart = kWarp * width;
  // A warp's elements lie together, so that those of a thread are a constant apart.
  const std::uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first = static_cast<int>(warp * kWarp * kPerThread + lane * width), count = tile.rows - first;
  if (count <= 0) return;
  const auto exists = [=](int v) { return v * kApart < count; };
  const auto place = [&](int v) { return Place{tile.offset + first + v * kApart, 0}; };
  typename Op::template Inputs<width> inputs[kVectors];
  float normals[kVectors][width];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (exists(v)) inputs[v] = op.template load<width>(place(v));
  }
  const auto noise = op.noise();
  if (noise.drawn) {
    const auto seed = static_cast<std::uint64_t>(noise.seeds[tile.sample]);
    const std::uint32_t block = static_cast<std::uint32_t>(tile.row >> 2) + static_cast<std::uint32_t>(first) / 4;
#pragma unroll
    for (int call = 0; call < kPerThread / 4; ++call) {
      const int v = 4 * call / width, i = 4 * call % width;
      draw(seed, noise.stream, block + (v * kApart + i) / 4, normals[v] + i);
    }
  } else {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      for (float& normal : normals[v]) normal = kNoNoise;
      if (noise.given != nullptr && exists(v)) load(noise.given + place(v).offset, normals[v]);
    }
  }
  op.start();
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (exists(v)) op.template finish<width>(place(v), inputs[v], normals[v]);
  }
}

// With the noise in `room`, if it is drawn.
template <int width, class Op, class T>
DDPM_FAST_DEVICE void run_staged(const Tiling& tiling, const Tile& tile, Op& op, const Noise<T>& noise,
                                 const float* room) {
  const int apart = static_cast<int>(blockDim.x) * width, count = tile.rows * tiling.tile_cols;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x) * width; first < count; first += kStagedVectors * apart) {
    typename Op::template Inputs<width> inputs[kStagedVectors];
    Place at[kStagedVectors];
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
      if (noise.drawn) load(room + first + v * apart, normals);
      if (noise.given != nullptr) load(noise.given + at[v].offset, normals);
      op.template finish<width>(at[v], inputs[v], normals);
    }
  }
}

// Runs an op over the block's tile.
template <bool staged, int width, class Op>
DDPM_FAST_DEVICE void run(const Tiling& tiling, const Tile& tile, Op& op) {
  if constexpr (staged) {
    alignas(kVectorBytes) __shared__ float room[kMostInTile];
    const auto noise = op.noise();
    if (noise.drawn) {
      stage(tiling, tile, static_cast<std::uint64_t>(noise.seeds[tile.sample]), noise.stream, room);
      __syncthreads();
    }
    op.start();
    if (tiling.vectors) {
      run_staged<width>(tiling, tile, op, noise, room);
    } else {
      run_staged<1>(tiling, tile, op, noise, room);
    }
  } else {
    run_in_registers<width>(tile, op);
  }
}

}  // namespace ddpm_fast::cuda
