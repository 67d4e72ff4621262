// The memory that one decode step works in.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "decode.h"
#include "decode_attention.h"
#include "decode_router.h"
#include "phases.h"

namespace linnet::decode {

// Cuts one block of memory into arrays; without memory it only adds up their sizes.
class Cutter {
  char* base_;
  int64_t used_ = 0;

 public:
  explicit Cutter(void* base) : base_(static_cast<char*>(base)) {}
  int64_t used() const { return used_; }

  template <typename T>
  T* take(int64_t count) {
    T* start = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return start;
  }
};

// [rows, columns] fp32 with aligned rows, and the addresses of the rows.
struct Activations {
  int64_t step;
  float* data;
  float** rows;

  Activations(Cutter& cutter, int64_t num_rows, int64_t columns)
      : step((columns + 15) / 16 * 16),
        data(cutter.take<float>(num_rows * step)),
        rows(cutter.take<float*>(num_rows)) {
    for (int64_t i = 0; data && i < num_rows; i++) rows[i] = data + i * step;
  }
  float* operator[](int64_t i) const { return data + i * step; }
};

// What a phase writes and the next one reads; each element is written by one thread.
struct Workspace {
  int64_t inner, num_slots, max_parts;  // ranges of keys that a row may be cut into
  Phase* phases;
  Activations x, normed;       // [B, D]
  Activations inputs, mixed;   // [B, 4HK or HK + 2GK], [B, HK]
  Activations logits, shares;  // [B, E], [B, 1]: of the router and of the shared expert
  Activations hidden, up;      // [slots, F]
  Activations part, total;     // [B, D]
  Activations cosine, sine;    // [B, rotary_dim / 2]
  float* partials;             // [B, max_parts, H, Partial::size(K)]
  Choice *queue, *choices;     // [E], [B, top_k]
  Routing routing;
  const float** sources;       // [slots] the token that each slot reads
  Activations heads, scores;   // [threads * H / G, K], [threads * H / G, KEY_BLOCK]
  float** outputs;             // [B] the rows of the logits

  Workspace(Cutter& c, const DecodeModel& m, int64_t batch, int64_t threads)
      : inner(m.num_heads * m.head_dim),
        num_slots(batch * (m.top_k + 1)),
        max_parts(std::clamp<int64_t>(4 * threads / (batch * m.num_kv_heads), 1, threads)),
        phases(c.take<Phase>(num_phases(m))),
        x(c, batch, m.hidden_size),
        normed(c, batch, m.hidden_size),
        inputs(c, batch, std::max(4 * inner, inner + 2 * m.num_kv_heads * m.head_dim)),
        mixed(c, batch, inner),
        logits(c, batch, m.num_experts),
        shares(c, batch, 1),
        hidden(c, num_slots, std::max(m.expert_width, m.shared_width)),
        up(c, num_slots, std::max(m.expert_width, m.shared_width)),
        part(c, batch, m.hidden_size),
        total(c, batch, m.hidden_size),
        cosine(c, batch, m.rotary_dim / 2),
        sine(c, batch, m.rotary_dim / 2),
        partials(c.take<float>(batch * max_parts * m.num_heads * Partial::size(m.head_dim))),
        queue(c.take<Choice>(m.num_experts)),
        choices(c.take<Choice>(batch * m.top_k)),
        routing{c.take<Expert>(m.num_experts + 1), c.take<Slot>(num_slots), 0, 0},
        sources(c.take<const float*>(num_slots)),
        heads(c, threads * m.num_heads / m.num_kv_heads, m.head_dim),
        scores(c, threads * m.num_heads / m.num_kv_heads, KEY_BLOCK),
        outputs(c.take<float*>(batch)) {}

  void begin(const DecodeStep& step) {
    for (int64_t i = 0; i < num_phases(*step.model); i++) new (phases + i) Phase;
    for (int64_t b = 0; b < step.batch_size; b++)
      outputs[b] = step.logits + b * step.model->vocab_size;
  }

  static int64_t num_phases(const DecodeModel& m) { return 5 * m.num_layers + 2; }
};

// Memory that stays with the calling thread, so that a step allocates nothing.
inline void* kept_memory(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> block;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    block.reset(std::aligned_alloc(64, bytes));
    size = block ? bytes : 0;
  }
  return block.get();
}

}  // namespace linnet::decode
