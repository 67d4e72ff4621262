// Lightning attention on the CPU: forward and backward, chunk by chunk, the state in cache.
//
// Each task is one head of one sequence (or a part of it, when there are fewer of these than
// threads) and goes through its tokens once; nothing of size T x C or of one state per chunk
// exists. What a task does is in lightning_vectors.h and lightning_tiles.h.
// MiniMax-01, section 2.2, algorithms 1 and 2 (with decay).

#include "lightning.h"

#include <algorithm>
#include <vector>

#include "lightning_tiles.h"
#include "lightning_vectors.h"

namespace linnet {
namespace {

// One scan over all sequences and heads.
struct Scan {
  bool is_reverse;
  const float* first;  // [N, H, K, V] states before the scan, null for zeros
  float* last;         // [N, H, K, V] states after it, or null
  SpanWork state_only; // carries the state through the parts that come earlier in the scan
  SpanWork work;
  int64_t scratch_floats;
};

// Splits each sequence into parts when there are too few (sequence, head) pairs for the threads.
int64_t parts_per_sequence(const LightningArgs& args) {
  const int64_t pairs = args.num_sequences * args.num_heads;
  int64_t longest = 0;
  for (int64_t n = 0; n < args.num_sequences; n++) longest = std::max(longest, args.lengths[n]);
  if (pairs == 0 || pairs % args.num_threads == 0 || pairs >= 4 * args.num_threads) return 1;
  // A part costs a second pass over its keys and values, so it has to be worth it.
  const int64_t wanted = pairs < args.num_threads ? (args.num_threads + pairs - 1) / pairs
                                                  : args.num_threads;
  return std::clamp<int64_t>(longest / (8 * CHUNK), 1, wanted);
}

// Part `part` in scan order of a pair of sequence and head.
Span span_of(const LightningArgs& args, bool is_reverse, int64_t pair, int64_t part,
             int64_t parts) {
  const int64_t sequence = pair / args.num_heads, length = args.lengths[sequence];
  const int64_t chunks = (length + CHUNK - 1) / CHUNK;
  const int64_t place = is_reverse ? parts - 1 - part : part;
  const auto border = [&](int64_t i) { return std::min(chunks * i / parts * CHUNK, length); };
  return {args, sequence, pair % args.num_heads, border(place), border(place + 1)};
}

// The states that the parts find: [pairs, parts, K, V]. First what each part adds to the state,
// then the sums of these.
std::vector<float> carried_states(const LightningArgs& args, const Scan& scan, int64_t parts) {
  const int64_t pairs = args.num_sequences * args.num_heads;
  const int64_t size = args.key_dim * args.value_dim;
  std::vector<float> carried(pairs * parts * size);
  for_each_task(pairs * (parts - 1), args.num_threads, scan.scratch_floats,
                [&](int64_t task, float* scratch) {
                  const int64_t pair = task / (parts - 1), part = task % (parts - 1);
                  scan.state_only(span_of(args, scan.is_reverse, pair, part, parts), scratch,
                                  nullptr, &carried[(pair * parts + part) * size]);
                });
  for (int64_t pair = 0; pair < pairs; pair++) {
    float* state = &carried[pair * parts * size];
    std::vector<float> current(size), added(size);
    const Span whole = span_of(args, scan.is_reverse, pair, 0, 1);
    if (const float* from = whole.state(scan.first)) current.assign(from, from + size);
    for (int64_t part = 0; part < parts; part++, state += size) {
      const Span span = span_of(args, scan.is_reverse, pair, part, parts);
      const float step = std::exp(-span.slope() * float(span.end - span.begin));
      added.assign(state, state + size);
      std::copy(current.begin(), current.end(), state);
      for (int64_t i = 0; i < size; i++) current[i] = step * current[i] + added[i];
    }
  }
  return carried;
}

void run(const LightningArgs& args, const Scan& scan) {
  const int64_t parts = parts_per_sequence(args);
  const int64_t pairs = args.num_sequences * args.num_heads;
  const int64_t size = args.key_dim * args.value_dim;
  const auto carried = parts > 1 ? carried_states(args, scan, parts) : std::vector<float>();
  for_each_task(pairs * parts, args.num_threads, scan.scratch_floats,
                [&](int64_t task, float* scratch) {
                  const int64_t part = task % parts;
                  const Span span = span_of(args, scan.is_reverse, task / parts, part, parts);
                  const float* first = parts > 1 ? &carried[task * size] : span.state(scan.first);
                  scan.work(span, scratch, first,
                            part == parts - 1 ? span.state(scan.last) : nullptr);
                });
}

template <typename T>
void vector_forward(const LightningArgs& args) {
  using namespace vectors;
  run(args, {false, args.initial_state, args.final_state, task<state_span<T>>,
             task<forward_span<T>>, Workspace::size(args.key_dim, args.value_dim)});
}

template <typename T>
void vector_backward(const LightningArgs& args) {
  using namespace vectors;
  const int64_t scratch = Workspace::size(args.key_dim, args.value_dim);
  run(args, {false, args.initial_state, nullptr, task<state_span<T>>, task<backward_q_span<T>>,
             scratch});
  run(args, {true, args.grad_state, args.final_state, task<grad_state_span<T>>,
             task<backward_kv_span<T>>, scratch});
}

#ifdef LINNET_TILES
template <tiles::Roles (*roles)(const LightningArgs&)>
void tile_scan(const LightningArgs& args, const float* first, float* last) {
  run(args, {roles(args).is_reverse, first, last, tiles::state_task<roles>,
             tiles::output_task<roles>, tiles::Workspace::size(args)});
}

bool takes_tiles(const LightningArgs& args) { return args.is_bf16 && request_tiles(); }

void tile_forward(const LightningArgs& args) {
  tile_scan<tiles::roles_of_o>(args, args.initial_state, args.final_state);
}

void tile_backward(const LightningArgs& args) {
  tile_scan<tiles::roles_of_grad_q>(args, args.initial_state, nullptr);
  tile_scan<tiles::roles_of_grad_k>(args, args.grad_state, nullptr);
  tile_scan<tiles::roles_of_grad_v>(args, args.grad_state, args.final_state);
}
#else
bool takes_tiles(const LightningArgs&) { return false; }
void tile_forward(const LightningArgs&) {}
void tile_backward(const LightningArgs&) {}
#endif

}  // namespace
}  // namespace linnet

extern "C" void linnet_lightning_forward(const linnet::LightningArgs* args) {
  using namespace linnet;
  if (takes_tiles(*args)) return tile_forward(*args);
  args->is_bf16 ? vector_forward<bf16>(*args) : vector_forward<float>(*args);
}

extern "C" void linnet_lightning_backward(const linnet::LightningArgs* args) {
  using namespace linnet;
  if (takes_tiles(*args)) return tile_backward(*args);
  args->is_bf16 ? vector_backward<bf16>(*args) : vector_backward<float>(*args);
}

// Whether the tiles that these kernels were compiled for may be used.
extern "C" int32_t linnet_has_tiles() {
#ifdef LINNET_TILES
  return linnet::request_tiles();
#else
  return 0;
#endif
}
