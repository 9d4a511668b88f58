// The output of a convolution: sums plus bias and residual, divided.
#pragma once

#include "common/args.h"
#include "cpu/panel_product.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Writes a panel of output channels, of `vectors` vectors.
template <class T, int vectors = kPanelVectors>
class Output {
 public:
  Output(const ConvArgs& a, Index panel)
      : y_(static_cast<T*>(a.y) + panel * kChannels),
        residual_(a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + panel * kChannels),
        divisor_(a.divisor),
        channels_(a.out_channels),
        lanes_(a.out_channels - panel * kChannels) {
    for (int v = 0; v < vectors; ++v) {
      const Index lanes = lanes_ - v * kWidth<float>;
      bias_[v] = Floats{};
      if (a.bias == nullptr || lanes <= 0) continue;
      const float* bias = a.bias + panel * kChannels + v * kWidth<float>;
      bias_[v] = lanes >= kWidth<float> ? load(bias) : load(bias, static_cast<int>(lanes));
    }
  }

  // Writes all vectors of the panel at a pixel.
  DDPM_FAST_INLINE void write(Index pixel, const float* sums) const {
    if (lanes_ < kChannels) {
      for (int v = 0; v < vectors; ++v) write(pixel, v, load(sums + v * kWidth<float>));
      return;
    }
    Floats values[vectors];
    const Index at = pixel * channels_;
    for (int v = 0; v < vectors; ++v) values[v] = load(sums + v * kWidth<float>) + bias_[v];
    if (residual_ != nullptr) {
      for (int v = 0; v < vectors; ++v) values[v] += load(residual_ + at + v * kWidth<float>);
    }
    static_assert(vectors % 2 == 0);
    for (int v = 0; v < vectors; v += 2) {
      store(y_ + at + v * kWidth<float>, divided(values[v]), divided(values[v + 1]));
    }
  }

  // Writes vector v of the panel at a pixel:
  //   (sum + bias + residual) / divisor
  DDPM_FAST_INLINE void write(Index pixel, int v, Floats sum) const {
    const Index at = pixel * channels_ + v * kWidth<float>;
    const Index lanes = lanes_ - v * kWidth<float>;
    Floats value = sum + bias_[v];
    if (lanes >= kWidth<float>) {
      if (residual_ != nullptr) value += load(residual_ + at);
      store(y_ + at, divided(value));
    } else if (lanes > 0) {
      if (residual_ != nullptr) value += load(residual_ + at, static_cast<int>(lanes));
      store(y_ + at, divided(value), static_cast<int>(lanes));
    }
  }

 private:
  static constexpr Index kChannels = vectors * kWidth<float>;

  DDPM_FAST_INLINE Floats divided(Floats value) const { return divisor_ == 1 ? value : value / divisor_; }

  T* y_;
  const T* residual_;
  float divisor_;
  Index channels_, lanes_;
  Floats bias_[vectors];
};

}  // namespace ddpm_fast::DDPM_FAST_ISA
