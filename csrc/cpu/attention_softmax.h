// The softmax of the scores of an attention head.
#pragma once

#include "cpu/attention_packing.h"

namespace ddpm_fast::DDPM_FAST_ISA {

struct Softmax {
  float largest, share;  // the largest score, and 1 / sum of the exponentials
};

// Computes the exponentials of the scores of a query:
//   exp((score - largest) scale)
template <class T, class To>
Softmax exponentials(To* to, const float* scores, Index count, float scale) {
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
  return {largest, 1 / sum};
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
