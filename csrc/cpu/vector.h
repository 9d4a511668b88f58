// Vectors of float32 or float64 in the width of the instruction set, and conversions from and to the storage types.
//
// Arithmetic uses GCC's vector extensions: a * b + c works, and rounds twice. This header adds what they lack.
//
// Everything is inline in the namespace of its instruction set. Kernels use no function templates of the standard
// library, because the linker would share their instances between the instruction sets.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/dtype.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

#define DDPM_FAST_INLINE inline __attribute__((always_inline))

// For long functions: inlined copies would take time to compile and gain nothing.
#ifdef __clang__
#define DDPM_FAST_NOINLINE __attribute__((noinline))
#else
#define DDPM_FAST_NOINLINE __attribute__((noinline, noclone))
#endif

namespace ddpm_fast::DDPM_FAST_ISA {

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
// The type of arithmetic on a T.
template <class T>
using RealOf = typename Arithmetic<T>::type;

#if defined(__AVX512F__)
constexpr int kVectorSize = 64;
#elif defined(__AVX2__)
constexpr int kVectorSize = 32;
#else
constexpr int kVectorSize = 16;
#endif

template <class T>
constexpr int kWidth = kVectorSize / static_cast<int>(sizeof(RealOf<T>));

template <class T>
struct VectorType {
  typedef RealOf<T> type __attribute__((vector_size(kVectorSize)));
};
template <class T>
using Vector = typename VectorType<T>::type;

using Floats = Vector<float>;
using Doubles = Vector<double>;
typedef float HalfFloats __attribute__((vector_size(kVectorSize / 2)));
typedef std::uint32_t Words __attribute__((vector_size(kVectorSize)));
typedef std::uint16_t HalfWords __attribute__((vector_size(kVectorSize / 2)));

// ------------------------------------------------------------------------------------------------------- arithmetic

// Sets all lanes. `Floats{} + value` would compute a sum.
DDPM_FAST_INLINE Floats broadcast(float value) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#elif defined(__AVX2__)
  return _mm256_set1_ps(value);
#else
  Floats v;
  for (int i = 0; i < kWidth<float>; ++i) v[i] = value;
  return v;
#endif
}
DDPM_FAST_INLINE Doubles broadcast(double value) {
#if defined(__AVX512F__)
  return _mm512_set1_pd(value);
#elif defined(__AVX2__)
  return _mm256_set1_pd(value);
#else
  Doubles v;
  for (int i = 0; i < kWidth<double>; ++i) v[i] = value;
  return v;
#endif
}

// a * b + c, rounded once if the instruction set has fused multiply-add.
DDPM_FAST_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
DDPM_FAST_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// Selects lanes by number. The lanes of b follow those of a.
template <int... lanes, class V>
DDPM_FAST_INLINE V shuffle(V a, V b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, lanes...);
#else  // GCC has __builtin_shufflevector since version 12
  return __builtin_shuffle(a, b, decltype(a < b){lanes...});
#endif
}

// Returns a vector whose lane i is the sum of the lanes of v[i].
template <class V, int... i>
DDPM_FAST_INLINE V sum_neighbours(V a, V b, std::integer_sequence<int, i...>) {
  return shuffle<2 * i...>(a, b) + shuffle<2 * i + 1 ...>(a, b);
}
template <class T, int count = kWidth<T>>
DDPM_FAST_INLINE Vector<T> sums_of_lanes(const Vector<T>* v) {
  if constexpr (count == 1) {
    return v[0];
  } else {
    return sum_neighbours(sums_of_lanes<T, count / 2>(v), sums_of_lanes<T, count / 2>(v + count / 2),
                          std::make_integer_sequence<int, kWidth<T>>{});
  }
}

// Transposes a square. Each pass exchanges the off-diagonal blocks of squares of twice the size.
template <int size, class V, int... i>
DDPM_FAST_INLINE void exchange(V& a, V& b, std::integer_sequence<int, i...>) {
  constexpr int count = sizeof...(i);
  const V first = shuffle<(i & size ? count + i - size : i)...>(a, b);
  b = shuffle<(i & size ? count + i : i + size)...>(a, b);
  a = first;
}
template <int size = 1, class V, int count>
DDPM_FAST_INLINE void transpose(V (&rows)[count]) {
  for (int i = 0; i < count; ++i) {
    if (!(i & size)) exchange<size>(rows[i], rows[i + size], std::make_integer_sequence<int, count>{});
  }
  if constexpr (2 * size < count) transpose<2 * size>(rows);
}

// ------------------------------------------------------------------------------------------------------ conversions

DDPM_FAST_INLINE Floats widen(const Floats& raw, float) { return raw; }
DDPM_FAST_INLINE Doubles widen(const Doubles& raw, double) { return raw; }

DDPM_FAST_INLINE Floats widen(HalfWords raw, BFloat16) {
#if defined(__AVX512BW__)
  // One permutation makes word j the high half of lane j. Widening and shifting would be two instructions.
  const __m512i from = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 16);
  const __m512i wide = _mm512_castsi256_si512(reinterpret_cast<__m256i>(raw));
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, from, wide));
#else
  return reinterpret_cast<Floats>(__builtin_convertvector(raw, Words) << 16);
#endif
}
DDPM_FAST_INLINE HalfWords narrow(Floats v, BFloat16) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<HalfWords>(_mm512_cvtneps_pbh(v));
#else
  // Round to nearest, ties to even: add half a unit, less one if the result is even already. NaN stays NaN.
  const Words bits = reinterpret_cast<Words>(v);
  const Words rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : bits >> 16 | 0x40, HalfWords);
#endif
}

