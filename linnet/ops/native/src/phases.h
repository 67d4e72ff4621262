// A sequence of phases that several threads work through, each phase after the one before it.
//
// Not OpenMP barriers: at these, every thread waits for every other, and one that the system has
// just suspended stops them all, dozens of times per decode step. Here threads take pieces as they
// come, a phase ends when its pieces are done, and a thread that was away skips what it missed.
#pragma once

#include <atomic>
#include <cstdint>

#include <sched.h>

namespace linnet::decode {

// Piece `index` of `count` equal ones.
struct Piece {
  int64_t index, count;
  int64_t begin(int64_t n) const { return n * index / count; }
  int64_t end(int64_t n) const { return n * (index + 1) / count; }
};

class alignas(64) Phase {
  std::atomic<int64_t> next_{0}, done_{0};
  std::atomic<bool> is_over_{false};

  static void wait_a_little(int64_t round) {
    if (round > 4096) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
  }

 public:
  // Does a share of `pieces` pieces and returns when all are done. Whoever does the last one then
  // calls `finish`, alone. All threads must name the same number, whenever they come.
  template <typename Work, typename Finish>
  void run(int64_t pieces, const Work& work, const Finish& finish) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      work(Piece{i, pieces});
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 < pieces) continue;
      finish();
      is_over_.store(true, std::memory_order_release);
    }
    for (int64_t round = 0; !is_over_.load(std::memory_order_acquire); round++)
      wait_a_little(round);
  }
};

}  // namespace linnet::decode
