// The gradient of attention, one head of one sample at a time.
//
// w are the weights. D is the sum of w dw over a query's keys.
//   w  = softmax(q k^T scale)
//   D  = rowsum(dy y)
//   dv = w^T dy
//   dw = dy v^T
//   ds = w (dw - D)
//   dq = ds k scale
//   dk = ds^T q scale
// A few keys are processed at a time, with all queries. w^T and ds^T are computed directly, with keys as rows, because
// dv and dk sum over queries. Only ds is transposed, for dq.
#include "cpu/attention_packing.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

constexpr Index kKeysInSum = 256;  // keys whose score gradients are kept at once
constexpr Index kKeys = 64;        // a divisor of kKeysInSum and a multiple of a vector

template <class T>
float sum_of_products(const T* a, const T* b, Index count) {
  Floats sums{};
  Index i = 0;
  for (; i + kWidth<T> <= count; i += kWidth<T>) sums = fma(load(a + i), load(b + i), sums);
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    sums = fma(load(a + i, rest), load(b + i, rest), sums);
  }
  float sum = 0;
  for (int lane = 0; lane < kWidth<T>; ++lane) sum += sums[lane];
  return sum;
}

// Transposes `from` [rows, columns]. Rows of `to` end with zeros up to a whole vector. columns: a multiple of a vector.
template <class T>
void transpose_matrix(T* to, Index to_stride, const T* from, Index from_stride, Index rows, Index columns) {
  constexpr int width = kWidth<T>;
  for (Index row = 0; row < rows; row += width) {
    for (Index column = 0; column < columns; column += width) {
      Floats square[width];
      for (int i = 0; i < width; ++i) {
        square[i] = row + i < rows ? load(from + (row + i) * from_stride + column) : Floats{};
      }
      transpose(square);
      for (int i = 0; i < width; ++i) store(to + (column + i) * to_stride + row, square[i]);
    }
  }
}

