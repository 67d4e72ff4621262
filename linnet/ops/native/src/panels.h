// Matrices of fp32 or bf16 rows, and their packed form for `gemm`.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm.h"
#include "vector.h"

namespace linnet {

// Rows of `columns` numbers; the stride counts elements.
struct Matrix {
  void* data;
  int64_t stride;
  int32_t is_bf16;

  template <typename T>
  T* row(int64_t i) const {
    return static_cast<T*>(data) + i * stride;
  }
};

template <typename T>
inline void widen_row(const T* in, int64_t count, float* out) {
  const int64_t whole = count / W * W;
  for (int64_t i = 0; i < whole; i += W) store(out + i, load(in + i));
  for (int64_t i = whole; i < count; i++) out[i] = widen(in[i]);
}

template <typename T>
inline void narrow_row(const float* in, int64_t count, T* out) {
  const int64_t whole = count / W * W;
  for (int64_t i = 0; i < whole; i += W) store(out + i, load(in + i));
  for (int64_t i = whole; i < count; i++) narrow(out + i, in[i]);
}

inline void read_row(const Matrix& m, int64_t row, int64_t count, float* out) {
  m.is_bf16 ? widen_row(m.row<bf16>(row), count, out) : widen_row(m.row<float>(row), count, out);
}

inline void write_row(const Matrix& m, int64_t row, int64_t count, const float* in) {
  m.is_bf16 ? narrow_row(in, count, m.row<bf16>(row)) : narrow_row(in, count, m.row<float>(row));
}

// Output channels of one panel: what one row of register tiles covers.
constexpr int64_t PANEL = MAX_COLUMNS * W;

inline int64_t num_panels(int64_t channels) { return (channels + PANEL - 1) / PANEL; }

// Packs channels [panel * PANEL, + PANEL) of a weight [N, D] as [D, PANEL], missing ones 0.
template <typename T>
inline void pack_panel(const T* weight, int64_t channels, int64_t depth, int64_t panel, float* out) {
  for (int64_t j = 0; j < PANEL; j += W) {
    const int64_t first = panel * PANEL + j;
    const int64_t present = std::min<int64_t>(W, channels - first);
    int64_t k = 0;
    for (; k + W <= depth && present == W; k += W) {
      vf tile[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) tile[i] = load(weight + (first + i) * depth + k);
      transpose_tile(tile);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) store(out + (k + i) * PANEL + j, tile[i]);
    }
    for (; k < depth; k++)
      for (int64_t i = 0; i < W; i++)
        out[k * PANEL + j + i] = i < present ? widen(weight[(first + i) * depth + k]) : 0.0f;
  }
}

// y[rows, channels rounded up to panels] = x[rows, depth] W^T with W packed in panels.
inline void multiply_panels(int64_t rows, int64_t channels, int64_t depth, const float* x,
                            const float* panels, float* y, int64_t y_stride) {
  for (int64_t p = 0; p < num_panels(channels); p++)
    gemm(rows, PANEL, depth, x, depth, 1, panels + p * depth * PANEL, PANEL, y + p * PANEL,
         y_stride, Result::store);
}

}  // namespace linnet
