// The input of a convolution: rows of x and skip, normed, activated and padded.
#pragma once

#include "common/args.h"
#include "cpu/group_norm.h"
#include "cpu/scratch.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// The norm and the activation of a vector of channels.
template <class T, bool normed, bool silu_>
struct Act {
  Floats center{}, slope{}, intercept{};

  // affine: the coefficients of the first channel. `stride` separates centers, slopes and intercepts.
  template <bool partial>
  DDPM_FAST_INLINE void load_coefficients(const float* affine, Index stride, int lanes) {
    if constexpr (normed) {
      center = load<partial>(affine, lanes);
      slope = load<partial>(affine + stride, lanes);
      intercept = load<partial>(affine + 2 * stride, lanes);
    }
    if constexpr (silu_) {  // see silu.h
      slope *= broadcast(kNegLog2E);
      intercept *= broadcast(kNegLog2E);
    }
  }

  DDPM_FAST_INLINE Floats operator()(Floats v) const {
    if constexpr (normed) v = apply<T, silu_>(v, center, slope, intercept);
    return v;
  }
};

// Calls body(normed, silu) with two integral constants. Without affine coefficients there is no norm and no activation.
template <class Body>
DDPM_FAST_INLINE void with_act(const float* affine, bool silu, Body body) {
  if (affine == nullptr) return body(std::false_type{}, std::false_type{});
  silu ? body(std::true_type{}, std::true_type{}) : body(std::true_type{}, std::false_type{});
}

// Calls column(channel, partial, lanes) for vectors of channels.
template <class T, class Column>
DDPM_FAST_INLINE void over_vectors(Index channels, Column column) {
  Index c = 0;
  for (; c + kWidth<T> <= channels; c += kWidth<T>) column(c, std::false_type{}, 0);
  if (c < channels) column(c, std::true_type{}, static_cast<int>(channels - c));
}

// Copies `channels` channels of `pixels` pixels. from_stride and to_stride are the elements from pixel to pixel.
//
// affine: the coefficients of the first channel. `affine_stride` separates centers, slopes and intercepts.
template <class T, class To, bool normed, bool silu_>
void copy_pixels(To* to, Index to_stride, const T* from, Index from_stride, Index pixels, Index channels,
                 const float* affine, Index affine_stride) {
  if constexpr (!normed && std::is_same_v<T, To>) {
    for (Index i = 0; i < pixels; ++i) {
      std::memcpy(to + i * to_stride, from + i * from_stride, static_cast<std::size_t>(channels) * sizeof(T));
    }
    return;
  }
  Index c = 0;
  if constexpr (sizeof(To) == 2 && kVectorSize == 64) {  // two vectors at a time: one instruction narrows both
    for (; c + 2 * kWidth<T> <= channels; c += 2 * kWidth<T>) {
      Act<T, normed, silu_> first, second;
      first.template load_coefficients<false>(affine + c, affine_stride, 0);
      second.template load_coefficients<false>(affine + c + kWidth<T>, affine_stride, 0);
      for (Index i = 0; i < pixels; ++i) {
        const T* pixel = from + i * from_stride + c;
        store(to + i * to_stride + c, first(load(pixel)), second(load(pixel + kWidth<T>)));
      }
    }
  }
  over_vectors<T>(channels - c, [&](Index rest, auto partial, int lanes) {
    const Index at = c + rest;
    Act<T, normed, silu_> act;
    act.template load_coefficients<partial()>(affine + at, affine_stride, lanes);
    for (Index i = 0; i < pixels; ++i) {
      store<partial()>(to + i * to_stride + at, act(load<partial()>(from + i * from_stride + at, lanes)), lanes);
    }
  });
}

template <class To>
void zero_pixels(To* to, Index stride, Index pixels) {
  std::memset(to, 0, static_cast<std::size_t>(pixels * stride) * sizeof(To));
}

// Copies `columns` pixels of a row of x and skip, from column `first` on, and applies the norm and the activation. The
// row and the columns may lie outside the map. Pixels outside are 0, without norm and activation.
//
// stride: elements per pixel in `to`. If it is larger than the number of channels, the rest is 0.
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
  const auto part = [&](const void* from, Index channels_before, Index channels) {
    const T* start = static_cast<const T*>(from) + at * channels;
    const float* affine = a.affine == nullptr ? nullptr : a.affine + sample * 3 * total + channels_before;
    with_act(affine, a.silu, [&](auto normed, auto silu) {
      copy_pixels<T, To, normed(), silu()>(to + channels_before, stride, start, channels, pixels, channels, affine,
                                           total);
    });
  };
  part(a.x, 0, a.channels);
  if (a.skip != nullptr) part(a.skip, a.channels, a.skip_channels);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
