// What the convolutions share: rows of their input, normed, activated and padded; sums that become output; how work is
// cut.
#pragma once

#include "common/args.h"
#include "cpu/group_norm.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "cpu/room.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// --------------------------------------------------------------------------------------------------------- input rows

// `pixels` pixels of some channels, `channels` of them, from memory with from_stride channels a pixel to memory with
// to_stride. affine: the center of the first channel; slopes and intercepts follow `affine_stride` further each.
template <class T, class To, bool normed, bool silu_>
void copy_pixels(To* to, Index to_stride, const T* from, Index from_stride, Index pixels, Index channels,
                 const float* affine, Index affine_stride) {
  const auto column = [&](Index c, auto partial, int lanes) {
    Floats center{}, slope{}, intercept{};
    if constexpr (normed) {
      center = load<partial()>(affine + c, lanes);
      slope = load<partial()>(affine + affine_stride + c, lanes);
      intercept = load<partial()>(affine + 2 * affine_stride + c, lanes);
    }
    if constexpr (silu_) {  // see silu.h
      slope *= broadcast(kNegLog2E);
      intercept *= broadcast(kNegLog2E);
    }
    for (Index i = 0; i < pixels; ++i) {
      Floats v = load<partial()>(from + i * from_stride + c, lanes);
      if constexpr (normed) v = apply<T, silu_>(v, center, slope, intercept);
      store<partial()>(to + i * to_stride + c, v, lanes);
    }
  };
  Index c = 0;
  for (; c + kWidth<T> <= channels; c += kWidth<T>) column(c, std::false_type{}, 0);
  if (c < channels) column(c, std::true_type{}, static_cast<int>(channels - c));
}

template <class To>
void zero_pixels(To* to, Index stride, Index pixels) {
  std::memset(to, 0, static_cast<std::size_t>(pixels * stride) * sizeof(To));
}

// Of x and skip, for a sample: `columns` pixels of a row from `first` on, either of which may lie outside the map:
// there are zeros, which norms and activations do not touch. `stride`: elements a pixel has in `to`, the channels
// rounded up.
template <class T, class To>
void input_row(const ConvArgs& a, Index sample, Index row, Index first, Index columns, To* to, Index stride) {
  const Index before = smaller(columns, larger(0, -first)), end = smaller(columns, a.width - first);
  if (row < 0 || row >= a.height || end <= before) return zero_pixels(to, stride, columns);
  zero_pixels(to, stride, before);
  zero_pixels(to + end * stride, stride, columns - end);
  to += before * stride;
  const Index pixels = end - before, total = a.channels + a.skip_channels;
  if (total < stride) zero_pixels(to, stride, pixels);
  const Index at = (sample * a.height + row) * a.width + first + before;
  const auto part = [&](const void* from, Index first_channel, Index channels) {
    const T* start = static_cast<const T*>(from) + at * channels;
    To* target = to + first_channel;
    const float* affine = a.affine == nullptr ? nullptr : a.affine + sample * 3 * total + first_channel;
    if (affine == nullptr) {
      copy_pixels<T, To, false, false>(target, stride, start, channels, pixels, channels, nullptr, 0);
    } else if (a.silu) {
      copy_pixels<T, To, true, true>(target, stride, start, channels, pixels, channels, affine, total);
    } else {
      copy_pixels<T, To, true, false>(target, stride, start, channels, pixels, channels, affine, total);
    }
  };
  part(a.x, 0, a.channels);
  if (a.skip != nullptr) part(a.skip, a.channels, a.skip_channels);
}

// ------------------------------------------------------------------------------------------------------------- output

// A panel of output channels.
template <class T>
class Output {
 public:
  Output(const ConvArgs& a, Index panel)
      : y_(static_cast<T*>(a.y) + panel * kPanel),
        residual_(a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + panel * kPanel),
        divisor_(a.divisor),
        channels_(a.out_channels),
        lanes_(a.out_channels - panel * kPanel) {
    for (int v = 0; v < kPanelVectors; ++v) {
      const Index lanes = lanes_ - v * kWidth<float>;
      bias_[v] = Floats{};
      if (a.bias == nullptr || lanes <= 0) continue;
      const float* bias = a.bias + panel * kPanel + v * kWidth<float>;
      bias_[v] = lanes >= kWidth<float> ? load(bias) : load(bias, static_cast<int>(lanes));
    }
  }

  // (sum + bias + residual) / divisor, at the pixel of this number.
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
  DDPM_FAST_INLINE Floats divided(Floats value) const { return divisor_ == 1 ? value : value / divisor_; }

  T* y_;
  const T* residual_;
  float divisor_;
  Index channels_, lanes_;
  Floats bias_[kPanelVectors];
};

// --------------------------------------------------------------------------------------------------------------- work

// Strips (of rows of the output) make blocks, which a thread takes one at a time, for all panels of the output or,
// where there are fewer blocks than threads, for some of them: then each reads its own part of the weights.
struct Work {
  Index strips, blocks, panels, parts;

  Work(Index all_strips, Index strips_in_block, Index out_channels, int threads)
      : strips(all_strips), panels((out_channels + kPanel - 1) / kPanel) {
    blocks = (strips + strips_in_block - 1) / strips_in_block;
    parts = 1;
    if (blocks >= threads) {
      blocks = smaller(strips, round_up(blocks, threads));
    } else if (blocks > 0) {
      parts = smaller(panels, (threads + blocks - 1) / blocks);
    }
  }

  Index largest_block() const { return (strips + blocks - 1) / blocks; }

  // What a thread takes.
  struct Share {
    Index first_strip, end_strip, first_panel, end_panel;
  };

  // Calls body(share) for all of them. `multiplications`: in all.
  template <class Body>
  void run(double multiplications, int threads, Body body) const {
    constexpr double kWorthAThread = 1 << 18;
    if (multiplications < kWorthAThread * 2) threads = 1;
    parallel_for(blocks * parts, 1, threads, [&](Index i) {
      const Index block = i / parts, part = i % parts;
      body(Share{block * strips / blocks, (block + 1) * strips / blocks, part * panels / parts,
                 (part + 1) * panels / parts});
    });
  }
};

}  // namespace ddpm_fast::DDPM_FAST_ISA
