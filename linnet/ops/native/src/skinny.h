// Products of a few vectors with a large matrix that lies row-major in fp32, bf16 or int8.
//
// Each weight is read once, so with few vectors the speed is that of memory. A tile is four rows
// that lie far apart: memory delivers four streams faster than one.
#pragma once

#include <algorithm>
#include <cmath>

#include "vector.h"

namespace linnet::decode {

// A [rows, columns] matrix; int8 has one scale per row.
struct Weight {
  enum Type : int64_t { fp32, half, int8 };
  const void* data;
  const float* scale;
  int64_t type;
};

// The first `count` elements, zeros after them.
template <typename T>
inline vf load_part(const T* p, int64_t count) {
  T part[W] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}

template <typename T>
inline vf load_lanes(const T* p, int64_t count) {
  return count == W ? load(p) : load_part(p, count);
}

template <typename T>
inline void store_part(T* p, vf x, int64_t count) {
  T part[W];
  store(part, x);
  std::memcpy(p, part, count * sizeof(T));
}

template <typename T>
inline void store_lanes(T* p, vf x, int64_t count) {
  if (count == W) store(p, x);
  else store_part(p, x, count);
}

// y[i] = f(y[i], i) for i in [begin, end), a vector at a time; `f` also gets the lanes that count.
template <typename F>
inline void update(float* y, int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + W <= end; i += W) store(y + i, f(load(y + i), i, int64_t(W)));
  if (i < end) store_part(y + i, f(load_part(y + i, end - i), i, end - i), end - i);
}

// Calls f with a typed pointer to the weights.
template <typename F>
inline void with_type(const Weight& w, const F& f) {
  if (w.type == Weight::fp32) f(static_cast<const float*>(w.data));
  if (w.type == Weight::half) f(static_cast<const bf16*>(w.data));
  if (w.type == Weight::int8) f(static_cast<const int8_t*>(w.data));
}

// The part of a matrix that begins at a row.
inline Weight from_row(const Weight& w, int64_t row, int64_t columns) {
  const int64_t size = w.type == Weight::fp32 ? 4 : (w.type == Weight::half ? 2 : 1);
  const char* data = static_cast<const char*>(w.data) + row * columns * size;
  return {data, w.scale ? w.scale + row : nullptr, w.type};
}

constexpr int ROWS = 4;
#if defined(__AVX512F__)
constexpr int MAX_COUNT = 6;  // 24 accumulators of 32 registers
#else
constexpr int MAX_COUNT = 2;  // 8 of 16
#endif
constexpr int64_t PREFETCH_BYTES = 512, BLOCK_BYTES = 16384;

template <int STEP, int... LANE>
inline vf swap_lanes(vf x, std::integer_sequence<int, LANE...>) {
  return __builtin_shufflevector(x, x, (LANE ^ STEP)...);
}

// The lanes joined by an associative operation, in every lane.
template <int STEP = W / 2, typename F>
inline vf join(vf x, const F& f) {
  x = f(x, swap_lanes<STEP>(x, std::make_integer_sequence<int, W>()));
  if constexpr (STEP > 1) x = join<STEP / 2>(x, f);
  return x;
}

inline vf plus(vf a, vf b) { return a + b; }
inline vf larger(vf a, vf b) { return b > a ? b : a; }

// The sums of the lanes of four vectors.
inline void sums(vf a, vf b, vf c, vf d, float* out) {
  const auto lanes = std::make_integer_sequence<int, W>();
  exchange<W / 2>(a, c, lanes);
  exchange<W / 2>(b, d, lanes);
  a += c, b += d;
  exchange<W / 4>(a, b, lanes);
  a += b;  // quarters: parts of the four sums in order
  if constexpr (W > 4) a = join<W / 8>(a, plus);
  for (int i = 0; i < 4; i++) out[i] = a[i * (W / 4)];
}

// acc[i][r] += w[r][d] * x[i][d] for the first `lanes` of W numbers.
template <typename T, int COUNT>
inline void multiply(const T* const* w, const float* const* x, int64_t d, int64_t lanes,
                     vf (&acc)[COUNT][ROWS]) {
  vf left[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) left[r] = load_lanes(w[r] + d, lanes);
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++) {
    const vf right = load_lanes(x[i] + d, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) acc[i][r] += left[r] * right;
  }
}

