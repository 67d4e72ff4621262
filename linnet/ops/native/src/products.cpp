// Products with bf16 or fp32 weights in fp32 arithmetic, for processors that multiply no bf16: the
// operands are widened while they are packed and the result is rounded once, so that no widened
// copy of a tensor exists. Also the whole expert feed-forward of many tokens in one call.

#include <cmath>
#include <vector>

#include "panels.h"
#include "threads.h"

namespace linnet {
namespace {

// Rows of x in one block: its packed copy takes about a third of the L2 cache.
int64_t block_rows(int64_t depth) {
  const int64_t rows = (96 * 1024) / std::max<int64_t>(depth, 1);
  return std::clamp<int64_t>(rows / MAX_ROWS * MAX_ROWS, 4 * MAX_ROWS, 32 * MAX_ROWS);
}

void pack_weight(const void* weight, bool is_bf16, int64_t channels, int64_t depth, int64_t panel,
                 float* out) {
  if (is_bf16)
    pack_panel(static_cast<const bf16*>(weight), channels, depth, panel, out);
  else
    pack_panel(static_cast<const float*>(weight), channels, depth, panel, out);
}

}  // namespace

struct LinearArgs {
  Matrix x, y;         // [M, D], [M, N]
  const void* weight;  // [N, D] contiguous
  int64_t rows, channels, depth;
  int32_t weight_is_bf16, num_threads;
};

struct ExpertsArgs {
  Matrix x, y;               // [T, D] tokens, [T, D] result
  Matrix hidden;             // [T * k, 2F] pre-activations by slot, not written if data is null
  const void *gate_up, *down;  // [E, 2F, D], [E, D, F]
  const int64_t* experts;    // [T, k] chosen expert of each slot, -1 for dropped slots
  const float* weights;      // [T, k]
  int64_t num_tokens, top_k, num_experts, dim, width;
  int32_t weights_are_bf16, num_threads;
};

namespace {

void linear(const LinearArgs& a) {
  const int64_t panels = num_panels(a.channels), block = block_rows(a.depth);
  const Scratch packed(panels * PANEL * a.depth);
#pragma omp parallel num_threads(a.num_threads)
  {
    NoDenormals guard;
    const Scratch x(block * a.depth), y(block * panels * PANEL);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; p++)
      pack_weight(a.weight, a.weight_is_bf16, a.channels, a.depth, p,
                  packed.get() + p * PANEL * a.depth);
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < a.rows; first += block) {
      const int64_t rows = std::min(block, a.rows - first);
      for (int64_t i = 0; i < rows; i++)
        read_row(a.x, first + i, a.depth, x.get() + i * a.depth);
      multiply_panels(rows, a.channels, a.depth, x.get(), packed.get(), y.get(), panels * PANEL);
      for (int64_t i = 0; i < rows; i++)
        write_row(a.y, first + i, a.channels, y.get() + i * panels * PANEL);
    }
  }
}

// Slots sorted by expert: order[bounds[e]] .. order[bounds[e + 1] - 1] belong to expert e.
struct Grouping {
  std::vector<int64_t> order, bounds;

  explicit Grouping(const ExpertsArgs& a)
      : order(a.num_tokens * a.top_k), bounds(a.num_experts + 1) {
    const int64_t slots = a.num_tokens * a.top_k;
    for (int64_t s = 0; s < slots; s++)
      if (a.experts[s] >= 0) bounds[a.experts[s] + 1]++;
    for (int64_t e = 0; e < a.num_experts; e++) bounds[e + 1] += bounds[e];
    std::vector<int64_t> next(bounds);
    for (int64_t s = 0; s < slots; s++)
      if (a.experts[s] >= 0) order[next[a.experts[s]]++] = s;
  }
};

