// What one new token does in the two kinds of attention: update and read a state, or read keys.
#pragma once

#include "skinny.h"

namespace linnet::decode {

// One head's state [K, V], V = K: S = exp(-s) S + k v^T and o = q S, for N vectors of columns.
template <int N>
inline void advance_columns(const float* q, const float* k, const float* v, int64_t dim, float loss,
                            float qk, float* state, float* o, int64_t lanes) {
  vf value[N], acc[N] = {};
  for (int j = 0; j < N; j++) value[j] = load_lanes(v + j * W, lanes);
  for (int64_t i = 0; i < dim; i++) {
    float* row = state + i * dim;
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
      __builtin_prefetch(reinterpret_cast<char*>(row + j * W) + PREFETCH_BYTES, 1);
      vf s = load_lanes(row + j * W, lanes);
      // S + (lambda - 1) S: see ops/lightning_attention/recurrent.py, also for q . k apart.
      s += s * loss;
      acc[j] += q[i] * s;
      s += k[i] * value[j];
      store_lanes(row + j * W, s, lanes);
    }
  }
  for (int j = 0; j < N; j++) store_lanes(o + j * W, acc[j] + qk * value[j], lanes);
}

constexpr int64_t STATE_COLUMNS = 4 * W;

// The columns [begin, begin + STATE_COLUMNS) of one head, as many as there are.
inline void advance_state(const float* q, const float* k, const float* v, int64_t dim, float loss,
                          int64_t begin, float* state, float* o) {
  const float qk = dot(q, k, dim);
  const int64_t end = std::min(dim, begin + STATE_COLUMNS);
  int64_t c = begin;
  if (c + STATE_COLUMNS <= end) {
    advance_columns<4>(q, k, v + c, dim, loss, qk, state + c, o + c, W);
    return;
  }
  for (; c < end; c += W)
    advance_columns<1>(q, k, v + c, dim, loss, qk, state + c, o + c,
                       std::min<int64_t>(W, end - c));
}

constexpr int64_t KEY_BLOCK = 64;

// o[h] += sum_j p[h, j] v[j] for HEADS heads, in COLUMNS vectors of columns.
template <int HEADS, int COLUMNS, typename T>
inline void add_columns(const T* v, int64_t step, int64_t count, const float* p, float* o,
                        int64_t o_step, int64_t lanes) {
  vf acc[HEADS][COLUMNS] = {};
  for (int64_t j = 0; j < count; j++) {
    vf value[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++) value[c] = load_lanes(v + j * step + c * W, lanes);
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; c++) acc[h][c] += p[h * KEY_BLOCK + j] * value[c];
  }
#pragma GCC unroll 4
  for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++) {
      float* target = o + h * o_step + c * W;
      store_lanes(target, load_lanes(target, lanes) + acc[h][c], lanes);
    }
}

template <int HEADS, typename T>
inline void add_values(const T* v, int64_t step, int64_t count, const float* p, int64_t dim,
                       float* o, int64_t o_step) {
  int64_t c = 0;
  for (; c + 2 * W <= dim; c += 2 * W)
    add_columns<HEADS, 2>(v + c, step, count, p, o + c, o_step, W);
  for (; c < dim; c += W)
    add_columns<HEADS, 1>(v + c, step, count, p, o + c, o_step, std::min<int64_t>(W, dim - c));
}

// What a range of keys gives one head, without the division by the sum: [V] values, then these two.
struct Partial {
  static int64_t size(int64_t dim) { return (dim + 2 + 15) / 16 * 16; }
  static float& largest(float* partial, int64_t dim) { return partial[dim]; }
  static float& total(float* partial, int64_t dim) { return partial[dim + 1]; }
};

// Scores of one head to weights exp(s - largest); rescales what the head has so far.
inline void exponentiate(float* scores, int64_t count, int64_t dim, float* partial) {
  const float before = Partial::largest(partial, dim);
  std::fill(scores + count, scores + KEY_BLOCK, -INFINITY);
  vf top = splat(before), added = {};
  for (int64_t j = 0; j < count; j += W) top = larger(top, load(scores + j));
  top = join(top, larger);
  for (int64_t j = 0; j < count; j += W) {
    const vf p = exp(load(scores + j) - top);
    added += p;
    store(scores + j, p);
  }
  const float factor = exp(before - top)[0];
  update(partial, 0, dim, [&](vf o, int64_t, int64_t) { return o * factor; });
  float& total = Partial::total(partial, dim);
  total = total * factor + join(added, plus)[0];
  Partial::largest(partial, dim) = top[0];
}

// Where the keys or values of a row lie: one after the other, or in pages.
struct Places {
  const int64_t* pages;
  int64_t page_size;
  int64_t operator[](int64_t token) const {
    return pages ? pages[token / page_size] * page_size + token % page_size : token;
  }
};

// Attention of the heads of one key/value group over the keys [begin, end), with an online
// softmax; begin is a multiple of KEY_BLOCK. q: [heads] rows of K, scaled; scores: [heads] rows of
// KEY_BLOCK, one after the other; partials: [heads, Partial::size(K)].
template <typename T>
void attend(const float* const* q, int64_t heads, const T* keys, const T* values, int64_t step,
            Places places, int64_t begin, int64_t end, int64_t dim, float* const* scores,
            float* partials) {
  const int64_t size = Partial::size(dim);
  for (int64_t h = 0; h < heads; h++) {
    float* partial = partials + h * size;
    std::fill(partial, partial + size, 0.0f);
    Partial::largest(partial, dim) = -INFINITY;
  }
  for (int64_t j = begin; j < end; j += KEY_BLOCK) {
    const int64_t n = std::min(KEY_BLOCK, end - j), first = places[j] * step;
    product(keys + first, step, nullptr, dim, 0, n, q, scores, heads);
    for (int64_t h = 0; h < heads; h++) exponentiate(scores[h], n, dim, partials + h * size);
    int64_t h = 0;
    for (; h + 4 <= heads; h += 4)
      add_values<4>(values + first, step, n, scores[h], dim, partials + h * size, size);
    for (; h < heads; h++)
      add_values<1>(values + first, step, n, scores[h], dim, partials + h * size, size);
  }
}

// o [K] = the attention over all keys, from the partials of its ranges, `step` floats apart.
inline void merge(float* partials, int64_t count, int64_t step, int64_t dim, float* o) {
  float largest = -INFINITY, total = 0;
  for (int64_t i = 0; i < count; i++)
    largest = std::max(largest, Partial::largest(partials + i * step, dim));
  update(o, 0, dim, [](vf, int64_t, int64_t) { return vf{}; });
  for (int64_t i = 0; i < count; i++) {
    float* partial = partials + i * step;
    const float factor = exp(splat(Partial::largest(partial, dim) - largest))[0];
    total += factor * Partial::total(partial, dim);
    update(o, 0, dim, [&](vf x, int64_t c, int64_t lanes) {
      return x + factor * load_lanes(partial + c, lanes);
    });
  }
  update(o, 0, dim, [&](vf x, int64_t, int64_t) { return x / total; });
}

}  // namespace linnet::decode
