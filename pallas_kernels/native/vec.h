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

}  // namespace jaxinfer

#endif
