// AMX: registers of whole tiles, and products of these.
//
// A register holds 16 rows of 64 bytes at most: 16 sums of each row of C, 32 steps of each row of
// A, or as pairs 32 steps of W columns of B. One instruction multiplies two of them. How many rows
// and bytes each has is set before, and is the same for the registers until it is set again.

#ifndef RNNATTN_TILES_INL_H_
#define RNNATTN_TILES_INL_H_

#include <cstdint>
#include <cstring>

#include "instruction_set.h"
#include "numbers-inl.h"
#include "simd-inl.h"
#include "util-inl.h"

RNNATTN_BEFORE_NAMESPACE();
namespace rnnattn::RNNATTN_SET {

constexpr int PAIR_ROWS = 16;
constexpr int64_t TILE_STEPS = 32;

// The registers of `accumulate`.
constexpr int TILE_OF_C = 0, TILE_OF_A = 4, TILE_OF_B = 5, REST_OF_A = 6, REST_OF_B = 7;

struct TileShapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr void set(int tile, int64_t rows_of_tile, int64_t bytes_of_row) {
    rows[tile] = static_cast<uint8_t>(rows_of_tile);
    bytes[tile] = static_cast<uint16_t>(bytes_of_row);
  }
  // Of products of R rows, with `rest` steps behind the last whole tile.
  constexpr TileShapes(int R, int64_t rest) {
    for (int n = 0; n < 4; ++n) set(TILE_OF_C + n, R, sizeof(V));
    set(TILE_OF_A, R, sizeof(V));
    set(TILE_OF_B, TILE_STEPS / 2, sizeof(V));
    if (rest == 0) return;
    set(REST_OF_A, R, 2 * rest);
    set(REST_OF_B, rest / 2, sizeof(V));
  }
};

#if !defined(RNNATTN_EMULATED_TILES)

// Compilers do not know these registers, and must not know: what is in them lives within
// `accumulate` alone.
RNNATTN_INLINE void begin_tiles(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" : : "m"(shapes));
}
RNNATTN_INLINE void end_tiles() { asm volatile("tilerelease"); }
template <int tile>
RNNATTN_INLINE void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(tile) : "memory");
}
template <int tile>
RNNATTN_INLINE void store_tile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(tile) : "memory");
}
template <int c, int a, int b>
RNNATTN_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

#else

// The same in memory, for tests on a processor without them, see tests/tiles.sh.
struct EmulatedTiles {
  TileShapes shapes{1, 0};
  uint32_t numbers[8][16][W];
};
static thread_local EmulatedTiles tiles;

RNNATTN_INLINE Words words_at(const uint32_t (&row)[W]) {
  Words words;
  __builtin_memcpy(&words, row, sizeof words);
  return words;
}

RNNATTN_INLINE void begin_tiles(const TileShapes& shapes) { tiles.shapes = shapes; }
RNNATTN_INLINE void end_tiles() {}
template <int tile>
RNNATTN_INLINE void load_tile(const void* from, int64_t row_bytes) {
  std::memset(tiles.numbers[tile], 0, sizeof tiles.numbers[tile]);
  for (int r = 0; r < tiles.shapes.rows[tile]; ++r)
    std::memcpy(tiles.numbers[tile][r], static_cast<const char*>(from) + r * row_bytes,
                tiles.shapes.bytes[tile]);
}
template <int tile>
RNNATTN_INLINE void store_tile(void* to, int64_t row_bytes) {
  for (int r = 0; r < tiles.shapes.rows[tile]; ++r)
    std::memcpy(static_cast<char*>(to) + r * row_bytes, tiles.numbers[tile][r],
                tiles.shapes.bytes[tile]);
}
template <int c, int a, int b>
RNNATTN_INLINE void multiply_tiles() {
  for (int r = 0; r < tiles.shapes.rows[c]; ++r) {
    V sums = of_bits(words_at(tiles.numbers[c][r]));
    for (int k = 0; k < tiles.shapes.rows[b]; ++k) {
      const Words x = Words{} + tiles.numbers[a][r][k], y = words_at(tiles.numbers[b][k]);
      sums = fma(of_bits(x << 16), of_bits(y << 16), sums);
      sums = fma(of_bits(x & 0xffff0000u), of_bits(y & 0xffff0000u), sums);
    }
    std::memcpy(tiles.numbers[c][r], &sums, sizeof sums);
  }
}

#endif

}  // namespace rnnattn::RNNATTN_SET
RNNATTN_AFTER_NAMESPACE();

#endif  // RNNATTN_TILES_INL_H_
