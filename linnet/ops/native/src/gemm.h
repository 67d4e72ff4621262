// Small fp32 products on data that is already packed and in cache.
#pragma once

#include "vector.h"

namespace linnet {

enum class Result { store, add };

#if defined(__AVX512F__)
constexpr int MAX_ROWS = 6, MAX_COLUMNS = 4;  // 24 accumulators of 32 registers
#else
constexpr int MAX_ROWS = 4, MAX_COLUMNS = 2;  // 8 of 16
#endif

// C[rows, columns * W] (+)= row_scale * A B. A(i, k) = a[i * a_row + k * a_step], so that a
// transposed A needs no copy; B and C have contiguous rows.
template <int ROWS, int COLUMNS>
inline void gemm_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b,
                      int64_t b_row, float* c, int64_t c_row, Result result,
                      const float* row_scale) {
  vf acc[ROWS][COLUMNS] = {};
  for (int64_t k = 0; k < depth; k++) {
    vf right[COLUMNS];
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) right[j] = load(b + k * b_row + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      const vf left = splat(a[i * a_row + k * a_step]);
#pragma GCC unroll 8
      for (int j = 0; j < COLUMNS; j++) acc[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++) {
    const vf scale = splat(row_scale ? row_scale[i] : 1.0f);
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) {
      float* target = c + i * c_row + j * W;
      const vf value = acc[i][j] * scale;
      store(target, result == Result::add ? load(target) + value : value);
    }
  }
}

template <int ROWS>
inline void gemm_rows(int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_step,
                      const float* b, int64_t b_row, float* c, int64_t c_row, Result result,
                      const float* row_scale) {
  int64_t j = 0;
  for (; j + MAX_COLUMNS * W <= columns; j += MAX_COLUMNS * W)
    gemm_tile<ROWS, MAX_COLUMNS>(depth, a, a_row, a_step, b + j, b_row, c + j, c_row, result,
                                 row_scale);
  for (; j + 2 * W <= columns; j += 2 * W)
    gemm_tile<ROWS, 2>(depth, a, a_row, a_step, b + j, b_row, c + j, c_row, result, row_scale);
  for (; j < columns; j += W)
    gemm_tile<ROWS, 1>(depth, a, a_row, a_step, b + j, b_row, c + j, c_row, result, row_scale);
}

// C[rows, columns] (+)= row_scale * A B with any number of rows; columns are a multiple of W.
inline void gemm(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row,
                 int64_t a_step, const float* b, int64_t b_row, float* c, int64_t c_row,
                 Result result, const float* row_scale = nullptr) {
  int64_t i = 0;
  const auto scale = [&] { return row_scale ? row_scale + i : nullptr; };
  for (; i + MAX_ROWS <= rows; i += MAX_ROWS)
    gemm_rows<MAX_ROWS>(columns, depth, a + i * a_row, a_row, a_step, b, b_row, c + i * c_row,
                        c_row, result, scale());
  for (; i + 2 <= rows; i += 2)
    gemm_rows<2>(columns, depth, a + i * a_row, a_row, a_step, b, b_row, c + i * c_row, c_row,
                 result, scale());
  for (; i < rows; i++)
    gemm_rows<1>(columns, depth, a + i * a_row, a_row, a_step, b, b_row, c + i * c_row, c_row,
                 result, scale());
}

}  // namespace linnet