// Rounds to bfloat16. Each 32-bit lane holds a in its low half and b in its high half.
DDPM_FAST_INLINE Words pairs_of(Floats a, Floats b) {
#if defined(__AVX512BF16__)
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));  // all of a, then all of b
  const __m512i interleaved =
      _mm512_set_epi32(0x1F000F, 0x1E000E, 0x1D000D, 0x1C000C, 0x1B000B, 0x1A000A, 0x190009, 0x180008, 0x170007,
                       0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  return reinterpret_cast<Words>(_mm512_permutexvar_epi16(interleaved, both));
#else
  return __builtin_convertvector(narrow(a, BFloat16{}), Words) | __builtin_convertvector(narrow(b, BFloat16{}), Words)
                                                                     << 16;
#endif
}

DDPM_FAST_INLINE Floats widen(HalfWords raw, Float16) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(raw));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(raw));
#else
  const Words bits = __builtin_convertvector(raw, Words), sign = (bits & 0x8000) << 16;
  // Shift the fields to those of a float32, whose exponent is larger by 112. The multiplication corrects the exponent,
  // also of subnormals.
  const Words magnitude = reinterpret_cast<Words>(reinterpret_cast<Floats>((bits & 0x7FFF) << 13) * 0x1p112f);
  return reinterpret_cast<Floats>(sign | ((bits & 0x7C00) == 0x7C00 ? magnitude | 0x7F800000 : magnitude));
#endif
}
DDPM_FAST_INLINE HalfWords narrow(Floats v, Float16) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfWords>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return reinterpret_cast<HalfWords>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Words bits = reinterpret_cast<Words>(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  const Words normal = (magnitude + 0xC8000FFF + (magnitude >> 13 & 1)) >> 13;
  // Below 2^-14, add 1/2: the last bit of the float32 sum has the value of the last bit of a float16.
  const Words subnormal = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) + 0.5f) - 0x3F000000;
  Words half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477FF000 ? Words{} + 0x7C00 : half;
  half = magnitude > 0x7F800000 ? Words{} + 0x7E00 : half;
  return __builtin_convertvector(half | sign, HalfWords);
#endif
}

// The lower and the upper half of a vector in float64, and the vector of two halves, rounded.
DDPM_FAST_INLINE void widen(Floats v, Doubles (&halves)[2]) {
  HalfFloats raw[2];
  std::memcpy(raw, &v, sizeof(v));
  for (int i = 0; i < 2; ++i) halves[i] = __builtin_convertvector(raw[i], Doubles);
}
DDPM_FAST_INLINE Floats narrow(const Doubles (&halves)[2]) {
  Floats v;
  const HalfFloats raw[2] = {__builtin_convertvector(halves[0], HalfFloats),
                             __builtin_convertvector(halves[1], HalfFloats)};
  std::memcpy(&v, raw, sizeof(v));
  return v;
}

// -------------------------------------------------------------------------------------------------- loads and stores

template <class T>
struct RawType {
  using type = HalfWords;
};
template <>
struct RawType<float> {
  using type = Floats;
};
template <>
struct RawType<double> {
  using type = Doubles;
};

template <class T>
DDPM_FAST_INLINE Vector<T> load(const T* from) {
  typename RawType<T>::type raw;
  std::memcpy(&raw, from, sizeof(raw));
  return widen(raw, T{});
}

template <class T>
DDPM_FAST_INLINE void store(T* to, Vector<T> v) {
  if constexpr (sizeof(T) == 2) {
    const HalfWords raw = narrow(v, T{});
    std::memcpy(to, &raw, sizeof(raw));
  } else {
    std::memcpy(to, &v, sizeof(v));
  }
}

// Stores two neighbouring vectors.
template <class T>
DDPM_FAST_INLINE void store(T* to, Vector<T> first, Vector<T> second) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {  // narrows two vectors by one instruction
    const auto raw = _mm512_cvtne2ps_pbh(second, first);
    std::memcpy(to, &raw, sizeof(raw));
    return;
  }
#endif
  store(to, first);
  store(to + kWidth<T>, second);
}

// Loads the first `count` lanes, fewer than a vector has. The other lanes are 0.
template <class T>
DDPM_FAST_INLINE Vector<T> load(const T* from, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const unsigned lanes = (1u << count) - 1;
  typename RawType<T>::type raw;
  if constexpr (sizeof(T) == 2) {
    raw = reinterpret_cast<HalfWords>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), from));
  } else if constexpr (sizeof(T) == 4) {
    raw = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from);
  } else {
    raw = _mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), from);
  }
  return widen(raw, T{});
#else
  T buffer[kWidth<T>] = {};
  for (int i = 0; i < count; ++i) buffer[i] = from[i];
  return load(buffer);
#endif
}

template <class T>
DDPM_FAST_INLINE void store(T* to, Vector<T> v, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const unsigned lanes = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(lanes), reinterpret_cast<__m256i>(narrow(v, T{})));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lanes), v);
  } else {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(lanes), v);
  }
#else
  T buffer[kWidth<T>];
  store(buffer, v);
  for (int i = 0; i < count; ++i) to[i] = buffer[i];
#endif
}

// Returns v with 0 in the lanes from `count` on.
template <class T>
DDPM_FAST_INLINE Vector<T> first_lanes(Vector<T> v, int count) {
  RealOf<T> buffer[kWidth<T>];
  std::memcpy(buffer, &v, sizeof(v));
  return load(buffer, count);
}

// Load and store a whole vector, or the first `count` lanes if `partial`.
template <bool partial, class T>
DDPM_FAST_INLINE Vector<T> load(const T* from, int count) {
  if constexpr (partial) return load(from, count);
  return load(from);
}
template <bool partial, class T>
DDPM_FAST_INLINE void store(T* to, Vector<T> v, int count) {
  if constexpr (partial) {
    store(to, v, count);
  } else {
    store(to, v);
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
