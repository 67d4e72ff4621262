// The operands of lightning attention in tiles: what is packed from the tensors, and the state.
//
// In the blocks of tile_blocks.h, the halves of tokens are the first and the last 16, those of
// features the even and the odd ones: a dword holds tokens r and r + 16, or features 2r and 2r + 1
// as in memory. So the keys alone are transposed, for both of their products at once; all else is
// packed lane by lane.
#pragma once

#include "tile_blocks.h"

#ifdef LINNET_TILES

#include <algorithm>

#include "lightning.h"

namespace linnet::tiles {

constexpr int64_t CHUNK_BLOCKS = CHUNK / BLOCK;

// Which tensors play queries, keys, values and outputs of one scan.
struct Roles {
  Rows queries, keys, values, outputs;
  int64_t key_dim, value_dim;
  bool is_reverse;     // from the last token to the first
  bool is_transposed;  // key_dim is the V of the states outside
};

// The buffers of one task. K and V count blocks of features, C those of a chunk's tokens.
struct Workspace {
  int64_t keys, values;                 // K, V
  Operand *query_rows, *late_queries;   // [1, K]; the second with the decay since the state
  Operand *key_columns;                 // [C, K]: keys as columns, for the scores
  Operand *key_rows;                    // [K, C]: their features as rows, for the state
  Operand *value_columns, *kept_values; // [V, C]; the second with the decay until the next state
  Operand *scores;                      // [1, C]
  Operand *state_columns;               // [V, K]
  Result *state;                        // [K, V]
  Result *results;                      // two in turn

  Workspace(void* memory, int64_t key_dim, int64_t value_dim)
      : keys(num_blocks(key_dim)), values(num_blocks(value_dim)) {
    Operand* p = static_cast<Operand*>(memory);
    const auto take = [&](int64_t count) { Operand* start = p; p += count; return start; };
    query_rows = take(keys), late_queries = take(keys), scores = take(CHUNK_BLOCKS);
    key_columns = take(CHUNK_BLOCKS * keys), key_rows = take(CHUNK_BLOCKS * keys);
    value_columns = take(CHUNK_BLOCKS * values), kept_values = take(CHUNK_BLOCKS * values);
    state_columns = take(keys * values), state = reinterpret_cast<Result*>(take(2 * keys * values));
    results = reinterpret_cast<Result*>(take(2 * 2));
  }

  // In floats, whichever dimension plays the keys.
  static int64_t size(const LightningArgs& args) {
    const int64_t keys = num_blocks(args.key_dim), values = num_blocks(args.value_dim);
    const int64_t blocks = 2 * std::max(keys, values) + CHUNK_BLOCKS * (1 + 2 * keys + 2 * values) +
                           3 * keys * values + 4;
    return blocks * int64_t(sizeof(Operand) / sizeof(float));
  }
};

// A bf16 tensor's rows of one chunk, in scan order.
struct ChunkRows {
  bf16* data;
  int64_t step, dim, count;
  bool has_silu;

  ChunkRows(const Span& span, const Roles& roles, const Rows& rows, int64_t dim, int64_t done)
      : dim(dim), count(std::min(CHUNK, span.end - span.begin - done)), has_silu(rows.silu) {
    const int64_t token = roles.is_reverse ? span.end - 1 - done : span.begin + done;
    data = span.row<bf16>(rows, token);
    step = roles.is_reverse ? -rows.token_stride : rows.token_stride;
  }

  bf16* at(int64_t row, int64_t block) const { return data + row * step + block * BLOCK; }

  __mmask32 mask(int64_t block) const {
    const int64_t present = dim - block * BLOCK;
    return present >= BLOCK ? ~__mmask32(0) : (__mmask32(1) << present) - 1;
  }

