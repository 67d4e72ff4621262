// One new token for each of several sequences: the whole model in one parallel region.
//
// Products are split by output rows, so each weight is read by one thread, once for all sequences,
// and only the experts that some sequence chose are read. Activations are fp32; keys and values are
// kept in the model's dtype. The block wiring is that of linnet/model/transformer.py.

#include "decode.h"

#include <cmath>

#include "decode_workspace.h"
#include "threads.h"

namespace linnet::decode {
namespace {

constexpr int64_t MIN_KEYS = 128;     // of a range of keys that is worth a task of its own
constexpr int64_t MIN_PIECE = 65536;  // multiply-adds that are worth a piece of their own

// One thread of a step.
class Worker {
  const DecodeStep& step_;
  const DecodeModel& m_;
  Workspace& w_;
  const int64_t thread_, threads_, batch_, hidden_, inner_;
  int64_t phase_ = 0;

 public:
  Worker(const DecodeStep& step, Workspace& workspace, int64_t thread, int64_t threads)
      : step_(step), m_(*step.model), w_(workspace), thread_(thread), threads_(threads),
        batch_(step.batch_size), hidden_(m_.hidden_size), inner_(w_.inner) {}

  void run() {
    const auto nothing = [] {};
    phase(0, [&](Piece piece) { embed(piece); }, [&] { normalize_x(m_.layers[0].input_norm); });
    for (int64_t l = 0; l < m_.num_layers; l++) {
      const DecodeLayer& layer = m_.layers[l];
      const bool is_last = l + 1 == m_.num_layers;
      const Norm& next = is_last ? m_.final_norm : m_.layers[l + 1].input_norm;
      phase(4 * inner_ * hidden_, [&](Piece piece) { project_in(layer, piece); }, nothing);
      if (layer.slopes) {
        phase(2 * batch_ * inner_ * m_.head_dim, [&](Piece piece) { mix_states(layer, l, piece); },
              [&] { join_states(layer); });
      } else {
        phase(2 * num_keys() * inner_, [&](Piece piece) { mix_keys(l, piece); },
              [&] { join_keys(); });
      }
      phase(inner_ * hidden_, [&](Piece piece) { project_out(layer, piece); }, [&] {
        normalize_x(layer.post_norm);
        route(layer);
      });
      const int64_t expert = m_.top_k * m_.expert_width * hidden_;
      phase(2 * expert, [&](Piece piece) { widen(piece); }, nothing);
      phase(expert, [&](Piece piece) { narrow(layer, piece); }, [&] { normalize_x(next); });
    }
    if (step_.logits)
      phase(m_.vocab_size * hidden_, [&](Piece piece) { project_logits(piece); }, nothing);
  }

 private:
  // `size` is what a phase multiplies for one sequence, roughly.
  template <typename Work, typename Finish>
  void phase(int64_t size, const Work& work, const Finish& finish) {
    const int64_t pieces = std::max(threads_, std::min(size / MIN_PIECE, 4 * threads_));
    w_.phases[phase_++].run(threads_ == 1 ? 1 : pieces, work, finish);
  }

  void embed(Piece piece) {
    const int64_t begin = piece.begin(hidden_), end = piece.end(hidden_);
    for (int64_t b = 0; b < batch_; b++) {
      const Weight row = from_row(m_.embedding, step_.tokens[b], hidden_);
      with_type(row, [&](auto* data) {
        update(w_.x[b], begin, end,
               [&](vf, int64_t i, int64_t lanes) { return load_lanes(data + i, lanes); });
      });
    }
    const int64_t half = m_.rotary_dim / 2;
    for (int64_t i = piece.begin(batch_ * half); i < piece.end(batch_ * half); i++) {
      const int64_t b = i / half, channel = i % half;
      const float angle = float(step_.lengths[b]) * m_.inverse_frequency[channel];
      w_.cosine[b][channel] = float(std::cos(double(angle)));
      w_.sine[b][channel] = float(std::sin(double(angle)));
    }
  }

  void normalize_x(const Norm& norm) {
    for (int64_t b = 0; b < batch_; b++)
      normalize(w_.x[b], norm.weight, hidden_, norm.eps, w_.normed[b]);
  }

