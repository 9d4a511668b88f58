// Attention of every pixel of a map to all pixels:
//   y = softmax(q k^T scale) v
//
// Keys and values are packed like the weights of a convolution. Queries are processed in blocks whose scores stay in
// cache. The division by the sum of a query's exponentials follows their product with the values.
#include "cpu/attention_packing.h"
#include "cpu/attention_softmax.h"
#include "cpu/with_type.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

// The floats of a head in the workspace.
template <class P>
struct PackedHead {
  explicit PackedHead(const AttentionArgs& a)
      : keys(panels_of(a.pixels) * panel_size<P>(a.head_dim)),
        values(panels_of(a.head_dim) * panel_size<P>(a.pixels)) {}

  Index keys, values;
};

template <class T>
void run(const AttentionArgs& a) {
  using P = ProductType<T>;
  const Index all_heads = a.n * a.num_heads;
  if (all_heads * a.pixels == 0) return;
  const Index key_panels = panels_of(a.pixels), value_panels = panels_of(a.head_dim);
  const PackedHead<P> packed(a);
  float* const all_keys = static_cast<float*>(a.workspace);
  float* const all_values = all_keys + all_heads * packed.keys;
  const Index panels = all_heads * key_panels;
  parallel_for(panels, grain_of(a, 2, panels), a.stream_or_threads, [&](Index i) {
    const Index head = i / key_panels, panel = i % key_panels, first = panel * kPanel;
    pack_pixels<P>(rows_of_qkv<T>(a, a.qkv, head, 1), panel,
                   all_keys + head * packed.keys + panel * panel_size<P>(a.head_dim));
    pack_channels<P>(rows_of_qkv<T>(a, a.qkv, head, 2), first, smaller(first + kPanel, a.pixels), a.pixels,
                     all_values + head * packed.values);
  });

  const Index row_size = key_panels * kPanel;
  constexpr Index kScoresBytes = 128 << 10, kQueries = 32;
  const Index most = smaller(kQueries, larger(kRows, kScoresBytes / (row_size * 4)));
  const Index blocks = (a.pixels + most - 1) / most;
  parallel_for(all_heads * blocks, grain_of(a, 2, all_heads * blocks), a.stream_or_threads, [&](Index i) {
    const Index head = i / blocks, first = i % blocks * most, count = smaller(most, a.pixels - first);
    const auto outputs = rows_of_y<T>(a, a.y, head);
    Scratch block_scratch(ScratchUse::kSlice, Scratch::bytes<float>(most * row_size) +
                                                  Scratch::bytes<P>(most * (row_size + a.head_dim)) +
                                                  Scratch::bytes<float>(most));
    float* scores = block_scratch.take<float>(most * row_size);
    P* weights = block_scratch.take<P>(most * row_size);
    const ProductRows<P, T> queries(rows_of_qkv<T>(a, a.qkv, head, 0), first, count,
                                    block_scratch.take<P>(most * a.head_dim));
    float* shares = block_scratch.take<float>(most);
    const float* keys = all_keys + head * packed.keys;
    for (Index panel = 0; panel < key_panels; ++panel, keys += panel_size<P>(a.head_dim)) {
      over_rows(0, count, [&](Index query, auto rows) {
        const P* inputs[rows()];
        for (int r = 0; r < rows(); ++r) inputs[r] = queries[query + r];
        Sums<rows()> sums{};
        multiply(sums, inputs, keys, a.head_dim);
        for (int r = 0; r < rows(); ++r) {
          float* to = scores + (query + r) * row_size + panel * kPanel;
          for (int v = 0; v < kPanelVectors; ++v) store(to + v * kWidth<float>, sums.of[r][v]);
        }
      });
    }
    for (Index query = 0; query < count; ++query) {
      P* to = weights + query * row_size;
      const Softmax softmax = exponentials<T>(to, scores + query * row_size, a.pixels, a.scale);
      if (a.pixels % kStep<P> != 0) to[a.pixels] = P{};
      shares[query] = softmax.share;
      if (a.softmax != nullptr) {
        float* at = a.softmax + 2 * head * a.pixels + first + query;
        at[0] = softmax.largest;
        at[a.pixels] = softmax.share;
      }
    }
    const float* values = all_values + head * packed.values;
    for (Index panel = 0; panel < value_panels; ++panel, values += panel_size<P>(a.pixels)) {
      over_rows(0, count, [&](Index query, auto rows) {
        const P* inputs[rows()];
        for (int r = 0; r < rows(); ++r) inputs[r] = weights + (query + r) * row_size;
        Sums<rows()> sums{};
        multiply(sums, inputs, values, round_up(a.pixels, kStep<P>));
        for (int r = 0; r < rows(); ++r) {
          store_channels(outputs[first + query + r] + panel * kPanel, sums.of[r], shares[query + r],
                         a.head_dim - panel * kPanel);
        }
      });
    }
  });
}

}  // namespace

void attention(const AttentionArgs& a) {
  with_conv_type(a.dtype, [&](auto type) { run<decltype(type)>(a); });
}

std::int64_t attention_workspace(const AttentionArgs& a) {
  Index floats = 0;
  with_conv_type(a.dtype, [&](auto type) {
    const PackedHead<ProductType<decltype(type)>> packed(a);
    floats = a.n * a.num_heads * (packed.keys + packed.values);
  });
  return floats * static_cast<Index>(sizeof(float));
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
