// The rows of an attention head, packed into panels in either direction, and products with them.
#pragma once

#include "common/args.h"
#include "cpu/panel_product.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/silu.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr float kLog2E = -kNegLog2E;
constexpr Index kTermsInSum = 256;  // rounding errors grow with the length of a sum

constexpr Index panels_of(Index lanes) { return (lanes + kPanel - 1) / kPanel; }

// One row of channels per pixel.
template <class T>
struct Rows {
  T* start;
  Index stride, pixels, channels;

  T* operator[](Index pixel) const { return start + pixel * stride; }
};

// Returns the rows of one head of one sample in a tensor like qkv: queries (0), keys (1) or values (2).
template <class T, class Args, class Address>
auto rows_of_qkv(const Args& a, Address* qkv, Index head, int which) {
  const Index width = a.num_heads * a.head_dim, pixel = head / a.num_heads * a.pixels;
  using Element = std::conditional_t<std::is_const_v<Address>, const T, T>;
  return Rows<Element>{static_cast<Element*>(qkv) + (pixel * 3 + which) * width + head % a.num_heads * a.head_dim,
                       3 * width, a.pixels, a.head_dim};
}

// Returns the rows of one head of one sample in a tensor like y.
template <class T, class Args, class Address>
auto rows_of_y(const Args& a, Address* y, Index head) {
  const Index width = a.num_heads * a.head_dim, pixel = head / a.num_heads * a.pixels;
  using Element = std::conditional_t<std::is_const_v<Address>, const T, T>;
  return Rows<Element>{static_cast<Element*>(y) + pixel * width + head % a.num_heads * a.head_dim, width, a.pixels,
                       a.head_dim};
}

// Packs a panel whose lanes are pixels, for sums over channels.
template <class T>
void pack_pixels(const Rows<const T>& rows, Index panel, float* to) {
  constexpr int width = kWidth<float>;
  const Index all_words = rows.channels / kStep<T>;  // 32 bits of channels
  for (Index first = 0; first < kPanel; first += width) {
    for (Index word = 0; word < all_words; word += width) {
      const int words = static_cast<int>(smaller(width, all_words - word));
      Floats square[width];
      for (int i = 0; i < width; ++i) {
        const Index pixel = panel * kPanel + first + i;
        if (pixel >= rows.pixels) {
          square[i] = Floats{};
        } else {
          const float* from = reinterpret_cast<const float*>(rows[pixel]) + word;
          square[i] = words == width ? load(from) : load(from, words);
        }
      }
      transpose(square);
      for (int i = 0; i < words; ++i) store(to + (word + i) * kPanel + first, square[i]);
    }
  }
}

// Joins the rows of a step of pixels: one row, or a pair in bfloat16.
DDPM_FAST_INLINE Floats joined(const Floats (&rows)[1]) { return rows[0]; }
DDPM_FAST_INLINE Floats joined(const Floats (&rows)[2]) {  // a bfloat16 is the high half of its float32
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(rows[0]) >> 16 | reinterpret_cast<Words>(rows[1]));
}

// Packs pixels first .. end - 1 of all panels whose lanes are channels, for sums over pixels.
template <class T>
void pack_channels(const Rows<const T>& rows, Index first, Index end, float* to) {
  for (Index pixel = first; pixel < end; pixel += kStep<T>) {
    for (Index c = 0; c < panels_of(rows.channels) * kPanel; c += kWidth<float>) {
      const Index lanes = rows.channels - c;
      Floats step[kStep<T>] = {};
      for (Index s = 0; s < smaller(kStep<T>, end - pixel) && lanes > 0; ++s) {
        const T* from = rows[pixel + s] + c;
        step[s] = lanes >= kWidth<float> ? load(from) : load(from, static_cast<int>(lanes));
      }
      store(to + c / kPanel * panel_size<T>(rows.pixels) + pixel / kStep<T> * kPanel + c % kPanel, joined(step));
    }
  }
}

// Multiplies rows by a panel, in partial sums of kTermsInSum terms.
template <class T, int rows>
DDPM_FAST_INLINE Sums<rows> product(const T* const (&inputs)[rows], const float* panel, Index depth) {
  Sums<rows> sums{};
  for (Index first = 0; first < depth; first += kTermsInSum) {
    const T* from[rows];
    for (int r = 0; r < rows; ++r) from[r] = inputs[r] + first;
    Sums<rows> part{};
    multiply(part, from, panel + panel_size<T>(first), smaller(kTermsInSum, depth - first));
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < kPanelVectors; ++v) sums.of[r][v] += part.of[r][v];
    }
  }
  return sums;
}

// Stores the sums of a panel times `factor` to a row. `channels` is the number of channels from `to` on.
template <class T>
DDPM_FAST_INLINE void store_channels(T* to, const Floats (&sums)[kPanelVectors], float factor, Index channels) {
  for (int v = 0; v < kPanelVectors; ++v) {
    const Floats out = sums[v] * factor;
    const Index lanes = channels - v * kWidth<float>;
    if (lanes >= kWidth<float>) {
      store(to + v * kWidth<float>, out);
    } else if (lanes > 0) {
      store(to + v * kWidth<float>, out, static_cast<int>(lanes));
    }
  }
}

// Returns the grain of a loop of `count` items that share `products` products of all queries with all keys: all items,
// which is one thread, if there is too little work for two.
template <class Args>
Index grain_of(const Args& a, int products, Index count) {
  constexpr double kWorthAThread = 1 << 18;
  const double pixels = static_cast<double>(a.pixels);
  const double multiplications = products * static_cast<double>(a.n * a.num_heads * a.head_dim) * pixels * pixels;
  return multiplications < 2 * kWorthAThread ? count : 1;
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
