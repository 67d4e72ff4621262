// Lightning attention over bf16 inputs in tile products.
//
// A gradient is the forward computation with other tensors in the roles of q, k and v, so one scan
// serves all four results; queries, keys and values below are what plays these roles.
// Rounded to bf16, once each: the decayed queries and values, the scores after their decay, and the
// state as an operand. Sums and the state itself are fp32.
#pragma once

#include "lightning_packing.h"

#ifdef LINNET_TILES

namespace linnet::tiles {

inline Roles roles_of_o(const LightningArgs& a) {
  return {a.q, a.k, a.v, a.o, a.key_dim, a.value_dim, false, false};
}
inline Roles roles_of_grad_q(const LightningArgs& a) {
  return {a.o, a.v, a.k, a.grad_q, a.value_dim, a.key_dim, false, true};
}
inline Roles roles_of_grad_k(const LightningArgs& a) {
  return {a.v, a.o, a.q, a.grad_k, a.value_dim, a.key_dim, true, true};
}
inline Roles roles_of_grad_v(const LightningArgs& a) {
  return {a.k, a.q, a.o, a.grad_v, a.key_dim, a.value_dim, true, false};
}

// scores = queries keys^T * diag for block i of the queries, as a left operand.
inline void form_scores(int64_t i, const Decays& decays, const Workspace& w) {
  const auto multiply = [&](int64_t j) {
    add_product(w.query_rows, w.key_columns + j * w.keys, w.keys);
  };
  const auto finish = [&](int64_t j, const Result& result) {
    for (int half = 0; half < 2; half++)
      for (int r = 0; r < W; r++) {
        const float* factors = decays.causal_row(i * BLOCK + half * W + r) + j * BLOCK;
        const vf first = load(factors), second = load(factors + W);
        // A select and no product: 0 * NaN of a later token would reach an earlier one.
        w.scores[j].half[half][r] =
            round_pairs(first != 0.0f ? result.half[half][0][r] * first : vf{},
                        second != 0.0f ? result.half[half][1][r] * second : vf{});
      }
  };
  for_each_result(i + 1, w.results, multiply, finish);
}

// outputs = late_queries state + scores values for block i of the queries.
inline void form_outputs(int64_t i, bool has_state, const ChunkRows& outputs, const Workspace& w) {
  const auto multiply = [&](int64_t h) {
    if (has_state) add_product(w.late_queries, w.state_columns + h * w.keys, w.keys);
    add_product(w.scores, w.value_columns + h * CHUNK_BLOCKS, i + 1);
  };
  const auto finish = [&](int64_t h, const Result& result) {
    for (int half = 0; half < 2; half++)
      for (int r = 0; r < W; r++)
        outputs.store(i * BLOCK + half * W + r, h,
                      round_pairs(result.half[half][0][r], result.half[half][1][r]));
  };
  for_each_result(w.values, w.results, multiply, finish);
}

// state = exp(-s count) state + keys^T kept_values
inline void advance(int64_t count, const Decays& decays, const Workspace& w) {
  const vf step = splat(decays[count]);
  const auto multiply = [&](int64_t n) {
    const int64_t g = n / w.values, h = n % w.values;
    add_product(w.key_rows + g * CHUNK_BLOCKS, w.kept_values + h * CHUNK_BLOCKS, num_blocks(count));
  };
  const auto finish = [&](int64_t n, const Result& added) {
    for (int tile = 0; tile < 4; tile++)
      for (int r = 0; r < W; r++) {
        vf& row = w.state[n].half[tile / 2][tile % 2][r];
        row = row * step + added.half[tile / 2][tile % 2][r];
      }
    round_state(n / w.values, n % w.values, w);
  };
  for_each_result(w.keys * w.values, w.results, multiply, finish);
}

inline void scan(const Span& span, const Roles& roles, bool wants_outputs, float* scratch,
                 const float* first, float* last) {
  const TileScope scope;
  const Decays decays(span.slope());
  const Workspace w(scratch, roles.key_dim, roles.value_dim);
  const int64_t length = span.end - span.begin;
  // Forwards a token sees the state before it, one decay away; backwards it sees the gradient of
  // the state that it has left itself.
  const int64_t late = roles.is_reverse ? 0 : 1;
  bool has_state = first != nullptr;
  load_state(first, roles, w);
  for (int64_t done = 0; done < length; done += CHUNK) {
    const auto rows = [&](const Rows& tensor, int64_t dim) {
      return ChunkRows(span, roles, tensor, dim, done);
    };
    const ChunkRows keys = rows(roles.keys, roles.key_dim);
    const ChunkRows values = rows(roles.values, roles.value_dim);
    pack_keys(keys, w);
    pack_values(values, decays, late, w);
    if (wants_outputs) {
      const ChunkRows queries = rows(roles.queries, roles.key_dim);
      const ChunkRows outputs = rows(roles.outputs, roles.value_dim);
      for (int64_t i = 0; i < num_blocks(keys.count); i++) {
        pack_queries(queries, i, decays, late, w);
        form_scores(i, decays, w);
        form_outputs(i, has_state, outputs, w);
      }
    }
    if (last || done + CHUNK < length) advance(keys.count, decays, w), has_state = true;
  }
  if (last) save_state(last, roles, w);
}

template <Roles (*roles)(const LightningArgs&)>
void output_task(const Span& span, float* scratch, const float* first, float* last) {
  scan(span, roles(span.args), true, scratch, first, last);
}

template <Roles (*roles)(const LightningArgs&)>
void state_task(const Span& span, float* scratch, const float* first, float* last) {
  scan(span, roles(span.args), false, scratch, first, last);
}

}  // namespace linnet::tiles

#endif
