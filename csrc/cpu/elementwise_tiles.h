// Tiles of the elementwise ops. A tile has at most kMaxTile elements, so it fits the first-level cache with all inputs.
//
// A tile is `rows` rows of `cols` elements in memory. A row is one element of a contiguous tensor, or a pixel in
// channels_last. Noise follows the C, H, W order in both formats: a channels_last tile generates it plane by plane and
// interleaves the planes, so no Philox block is computed twice.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/args.h"
#include "common/dtype.h"
#include "cpu/index.h"
#include "cpu/parallel.h"
#include "cpu/philox_normal.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace ddpm_fast::DDPM_FAST_ISA {

struct Tile {
  std::int64_t sample, row, rows, col, cols;
  std::int64_t count() const { return rows * cols; }
};

class Partition {
 public:
  explicit Partition(const Shape& shape)
      : rows_(shape.channels_last ? shape.hw : shape.c * shape.hw), cols_(shape.channels_last ? shape.c : 1) {
    tile_cols_ = cols_ < 1 ? 1 : smaller(cols_, kMaxCols);
    tile_rows_ = kMaxTile / tile_cols_ / 64 * 64;  // 16 blocks: whole vectors
    row_tiles_ = (rows_ + tile_rows_ - 1) / tile_rows_;
    col_tiles_ = (cols_ + kMaxCols - 1) / kMaxCols;
  }