// One block of slots through one expert: down(silu(gate x) * up x), into `results` by slot.
void expert_block(const ExpertsArgs& a, const int64_t* slots, int64_t rows, const float* gate_up,
                  const float* down, float* x, float* hidden, float* y, float* results) {
  const int64_t hidden_stride = num_panels(2 * a.width) * PANEL;
  const int64_t y_stride = num_panels(a.dim) * PANEL;
  for (int64_t i = 0; i < rows; i++) read_row(a.x, slots[i] / a.top_k, a.dim, x + i * a.dim);
  multiply_panels(rows, 2 * a.width, a.dim, x, gate_up, hidden, hidden_stride);
  for (int64_t i = 0; a.hidden.data && i < rows; i++)
    write_row(a.hidden, slots[i], 2 * a.width, hidden + i * hidden_stride);
  float* activated = hidden;  // row i moves to i * width, never past what is still to be read
  for (int64_t i = 0; i < rows; i++) {
    const float *gate = hidden + i * hidden_stride, *up = gate + a.width;
    float* out = activated + i * a.width;
    int64_t j = 0;
    for (; j + W <= a.width; j += W) store(out + j, silu(load(gate + j)) * load(up + j));
    for (; j < a.width; j++) out[j] = gate[j] / (1.0f + std::exp(-gate[j])) * up[j];
  }
  multiply_panels(rows, a.dim, a.width, activated, down, y, y_stride);
  for (int64_t i = 0; i < rows; i++)
    std::memcpy(results + slots[i] * a.dim, y + i * y_stride, a.dim * sizeof(float));
}

void add_up_slots(const ExpertsArgs& a, const float* results, int64_t token, float* sum) {
  std::fill(sum, sum + a.dim, 0.0f);
  for (int64_t slot = token * a.top_k; slot < (token + 1) * a.top_k; slot++) {
    if (a.experts[slot] < 0) continue;
    const float weight = a.weights[slot];
    const float* result = results + slot * a.dim;
    for (int64_t j = 0; j < a.dim; j++) sum[j] += weight * result[j];
  }
  write_row(a.y, token, a.dim, sum);
}

void experts(const ExpertsArgs& a) {
  const Grouping grouping(a);
  const int64_t first_panels = num_panels(2 * a.width), second_panels = num_panels(a.dim);
  const int64_t block = block_rows(std::max(a.dim, 2 * a.width));
  const int64_t element = a.weights_are_bf16 ? 2 : 4;
  const Scratch gate_up(first_panels * PANEL * a.dim), down(second_panels * PANEL * a.width);
  const Scratch results(a.num_tokens * a.top_k * a.dim);
#pragma omp parallel num_threads(a.num_threads)
  {
    NoDenormals guard;
    const Scratch x(block * a.dim), hidden(block * first_panels * PANEL);
    const Scratch y(block * second_panels * PANEL);
    for (int64_t e = 0; e < a.num_experts; e++) {
      const int64_t begin = grouping.bounds[e], end = grouping.bounds[e + 1];
      if (begin == end) continue;
      const char* w13 = static_cast<const char*>(a.gate_up) + e * 2 * a.width * a.dim * element;
      const char* w2 = static_cast<const char*>(a.down) + e * a.width * a.dim * element;
#pragma omp for schedule(static) nowait
      for (int64_t p = 0; p < first_panels; p++)
        pack_weight(w13, a.weights_are_bf16, 2 * a.width, a.dim, p,
                    gate_up.get() + p * PANEL * a.dim);
#pragma omp for schedule(static)
      for (int64_t p = 0; p < second_panels; p++)
        pack_weight(w2, a.weights_are_bf16, a.dim, a.width, p, down.get() + p * PANEL * a.width);
#pragma omp for schedule(dynamic, 1)
      for (int64_t first = begin; first < end; first += block)
        expert_block(a, &grouping.order[first], std::min(block, end - first), gate_up.get(),
                     down.get(), x.get(), hidden.get(), y.get(), results.get());
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.num_tokens; t++) add_up_slots(a, results.get(), t, y.get());
  }
}

}  // namespace
}  // namespace linnet

extern "C" void linnet_linear(const linnet::LinearArgs* args) { linnet::linear(*args); }

// Tokens in parts, which bounds the results of all slots, kept until they are added up.
extern "C" void linnet_experts(const linnet::ExpertsArgs* args) {
  constexpr int64_t PART = 4096;
  for (int64_t first = 0; first < args->num_tokens; first += PART) {
    linnet::ExpertsArgs part = *args;
    const auto skip = [](linnet::Matrix& m, int64_t rows) {
      if (m.data) m.data = static_cast<char*>(m.data) + rows * m.stride * (m.is_bf16 ? 2 : 4);
    };
    skip(part.x, first), skip(part.y, first), skip(part.hidden, first * part.top_k);
    part.experts += first * part.top_k, part.weights += first * part.top_k;
    part.num_tokens = std::min(PART, args->num_tokens - first);
    linnet::experts(part);
  }
}
