// Attention in bfloat16 by products on tiles (see tiles.h), with the steps of attention.cpp.
//
// A row of a tile that has no query is multiplied too, whatever its memory holds, and dropped.
#include "cpu/attention_packing.h"
#include "cpu/attention_softmax.h"
#include "cpu/tiles.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

constexpr Index kQueries = 2 * kTileSide;  // that a block has

// Pixels in whole blocks. Channels are whole tiles.
Index padded_pixels(const AttentionArgs& a) { return round_up(a.pixels, kQueries); }

// to = rows panels, for the rows of a block. The panels have 16 columns each.
void multiply_rows(float* to, Index columns, const BFloat16* rows, Index depth, const BFloat16* panels) {
  using Sums = TileSums<2, 2>;
  const Index row_bytes = depth * static_cast<Index>(sizeof(BFloat16)), panel_bytes = kTileSide * row_bytes;
  for (Index column = 0; column < columns; column += 2 * kTileSide) {
    const char* a[2] = {reinterpret_cast<const char*>(rows), reinterpret_cast<const char*>(rows + kTileSide * depth)};
    const char* first = reinterpret_cast<const char*>(panels) + column / kTileSide * panel_bytes;
    const char* b[2] = {first, first + panel_bytes};
    Sums::clear();
    for (Index step = 0; step < depth; step += kTileDepth) {
      Sums::add(a, row_bytes, b);
      for (int i = 0; i < 2; ++i) a[i] += kTileRowBytes, b[i] += kTileBytes;
    }
    Sums::store(to + column, columns);
  }
}

}  // namespace

void attention_tiles(const AttentionArgs& a) {
  using T = BFloat16;
  const Index all_heads = a.n * a.num_heads, pixels = padded_pixels(a), channels = a.head_dim;
  if (all_heads * pixels * channels == 0) return;
  T* const all_keys = static_cast<T*>(a.workspace);
  T* const all_values = all_keys + all_heads * pixels * channels;
  const Index panels = pixels / kTileSide, all_panels = all_heads * panels;
  parallel_for(all_panels, grain_of(a, 2, all_panels), a.stream_or_threads, [&](Index i) {
    const Index head = i / panels, first = i % panels * kTileSide;
    float* const keys = reinterpret_cast<float*>(all_keys + (head * pixels + first) * channels);
    float* const values = reinterpret_cast<float*>(all_values + head * pixels * channels);
    pack_pixels<T, kTileSide>(rows_of_qkv<T>(a, a.qkv, head, 1), i % panels, keys);
    pack_channels<T, kTileSide>(rows_of_qkv<T>(a, a.qkv, head, 2), first, first + kTileSide, pixels, values);
  });

  const Index blocks = pixels / kQueries;
  parallel_for(all_heads * blocks, grain_of(a, 2, all_heads * blocks), a.stream_or_threads, [&](Index i) {
    const Index head = i / blocks, first = i % blocks * kQueries, count = smaller(kQueries, a.pixels - first);
    const auto queries = rows_of_qkv<T>(a, a.qkv, head, 0);
    const auto outputs = rows_of_y<T>(a, a.y, head);
    const Index size = kQueries * larger(pixels, channels);
    Scratch scratch(ScratchUse::kSlice, Scratch::bytes<float>(size) + Scratch::bytes<T>(size));
    float* const sums = scratch.take<float>(size);
    T* const rows = scratch.take<T>(size);  // the queries, then the exponentials of their scores
    float shares[kQueries];

    for (Index q = 0; q < count; ++q) {
      std::memcpy(rows + q * channels, queries[first + q], static_cast<std::size_t>(channels) * sizeof(T));
    }
    const TileUse in_use;
    multiply_rows(sums, pixels, rows, channels, all_keys + head * pixels * channels);
    for (Index q = 0; q < count; ++q) {
      T* const to = rows + q * pixels;
      shares[q] = exponentials<T>(to, sums + q * pixels, a.pixels, a.scale).share;
      std::memset(to + a.pixels, 0, static_cast<std::size_t>(pixels - a.pixels) * sizeof(T));
    }
    multiply_rows(sums, channels, rows, pixels, all_values + head * pixels * channels);
    for (Index q = 0; q < count; ++q) {
      for (Index c = 0; c < channels; c += kWidth<float>) {
        store(outputs[first + q] + c, load(sums + q * channels + c) * shares[q]);
      }
    }
  });
}

std::int64_t attention_tiles_workspace(const AttentionArgs& a) {
  return 2 * a.n * a.num_heads * padded_pixels(a) * a.head_dim * static_cast<Index>(sizeof(BFloat16));
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
