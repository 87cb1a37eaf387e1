// Products of bfloat16 matrices in the tiles of AMX, where the processor has them.

#ifndef JAXLLM_NATIVE_TILES_H_
#define JAXLLM_NATIVE_TILES_H_

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define JAXLLM_TILES 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace jaxllm {
namespace {

constexpr long kTile = 16;   // rows of a tile, and its columns of float32
constexpr long kDepth = 32;  // bfloat16 numbers of a row

// Whether Linux lets this process use tiles, which it must be asked.
inline bool HaveTiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// What `ldtilecfg` reads: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// In memory, and never a local: GCC believes that the instruction reads eight bytes of it.
static const TileConfig kTileConfig;

// Those tiles, for as long as this lives. XLA has its own in between.
class Tiles {
 public:
  Tiles() { _tile_loadconfig(&kTileConfig); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// Zeros in the four tiles that sum.
inline void ClearSums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Two rows of `b` side by side, pair by pair, as a tile wants its right side: [columns, 2].
// `columns` are a multiple of 16. The second row is zeros where there is none.
inline void Pair(const BFloat16* first, const BFloat16* second, long columns, BFloat16* to) {
  for (long i = 0; i < columns; i += kTile) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + i));
    const __m256i b = second ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + i))
                             : _mm256_setzero_si256();
    const __m512i pairs =
        _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
    _mm512_storeu_si512(to + 2 * i, pairs);
  }
}

// c [rows, columns] (+)= a [rows, depth] b, where b is pairs of rows: [depth / 2, c_row, 2].
// Rows and columns are multiples of 16, the depth of 32.
inline void MultiplyTiles(const BFloat16* a, long a_row, const BFloat16* b, float* c, long c_row,
                          long rows, long depth, long columns, bool add) {
  const long b_bytes = c_row * 4, c_bytes = c_row * 4, a_bytes = a_row * 2;
  for (long n = 0; n < columns; n += 2 * kTile) {
    const bool wide = n + kTile < columns;
    for (long r = 0; r < rows; r += 2 * kTile) {
      const bool high = r + kTile < rows;
      float* const corner = c + r * c_row + n;
      float* const below = corner + kTile * c_row;
      if (add) {
        _tile_loadd(0, corner, c_bytes);
        if (wide) _tile_loadd(1, corner + kTile, c_bytes);
        if (high) _tile_loadd(2, below, c_bytes);
        if (wide && high) _tile_loadd(3, below + kTile, c_bytes);
      } else {
        ClearSums();
      }
      for (long k = 0; k < depth; k += kDepth) {
        const BFloat16* right = b + k * c_row + 2 * n;
        _tile_loadd(4, a + r * a_row + k, a_bytes);
        _tile_loadd(6, right, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (high) {
          _tile_loadd(5, a + (r + kTile) * a_row + k, a_bytes);
          _tile_dpbf16ps(2, 5, 6);
        }
        if (wide) {
          _tile_loadd(7, right + 2 * kTile, b_bytes);
          _tile_dpbf16ps(1, 4, 7);
          if (high) _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, corner, c_bytes);
      if (wide) _tile_stored(1, corner + kTile, c_bytes);
      if (high) _tile_stored(2, below, c_bytes);
      if (wide && high) _tile_stored(3, below + kTile, c_bytes);
    }
  }
}

}  // namespace
}  // namespace jaxllm

#endif
#endif  // JAXLLM_NATIVE_TILES_H_