  std::int64_t numel() const { return rows_ * cols_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  std::int64_t tiles_per_sample() const { return row_tiles_ * col_tiles_; }

  Tile tile(std::int64_t index) const {
    const std::int64_t sample = index / tiles_per_sample(), within = index % tiles_per_sample();
    const std::int64_t row = within / col_tiles_ * tile_rows_, col = within % col_tiles_ * kMaxCols;
    return {sample, row, smaller(tile_rows_, rows_ - row), col, smaller(tile_cols_, cols_ - col)};
  }

  static constexpr int kMaxCols = 16;

 private:
  std::int64_t rows_, cols_, tile_rows_, tile_cols_, row_tiles_, col_tiles_;
};

// The location of a tile in a tensor: the first element, and the elements from row to row.
struct Location {
  std::int64_t offset, stride;
};

inline Location location(const Partition& partition, const Tile& tile) {
  return {tile.sample * partition.numel() + tile.row * partition.cols() + tile.col, partition.cols()};
}

// ------------------------------------------------------------------------------------------------------ load and store

#ifdef __F16C__
constexpr int kHalves = 8;
inline void widen_halves(const Float16* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline void narrow_halves(const float* from, Float16* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#else
constexpr int kHalves = 1;
inline void widen_halves(const Float16* from, float* to) { *to = widen(*from); }
inline void narrow_halves(const float* from, Float16* to) { *to = narrow_to_float16(*from); }
#endif

inline void widen_run(const Float16* from, std::int64_t count, float* to) {
  std::int64_t i = 0;
  for (; i + kHalves <= count; i += kHalves) widen_halves(from + i, to + i);
  for (; i < count; ++i) to[i] = widen(from[i]);
}

inline void widen_run(const BFloat16* from, std::int64_t count, float* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

// Maps 0..255 to -1..1.
template <class A>
inline void widen_run(const std::uint8_t* from, std::int64_t count, A* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(from[i]) * static_cast<A>(2.0 / 255) - 1;
}

inline void narrow_run(const float* from, std::int64_t count, Float16* to) {
  std::int64_t i = 0;
  for (; i + kHalves <= count; i += kHalves) narrow_halves(from + i, to + i);
  for (; i < count; ++i) to[i] = narrow_to_float16(from[i]);
}

inline void narrow_run(const float* from, std::int64_t count, BFloat16* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) to[i] = narrow_to_bfloat16(from[i]);
}

template <class T>
inline void widen_run(const T* from, std::int64_t count, T* to) {
  memcpy(to, from, count * sizeof(T));
}

template <class T>
inline void narrow_run(const T* from, std::int64_t count, T* to) {
  memcpy(to, from, count * sizeof(T));
}

// The loops of loads and stores are not inlined: they would be compiled once for each tensor of each op.
template <class A, class T>
DDPM_FAST_NOINLINE void widen_dense(const T* from, std::int64_t count, A* to) {
  widen_run(from, count, to);
}
template <class A, class T>
DDPM_FAST_NOINLINE void widen_rows(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t cols, A* to) {
  const auto widen_all = [&](auto width) {
    for (std::int64_t row = 0; row < rows; ++row) widen_run(from + row * stride, width, to + row * width);
  };
  if (cols == 3) return widen_all(std::integral_constant<std::int64_t, 3>{});  // images
  widen_all(cols);
}
template <class A, class T>
DDPM_FAST_NOINLINE void narrow_dense(const A* from, std::int64_t count, T* to) {
  narrow_run(from, count, to);
}
template <class A, class T>
DDPM_FAST_NOINLINE void narrow_rows(const A* from, std::int64_t rows, std::int64_t cols, T* to, std::int64_t stride) {
  for (std::int64_t row = 0; row < rows; ++row) narrow_run(from + row * cols, cols, to + row * stride);
}

template <class A, class T>
inline const A* load_as(const T* from, const Location& at, const Tile& tile, A* buffer) {
  from += at.offset;
  if (at.stride == tile.cols) {
    if constexpr (std::is_same_v<A, T>) return from;
    widen_dense(from, tile.count(), buffer);
  } else {
    widen_rows(from, at.stride, tile.rows, tile.cols, buffer);
  }
  return buffer;
}

// Returns a tile of `tensor` as a dense array of A, the type of arithmetic: float, or double for float64. The array is
// the tensor's own memory if it is dense and of type A, and `buffer` otherwise.
template <class A>
inline const A* load(const void* tensor, DType dtype, const Location& at, const Tile& tile, A* buffer) {
  if (dtype == DType::kUInt8) return load_as(static_cast<const std::uint8_t*>(tensor), at, tile, buffer);
  if constexpr (std::is_same_v<A, double>) {
    return load_as(static_cast<const double*>(tensor), at, tile, buffer);
  } else {
    switch (dtype) {
      case DType::kFloat16:
        return load_as(static_cast<const Float16*>(tensor), at, tile, buffer);
      case DType::kBFloat16:
        return load_as(static_cast<const BFloat16*>(tensor), at, tile, buffer);
      default:
        return load_as(static_cast<const float*>(tensor), at, tile, buffer);
    }
  }
}

template <class A, class T>
inline void store_as(const A* values, T* to, const Location& at, const Tile& tile) {
  to += at.offset;
  if (at.stride == tile.cols) {
    if constexpr (std::is_same_v<A, T>) return narrow_run(values, tile.count(), to);
    narrow_dense(values, tile.count(), to);
  } else {
    narrow_rows(values, tile.rows, tile.cols, to, at.stride);
  }
}

// Stores a tile, rounded once to the dtype of the tensor.
template <class A>
inline void store(const A* values, void* tensor, DType dtype, const Location& at, const Tile& tile) {
  if constexpr (std::is_same_v<A, double>) {
    store_as(values, static_cast<double*>(tensor), at, tile);
  } else {
    switch (dtype) {
      case DType::kFloat16:
        return store_as(values, static_cast<Float16*>(tensor), at, tile);
      case DType::kBFloat16:
        return store_as(values, static_cast<BFloat16*>(tensor), at, tile);
      default:
        return store_as(values, static_cast<float*>(tensor), at, tile);
    }
  }
}

// --------------------------------------------------------------------------------------------------------------- noise

//   out[row * cols + col] = planes[col][row]
template <int kCols>
inline void interleave(const float* const* planes, std::int64_t rows, float* out) {
#pragma omp simd
  for (std::int64_t row = 0; row < rows; ++row) {
    for (int col = 0; col < kCols; ++col) out[row * kCols + col] = planes[col][row];
  }
}

inline void interleave(const float* const* planes, std::int64_t rows, std::int64_t cols, float* out) {
  if (cols == 3) return interleave<3>(planes, rows, out);
  if (cols == 4) return interleave<4>(planes, rows, out);
  for (std::int64_t col = 0; col < cols; ++col) {
    for (std::int64_t row = 0; row < rows; ++row) out[row * cols + col] = planes[col][row];
  }
}

// The noise of a tile, and the memory to prefetch while it is computed.
template <class A>
class NoiseTile {
 public:
  // Prefetches the tile of a tensor during `generate`.
  void prefetch(const void* tensor, DType dtype, const Location& at, const Tile& tile) {
    if (tensor == nullptr || at.stride != tile.cols) return;
    const int bytes = size_of(dtype);
    prefetch_.add(static_cast<const char*>(tensor) + at.offset * bytes, bytes);
  }

  // Returns the normals of the tile in memory order.
  const A* generate(std::int64_t seed, std::uint32_t stream, const Partition& partition, const Tile& tile) {
    const auto key = static_cast<std::uint64_t>(seed);
    const float* planes[Partition::kMaxCols] = {};
    if (tile.rows == partition.rows()) {  // whole planes, which are neighbours
      planes[0] = philox_normal(key, stream, tile.col * partition.rows(), tile.count(), planes_, prefetch_);
      for (std::int64_t col = 1; col < tile.cols; ++col) planes[col] = planes[0] + col * tile.rows;
    } else {
      float* plane = planes_;
      for (std::int64_t col = 0; col < tile.cols; ++col, plane += tile.rows + kNormalsBuffer - kMaxTile) {
        const std::int64_t first = (tile.col + col) * partition.rows() + tile.row;
        planes[col] = philox_normal(key, stream, first, tile.rows, plane, prefetch_);
      }
    }
    const float* normals = planes[0];
    if (tile.cols > 1) {
      interleave(planes, tile.rows, tile.cols, interleaved_);
      normals = interleaved_;
    }
    if constexpr (std::is_same_v<A, double>) {
      for (std::int64_t i = 0; i < tile.count(); ++i) widened_[i] = normals[i];
      return widened_;
    } else {
      return normals;
    }
  }

  // Returns the given noise, or generates it if `noise` is absent.
  const A* given_or_generated(const void* noise, DType dtype, const std::int64_t* seeds, std::uint32_t stream,
                              const Partition& partition, const Tile& tile) {
    if (noise != nullptr) return load<A>(noise, dtype, location(partition, tile), tile, widened_);
    return generate(seeds[tile.sample], stream, partition, tile);
  }

 private:
  Prefetch prefetch_;
  alignas(64) float planes_[kMaxTile + Partition::kMaxCols * (kNormalsBuffer - kMaxTile)];
  alignas(64) float interleaved_[kMaxTile];
  alignas(64) A widened_[kMaxTile];
};

// ------------------------------------------------------------------------------------------------------------- threads

// Runs body(index, tile) for all tiles. A thread gets at least 16 tiles with noise or 64 without, about 10 us of work.
template <class Body>
inline void for_each_tile(const Partition& partition, std::int64_t samples, bool generates,
                          const StreamOrThreads& where, Body body) {
  parallel_for(samples * partition.tiles_per_sample(), generates ? 16 : 64, where,
               [&](std::int64_t index) { body(index, partition.tile(index)); });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
