// Transposition: rows become columns, in squares of vectors where registers hold one.

#ifndef JAXLLM_NATIVE_TURN_H_
#define JAXLLM_NATIVE_TURN_H_

#include <algorithm>

#include "vectors.h"

#if defined(__AVX512F__)
#define JAXLLM_SQUARES 1
#include <immintrin.h>
#endif

namespace jaxllm {
namespace {

#ifdef JAXLLM_SQUARES

// Sixteen rows of sixteen numbers, in place: by pairs, fours, eights and halves.
__attribute__((always_inline)) inline void TurnSquare(__m512i* x) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int half = 0; half < 16; half += 8)
    for (int i = half; i < half + 4; ++i) {
      y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
      y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
  }
}

// Up to sixteen rows of up to sixteen numbers.
template <class From, class To>
__attribute__((always_inline)) inline void TurnSome(const From* from, long from_row, long rows,
                                                    long columns, To* to, long to_row) {
  __m512i x[16];
  for (long r = 0; r < 16; ++r) {
    const From* const row = from + r * from_row;
    x[r] = r >= rows
               ? _mm512_setzero_si512()
               : reinterpret_cast<__m512i>(columns == 16 ? Load(row) : LoadSome(row, columns));
  }
  TurnSquare(x);
  for (long c = 0; c < columns; ++c) {
    const Floats column = reinterpret_cast<Floats>(x[c]);
    if (rows == 16)
      Store(to + c * to_row, column);
    else
      StoreSome(to + c * to_row, column, rows);
  }
}

// to [columns, rows] of from [rows, columns].
template <class From, class To>
void Turn(const From* from, long from_row, long rows, long columns, To* to, long to_row) {
  for (long c = 0; c < columns; c += 16)
    for (long r = 0; r < rows; r += 16) {
      const From* const corner = from + r * from_row + c;
      To* const turned = to + c * to_row + r;
      if (rows - r >= 16 && columns - c >= 16)
        TurnSome(corner, from_row, 16, 16, turned, to_row);
      else
        TurnSome(corner, from_row, std::min(16L, rows - r), std::min(16L, columns - c), turned,
                 to_row);
    }
}

// 16-bit numbers of any type, whose bits stay as they are.
struct Raw16 {
  uint16_t bits;
};

inline Floats Load(const Raw16* from) { return reinterpret_cast<Floats>(LoadBits(from)); }

inline void Store(Raw16* to, Floats x) {
  const Halves bits = __builtin_convertvector(reinterpret_cast<Bits>(x), Halves);
  std::memcpy(static_cast<void*>(to), &bits, sizeof bits);
}

// The same without a change of type.
template <class E>
void TurnAsIs(const E* from, long from_row, long rows, long columns, E* to, long to_row) {
  using Raw = std::conditional_t<sizeof(E) == 2, Raw16, E>;
  Turn(reinterpret_cast<const Raw*>(from), from_row, rows, columns, reinterpret_cast<Raw*>(to),
       to_row);
}

#else

template <class E>
void TurnAsIs(const E* from, long from_row, long rows, long columns, E* to, long to_row) {
  for (long c = 0; c < columns; ++c)
    for (long r = 0; r < rows; ++r) to[c * to_row + r] = from[r * from_row + c];
}

template <class From, class To>
void Turn(const From* from, long from_row, long rows, long columns, To* to, long to_row) {
  for (long c = 0; c < columns; ++c)
    for (long r = 0; r < rows; ++r) StoreOne(to + c * to_row + r, LoadOne(from + r * from_row + c));
}

#endif

}  // namespace
}  // namespace jaxllm

#endif  // JAXLLM_NATIVE_TURN_H_
