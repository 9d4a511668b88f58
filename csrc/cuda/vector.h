// Neighbouring elements of a tensor, packed as they lie in memory: one access of up to 16 bytes.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cuda/intrinsics.h"

namespace ddpm_fast::cuda {

constexpr int kVectorBytes = 16;  // the widest access

// Elements of type T in a vector.
template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int width>
struct alignas(width > kWidth<T> ? kVectorBytes : sizeof(T) * width) Packed {
  static_assert(sizeof(T) * width % 4 == 0);
  std::uint32_t words[sizeof(T) * width / 4];
};
template <class T>
struct Packed<T, 1> {
  T element;
};

template <int width, class T>
DDPM_FAST_DEVICE Packed<T, width> load(const T* from) {
  return *reinterpret_cast<const Packed<T, width>*>(from);
}

template <class T, int width>
DDPM_FAST_DEVICE void store(T* to, const Packed<T, width>& packed) {
  *reinterpret_cast<Packed<T, width>*>(to) = packed;
}

// ------------------------------------------------------------------------------------------------------ to float32

DDPM_FAST_DEVICE float widen(float value) { return value; }

// 0..255 stand for -1..1. `byte`: as a float32.
DDPM_FAST_DEVICE float from_byte(float byte) { return byte * static_cast<float>(2.0 / 255) - 1; }
DDPM_FAST_DEVICE float widen(std::uint8_t value) { return from_byte(value); }

DDPM_FAST_DEVICE void widen_word(std::uint32_t word, float, float* to) { to[0] = bit_cast<float>(word); }
DDPM_FAST_DEVICE void widen_word(std::uint32_t word, Float16, float* to) { unpack_float16(word, to[0], to[1]); }
DDPM_FAST_DEVICE void widen_word(std::uint32_t word, BFloat16, float* to) { unpack_bfloat16(word, to[0], to[1]); }
DDPM_FAST_DEVICE void widen_word(std::uint32_t word, std::uint8_t, float* to) {
  // A byte as the last one of a float32 from 2^23 on, where the unit is 1: cheaper than a conversion.
  for (int i = 0; i < 4; ++i) {
    to[i] = from_byte(bit_cast<float>(with_low_byte(bit_cast<std::uint32_t>(0x1p23f), word, i)) - 0x1p23f);
  }
}

template <class T, int width>
DDPM_FAST_DEVICE void widen(const Packed<T, width>& packed, float (&to)[width]) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  for (int i = 0; i < width / kPerWord; ++i) widen_word(packed.words[i], T{}, to + kPerWord * i);
}
template <class T>
DDPM_FAST_DEVICE void widen(const Packed<T, 1>& packed, float (&to)[1]) {
  to[0] = widen(packed.element);
}

// ---------------------------------------------------------------------------------------------------- from float32

DDPM_FAST_DEVICE std::uint32_t narrow_word(const float* from, float) { return bit_cast<std::uint32_t>(from[0]); }
DDPM_FAST_DEVICE std::uint32_t narrow_word(const float* from, Float16) { return pack_float16(from[0], from[1]); }
DDPM_FAST_DEVICE std::uint32_t narrow_word(const float* from, BFloat16) { return pack_bfloat16(from[0], from[1]); }

template <class T, int width>
DDPM_FAST_DEVICE void narrow(const float (&from)[width], Packed<T, width>& to) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  for (int i = 0; i < width / kPerWord; ++i) to.words[i] = narrow_word(from + kPerWord * i, T{});
}
template <class T>
DDPM_FAST_DEVICE void narrow(const float (&from)[1], Packed<T, 1>& to) {
  const float pair[] = {from[0], 0};
  to.element = {static_cast<std::uint16_t>(narrow_word(pair, T{}))};
}
DDPM_FAST_DEVICE void narrow(const float (&from)[1], Packed<float, 1>& to) { to.element = from[0]; }

// ------------------------------------------------------------------------------------------------- both in one word

template <int width, class T>
DDPM_FAST_DEVICE void load(const T* from, float (&to)[width]) {
  widen(load<width>(from), to);
}

template <int width, class T>
DDPM_FAST_DEVICE void store(T* to, const float (&from)[width]) {
  Packed<T, width> packed;
  narrow(from, packed);
  store(to, packed);
}

}  // namespace ddpm_fast::cuda
