// Vectors of floats as wide as the processor's registers. Knows no kernels.

#ifndef JAXINFER_NATIVE_VEC_H_
#define JAXINFER_NATIVE_VEC_H_

#include <cstdint>
#include <cstring>

namespace jaxinfer {

#if defined(__AVX512F__) || defined(JAXINFER_WIDE_VECTORS)  // the latter for tests elsewhere
constexpr int kLanes = 16;
constexpr int kNumRegisters = 32;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kNumRegisters = 32;
#else
constexpr int kLanes = 8;
constexpr int kNumRegisters = 16;
#endif
// aligned(4): loads and stores need no alignment. The compiler splits what is too wide for the
// processor, so the code is right everywhere and fast where kLanes fits.
typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vec Load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void Store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec Splat(float x) { return Vec{} + x; }

inline IntVec LoadInts(const int32_t* p) { return *reinterpret_cast<const IntVec*>(p); }

inline float Sum(Vec v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

inline float FromBits16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
inline uint16_t ToBits16(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  if ((wide & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((wide >> 16) | 0x40);
  return static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// e^x for x <= 0, within 2 units in the last place: 2^n * e^r with |r| <= ln(2) / 2.
inline Vec Exp(Vec x) {
  const Vec lowest = Splat(-87.0f);
  x = x < lowest ? lowest : x;
  const IntVec n = __builtin_convertvector(x * 1.44269504f - 0.5f, IntVec);
  const Vec nf = __builtin_convertvector(n, Vec);
  const Vec r = (x - nf * 0.693359375f) + nf * 2.12194440e-4f;
  Vec poly = Splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f}) {
    poly = poly * r + c;
  }
  poly = poly * r * r + r + 1.0f;
  return poly * reinterpret_cast<Vec>((n + 127) << 23);
}

}  // namespace jaxinfer

#endif