  // One row of a block of features as pairs; zeros past the last row and feature.
  vu load(int64_t row, int64_t block) const {
    if (row >= count) return vu{};
    const bf16* from = at(row, block);
    // The row one chunk ahead: each lies in a page of its own, where no hardware prefetcher
    // follows. Into L2, since L1 is full of operands.
    __builtin_prefetch(from + CHUNK * step, 0, 2);
    const vu pairs = (vu)_mm512_maskz_loadu_epi16(mask(block), from);
    return has_silu ? round_pairs(silu(firsts(pairs)), silu(seconds(pairs))) : pairs;
  }

  void store(int64_t row, int64_t block, vu pairs) const {
    if (row >= count) return;
    _mm512_mask_storeu_epi16(at(row, block), mask(block), (__m512i)pairs);
  }
};

// Block i of the queries as a left operand. The first row is `late` tokens after the state.
inline void pack_queries(const ChunkRows& rows, int64_t i, const Decays& decays, int64_t late,
                         const Workspace& w) {
  for (int half = 0; half < 2; half++)
    for (int r = 0; r < W; r++) {
      const int64_t row = i * BLOCK + half * W + r;
      const vf decay = splat(decays[row + late]);
      for (int64_t g = 0; g < w.keys; g++) {
        const vu x = rows.load(row, g);
        w.query_rows[g].half[half][r] = x;
        w.late_queries[g].half[half][r] = round_pairs(firsts(x) * decay, seconds(x) * decay);
      }
    }
}

// Keys as right operands of the scores and, transposed by the same work, as left ones of the state.
inline void pack_keys(const ChunkRows& rows, const Workspace& w) {
  for (int64_t j = 0; j < num_blocks(rows.count); j++)
    for (int64_t g = 0; g < w.keys; g++) {
      Operand &columns = w.key_columns[j * w.keys + g], &across = w.key_rows[g * CHUNK_BLOCKS + j];
      for (int64_t half = 0; half < 2; half++) {
        vf tile[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; r++) tile[r] = (vf)rows.load(j * BLOCK + half * W + r, g);
        transpose_tile(tile);
#pragma GCC unroll 16
        for (int r = 0; r < W; r++) columns.half[half][r] = (vu)tile[r];
      }
      for (int r = 0; r < W; r++) {
        const vu x = columns.half[0][r], y = columns.half[1][r];
        across.half[0][r] = pair_firsts(x, y), across.half[1][r] = pair_seconds(x, y);
      }
    }
}

// Values as right operands of the outputs and, decayed, of the state.
inline void pack_values(const ChunkRows& rows, const Decays& decays, int64_t late,
                        const Workspace& w) {
  const auto decay_of = [&](int64_t row) {
    return splat(row < rows.count ? decays[rows.count - late - row] : 0.0f);
  };
  for (int64_t j = 0; j < num_blocks(rows.count); j++)
    for (int r = 0; r < W; r++) {
      const int64_t upper = j * BLOCK + r, lower = upper + W;
      const vf a = decay_of(upper), b = decay_of(lower);
      for (int64_t h = 0; h < w.values; h++) {
        Operand& columns = w.value_columns[h * CHUNK_BLOCKS + j];
        Operand& kept = w.kept_values[h * CHUNK_BLOCKS + j];
        const vu x = rows.load(upper, h), y = rows.load(lower, h);
        columns.half[0][r] = pair_firsts(x, y), columns.half[1][r] = pair_seconds(x, y);
        kept.half[0][r] = round_pairs(firsts(x) * a, firsts(y) * b);
        kept.half[1][r] = round_pairs(seconds(x) * a, seconds(y) * b);
      }
    }
}

// A state outside, fp32 [rows, columns].
template <typename T>
struct OutsideState {
  T* data;
  int64_t rows, columns;

  OutsideState(T* data, const Roles& roles)
      : data(data),
        rows(roles.is_transposed ? roles.value_dim : roles.key_dim),
        columns(roles.is_transposed ? roles.key_dim : roles.value_dim) {}

