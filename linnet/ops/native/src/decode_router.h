// Which experts each token goes to, and which tokens each expert gets.
#pragma once

#include <algorithm>
#include <cmath>

#include "decode.h"

namespace linnet::decode {

struct Choice {
  float weight;
  int64_t expert;
};

// Softmax over all experts in place, then the `top_k` largest, renormalized, to the front of
// `choices` [E]. Ties are broken as by torch.topk on the CPU, which calls the same functions.
inline void choose_experts(float* logits, int64_t num_experts, int64_t top_k, Choice* choices) {
  const float largest = *std::max_element(logits, logits + num_experts);
  update(logits, 0, num_experts, [&](vf x, int64_t, int64_t) { return exp(x - largest); });
  float total = 0;
  for (int64_t e = 0; e < num_experts; e++) total += logits[e];
  for (int64_t e = 0; e < num_experts; e++) choices[e] = {logits[e] / total, e};
  const auto is_before = [](const Choice& a, const Choice& b) {
    return (std::isnan(a.weight) && !std::isnan(b.weight)) || a.weight > b.weight;
  };
  if (top_k * 64 <= num_experts) {
    std::partial_sort(choices, choices + top_k, choices + num_experts, is_before);
  } else {
    std::nth_element(choices, choices + top_k - 1, choices + num_experts, is_before);
    std::sort(choices, choices + top_k - 1, is_before);
  }
  float sum = 0;
  for (int64_t i = 0; i < top_k; i++) sum += choices[i].weight;
  for (int64_t i = 0; i < top_k; i++) choices[i].weight /= sum;
}

// One expert that has tokens: `count` slots from `first`.
struct Expert {
  Weight gate, up, down;
  int64_t width, first, count;
};

// A token's place with one of its experts.
struct Slot {
  int64_t token;
  float weight;
};

// The experts that have tokens in one layer; the shared one, if any, is the last of them.
struct Routing {
  Expert* experts;  // [E + 1]
  Slot* slots;      // [B * (top_k + 1)], by expert
  int64_t num_experts, num_slots;

  void clear() { num_experts = num_slots = 0; }

  Expert* add(const Weight& gate, const Weight& up, const Weight& down, int64_t width) {
    experts[num_experts] = {gate, up, down, width, num_slots, 0};
    return &experts[num_experts++];
  }

  void give(Expert* expert, int64_t token, float weight) {
    slots[num_slots++] = {token, weight};
    expert->count++;
  }
};

}  // namespace linnet::decode
