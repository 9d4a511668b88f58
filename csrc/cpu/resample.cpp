// Resampling by 2 after a norm and an activation, for the residual blocks that resample.
#include "cpu/conv_input.h"
#include "cpu/parallel.h"
#include "cpu/with_type.h"

namespace ddpm_fast::DDPM_FAST_ISA {

namespace {

// Writes two rows of the output: each pixel of a row of x becomes a square.
template <class T, bool normed, bool silu_>
void upsample_row(const ResampleArgs& a, const T* x, T* y, const float* affine) {
  const auto pixel = static_cast<std::size_t>(a.channels) * sizeof(T);
  const Index apart = 2 * a.channels;
  copy_pixels<T, T, normed, silu_>(y, apart, x, a.channels, a.width, a.channels, affine, a.channels);
  for (Index i = 0; i < a.width; ++i) std::memcpy(y + i * apart + a.channels, y + i * apart, pixel);
  std::memcpy(y + a.width * apart, y, 2 * static_cast<std::size_t>(a.width) * pixel);
}

// Writes a row of the output: the means of two rows of x.
template <class T, bool normed, bool silu_>
void mean_row(const ResampleArgs& a, const T* x, T* y, const float* affine) {
  const Index channels = a.channels, below = a.width * channels;
  over_vectors<T>(channels, [&](Index c, auto partial, int lanes) {
    Act<T, normed, silu_> act;
    act.template load_coefficients<partial()>(affine + c, channels, lanes);
    for (Index i = 0; i < a.width / 2; ++i) {
      const auto value = [&](Index offset) { return act(load<partial()>(x + 2 * i * channels + offset + c, lanes)); };
      const Floats sum = (value(0) + value(channels)) + (value(below) + value(below + channels));
      store<partial()>(y + i * channels + c, sum * broadcast(0.25f), lanes);
    }
  });
}

}  // namespace

void resample(const ResampleArgs& a) {
  // An item is a row of x and two of y, or two of x and one of y.
  const Index rows = a.up ? 1 : 2, items = a.height / rows, row = a.width * a.channels;
  const Index y_size = a.up ? 4 * row : row / 2;
  with_conv_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    with_act(a.affine, a.silu, [&](auto normed, auto silu) {
      parallel_for(a.n * items, kForwardGrain / larger(1, rows * row), a.stream_or_threads, [&](Index item) {
        const T* x = static_cast<const T*>(a.x) + item * rows * row;
        T* y = static_cast<T*>(a.y) + item * y_size;
        const float* affine = normed() ? a.affine + item / items * 3 * a.channels : nullptr;
        if (a.up) {
          upsample_row<T, normed(), silu()>(a, x, y, affine);
        } else {
          mean_row<T, normed(), silu()>(a, x, y, affine);
        }
      });
    });
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
