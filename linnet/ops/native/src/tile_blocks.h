// Matrices of bf16 cut into blocks of 32 x 32 for tile products.
//
// Along each side a block has two halves of 16; which indices they hold is up to the user. Along
// the side that a product sums over, a dword holds the bf16 at one place of both halves. So two
// halves of a result merge into an operand lane by lane.
//
//   operand block  2 KiB  two tiles, one per half; a panel is a row of blocks along the summed side
//   result block   4 KiB  four fp32 tiles [row half][column half]
//
// Tiles 0 .. 3 are the result, 4 and 5 the halves of the left operand, 6 and 7 of the right one.
#pragma once

#include "tiles.h"

#ifdef LINNET_TILES

namespace linnet::tiles {

static_assert(W == TILE_ROWS, "a vector is one row of a tile");

constexpr int64_t BLOCK = 2 * TILE_ROWS;

struct Operand {
  vu half[2][TILE_ROWS];
};

struct Result {
  vf half[2][2][TILE_ROWS];
};

inline int64_t num_blocks(int64_t n) { return (n + BLOCK - 1) / BLOCK; }

// The first and the second elements of pairs, widened.
inline vf firsts(vu pairs) { return (vf)(pairs << 16); }
inline vf seconds(vu pairs) { return (vf)(pairs & 0xffff0000); }

// Pairs of the first, and of the second, elements of x and y.
inline vu pair_firsts(vu x, vu y) { return (x & 0xffff) | (y << 16); }
inline vu pair_seconds(vu x, vu y) { return (x >> 16) | (y & 0xffff0000); }

// Tiles 0 .. 3 += left right over panels of `depth` blocks.
inline void add_product(const Operand* left, const Operand* right, int64_t depth) {
  for (int64_t d = 0; d < depth; d++) {
    load_tile<4>(left[d].half[0]);
    load_tile<6>(right[d].half[0]);
    multiply_tiles<0, 4, 6>();
    load_tile<7>(right[d].half[1]);
    multiply_tiles<1, 4, 7>();
    load_tile<5>(left[d].half[1]);
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }
}

// For n = 0 .. count - 1: tiles 0 .. 3 = multiply(n), then finish(n, result). A result is finished
// after the next products are under way, as these run beside vector operations and what tiles have
// stored takes a while to be readable.
template <typename Multiply, typename Finish>
void for_each_result(int64_t count, Result* two_results, const Multiply& multiply,
                     const Finish& finish) {
  for (int64_t n = 0; n <= count; n++) {
    if (n < count) {
      Result& result = two_results[n % 2];
      zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
      multiply(n);
      store_tile<0>(result.half[0][0]), store_tile<1>(result.half[0][1]);
      store_tile<2>(result.half[1][0]), store_tile<3>(result.half[1][1]);
    }
    if (n > 0) finish(n - 1, two_results[(n - 1) % 2]);
  }
}

}  // namespace linnet::tiles

#endif
