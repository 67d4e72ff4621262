// Vectors of fp32 of the width that the build's level has, with loads and stores of fp32 and bf16.
//
// Compiler vector extensions instead of intrinsics: one source serves AVX-512, AVX2 and whatever
// the portable level compiles for.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace linnet {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(W * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

inline vf splat(float x) { return x - vf{}; }
inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }

// GCC 12 converts vectors of small integers in halves and joins them; the intrinsics do it at once
// (with a full mask, since those without one make it warn of a value that is not initialized).
#if defined(__AVX512F__)
inline vf load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vf)((vu)_mm512_maskz_cvtepu16_epi32(0xffff, half) << 16);
}

inline vf load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return __builtin_convertvector((vi)_mm512_maskz_cvtepi8_epi32(0xffff, bytes), vf);
}
#elif defined(__AVX2__)
inline vf load(const bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vf)((vu)_mm256_cvtepu16_epi32(half) << 16);
}

inline vf load(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return __builtin_convertvector((vi)_mm256_cvtepi8_epi32(bytes), vf);
}
#else
inline vf load(const bf16* p) {
  const vh half = *reinterpret_cast<const vh_any*>(p);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}

inline vf load(const int8_t* p) {
  vi x;
  for (int i = 0; i < W; i++) x[i] = p[i];
  return __builtin_convertvector(x, vf);
}
#endif

inline void store(bf16* p, vf x) {
  // Round to nearest even; a NaN must not carry over into infinity.
  vu bits = (vu)x;
  const vu rounded = bits + 0x7fff + ((bits >> 16) & 1);
  bits = x == x ? rounded : (bits | 0x400000);
  *reinterpret_cast<vh_any*>(p) = __builtin_convertvector(bits >> 16, vh);
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline void narrow(float* p, float x) { *p = x; }
inline void narrow(bf16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = x == x ? bits + 0x7fff + ((bits >> 16) & 1) : (bits | 0x400000);
  p->bits = uint16_t(bits >> 16);
}

template <int BLOCK, int... LANE>
inline void exchange(vf& a, vf& b, std::integer_sequence<int, LANE...>) {
  // Lanes of 2 x BLOCK: the upper block of a and the lower block of b change places.
  const vf low = __builtin_shufflevector(a, b, (LANE & BLOCK ? LANE - BLOCK + W : LANE)...);
  b = __builtin_shufflevector(a, b, (LANE & BLOCK ? LANE + W : LANE + BLOCK)...);
  a = low;
}

template <int BLOCK = 1>
inline void transpose_tile(vf* tile) {
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & BLOCK)) exchange<BLOCK>(tile[i], tile[i + BLOCK], std::make_integer_sequence<int, W>());
  if constexpr (2 * BLOCK < W) transpose_tile<2 * BLOCK>(tile);
}

inline float sum(vf x) {
  float total = 0;
  for (int i = 0; i < W; i++) total += x[i];
  return total;
}

// exp with a relative error below 2e-7; 0 and infinity beyond the range of fp32, NaN stays.
inline vf exp(vf x) {
  const vf low = splat(-87.3f), high = splat(88.7f);
  const vf clamped = x < low ? low : (x > high ? high : x);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (clamped * 1.44269504f + magic) - magic;
  const vf r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  const vf y = p * (vf)exponent;
  return x < low ? vf{} : y;
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
inline vf silu(vf x) { return x * sigmoid(x); }

}  // namespace linnet
