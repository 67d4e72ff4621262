// Arguments of the decode step; linnet/ops/native/decode.py mirrors these structures.
#pragma once

#include "skinny.h"

namespace linnet::decode {

struct Norm {
  Weight weight;
  float eps;
};

struct DecodeLayer {
  Norm input_norm, post_norm;  // [D]
  // Lightning: qkv [3HK, D] by head, output gate [HK, D]. Softmax: q [HK, D], k, v [GK, D].
  Weight inputs[3];
  Norm inner_norm;               // [HK], lightning only
  Weight output;                 // [D, HK]
  const float* slopes;           // [H]; null in a softmax layer
  Weight router, gate_up, down;  // [E, D], [E, 2F, D], [E, D, F]
  // [Fs, D], [Fs, D], [D, Fs], [1, D]; null without a shared expert.
  Weight shared_gate, shared_up, shared_down, coefficient;
  float alpha, beta, mlp_alpha, mlp_beta;  // residual factors of the two sublayers
  int64_t is_postnorm;
};

struct DecodeModel {
  const DecodeLayer* layers;
  Weight embedding;
  Norm final_norm;
  Weight lm_head;
  const float* inverse_frequency;  // [rotary_dim / 2]
  int64_t num_layers, vocab_size, hidden_size, num_heads, num_kv_heads, head_dim, rotary_dim;
  int64_t num_experts, top_k, expert_width, shared_width;
  int64_t kv_is_half;
};

struct DecodeStep {
  const DecodeModel* model;
  const int64_t* tokens;  // [B]
  int64_t* lengths;       // [B] tokens that each row has taken in; counted up at the end
  // [L, B, 2]: state [H, K, K] fp32 and null, or keys and values [capacity, G, K] with room for
  // one more token. With pages these are [pages, page_size, G, K].
  void* const* memory;
  // [B] tables of the pages that hold the tokens of a row, in order; null without pages.
  const int64_t* const* pages;
  int64_t page_size;  // tokens, a multiple of KEY_BLOCK
  float* logits;  // [B, vocab], null if not wanted
  int64_t batch_size, num_threads;
};

}  // namespace linnet::decode
