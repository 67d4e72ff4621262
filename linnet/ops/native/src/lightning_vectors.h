// Lightning attention in fp32 vectors, for fp32 and bf16 inputs at every level.
//
// Packs C tokens at a time to fp32 and forms the products of ops/lightning_attention/chunked.py
// with the decays applied while packing or while a product is written.
#pragma once

#include "gemm.h"
#include "lightning.h"

namespace linnet::vectors {

// The buffers of one task; dimensions padded to whole vectors, the padding 0.
struct Workspace {
  int64_t keys, values;  // padded K and V
  float *q, *k, *v, *g;  // [C, K or V] chunk rows; g is grad_o
  float *transposed;     // [K or V, C]
  float *scores, *other; // [C, C]
  float *out;            // [C, K or V]
  float *state, *state_t;  // [K, V], [V, K]

  Workspace(float* p, int64_t key_dim, int64_t value_dim)
      : keys(padded(key_dim)), values(padded(value_dim)) {
    const int64_t widest = keys > values ? keys : values;
    const auto take = [&](int64_t size) { float* start = p; p += size; return start; };
    q = take(CHUNK * keys), k = take(CHUNK * keys);
    v = take(CHUNK * values), g = take(CHUNK * values);
    transposed = take(CHUNK * widest), scores = take(CHUNK * CHUNK), other = take(CHUNK * CHUNK);
    out = take(CHUNK * widest), state = take(keys * values), state_t = take(keys * values);
  }

  static int64_t size(int64_t key_dim, int64_t value_dim) {
    const int64_t keys = padded(key_dim), values = padded(value_dim);
    const int64_t widest = keys > values ? keys : values;
    return CHUNK * (2 * keys + 2 * values + 2 * widest + 2 * CHUNK) + 2 * keys * values;
  }
};

template <typename T>
void prefetch(const T* row, int64_t dim) {
  for (int64_t i = 0; i < dim; i += int64_t(64 / sizeof(T))) __builtin_prefetch(row + i);
}

// Copies `count` rows to fp32, the padding of each row 0.
template <typename T>
void pack(const Span& span, const Rows& rows, int64_t token, int64_t count, int64_t dim,
          float* out) {
  const int64_t width = padded(dim), whole = dim / W * W;
  for (int64_t t = 0; t < count; t++) {
    const T* in = span.row<const T>(rows, token + t);
    // The row one chunk ahead: each lies in a page of its own, where no hardware
    // prefetcher follows.
    prefetch(in + CHUNK * rows.token_stride, dim);
    float* row = out + t * width;
    for (int64_t i = 0; i < whole; i += W) {
      const vf x = load(in + i);
      store(row + i, rows.silu ? silu(x) : x);
    }
    for (int64_t i = whole; i < width; i++) {
      const float x = i < dim ? widen(in[i]) : 0.0f;
      row[i] = rows.silu ? x / (1.0f + std::exp(-x)) : x;
    }
  }
}

template <typename T>
void unpack(const Span& span, const Rows& rows, int64_t token, int64_t count, int64_t dim,
            const float* in) {
  const int64_t width = padded(dim), whole = dim / W * W;
  for (int64_t t = 0; t < count; t++) {
    T* out = span.row<T>(rows, token + t);
    prefetch(out + CHUNK * rows.token_stride, dim);
    const float* row = in + t * width;
    for (int64_t i = 0; i < whole; i += W) store(out + i, load(row + i));
    for (int64_t i = whole; i < dim; i++) narrow(out + i, row[i]);
  }
}

// out[column * out_row + row] = in[row * width + column], columns beyond `count` rows 0.
inline void transpose(const float* in, int64_t count, int64_t width, float* out, int64_t out_row) {
  const int64_t filled = padded(count);
  for (int64_t c = 0; c < width; c += W)
    for (int64_t r = 0; r < filled; r += W) {
      vf tile[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) tile[i] = r + i < count ? load(in + (r + i) * width + c) : vf{};
      transpose_tile(tile);
#pragma GCC unroll 16
      for (int j = 0; j < W; j++) store(out + (c + j) * out_row + r, tile[j]);
    }
}

inline void load_state(const float* in, const Workspace& w, const LightningArgs& args) {
  std::memset(w.state, 0, w.keys * w.values * sizeof(float));
  for (int64_t i = 0; in && i < args.key_dim; i++)
    std::memcpy(w.state + i * w.values, in + i * args.value_dim, args.value_dim * sizeof(float));
}

inline void save_state(const Workspace& w, const LightningArgs& args, float* out) {
  for (int64_t i = 0; out && i < args.key_dim; i++)
    std::memcpy(out + i * args.value_dim, w.state + i * w.values, args.value_dim * sizeof(float));
}

inline void scale_rows(float* rows, int64_t count, int64_t width, const Decays& decays,
                       int64_t first, int64_t step) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t i = 0; i < width; i += W)
      store(rows + t * width + i, load(rows + t * width + i) * decays[first + t * step]);
}