template <class T>
void gradients_of_head(const AttentionBackwardArgs& a, Index head) {
  const auto q = rows_of_qkv<T>(a, a.qkv, head, 0), k = rows_of_qkv<T>(a, a.qkv, head, 1),
             v = rows_of_qkv<T>(a, a.qkv, head, 2), dy = rows_of_y<T>(a, a.grad_y, head);
  const auto dq = rows_of_qkv<T>(a, a.grad_qkv, head, 0), dk = rows_of_qkv<T>(a, a.grad_qkv, head, 1),
             dv = rows_of_qkv<T>(a, a.grad_qkv, head, 2);
  const auto y = rows_of_y<T>(a, a.y, head);

  const Index pixel_panels = panels_of(a.pixels), channel_panels = panels_of(a.head_dim);
  const Index across = pixel_panels * kPanel, wide = channel_panels * kPanel;
  const Index over_channels = panel_size<T>(a.head_dim), over_pixels = panel_size<T>(a.pixels);
  const Index sums_size = a.pixels > kKeysInSum ? a.pixels * wide : 0;
  Scratch scratch(ScratchUse::kSlice, 2 * Scratch::bytes<float>(pixel_panels * over_channels) +
                                          3 * Scratch::bytes<float>(channel_panels * over_pixels) +
                                          3 * Scratch::bytes<float>(across) + 2 * Scratch::bytes<T>(kKeys * across) +
                                          Scratch::bytes<T>(across * kKeysInSum) + Scratch::bytes<float>(sums_size));
  float* q_pixels = scratch.take<float>(pixel_panels * over_channels);
  float* dy_pixels = scratch.take<float>(pixel_panels * over_channels);
  float* q_channels = scratch.take<float>(channel_panels * over_pixels);
  float* dy_channels = scratch.take<float>(channel_panels * over_pixels);
  float* k_channels = scratch.take<float>(channel_panels * over_pixels);
  float* largest = scratch.take<float>(across);  // per query; 0 beyond the last query
  float* shares = scratch.take<float>(across);   // per query; 0 beyond the last query, which makes its weights 0
  float* totals = scratch.take<float>(across);   // D
  T* weights = scratch.take<T>(kKeys * across);  // [key, query]
  T* dscores = scratch.take<T>(kKeys * across);  // [key, query]
  T* dscores_down = scratch.take<T>(across * kKeysInSum);  // [query, key]
  float* dq_sums = scratch.take<float>(sums_size);

  for (Index panel = 0; panel < pixel_panels; ++panel) {
    pack_pixels<T>(q, panel, q_pixels + panel * over_channels);
    pack_pixels<T>(dy, panel, dy_pixels + panel * over_channels);
  }
  pack_channels<T>(q, 0, a.pixels, a.pixels, q_channels);
  pack_channels<T>(dy, 0, a.pixels, a.pixels, dy_channels);
  pack_channels<T>(k, 0, a.pixels, a.pixels, k_channels);
  const float* softmax = a.softmax + 2 * head * a.pixels;
  for (Index query = 0; query < across; ++query) {
    const bool is_one = query < a.pixels;
    largest[query] = is_one ? softmax[query] : 0;
    shares[query] = is_one ? softmax[a.pixels + query] : 0;
    totals[query] = is_one ? sum_of_products(dy[query], y[query], a.head_dim) : 0;
  }

  const Floats factor = broadcast(a.scale * kLog2E);
  const auto weights_and_dscores = [&](Index first, Index count) {
    for (Index panel = 0; panel < pixel_panels; ++panel) {
      over_rows(0, count, [&](Index key, auto rows) {
        const T *keys[rows()], *values[rows()];
        for (int r = 0; r < rows(); ++r) keys[r] = k[first + key + r], values[r] = v[first + key + r];
        Sums<rows()> scores{}, dweights{};
        multiply(scores, keys, q_pixels + panel * over_channels, a.head_dim);
        multiply(dweights, values, dy_pixels + panel * over_channels, a.head_dim);
        for (int r = 0; r < rows(); ++r) {
          for (int i = 0; i < kPanelVectors; ++i) {
            const Index query = panel * kPanel + i * kWidth<float>, at = (key + r) * across + query;
            const Floats exponential = exp2<T>((scores.of[r][i] - load(largest + query)) * factor);
            const Floats weight = exponential * load(shares + query);
            store(weights + at, weight);
            store(dscores + at, weight * (dweights.of[r][i] - load(totals + query)));
          }
        }
      });
    }
  };
  //   out [key, channel] = from [key, query] packed [query, channel]
  const auto sum_over_queries = [&](const Rows<T>& out, Index first, Index count, const T* from, const float* packed,
                                    float scale) DDPM_FAST_NOINLINE {
    for (Index panel = 0; panel < channel_panels; ++panel) {
      over_rows(0, count, [&](Index key, auto rows) {
        const T* inputs[rows()];
        for (int r = 0; r < rows(); ++r) inputs[r] = from + (key + r) * across;
        Sums<rows()> sums{};
        multiply(sums, inputs, packed + panel * over_pixels, round_up(a.pixels, kStep<T>));
        for (int r = 0; r < rows(); ++r) {
          store_channels(out[first + key + r] + panel * kPanel, sums.of[r], scale, a.head_dim - panel * kPanel);
        }
      });
    }
  };
  // Sums over keys first .. end - 1:
  //   dq [query, channel] = ds [query, key] k [key, channel]
  const auto sum_over_keys = [&](Index first, Index end) {
    for (Index panel = 0; panel < channel_panels; ++panel) {
      over_rows(0, a.pixels, [&](Index query, auto rows) {
        const T* inputs[rows()];
        for (int r = 0; r < rows(); ++r) inputs[r] = dscores_down + (query + r) * kKeysInSum;
        Sums<rows()> sums{};
        multiply(sums, inputs, k_channels + panel * over_pixels + panel_size<T>(first),
                 round_up(end - first, kStep<T>));
        for (int r = 0; r < rows(); ++r) {
          float* before = dq_sums + (query + r) * wide + panel * kPanel;
          for (int i = 0; i < kPanelVectors; ++i) {
            if (first > 0) sums.of[r][i] += load(before + i * kWidth<float>);
            if (end < a.pixels) store(before + i * kWidth<float>, sums.of[r][i]);
          }
          if (end == a.pixels) {
            store_channels(dq[query + r] + panel * kPanel, sums.of[r], a.scale, a.head_dim - panel * kPanel);
          }
        }
      });
    }
  };

  for (Index first = 0; first < a.pixels; first += kKeysInSum) {
    const Index end = smaller(first + kKeysInSum, a.pixels);
    for (Index key = first; key < end; key += kKeys) {
      const Index count = smaller(kKeys, end - key);
      weights_and_dscores(key, count);
      sum_over_queries(dv, key, count, weights, dy_channels, 1);
      sum_over_queries(dk, key, count, dscores, q_channels, a.scale);
      transpose_matrix(dscores_down + key - first, kKeysInSum, dscores, across, count, across);
    }
    sum_over_keys(first, end);
  }
}

template <class T>
void run(const AttentionBackwardArgs& a) {
  if (a.pixels == 0) return;
  const Index heads = a.n * a.num_heads;
  parallel_for(heads, grain_of(a, 5, heads), a.stream_or_threads, [&](Index head) { gradients_of_head<T>(a, head); });
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& a) {
  a.dtype == DType::kBFloat16 ? run<BFloat16>(a) : run<float>(a);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