  __mmask16 mask(int64_t row, int64_t column) const {
    const int64_t present = row < rows ? std::clamp<int64_t>(columns - column, 0, W) : 0;
    return __mmask16((1 << present) - 1);
  }
  vf load(int64_t row, int64_t column) const {
    return (vf)_mm512_maskz_loadu_ps(mask(row, column), data + row * columns + column);
  }
  void store(int64_t row, int64_t column, vf x) const {
    _mm512_mask_storeu_ps(data + row * columns + column, mask(row, column), (__m512)x);
  }
};

// Calls move(row, column, even, odd) for rows row, row + 2, ..., row + 2 W - 2 of the state outside
// and 2 W of its columns: W vectors of even and W of odd columns, transposed if the state is.
template <typename Move>
void for_each_half(bool is_transposed, const Workspace& w, const Move& move) {
  for (int64_t g = 0; g < w.keys; g++)
    for (int64_t h = 0; h < w.values; h++)
      for (int parity = 0; parity < 2; parity++) {
        auto& half = w.state[g * w.values + h].half;
        if (is_transposed)
          move(h * BLOCK + parity, g * BLOCK, half[0][parity], half[1][parity]);
        else
          move(g * BLOCK + parity, h * BLOCK, half[parity][0], half[parity][1]);
      }
}

template <int... LANE>
inline void split_columns(vf& a, vf& b, std::integer_sequence<int, LANE...>) {
  const vf even = __builtin_shufflevector(a, b, (2 * LANE)...);
  b = __builtin_shufflevector(a, b, (2 * LANE + 1)...), a = even;
}

template <int... LANE>
inline void merge_columns(vf& a, vf& b, std::integer_sequence<int, LANE...>) {
  const vf low = __builtin_shufflevector(a, b, (LANE / 2 + LANE % 2 * W)...);
  b = __builtin_shufflevector(a, b, (W / 2 + LANE / 2 + LANE % 2 * W)...), a = low;
}

// The rounded state as a right operand.
inline void round_state(int64_t g, int64_t h, const Workspace& w) {
  const Result& state = w.state[g * w.values + h];
  for (int half = 0; half < 2; half++)
    for (int r = 0; r < W; r++)
      w.state_columns[h * w.keys + g].half[half][r] =
          round_pairs(state.half[0][half][r], state.half[1][half][r]);
}

// `data` is [K, V], null for zeros.
inline void load_state(const float* data, const Roles& roles, const Workspace& w) {
  if (!data) return void(std::memset(w.state, 0, w.keys * w.values * sizeof(Result)));
  const OutsideState<const float> outside(data, roles);
  for_each_half(roles.is_transposed, w, [&](int64_t row, int64_t column, vf* even, vf* odd) {
    vf first[W], second[W];
    for (int r = 0; r < W; r++) {
      first[r] = outside.load(row + 2 * r, column);
      second[r] = outside.load(row + 2 * r, column + W);
      split_columns(first[r], second[r], std::make_integer_sequence<int, W>());
    }
    if (roles.is_transposed) transpose_tile(first), transpose_tile(second);
    std::copy(first, first + W, even), std::copy(second, second + W, odd);
  });
  for (int64_t g = 0; g < w.keys; g++)
    for (int64_t h = 0; h < w.values; h++) round_state(g, h, w);
}

inline void save_state(float* data, const Roles& roles, const Workspace& w) {
  const OutsideState<float> outside(data, roles);
  for_each_half(roles.is_transposed, w, [&](int64_t row, int64_t column, vf* even, vf* odd) {
    vf first[W], second[W];
    std::copy(even, even + W, first), std::copy(odd, odd + W, second);
    if (roles.is_transposed) transpose_tile(first), transpose_tile(second);
    for (int r = 0; r < W; r++) {
      merge_columns(first[r], second[r], std::make_integer_sequence<int, W>());
      outside.store(row + 2 * r, column, first[r]);
      outside.store(row + 2 * r, column + W, second[r]);
    }
  });
}

}  // namespace linnet::tiles

#endif
