// Attention of every pixel of a map to all pixels: softmax(q k^T scale) v.
//
// Keys and values are packed like the weights of a convolution; then queries go in blocks whose scores stay in cache.
// The division by the sum of a query's exponentials waits until their product with the values is there.
#include "common/args.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "cpu/room.h"
#include "cpu/silu.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

constexpr float kLog2E = -kNegLog2E;

template <class T>
struct Heads {
  const AttentionArgs& a;
  Index words, key_panels, value_panels, keys_size, values_size;  // words: 32 bits of channels, in a row of q, k or v

  explicit Heads(const AttentionArgs& args)
      : a(args),
        words(args.channels / kStep<T>),
        key_panels((args.pixels + kPanel - 1) / kPanel),
        value_panels((args.channels + kPanel - 1) / kPanel),
        keys_size(key_panels * panel_size<T>(args.channels)),
        values_size(value_panels * panel_size<T>(args.pixels)) {}

  // Row `pixel` of q (0), k (1) or v (2) of a head of a sample.
  const T* row(int which, Index head, Index pixel) const {
    const Index sample = head / a.heads;
    return static_cast<const T*>(a.qkv) +
           (((sample * a.pixels + pixel) * 3 + which) * a.heads + head % a.heads) * a.channels;
  }
};

// A panel of keys: in steps of channels, kPanel keys each.
template <class T>
void pack_keys(const Heads<T>& heads, Index head, Index panel, float* to) {
  constexpr int width = kWidth<float>;
  for (Index first = 0; first < kPanel; first += width) {
    for (Index word = 0; word < heads.words; word += width) {
      const int words = static_cast<int>(smaller(width, heads.words - word));
      Floats square[width];
      for (int i = 0; i < width; ++i) {
        const Index key = panel * kPanel + first + i;
        if (key >= heads.a.pixels) {
          square[i] = Floats{};
        } else {
          const float* from = reinterpret_cast<const float*>(heads.row(1, head, key)) + word;
          square[i] = words == width ? load(from) : load(from, words);
        }
      }
      transpose(square);
      for (int i = 0; i < words; ++i) store(to + (word + i) * kPanel + first, square[i]);
    }
  }
}

// A step of values, `rows` of them: kPanel channels for each panel.
DDPM_FAST_INLINE Floats joined(const Floats (&rows)[1]) { return rows[0]; }
DDPM_FAST_INLINE Floats joined(const Floats (&rows)[2]) {  // a bfloat16 is the high half of its float32
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(rows[0]) >> 16 | reinterpret_cast<Words>(rows[1]));
}

template <class T>
void pack_values(const Heads<T>& heads, Index head, Index first, Index end, float* to) {
  for (Index pixel = first; pixel < end; pixel += kStep<T>) {
    for (Index c = 0; c < heads.value_panels * kPanel; c += kWidth<float>) {
      const Index lanes = heads.a.channels - c;
      Floats rows[kStep<T>] = {};
      for (Index s = 0; s < smaller(kStep<T>, end - pixel) && lanes > 0; ++s) {
        const T* from = heads.row(2, head, pixel + s) + c;
        rows[s] = lanes >= kWidth<float> ? load(from) : load(from, static_cast<int>(lanes));
      }
      store(to + c / kPanel * panel_size<T>(heads.a.pixels) + pixel / kStep<T> * kPanel + c % kPanel, joined(rows));
    }
  }
}

// Scores of a query to exp((score - largest) scale), their sum is returned. to: may be scores.
template <class T>
float exponentials(T* to, const float* scores, Index count, float scale) {
  constexpr int width = kWidth<float>;
  const Index whole = count / width * width;
  const int rest = static_cast<int>(count - whole);
  Floats highest = broadcast(scores[0]);
  for (Index i = 0; i < whole; i += width) {
    const Floats v = load(scores + i);
    highest = v > highest ? v : highest;
  }
  float largest = highest[0];
  for (int i = 1; i < width; ++i) largest = highest[i] > largest ? highest[i] : largest;
  for (Index i = whole; i < count; ++i) largest = scores[i] > largest ? scores[i] : largest;
  const Floats shift = broadcast(largest), factor = broadcast(scale * kLog2E);
  Floats sums{};
  const auto exponential = [&](Floats v) { return exp2<T>((v - shift) * factor); };
  for (Index i = 0; i < whole; i += width) {
    const Floats v = exponential(load(scores + i));
    sums += v;
    store(to + i, v);
  }
  if (rest > 0) {
    const Floats v = first_lanes<float>(exponential(load(scores + whole, rest)), rest);
    sums += v;
    store(to + whole, v, rest);
  }
  float sum = 0;
  for (int i = 0; i < width; ++i) sum += sums[i];
  return sum;
}