  // All projections of the layer's input, side by side in one row.
  void project_in(const DecodeLayer& layer, Piece piece) {
    const int64_t kv = m_.num_kv_heads * m_.head_dim;
    const int64_t lightning[3] = {3 * inner_, inner_, 0}, softmax[3] = {inner_, kv, kv};
    const int64_t* sizes = layer.slopes ? lightning : softmax;
    const int64_t rows = sizes[0] + sizes[1] + sizes[2];
    int64_t first = 0;
    for (int i = 0; i < 3; first += sizes[i++]) {
      const int64_t begin = std::max(piece.begin(rows), first) - first;
      const int64_t end = std::min(piece.end(rows), first + sizes[i]) - first;
      if (begin >= end) continue;
      product(layer.inputs[i], hidden_, begin, end, w_.normed.rows, w_.inputs.rows, batch_, first);
      if (!layer.slopes) continue;
      for (int64_t b = 0; b < batch_; b++)
        update(w_.inputs[b], first + begin, first + end,
               [&](vf y, int64_t, int64_t) { return i == 0 ? silu(y) : sigmoid(y); });
    }
  }

  void mix_states(const DecodeLayer& layer, int64_t l, Piece piece) {
    const int64_t dim = m_.head_dim, parts = (dim + STATE_COLUMNS - 1) / STATE_COLUMNS;
    const int64_t tasks = batch_ * m_.num_heads * parts;
    for (int64_t task = piece.begin(tasks); task < piece.end(tasks); task++) {
      const int64_t b = task / parts / m_.num_heads, h = task / parts % m_.num_heads;
      const float* q = w_.inputs[b] + 3 * dim * h;
      advance_state(q, q + dim, q + 2 * dim, dim, std::expm1(-layer.slopes[h]),
                    task % parts * STATE_COLUMNS, memory<float>(l, b, 0) + h * dim * dim,
                    w_.mixed[b] + h * dim);
    }
  }

  void join_states(const DecodeLayer& layer) {
    for (int64_t b = 0; b < batch_; b++) {
      const float* gate = w_.inputs[b] + 3 * inner_;
      normalize(w_.mixed[b], layer.inner_norm.weight, inner_, layer.inner_norm.eps, w_.mixed[b]);
      update(w_.mixed[b], 0, inner_, [&](vf o, int64_t i, int64_t lanes) {
        return o * load_lanes(gate + i, lanes);
      });
    }
  }

  template <typename T>
  T* memory(int64_t layer, int64_t b, int which) const {
    return static_cast<T*>(step_.memory[(layer * batch_ + b) * 2 + which]);
  }

  int64_t num_keys() const {
    int64_t keys = 0;
    for (int64_t b = 0; b < batch_; b++) keys += step_.lengths[b] + 1;
    return keys;
  }

  // Ranges into which the keys of a row are cut: some when there are few heads and rows.
  int64_t parts_of(int64_t b) const {
    return std::max<int64_t>(1, std::min(w_.max_parts, (step_.lengths[b] + 1) / MIN_KEYS));
  }

  // Where a range begins: with a block of keys, so that no block crosses a page.
  static int64_t first_key(int64_t num_keys, int64_t part, int64_t parts) {
    return part == parts ? num_keys : num_keys * part / parts / KEY_BLOCK * KEY_BLOCK;
  }

  float* partials(int64_t b, int64_t part, int64_t head) const {
    const int64_t row = (b * w_.max_parts + part) * m_.num_heads + head;
    return w_.partials + row * Partial::size(m_.head_dim);
  }

  void mix_keys(int64_t l, Piece piece) {
    const int64_t tasks = batch_ * w_.max_parts * m_.num_kv_heads;
    for (int64_t task = piece.begin(tasks); task < piece.end(tasks); task++) {
      const int64_t group = task % m_.num_kv_heads, part = task / m_.num_kv_heads % w_.max_parts;
      const int64_t b = task / m_.num_kv_heads / w_.max_parts;
      if (part >= parts_of(b)) continue;
      if (m_.kv_is_half) mix_range<bf16>(l, b, group, part);
      else mix_range<float>(l, b, group, part);
    }
  }

