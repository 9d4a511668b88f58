// The rows of an attention head, packed into panels in either direction, and products with them.
#pragma once

#include "common/args.h"
#include "cpu/panel_product.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/silu.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr float kLog2E = -kNegLog2E;

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

// Loads a step of channels for each lane, as products of type P take them.
template <class P, class T>
DDPM_FAST_INLINE Floats load_steps(const T* from) {
  if constexpr (std::is_same_v<P, T>) return load(reinterpret_cast<const float*>(from));
  return load(from);
}
template <class P, class T>
DDPM_FAST_INLINE Floats load_steps(const T* from, int steps) {
  if constexpr (std::is_same_v<P, T>) return load(reinterpret_cast<const float*>(from), steps);
  return load(from, steps);
}

// Packs a panel whose lanes are pixels, for sums over channels in products of type P.
template <class P, int lanes = kPanel, class T>
void pack_pixels(const Rows<const T>& rows, Index panel, float* to) {
  constexpr int width = kWidth<float>;
  const Index all_steps = rows.channels / kStep<P>;
  for (Index first = 0; first < lanes; first += width) {
    for (Index step = 0; step < all_steps; step += width) {
      const int steps = static_cast<int>(smaller(width, all_steps - step));
      Floats square[width];
      for (int i = 0; i < width; ++i) {
        const Index pixel = panel * lanes + first + i;
        if (pixel >= rows.pixels) {
          square[i] = Floats{};
        } else {
          const T* from = rows[pixel] + step * kStep<P>;
          square[i] = steps == width ? load_steps<P>(from) : load_steps<P>(from, steps);
        }
      }
      transpose(square);
      for (int i = 0; i < steps; ++i) store(to + (step + i) * lanes + first, square[i]);
    }
  }
}

// Joins the rows of a step of pixels: one row, or a pair in bfloat16.
DDPM_FAST_INLINE Floats joined(const Floats (&rows)[1]) { return rows[0]; }
DDPM_FAST_INLINE Floats joined(const Floats (&rows)[2]) {  // a bfloat16 is the high half of its float32
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(rows[0]) >> 16 | reinterpret_cast<Words>(rows[1]));
}

// Packs pixels first .. end - 1 of all panels whose lanes are channels, for sums over `depth` pixels in products of type P.
// Pixels that do not exist are 0.
template <class P, int lanes = kPanel, class T>
void pack_channels(const Rows<const T>& rows, Index first, Index end, Index depth, float* to) {
  const Index steps = round_up(depth, kStep<P>) / kStep<P>;
  // Channels are the outer loop, because the panels of one pixel may all lie in the same set of the cache.
  for (Index c = 0; c < round_up(rows.channels, lanes); c += kWidth<float>) {
    const Index channels = rows.channels - c;
    for (Index pixel = first; pixel < end; pixel += kStep<P>) {
      Floats step[kStep<P>] = {};
      for (Index s = 0; s < smaller(kStep<P>, smaller(end, rows.pixels) - pixel) && channels > 0; ++s) {
        const T* from = rows[pixel + s] + c;
        step[s] = channels >= kWidth<float> ? load(from) : load(from, static_cast<int>(channels));
      }
      store(to + (c / lanes * steps + pixel / kStep<P>)*lanes + c % lanes, joined(step));
    }
  }
}

// Rows first .. first + count - 1, as products of type P read them: where they are, or widened in a buffer.
template <class P, class T>
class ProductRows {
 public:
  ProductRows(const Rows<const T>& rows, Index first, Index count, P* buffer)
      : rows_(rows), first_(first), buffer_(buffer) {
    if constexpr (!std::is_same_v<P, T>) {
      const Index channels = rows.channels, whole = channels / kWidth<float> * kWidth<float>;
      const int rest = static_cast<int>(channels - whole);
      for (Index i = 0; i < count; ++i, buffer += channels) {
        for (Index c = 0; c < whole; c += kWidth<float>) store(buffer + c, load(rows[first + i] + c));
        if (rest > 0) store(buffer + whole, load(rows[first + i] + whole, rest), rest);
      }
    }
  }

  const P* operator[](Index row) const {
    if constexpr (std::is_same_v<P, T>) {
      return rows_[first_ + row];
    } else {
      return buffer_ + row * rows_.channels;
    }
  }

 private:
  const Rows<const T> rows_;
  Index first_;
  const P* buffer_;
};

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