// state = exp(-s m) state + left^T right, left [m, K] and right [m, V] packed.
inline void advance(const Workspace& w, const float* left, const float* right, int64_t m,
                    const Decays& decays) {
  const vf step = splat(decays[m]);
  for (int64_t i = 0; i < w.keys * w.values; i += W) store(w.state + i, load(w.state + i) * step);
  gemm(w.keys, w.values, m, left, 1, w.keys, right, w.values, w.state, w.values, Result::add);
}

// scores[a, b] = exp(-s (a - b)) left[a] . right[b] for b <= a, 0 above the diagonal; `right` is
// given transposed, [dim, C].
inline void causal_scores(const float* left, const float* right_t, int64_t m, int64_t dim,
                          const Decays& decays, float* scores) {
  for (int64_t a = 0; a < m; a += MAX_ROWS) {
    const int64_t rows = m - a < MAX_ROWS ? m - a : MAX_ROWS;
    const int64_t columns = padded(a + rows);
    gemm(rows, columns, dim, left + a * dim, dim, 1, right_t, CHUNK, scores + a * CHUNK, CHUNK,
         Result::store);
    for (int64_t i = a; i < a + rows; i++) {
      float* row = scores + i * CHUNK;
      const float* factors = decays.causal_row(i);
      for (int64_t b = 0; b < columns; b += W) {
        // A select and no product: 0 * NaN of a later token would reach an earlier one.
        const vf factor = load(factors + b), score = load(row + b);
        store(row + b, factor != 0.0f ? score * factor : vf{});
      }
    }
  }
}

// out += scores in, with scores lower triangular.
inline void add_causal(const float* scores, const float* in, int64_t m, int64_t width, float* out) {
  for (int64_t a = 0; a < m; a += MAX_ROWS) {
    const int64_t rows = m - a < MAX_ROWS ? m - a : MAX_ROWS;
    gemm(rows, width, a + rows, scores + a * CHUNK, CHUNK, 1, in, width, out + a * width, width,
         Result::add);
  }
}

// out += scores^T in, with scores lower triangular.
inline void add_causal_transposed(const float* scores, const float* in, int64_t m, int64_t width,
                                  float* out) {
  for (int64_t b = 0; b < m; b += MAX_ROWS) {
    const int64_t rows = m - b < MAX_ROWS ? m - b : MAX_ROWS;
    gemm(rows, width, m - b, scores + b * CHUNK + b, 1, CHUNK, in + b * width, width,
         out + b * width, width, Result::add);
  }
}

// Row factors exp(-s (first + step * t)) of one chunk.
inline void fill_factors(const Decays& decays, int64_t m, int64_t first, int64_t step,
                         float* factors) {
  for (int64_t t = 0; t < m; t++) factors[t] = decays[first + t * step];
}

template <typename T>
void forward_span(const Span& span, const Workspace& w) {
  const LightningArgs& args = span.args;
  const Decays decays(span.slope());
  float q_decay[CHUNK];
  fill_factors(decays, CHUNK, 1, 1, q_decay);
  for (int64_t t = span.begin; t < span.end; t += CHUNK) {
    const int64_t m = span.end - t < CHUNK ? span.end - t : CHUNK;
    pack<T>(span, args.q, t, m, args.key_dim, w.q);
    pack<T>(span, args.k, t, m, args.key_dim, w.k);
    pack<T>(span, args.v, t, m, args.value_dim, w.v);
    transpose(w.k, m, w.keys, w.transposed, CHUNK);
    causal_scores(w.q, w.transposed, m, w.keys, decays, w.scores);
    gemm(m, w.values, w.keys, w.q, w.keys, 1, w.state, w.values, w.out, w.values, Result::store,
         q_decay);
    add_causal(w.scores, w.v, m, w.values, w.out);
    unpack<T>(span, args.o, t, m, args.value_dim, w.out);
    scale_rows(w.k, m, w.keys, decays, m - 1, -1);
    advance(w, w.k, w.v, m, decays);
  }
}

// Advances the state over a span without forming outputs.
template <typename T>
void state_span(const Span& span, const Workspace& w) {
  const LightningArgs& args = span.args;
  const Decays decays(span.slope());
  for (int64_t t = span.begin; t < span.end; t += CHUNK) {
    const int64_t m = span.end - t < CHUNK ? span.end - t : CHUNK;
    pack<T>(span, args.k, t, m, args.key_dim, w.k);
    pack<T>(span, args.v, t, m, args.value_dim, w.v);
    scale_rows(w.k, m, w.keys, decays, m - 1, -1);
    advance(w, w.k, w.v, m, decays);
  }
}