template <class T>
void run(const AttentionArgs& a) {
  const Heads<T> heads(a);
  const Index all_heads = a.n * a.heads;
  if (all_heads * a.pixels == 0) return;
  constexpr double kWorthAThread = 1 << 18;
  const double multiplications =
      2.0 * static_cast<double>(all_heads * a.channels) * static_cast<double>(a.pixels) * static_cast<double>(a.pixels);
  const int threads = multiplications < 2 * kWorthAThread ? 1 : a.run_on.threads();

  const Index keys_bytes = Room::bytes<float>(heads.keys_size), values_bytes = Room::bytes<float>(heads.values_size);
  Room room(RoomFor::kCall, all_heads * (keys_bytes + values_bytes));
  float* all_keys = room.take<float>(all_heads * keys_bytes / 4);
  float* all_values = room.take<float>(all_heads * values_bytes / 4);
  parallel_for(all_heads * heads.key_panels, 1, threads, [&](Index i) {
    const Index head = i / heads.key_panels, panel = i % heads.key_panels;
    const Index first = panel * kPanel;
    pack_keys(heads, head, panel, all_keys + head * keys_bytes / 4 + panel * panel_size<T>(a.channels));
    pack_values(heads, head, first, smaller(first + kPanel, a.pixels), all_values + head * values_bytes / 4);
  });

  const Index row_size = heads.key_panels * kPanel;
  constexpr Index kScoresBytes = 128 << 10, kQueries = 32;
  constexpr Index kKeysInSum = 256;  // rounding errors of longer sums grow with their length
  const Index most = smaller(kQueries, larger(kRows, kScoresBytes / (row_size * 4)));
  const Index blocks = (a.pixels + most - 1) / most;
  parallel_for(all_heads * blocks, 1, threads, [&](Index i) {
    const Index head = i / blocks, first = i % blocks * most, count = smaller(most, a.pixels - first);
    Room block_room(RoomFor::kSlice,
                    Room::bytes<float>(most * row_size) + Room::bytes<T>(most * row_size) + Room::bytes<float>(most));
    float* scores = block_room.take<float>(most * row_size);
    T* weights = block_room.take<T>(most * row_size);
    float* factors = block_room.take<float>(most);
    const float* keys = all_keys + head * keys_bytes / 4;
    for (Index panel = 0; panel < heads.key_panels; ++panel, keys += panel_size<T>(a.channels)) {
      over_rows(0, count, [&](Index query, auto rows) {
        const T* inputs[rows()];
        for (int r = 0; r < rows(); ++r) inputs[r] = heads.row(0, head, first + query + r);
        Sums<rows()> sums{};
        multiply(sums, inputs, keys, a.channels);
        for (int r = 0; r < rows(); ++r) {
          float* to = scores + (query + r) * row_size + panel * kPanel;
          for (int v = 0; v < kPanelVectors; ++v) store(to + v * kWidth<float>, sums.of[r][v]);
        }
      });
    }
    for (Index query = 0; query < count; ++query) {
      T* to = weights + query * row_size;
      factors[query] = 1 / exponentials(to, scores + query * row_size, a.pixels, a.scale);
      if (a.pixels % kStep<T> != 0) to[a.pixels] = T{};
    }
    const float* values = all_values + head * values_bytes / 4;
    for (Index panel = 0; panel < heads.value_panels; ++panel, values += panel_size<T>(a.pixels)) {
      over_rows(0, count, [&](Index query, auto rows) {
        const T* inputs[rows()];
        for (int r = 0; r < rows(); ++r) inputs[r] = weights + (query + r) * row_size;
        Sums<rows()> sums{};
        for (Index key = 0; key < a.pixels; key += kKeysInSum) {
          Sums<rows()> part{};
          multiply(part, inputs, values + panel_size<T>(key), smaller(kKeysInSum, round_up(a.pixels, kStep<T>) - key));
          for (int r = 0; r < rows(); ++r) {
            inputs[r] += kKeysInSum;
            for (int v = 0; v < kPanelVectors; ++v) sums.of[r][v] += part.of[r][v];
          }
        }
        for (int r = 0; r < rows(); ++r) {
          const Index pixel = head / a.heads * a.pixels + first + query + r;
          T* to = static_cast<T*>(a.y) + (pixel * a.heads + head % a.heads) * a.channels + panel * kPanel;
          for (int v = 0; v < kPanelVectors; ++v) {
            const Floats out = sums.of[r][v] * factors[query + r];
            const Index lanes = a.channels - panel * kPanel - v * kWidth<float>;
            if (lanes >= kWidth<float>) {
              store(to + v * kWidth<float>, out);
            } else if (lanes > 0) {
              store(to + v * kWidth<float>, out, static_cast<int>(lanes));
            }
          }
        }
      });
    }
  });
}

}  // namespace

void attention(const AttentionArgs& a) { a.dtype == DType::kBFloat16 ? run<BFloat16>(a) : run<float>(a); }

}  // namespace ddpm_fast::DDPM_FAST_ISA