  template <typename T>
  void mix_range(int64_t l, int64_t b, int64_t group, int64_t part) {
    const int64_t dim = m_.head_dim, step = m_.num_kv_heads * dim, past = step_.lengths[b];
    const int64_t heads = m_.num_heads / m_.num_kv_heads, own = thread_ * heads;
    const int64_t parts = parts_of(b), begin = first_key(past + 1, part, parts);
    const int64_t end = first_key(past + 1, part + 1, parts);
    const Places places{step_.pages ? step_.pages[b] : nullptr, step_.page_size};
    T* keys = memory<T>(l, b, 0) + group * dim;
    T* values = memory<T>(l, b, 1) + group * dim;
    const float* inputs = w_.inputs[b];
    if (end == past + 1) {
      const float* k = inputs + inner_ + group * dim;
      turn(k, b, 1.0f, w_.heads[own]);
      narrow_row(w_.heads[own], keys + places[past] * step);
      narrow_row(k + step, values + places[past] * step);
    }
    for (int64_t h = 0; h < heads; h++)
      turn(inputs + (group * heads + h) * dim, b, 1.0f / std::sqrt(float(dim)), w_.heads[own + h]);
    attend(w_.heads.rows + own, heads, keys, values, step, places, begin, end, dim,
           w_.scores.rows + own, partials(b, part, group * heads));
  }

  // Rotary position (ops/rotary.py) and a factor.
  void turn(const float* x, int64_t b, float factor, float* y) const {
    const int64_t half = m_.rotary_dim / 2;
    const float *cosine = w_.cosine[b], *sine = w_.sine[b];
    for (int64_t i = 0; i < half; i++) {
      y[i] = factor * (x[i] * cosine[i] - x[half + i] * sine[i]);
      y[half + i] = factor * (x[half + i] * cosine[i] + x[i] * sine[i]);
    }
    for (int64_t i = 2 * half; i < m_.head_dim; i++) y[i] = factor * x[i];
  }

  template <typename T>
  void narrow_row(const float* x, T* y) const {
    for (int64_t i = 0; i < m_.head_dim; i++) linnet::narrow(y + i, x[i]);
  }

  void join_keys() {
    const int64_t step = m_.num_heads * Partial::size(m_.head_dim);
    for (int64_t b = 0; b < batch_; b++)
      for (int64_t h = 0; h < m_.num_heads; h++)
        merge(partials(b, 0, h), parts_of(b), step, m_.head_dim, w_.mixed[b] + h * m_.head_dim);
  }

  void project_out(const DecodeLayer& layer, Piece piece) {
    product(layer.output, inner_, piece.begin(hidden_), piece.end(hidden_), w_.mixed.rows,
            w_.total.rows, batch_);
    add_residual(layer, layer.alpha, layer.beta, piece);
  }

  // x = beta total + alpha residual, in the columns of a piece.
  void add_residual(const DecodeLayer& layer, float alpha, float beta, Piece piece) {
    for (int64_t b = 0; b < batch_; b++) {
      const float* residual = layer.is_postnorm ? w_.normed[b] : w_.x[b];
      const float* y = w_.total[b];
      update(w_.x[b], piece.begin(hidden_), piece.end(hidden_), [&](vf, int64_t i, int64_t lanes) {
        return beta * load_lanes(y + i, lanes) + alpha * load_lanes(residual + i, lanes);
      });
    }
  }

  void route(const DecodeLayer& layer) {
    product(layer.router, hidden_, 0, m_.num_experts, w_.normed.rows, w_.logits.rows, batch_);
    const bool has_shared = layer.coefficient.data;
    if (has_shared)
      product(layer.coefficient, hidden_, 0, 1, w_.normed.rows, w_.shares.rows, batch_);
    for (int64_t b = 0; b < batch_; b++) {
      float& share = w_.shares[b][0];
      share = has_shared ? 1.0f / (1.0f + std::exp(-share)) : 0.0f;
      choose_experts(w_.logits[b], m_.num_experts, m_.top_k, w_.queue);
      std::copy(w_.queue, w_.queue + m_.top_k, w_.choices + b * m_.top_k);
    }
    Routing& routing = w_.routing;
    const int64_t width = m_.expert_width;
    routing.clear();
    for (int64_t e = 0; e < m_.num_experts; e++) {
      Expert* expert = nullptr;
      for (int64_t i = 0; i < batch_ * m_.top_k; i++) {
        if (w_.choices[i].expert != e) continue;
        if (!expert)
          expert = routing.add(from_row(layer.gate_up, 2 * width * e, hidden_),
                               from_row(layer.gate_up, 2 * width * e + width, hidden_),
                               from_row(layer.down, hidden_ * e, width), width);
        const int64_t token = i / m_.top_k;
        routing.give(expert, token, w_.choices[i].weight * (1.0f - w_.shares[token][0]));
      }
    }
    if (has_shared) {
      Expert* shared = routing.add(layer.shared_gate, layer.shared_up, layer.shared_down,
                                   m_.shared_width);
      for (int64_t b = 0; b < batch_; b++) routing.give(shared, b, w_.shares[b][0]);
    }
    for (int64_t i = 0; i < routing.num_slots; i++)
      w_.sources[i] = w_.normed[routing.slots[i].token];
  }

