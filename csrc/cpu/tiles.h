// Products of bfloat16 on tiles: the matrix unit of processors with AMX.
//
// A tile is a register of 16 rows of 64 bytes. A product adds to a tile of sums, 16 x 16 in float32, the product of
// 16 rows of 32 values and 32 rows of 16 columns. The rows of the second factor lie in pairs: [16 pairs][16 columns][2].
//
// Other processors compute the same bits in C++, slowly. So the kernels that use tiles can be tested everywhere.
#pragma once

#include "cpu/index.h"
#include "cpu/vector.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int kTileSide = 16;   // rows and columns of a tile of sums
constexpr int kTileDepth = 32;  // values of a row of a factor
constexpr Index kTileRowBytes = 64, kTileBytes = kTileSide * kTileRowBytes;

#ifdef DDPM_FAST_TILES  // CMake sets it with the flags for AMX

// A thread can use tiles while it has one of these.
class TileUse {
 public:
  TileUse() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile) shapes.row_bytes[tile] = kTileRowBytes, shapes.rows[tile] = kTileSide;
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~TileUse() { __asm__ volatile("tilerelease"); }
  TileUse(const TileUse&) = delete;
  TileUse& operator=(const TileUse&) = delete;
};

template <int tile>
DDPM_FAST_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int tile>
DDPM_FAST_INLINE void load_tile(const void* from, Index row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(tile) : "memory");
}
template <int tile>
DDPM_FAST_INLINE void store_tile(void* to, Index row_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(tile) : "memory");
}
template <int sums, int rows, int columns>
DDPM_FAST_INLINE void add_product() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(rows), "i"(columns));
}

#else

struct alignas(64) TileRegister {
  char row[kTileSide][kTileRowBytes];
};
inline TileRegister* tile_registers() {
  static thread_local TileRegister tiles[8];
  return tiles;
}

class TileUse {
 public:
  // Fills the tiles with NaN, so that nothing relies on what they held before.
  TileUse() { std::memset(tile_registers(), 0xFF, 8 * sizeof(TileRegister)); }
  TileUse(const TileUse&) = delete;
  TileUse& operator=(const TileUse&) = delete;
};

template <int tile>
DDPM_FAST_INLINE void zero_tile() {
  std::memset(tile_registers() + tile, 0, sizeof(TileRegister));
}
template <int tile>
DDPM_FAST_INLINE void load_tile(const void* from, Index row_bytes) {
  for (Index i = 0; i < kTileSide; ++i) {
    std::memcpy(tile_registers()[tile].row[i], static_cast<const char*>(from) + i * row_bytes, kTileRowBytes);
  }
}
template <int tile>
DDPM_FAST_INLINE void store_tile(void* to, Index row_bytes) {
  for (Index i = 0; i < kTileSide; ++i) {
    std::memcpy(static_cast<char*>(to) + i * row_bytes, tile_registers()[tile].row[i], kTileRowBytes);
  }
}

// The matrix unit takes subnormal numbers for zeros, and returns zeros in their place.
DDPM_FAST_INLINE Floats without_subnormals(Floats v) {
  const Words bits = reinterpret_cast<Words>(v);
  return reinterpret_cast<Floats>((bits & 0x7F800000) != 0 ? bits : bits & 0x80000000);
}

// The sums of even and of odd values are separate until the end, in this order. Every fused multiply-add rounds once.
// The baseline has none, but there the product of two bfloat16 is exact, unless it overflows or underflows.
inline void add_product(TileRegister& sums, const TileRegister& rows, const TileRegister& columns) {
  const auto even = [](Words pairs) { return without_subnormals(reinterpret_cast<Floats>(pairs << 16)); };
  const auto odd = [](Words pairs) { return without_subnormals(reinterpret_cast<Floats>(pairs & 0xFFFF0000)); };
  for (int i = 0; i < kTileSide; ++i) {
    for (int part = 0; part < kTileRowBytes; part += kVectorSize) {
      Floats even_sum{}, odd_sum{}, sum;
      for (int k = 0; k < kTileSide; ++k) {
        std::uint32_t pair;
        Words pairs;
        std::memcpy(&pair, rows.row[i] + k * sizeof(pair), sizeof(pair));
        std::memcpy(&pairs, columns.row[k] + part, sizeof(pairs));
        even_sum = without_subnormals(fma(even(Words{} + pair), even(pairs), even_sum));
        odd_sum = without_subnormals(fma(odd(Words{} + pair), odd(pairs), odd_sum));
      }
      std::memcpy(&sum, sums.row[i] + part, sizeof(sum));
      sum = without_subnormals(without_subnormals(sum) + without_subnormals(even_sum + odd_sum));
      std::memcpy(sums.row[i] + part, &sum, sizeof(sum));
    }
  }
}
template <int sums, int rows, int columns>
DDPM_FAST_INLINE void add_product() {
  TileRegister* const tiles = tile_registers();
  add_product(tiles[sums], tiles[rows], tiles[columns]);
}

#endif

// A tile store that comes more than about 0.7 us after the last one takes 0.3 us (Sapphire Rapids). So the products below
// store a tile that nobody reads after every eighth step.
class FrequentStores {
 public:
  DDPM_FAST_INLINE void after_step() {
    if (++steps_ % 8 == 0) store_tile<4>(unread_, kTileRowBytes);
  }

 private:
  alignas(64) char unread_[kTileBytes];
  int steps_ = 0;
};

// Products of `rows` tiles with two tiles of columns, one depth of a tile at a time. The sums are in tiles
// 0 .. 2 rows - 1, row by row. With two tiles of rows, each loaded tile is used twice.
template <int rows>
struct TileSums {
  static_assert(rows == 1 || rows == 2);

  static DDPM_FAST_INLINE void clear() {
    zero_tile<0>();
    zero_tile<1>();
    if constexpr (rows == 2) {
      zero_tile<2>();
      zero_tile<3>();
    }
  }

  // a: first value of each tile of rows, whose rows are `row_bytes` apart. b: both tiles of columns, each contiguous.
  static DDPM_FAST_INLINE void add(const char* const (&a)[rows], Index row_bytes, const char* const (&b)[2]) {
    load_tile<4>(a[0], row_bytes);
    load_tile<6>(b[0], kTileRowBytes);
    add_product<0, 4, 6>();
    load_tile<7>(b[1], kTileRowBytes);
    add_product<1, 4, 7>();
    if constexpr (rows == 2) {
      load_tile<5>(a[1], row_bytes);
      add_product<2, 5, 6>();
      add_product<3, 5, 7>();
    }
  }

  // Writes the sums to a matrix whose rows are `stride` floats apart.
  static DDPM_FAST_INLINE void store(float* to, Index stride) {
    const Index row_bytes = stride * static_cast<Index>(sizeof(float));
    store_tile<0>(to, row_bytes);
    store_tile<1>(to + kTileSide, row_bytes);
    if constexpr (rows == 2) {
      store_tile<2>(to + kTileSide * stride, row_bytes);
      store_tile<3>(to + kTileSide * stride + kTileSide, row_bytes);
    }
  }
};

}  // namespace ddpm_fast::DDPM_FAST_ISA
