// Products of AMX tiles, or the same in plain loops (-DLINNET_EMULATE_TILES) for processors with
// AVX-512 alone, so that kernels over tiles run everywhere in tests.
//
// A tile is 16 rows of 64 bytes, which lie one after the other in memory:
//
//   left operand   [16, 32] bf16
//   right operand  [32, 16] bf16, dword (r, c) holds the elements (2r, c) and (2r + 1, c)
//   result         [16, 16] fp32
#pragma once

#if defined(LINNET_EMULATE_TILES) || \
    (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__))
#define LINNET_TILES

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>

#include "threads.h"
#include "vector.h"

namespace linnet {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64, NUM_TILES = 8;

// What LDTILECFG reads: all eight tiles of full size.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileConfig() {
    for (int i = 0; i < NUM_TILES; i++) row_bytes[i] = TILE_BYTES, rows[i] = TILE_ROWS;
  }
};

#if defined(LINNET_EMULATE_TILES)

struct TileFile {
  TileConfig config;
  bool is_configured = false;
  vu tiles[NUM_TILES][TILE_ROWS];
};

// Traps where the processor would: at the use of tiles that are not configured.
inline TileFile& tile_file(bool configures = false) {
  static thread_local TileFile file;
  if (!file.is_configured && !configures) std::abort();
  return file;
}

inline bool request_tiles() { return true; }

inline void configure_tiles(const TileConfig& config) {
  TileFile& file = tile_file(true);
  file.config = config, file.is_configured = true;
  std::memset(file.tiles, 0, sizeof file.tiles);
}

inline void release_tiles() { tile_file(true).is_configured = false; }

template <int TILE>
inline void zero_tile() {
  std::memset(tile_file().tiles[TILE], 0, sizeof(TileFile::tiles[TILE]));
}

template <int TILE>
inline void load_tile(const void* from) {
  zero_tile<TILE>();
  TileFile& file = tile_file();
  for (int r = 0; r < file.config.rows[TILE]; r++)
    std::memcpy(&file.tiles[TILE][r], static_cast<const char*>(from) + r * TILE_BYTES,
                file.config.row_bytes[TILE]);
}

template <int TILE>
inline void store_tile(void* to) {
  TileFile& file = tile_file();
  for (int r = 0; r < file.config.rows[TILE]; r++)
    std::memcpy(static_cast<char*>(to) + r * TILE_BYTES, &file.tiles[TILE][r],
                file.config.row_bytes[TILE]);
}

// The order of TDPBF16PS: the first and the second elements of the pairs are summed apart.
template <int RESULT, int LEFT, int RIGHT>
inline void multiply_tiles() {
  const NoDenormals guard;
  TileFile& file = tile_file();
  const TileConfig& config = file.config;
  const int depth = config.row_bytes[LEFT] / 4;
  if (config.rows[LEFT] != config.rows[RESULT] || config.rows[RIGHT] != depth ||
      config.row_bytes[RIGHT] != config.row_bytes[RESULT])
    std::abort();
  for (int r = 0; r < config.rows[RESULT]; r++) {
    vf firsts = {}, seconds = {};
    for (int k = 0; k < depth; k++) {
      const uint32_t left = file.tiles[LEFT][r][k];
      const vu right = file.tiles[RIGHT][k];
      firsts += (vf)(vu{} + (left << 16)) * (vf)(right << 16);
      seconds += (vf)(vu{} + (left & 0xffff0000)) * (vf)(right & 0xffff0000);
    }
    file.tiles[RESULT][r] = (vu)((vf)file.tiles[RESULT][r] + (firsts + seconds));
  }
}

// The lanes of both vectors rounded to bf16, `first` in the low halves of the dwords.
inline vu round_pairs(vf first, vf second) {
  const auto rounded = [](vf x) {
    const vu bits = (vu)x, flushed = bits & 0x80000000;
    const vu nearest = bits + 0x7fff + ((bits >> 16) & 1);
    return (bits & 0x7f800000) == 0 ? flushed : (x == x ? nearest : (bits | 0x400000));
  };
  return (rounded(first) >> 16) | (rounded(second) & 0xffff0000);
}

#else

// Linux gives the tile registers only to a process that asked for them.
inline bool request_tiles() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool is_granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return is_granted;
}

// Assembly and not intrinsics: those of GCC 12 take no template argument as a tile and do not say
// that they read and write memory, so that the stores before them could move.
inline void configure_tiles(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config));
}

inline void release_tiles() { asm volatile("tilerelease"); }

template <int TILE>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

template <int TILE>
inline void load_tile(const void* from) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               :
               : "r"(from), "r"(int64_t(TILE_BYTES)), "i"(TILE)
               : "memory");
}

template <int TILE>
inline void store_tile(void* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
               :
               : "r"(to), "r"(int64_t(TILE_BYTES)), "i"(TILE)
               : "memory");
}

template <int RESULT, int LEFT, int RIGHT>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(RESULT), "i"(LEFT), "i"(RIGHT));
}

// The lanes of both vectors rounded to bf16, `first` in the low halves of the dwords.
inline vu round_pairs(vf first, vf second) {
  const vu lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vu order = lane | (lane + W) << 16;
  const __m512bh words = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (vu)_mm512_permutexvar_epi16((__m512i)order, (__m512i)words);
}

#endif

// Tiles are configured while one lives. They are a setting of the thread: other libraries configure
// them before each of their own uses, and so must we, once per task.
class TileScope {
 public:
  TileScope() { configure_tiles(TileConfig()); }
  ~TileScope() { release_tiles(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

}  // namespace linnet

#endif