  // silu(W1 x) * W3 x of every expert for its tokens.
  void widen(Piece piece) {
    const Routing& routing = w_.routing;
    int64_t rows = 0, first = 0;
    for (int64_t e = 0; e < routing.num_experts; e++) rows += routing.experts[e].width;
    for (int64_t e = 0; e < routing.num_experts; first += routing.experts[e++].width) {
      const Expert& expert = routing.experts[e];
      const int64_t begin = std::max(piece.begin(rows), first) - first;
      const int64_t end = std::min(piece.end(rows), first + expert.width) - first;
      if (begin >= end) continue;
      const float* const* x = w_.sources + expert.first;
      product(expert.gate, hidden_, begin, end, x, w_.hidden.rows + expert.first, expert.count);
      product(expert.up, hidden_, begin, end, x, w_.up.rows + expert.first, expert.count);
      for (int64_t i = expert.first; i < expert.first + expert.count; i++)
        update(w_.hidden[i], begin, end, [&](vf gate, int64_t n, int64_t lanes) {
          return silu(gate) * load_lanes(w_.up[i] + n, lanes);
        });
    }
  }

  // The weighted sum of W2 h over each token's experts, and the residual.
  void narrow(const DecodeLayer& layer, Piece piece) {
    const int64_t begin = piece.begin(hidden_), end = piece.end(hidden_);
    for (int64_t b = 0; b < batch_; b++)
      update(w_.total[b], begin, end, [](vf, int64_t, int64_t) { return vf{}; });
    for (int64_t e = 0; e < w_.routing.num_experts; e++) {
      const Expert& expert = w_.routing.experts[e];
      product(expert.down, expert.width, begin, end, w_.hidden.rows + expert.first, w_.part.rows,
              expert.count);
      for (int64_t i = 0; i < expert.count; i++) {
        const Slot& slot = w_.routing.slots[expert.first + i];
        update(w_.total[slot.token], begin, end, [&](vf y, int64_t n, int64_t lanes) {
          return y + slot.weight * load_lanes(w_.part[i] + n, lanes);
        });
      }
    }
    add_residual(layer, layer.mlp_alpha, layer.mlp_beta, piece);
  }

  void project_logits(Piece piece) {
    product(m_.lm_head, hidden_, piece.begin(m_.vocab_size), piece.end(m_.vocab_size),
            w_.normed.rows, w_.outputs, batch_);
  }
};

}  // namespace
}  // namespace linnet::decode

// Returns 0, or 1 if there is no memory; nothing has changed then.
extern "C" int linnet_decode_step(const linnet::decode::DecodeStep* step) {
  using namespace linnet::decode;
  const DecodeModel& model = *step->model;
  const int64_t batch = step->batch_size, threads = step->num_threads;
  Cutter sizes(nullptr);
  Workspace(sizes, model, batch, threads);
  void* memory = kept_memory(sizes.used());
  if (!memory) return 1;
  Cutter cutter(memory);
  Workspace workspace(cutter, model, batch, threads);
  workspace.begin(*step);
#pragma omp parallel num_threads(int(threads))
  {
    linnet::NoDenormals guard;
    Worker(*step, workspace, omp_get_thread_num(), omp_get_num_threads()).run();
  }
  for (int64_t b = 0; b < batch; b++) step->lengths[b]++;
  return 0;
}
