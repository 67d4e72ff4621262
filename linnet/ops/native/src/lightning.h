// Arguments of the lightning attention kernels; native.py of the operator mirrors this structure.
#pragma once

#include <cmath>
#include <cstdint>

#include "threads.h"
#include "vector.h"

namespace linnet {

// Tokens packed at a time. Twice as many would halve the passes over the state, but their operands
// no longer fit in L1, and rows fetched one chunk ahead would push each other out of L2.
constexpr int64_t CHUNK = 64;

// A [B, T, H, K] tensor: strides in elements, the last dimension contiguous.
struct Rows {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
  int32_t silu;  // whether the values pass through SiLU when they are read
};

struct LightningArgs {
  Rows q, k, v, o;                  // o also holds grad_o in the backward pass
  Rows grad_q, grad_k, grad_v;
  const float* decay;               // [H] slopes
  const float* initial_state;       // [N, H, K, V] or null
  float* final_state;               // [N, H, K, V] or null; grad of initial_state in the backward
  const float* grad_state;          // [N, H, K, V] or null
  const int64_t* starts;            // [N] first token of each sequence in its batch row
  const int64_t* lengths;           // [N]
  const int64_t* batch_rows;        // [N] batch row of each sequence
  int64_t num_sequences, num_heads, key_dim, value_dim;
  int32_t is_bf16, num_threads;
};

// One part of one sequence and head: what a task works on.
struct Span {
  const LightningArgs& args;
  int64_t sequence, head, begin, end;  // tokens within the sequence

  int64_t state_size() const { return args.key_dim * args.value_dim; }
  float slope() const { return args.decay[head]; }

  template <typename T>
  T* row(const Rows& rows, int64_t token) const {
    return static_cast<T*>(rows.data) + args.batch_rows[sequence] * rows.batch_stride +
           (args.starts[sequence] + token) * rows.token_stride + head * rows.head_stride;
  }

  // The state of this sequence and head in a [N, H, K, V] tensor.
  template <typename T>
  T* state(T* states) const {
    return states ? states + (sequence * args.num_heads + head) * state_size() : nullptr;
  }
};

// What a task does: it finds the state [K, V] before its span in `first` (null: zeros) and leaves
// the one after it in `last` unless that is null.
using SpanWork = void (*)(const Span&, float* scratch, const float* first, float* last);

// exp(-s n) for n = 0 .. C, and the rows of the causal decay as windows of one reversed vector.
class Decays {
  float power_[CHUNK + 1];
  float reversed_[2 * CHUNK] = {};  // exp(-s (C - 1 - i)), 0 from i = C on

 public:
  explicit Decays(float slope) {
    for (int64_t n = 0; n <= CHUNK; n++) power_[n] = std::exp(-slope * float(n));
    for (int64_t i = 0; i < CHUNK; i++) reversed_[i] = power_[CHUNK - 1 - i];
  }
  float operator[](int64_t n) const { return power_[n]; }
  // exp(-s (row - b)) for b = 0, 1, ..., 0 where b > row.
  const float* causal_row(int64_t row) const { return reversed_ + CHUNK - 1 - row; }
};

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

}  // namespace linnet
