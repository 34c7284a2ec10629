// Pairs of bfloat16 as vectors of 32-bit words, the first of a pair in the low half.
//
// Processors with AVX512-BF16 multiply pairs as they are. JAXINFER_EMULATE_PAIRS gives the same
// functions in plain C++, so that machines without it can test the code that uses them.

#ifndef JAXINFER_NATIVE_PAIRS_H_
#define JAXINFER_NATIVE_PAIRS_H_

#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vec.h"

namespace jaxinfer {

inline IntVec LoadPairs(const uint32_t* p) { return *reinterpret_cast<const IntVec*>(p); }
inline Vec FirstOf(IntVec pairs) { return reinterpret_cast<Vec>(pairs << 16); }
inline Vec SecondOf(IntVec pairs) { return reinterpret_cast<Vec>(pairs & ~0xffff); }

#if defined(__AVX512BF16__) || defined(JAXINFER_EMULATE_PAIRS)
#define JAXINFER_HAS_PAIR_PRODUCTS

// sum + first(x) * first(w) + second(x) * second(w), lane by lane.
inline Vec AddPairProducts(Vec sum, IntVec x, IntVec w) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else
  return sum + SecondOf(x) * SecondOf(w) + FirstOf(x) * FirstOf(w);
#endif
}

// 2 * kLanes floats as kLanes pairs, rounded to nearest even.
inline void RoundToPairs(const float* x, uint32_t* pairs) {
#if defined(__AVX512BF16__)
  const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
  _mm512_storeu_si512(pairs, (__m512i)rounded);
#else
  for (int i = 0; i < kLanes; ++i) {
    pairs[i] = ToBits16(x[2 * i]) | static_cast<uint32_t>(ToBits16(x[2 * i + 1])) << 16;
  }
#endif
}
#endif

}  // namespace jaxinfer

#endif