// dQ = (dO V^T * diag) K + (dO S^T) * q_decay, scanning forwards.
template <typename T>
void backward_q_span(const Span& span, const Workspace& w) {
  const LightningArgs& args = span.args;
  const Decays decays(span.slope());
  float q_decay[CHUNK];
  fill_factors(decays, CHUNK, 1, 1, q_decay);
  for (int64_t t = span.begin; t < span.end; t += CHUNK) {
    const int64_t m = span.end - t < CHUNK ? span.end - t : CHUNK;
    pack<T>(span, args.k, t, m, args.key_dim, w.k);
    pack<T>(span, args.v, t, m, args.value_dim, w.v);
    pack<T>(span, args.o, t, m, args.value_dim, w.g);
    transpose(w.v, m, w.values, w.transposed, CHUNK);
    causal_scores(w.g, w.transposed, m, w.values, decays, w.scores);
    transpose(w.state, w.keys, w.values, w.state_t, w.keys);
    gemm(m, w.keys, w.values, w.g, w.values, 1, w.state_t, w.keys, w.out, w.keys, Result::store,
         q_decay);
    add_causal(w.scores, w.k, m, w.keys, w.out);
    unpack<T>(span, args.grad_q, t, m, args.key_dim, w.out);
    scale_rows(w.k, m, w.keys, decays, m - 1, -1);
    advance(w, w.k, w.v, m, decays);
  }
}

// dK and dV, scanning backwards with the gradient R of the state in w.state.
template <typename T>
void backward_kv_span(const Span& span, const Workspace& w) {
  const LightningArgs& args = span.args;
  const Decays decays(span.slope());
  float k_decay[CHUNK];
  const int64_t chunks = (span.end - span.begin + CHUNK - 1) / CHUNK;
  for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
    const int64_t t = span.begin + chunk * CHUNK;
    const int64_t m = span.end - t < CHUNK ? span.end - t : CHUNK;
    fill_factors(decays, m, m - 1, -1, k_decay);
    pack<T>(span, args.q, t, m, args.key_dim, w.q);
    pack<T>(span, args.k, t, m, args.key_dim, w.k);
    pack<T>(span, args.v, t, m, args.value_dim, w.v);
    pack<T>(span, args.o, t, m, args.value_dim, w.g);
    transpose(w.v, m, w.values, w.transposed, CHUNK);
    causal_scores(w.g, w.transposed, m, w.values, decays, w.other);
    transpose(w.state, w.keys, w.values, w.state_t, w.keys);
    gemm(m, w.keys, w.values, w.v, w.values, 1, w.state_t, w.keys, w.out, w.keys, Result::store,
         k_decay);
    add_causal_transposed(w.other, w.q, m, w.keys, w.out);
    unpack<T>(span, args.grad_k, t, m, args.key_dim, w.out);
    transpose(w.k, m, w.keys, w.transposed, CHUNK);
    causal_scores(w.q, w.transposed, m, w.keys, decays, w.scores);
    gemm(m, w.values, w.keys, w.k, w.keys, 1, w.state, w.values, w.out, w.values, Result::store,
         k_decay);
    add_causal_transposed(w.scores, w.g, m, w.values, w.out);
    unpack<T>(span, args.grad_v, t, m, args.value_dim, w.out);
    scale_rows(w.q, m, w.keys, decays, 1, 1);
    advance(w, w.q, w.g, m, decays);
  }
}

// R over a span, scanning backwards, without forming gradients.
template <typename T>
void grad_state_span(const Span& span, const Workspace& w) {
  const LightningArgs& args = span.args;
  const Decays decays(span.slope());
  const int64_t chunks = (span.end - span.begin + CHUNK - 1) / CHUNK;
  for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
    const int64_t t = span.begin + chunk * CHUNK;
    const int64_t m = span.end - t < CHUNK ? span.end - t : CHUNK;
    pack<T>(span, args.q, t, m, args.key_dim, w.q);
    pack<T>(span, args.o, t, m, args.value_dim, w.g);
    scale_rows(w.q, m, w.keys, decays, 1, 1);
    advance(w, w.q, w.g, m, decays);
  }
}

// A task of `work`, which finds and leaves the state in its workspace.
template <void (*work)(const Span&, const Workspace&)>
void task(const Span& span, float* scratch, const float* first, float* last) {
  const Workspace w(scratch, span.args.key_dim, span.args.value_dim);
  load_state(first, w, span.args);
  work(span, w);
  save_state(w, span.args, last);
}

}  // namespace linnet::vectors