// out[i][r] = w[r] . x[i]
template <typename T, int COUNT>
inline void dot_tile(const T* const* w, const float* const* x, int64_t depth, float (*out)[ROWS]) {
  constexpr int64_t LINE = 64 / sizeof(T);
  vf acc[COUNT][ROWS] = {};
  int64_t d = 0;
  for (; d + LINE <= depth; d += LINE) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
      __builtin_prefetch(reinterpret_cast<const char*>(w[r] + d) + PREFETCH_BYTES);
#pragma GCC unroll 16
    for (int64_t part = 0; part < LINE; part += W) multiply(w, x, d + part, W, acc);
  }
  for (; d + W <= depth; d += W) multiply(w, x, d, W, acc);
  if (d < depth) multiply(w, x, d, depth - d, acc);
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++) sums(acc[i][0], acc[i][1], acc[i][2], acc[i][3], out[i]);
}

template <typename T, int COUNT = MAX_COUNT>
inline void dot_tile(int64_t count, const T* const* w, const float* const* x, int64_t depth,
                     float (*out)[ROWS]) {
  if constexpr (COUNT > 1)
    if (count < COUNT) return dot_tile<T, COUNT - 1>(count, w, x, depth, out);
  dot_tile<T, COUNT>(w, x, depth, out);
}

// y[i][first + n] = scale[n] * (row n of w) . x[i] for n in [begin, end) and i in [0, count).
template <typename T>
void product(const T* w, int64_t row_step, const float* scale, int64_t depth, int64_t begin,
             int64_t end, const float* const* x, float* const* y, int64_t count,
             int64_t first = 0) {
  const int64_t stream = (end - begin) / ROWS, whole = begin + stream * ROWS;
  const int64_t tiles = stream + (whole < end);
  const int64_t groups = (count + MAX_COUNT - 1) / MAX_COUNT;
  // With several groups a block of rows stays in the first cache until all have passed it.
  const int64_t tile_bytes = ROWS * depth * int64_t(sizeof(T));
  const int64_t block = groups == 1 ? 1 : std::max<int64_t>(1, BLOCK_BYTES / tile_bytes);
  for (int64_t start = 0; start < tiles; start += block) {
    int64_t i = 0;
    for (int64_t group = groups; group > 0; group--) {
      const int64_t members = (count - i + group - 1) / group;
      for (int64_t tile = start; tile < std::min(start + block, tiles); tile++) {
        int64_t row[ROWS];
        const T* left[ROWS];
        for (int r = 0; r < ROWS; r++) {
          // The last tile may repeat a row.
          row[r] = tile < stream ? begin + r * stream + tile : std::min(whole + r, end - 1);
          left[r] = w + row[r] * row_step;
        }
        float out[MAX_COUNT][ROWS];
        dot_tile<T>(members, left, x + i, depth, out);
        for (int64_t m = 0; m < members; m++)
          for (int r = 0; r < ROWS; r++)
            y[i + m][first + row[r]] = scale ? scale[row[r]] * out[m][r] : out[m][r];
      }
      i += members;
    }
  }
}

inline void product(const Weight& w, int64_t depth, int64_t begin, int64_t end,
                    const float* const* x, float* const* y, int64_t count, int64_t first = 0) {
  with_type(w, [&](auto* data) {
    product(data, depth, w.scale, depth, begin, end, x, y, count, first);
  });
}

// The sum of x[i] y[i].
inline float dot(const float* x, const float* y, int64_t n) {
  vf acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) acc[j] += load(x + i + j * W) * load(y + i + j * W);
  for (; i < n; i += W)
    acc[0] += load_lanes(x + i, std::min<int64_t>(n - i, W)) *
              load_lanes(y + i, std::min<int64_t>(n - i, W));
  return join((acc[0] + acc[1]) + (acc[2] + acc[3]), plus)[0];
}

// y = x / sqrt(mean(x^2) + eps) * weight
inline void normalize(const float* x, const Weight& weight, int64_t n, float eps, float* y) {
  const float inverse = 1.0f / std::sqrt(dot(x, x, n) / float(n) + eps);
  with_type(weight, [&](auto* scale) {
    update(y, 0, n, [&](vf, int64_t i, int64_t lanes) {
      return load_lanes(x + i, lanes) * inverse * load_lanes(scale + i, lanes);
    });
  });
}

}  // namespace linnet::decode
