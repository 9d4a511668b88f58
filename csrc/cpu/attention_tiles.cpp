// Attention in bfloat16 by products on tiles (see tiles.h), with the steps of attention.cpp.
//
// A row of a tile that has no query is multiplied too, whatever its memory holds, and dropped.
#include "cpu/attention_packing.h"
#include "cpu/attention_softmax.h"
#include "cpu/tiles.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

constexpr Index kQueries = 2 * kTileSide;  // that a block has

// Pixels and channels in whole pairs of tiles.
Index padded_pixels(const AttentionArgs& a) { return round_up(a.pixels, kQueries); }
Index padded_channels(const AttentionArgs& a) { return round_up(a.head_dim, kQueries); }

// to = rows panels, for the rows of a block. A panel has 16 columns.
void multiply_rows(float* to, Index stride, Index columns, const BFloat16* rows, Index depth, const BFloat16* panels,
                   FrequentStores& stores) {
  using Block = TileSums<2>;
  const Index row_bytes = depth * static_cast<Index>(sizeof(BFloat16)), panel_bytes = kTileSide * row_bytes;
  for (Index column = 0; column < columns; column += 2 * kTileSide) {
    const char* a[2] = {reinterpret_cast<const char*>(rows), reinterpret_cast<const char*>(rows + kTileSide * depth)};
    const char* first = reinterpret_cast<const char*>(panels) + column / kTileSide * panel_bytes;
    const char* b[2] = {first, first + panel_bytes};
    Block::clear();
    for (Index step = 0; step < depth; step += kTileDepth) {
      Block::add(a, row_bytes, b);
      for (int i = 0; i < 2; ++i) a[i] += kTileRowBytes, b[i] += kTileBytes;
      stores.after_step();
    }
    Block::store(to + column, stride);
  }
}

}  // namespace

void attention_tiles(const AttentionArgs& a) {
  using T = BFloat16;
  const Index all_heads = a.n * a.num_heads, pixels = padded_pixels(a), channels = padded_channels(a);
  if (all_heads * pixels * channels == 0) return;
  T* const all_keys = static_cast<T*>(a.workspace);
  T* const all_values = all_keys + all_heads * pixels * channels;
  const Index panels = pixels / kTileSide, all_panels = all_heads * panels;
  parallel_for(all_panels, grain_of(a, 2, all_panels), a.stream_or_threads, [&](Index i) {
    const Index head = i / panels, first = i % panels * kTileSide;
    T* const keys = all_keys + (head * pixels + first) * channels;
    T* const values = all_values + head * pixels * channels;
    pack_pixels<T, kTileSide>(rows_of_qkv<T>(a, a.qkv, head, 1), i % panels, reinterpret_cast<float*>(keys));
    std::memset(keys + a.head_dim * kTileSide, 0,
                static_cast<std::size_t>((channels - a.head_dim) * kTileSide) * sizeof(T));
    pack_channels<T, kTileSide>(rows_of_qkv<T>(a, a.qkv, head, 2), first, first + kTileSide, pixels,
                                reinterpret_cast<float*>(values));
  });

  const Index blocks = pixels / kQueries;
  parallel_for(all_heads * blocks, grain_of(a, 2, all_heads * blocks), a.stream_or_threads, [&](Index i) {
    const Index head = i / blocks, first = i % blocks * kQueries, count = smaller(kQueries, a.pixels - first);
    const auto queries = rows_of_qkv<T>(a, a.qkv, head, 0);
    const auto outputs = rows_of_y<T>(a, a.y, head);
    // The rows of sums are a cache line further apart, so that those of large maps do not share a set of the cache.
    const Index size = kQueries * larger(pixels, channels), stride = larger(pixels, channels) + kTileSide;
    Scratch scratch(ScratchUse::kSlice, Scratch::bytes<float>(kQueries * stride) + Scratch::bytes<T>(size));
    float* const sums = scratch.take<float>(kQueries * stride);
    T* const rows = scratch.take<T>(size);  // the queries, then the exponentials of their scores
    float shares[kQueries];

    for (Index q = 0; q < count; ++q) {
      T* const to = rows + q * channels;
      std::memcpy(to, queries[first + q], static_cast<std::size_t>(a.head_dim) * sizeof(T));
      std::memset(to + a.head_dim, 0, static_cast<std::size_t>(channels - a.head_dim) * sizeof(T));
    }
    const TileUse in_use;
    FrequentStores stores;
    multiply_rows(sums, stride, pixels, rows, channels, all_keys + head * pixels * channels, stores);
    for (Index q = 0; q < count; ++q) {
      T* const to = rows + q * pixels;
      shares[q] = exponentials<T>(to, sums + q * stride, a.pixels, a.scale).share;
      std::memset(to + a.pixels, 0, static_cast<std::size_t>(pixels - a.pixels) * sizeof(T));
    }
    multiply_rows(sums, stride, channels, rows, pixels, all_values + head * pixels * channels, stores);
    for (Index q = 0; q < count; ++q) {
      for (Index c = 0; c < a.head_dim; c += kWidth<float>) {
        const Floats out = load(sums + q * stride + c) * shares[q];
        const Index lanes = a.head_dim - c;
        T* const to = outputs[first + q] + c;
        lanes >= kWidth<float> ? store(to, out) : store(to, out, static_cast<int>(lanes));
      }
    }
  });
}

std::int64_t attention_tiles_workspace(const AttentionArgs& a) {
  // The keys and the values of all heads.
  const Index values = a.n * a.num_heads * padded_pixels(a) * padded_channels(a);
  return 2 * values * static_cast<Index>(sizeof(BFloat16));
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
