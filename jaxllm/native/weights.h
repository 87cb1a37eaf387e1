// Products of some rows of a weight with some tokens, which are packed once for all rows.
//
// Each class has its way: `Dots` for few tokens, `Broadcasts` for many, `WeightsInTiles` for up to
// 64 in bfloat16 where the processor multiplies matrices (`turned.h` has more). It takes `kRows`
// rows of the weight as they lie, of a depth (the inputs) that is a multiple of `kWhole`, so many
// of the inputs at once (`Piece`), and up to `kTogether` tokens. Results are float32: a row for
// each row of the weight, tokens side by side; a piece is added to the pieces before it.

#ifndef JAXLLM_NATIVE_WEIGHTS_H_
#define JAXLLM_NATIVE_WEIGHTS_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tiles.h"
#include "turn.h"
#include "vectors.h"

namespace jaxllm {
namespace {

// Some of the inputs, and so of the numbers of each row.
struct Some {
  long begin, numbers;
};

// Room for numbers that begins with a line of the cache, and is kept.
template <class T>
class Lines {
 public:
  T* Room(long count) {
    constexpr long kMore = 64 / sizeof(T);
    if (static_cast<long>(numbers_.size()) < count + kMore) numbers_.resize(count + kMore);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(numbers_.data());
    return numbers_.data() + (RoundUp(begin, 64) - begin) / sizeof(T);
  }

 private:
  std::vector<T> numbers_;
};

// Rows of `count` numbers that lie `row` apart, with zeros behind their numbers up to `padded`, and
// as many rows of zeros as are wanted.
template <class E>
const E* Padded(const E* from, long row, long rows, long count, long wanted, long padded,
                Lines<E>& lines) {
  E* const to = lines.Room(wanted * padded);
  std::fill_n(to, wanted * padded, E{});
  for (long r = 0; r < rows; ++r) std::copy_n(from + r * row, count, to + r * padded);
  return to;
}

// ------------------------------------------------------------------ few tokens

// c [kN, c_row] = w [kN, depth] times x [kM, depth], both along their rows.
template <int kN, int kM, class E>
void Dot(const E* w, long depth, const float* x, float* c, long c_row, Ahead<E>& next) {
  constexpr long kNumbers = 64 / sizeof(E);  // of a line
  Ahead<E> ahead = next;                     // in registers
  Floats sums[kN][kM] = {};
  for (long k = 0; k < depth; k += kNumbers) {
    ahead.template Ask<kN>();
    for (long i = k; i < k + kNumbers; i += kLanes) {
      Floats right[kM];
      for (int m = 0; m < kM; ++m) right[m] = Load(x + m * depth + i);
      for (int n = 0; n < kN; ++n) {
        const Floats left = Load(w + n * depth + i);
        for (int m = 0; m < kM; ++m) sums[n][m] += left * right[m];
      }
    }
  }
  for (int n = 0; n < kN; ++n)
    for (int m = 0; m < kM; ++m) c[n * c_row + m] = Sum(sums[n][m]);
  next = ahead;
}

template <class E>
class Dots {
 public:
  static constexpr long kTogether = 8;            // tokens
  static constexpr long kRows = 48;               // of the weight
  static constexpr long kWhole = 64 / sizeof(E);  // the depth is a multiple

  explicit Dots(long depth) : depth_(depth) {}

  static long Packed(long tokens, long depth) { return RoundUp(tokens, kTogether) * depth; }

  void Pack(const E* x, long tokens, float* to) const {
    for (long i = 0; i < tokens * depth_; i += kLanes) Store(to + i, Load(x + i));
  }

  long Piece() const { return depth_; }

  const E* Take(const E* rows, const Some&, Lines<float>&) const { return rows; }

  void Multiply(const E* w, const float* x, const Some&, long tokens, float* c,
                Ahead<E>& next) const {
    if (tokens <= 1) return Rows<1>(w, x, c, next);
    if (tokens <= 2) return Rows<2>(w, x, c, next);
    if (tokens <= 4) return Rows<4>(w, x, c, next);
    return Rows<8>(w, x, c, next);
  }

 private:
  static constexpr int kSums = kVectors > 2 ? 24 : 8;  // that registers hold beside the rest

  template <int kM>
  void Rows(const E* w, const float* x, float* c, Ahead<E>& next) const {
    constexpr int kN = std::min(8, kSums / kM);
    static_assert(kRows % kN == 0);
    for (long n = 0; n < kRows; n += kN)
      Dot<kN, kM>(w + n * depth_, depth_, x, c + n * kTogether, kTogether, next);
  }

  const long depth_;
};

// ------------------------------------------------------------------ many tokens

// Sixteen bits are widened once for all tokens of a block, a piece of the depth at a time: all of
// it would drive the tokens out of the second cache.
template <class E>
class Broadcasts {
 public:
  static constexpr long kTogether = kVectors * kLanes;
  static constexpr long kRows = 48;
  static constexpr long kWhole = kLine;

  explicit Broadcasts(long depth) : depth_(depth) {}

  static long Packed(long tokens, long depth) { return RoundUp(tokens, kTogether) * depth; }

  void Pack(const E* x, long tokens, float* to) const {  // [tokens / kTogether, depth, kTogether]
    for (long m = 0; m < tokens; m += kTogether)
      Turn(x + m * depth_, depth_, std::min(kTogether, tokens - m), depth_, to + m * depth_,
           kTogether);
  }

  long Piece() const { return kWidens ? kPiece : depth_; }

  const float* Take(const E* rows, const Some& some, Lines<float>& lines) const {
    if constexpr (kWidens) {
      float* const wide = lines.Room(kRows * kPiece);
      for (long r = 0; r < kRows; ++r)
        for (long i = 0; i < some.numbers; i += kLanes)
          Store(wide + r * kPiece + i, Load(rows + r * depth_ + some.begin + i));
      return wide;
    } else {
      return rows;
    }
  }

  void Multiply(const float* w, const float* x, const Some& some, long tokens, float* c,
                Ahead<E>& next) const {
    if (tokens <= kLanes) return Rows<12, 1>(w, x, some, c, next);
    if constexpr (kVectors > 2)
      if (tokens <= 2 * kLanes) return Rows<12, 2>(w, x, some, c, next);
    Rows<jaxllm::kRows, kVectors>(w, x, some, c, next);
  }

 private:
  static constexpr bool kWidens = sizeof(E) != sizeof(float);
  static constexpr long kPiece = 256;

  template <int kR, int kV>
  void Rows(const float* w, const float* x, const Some& some, float* c, Ahead<E>& next) const {
    const long row = kWidens ? kPiece : depth_;
    for (long n = 0; n < kRows; n += kR)
      Tile<float, kR, kV>(w + n * row, row, x + some.begin * kTogether, kTogether,
                          c + n * kTogether, kTogether, some.numbers, some.begin > 0, next);
  }

  const long depth_;
};

#ifdef JAXLLM_TILES

// ------------------------------------------------------------------ bfloat16 in tiles

class WeightsInTiles {
 public:
  static constexpr long kTogether = 2 * kTile;
  static constexpr long kRows = 4 * kTile;
  static constexpr long kWhole = kDepth;

  explicit WeightsInTiles(long depth) : depth_(depth) {}

  static long Packed(long tokens, long depth) { return RoundUp(tokens, kTogether) * depth / 2; }

  // Pairs of a token's numbers are one of 32 bits: [tokens / 16, depth / 2, 16].
  void Pack(const BFloat16* x, long tokens, float* to) const {
    for (long m = 0; m < tokens; m += kTile)
      Turn(reinterpret_cast<const float*>(x + m * depth_), depth_ / 2, std::min(kTile, tokens - m),
           depth_ / 2, to + m * depth_ / 2, kTile);
  }

  long Piece() const { return depth_; }

  const BFloat16* Take(const BFloat16* rows, const Some&, Lines<float>&) const { return rows; }

  void Multiply(const BFloat16* w, const float* x, const Some&, long tokens, float* c,
                Ahead<BFloat16>& next) const {
    if (tokens <= kTile) return Tall(w, x, c, next);
    Square(w, x, c, next);
    const long half = 2 * kTile * depth_;
    Square(w + half, x, c + 2 * kTile * kTogether, next);
  }

 private:
  // Four tiles of rows, one of tokens.
  void Tall(const BFloat16* w, const float* x, float* c, Ahead<BFloat16>& next) const {
    const long w_bytes = depth_ * 2, c_bytes = kTogether * 4, tall = kTile * depth_;
    ClearSums();
    for (long k = 0; k < depth_; k += kDepth) {
      next.Ask<4 * kTile>();
      _tile_loadd(6, x + k * kTile / 2, 64);
      _tile_loadd(4, w + k, w_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, w + tall + k, w_bytes);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(4, w + 2 * tall + k, w_bytes);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, w + 3 * tall + k, w_bytes);
      _tile_dpbf16ps(3, 5, 6);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + kTile * kTogether, c_bytes);
    _tile_stored(2, c + 2 * kTile * kTogether, c_bytes);
    _tile_stored(3, c + 3 * kTile * kTogether, c_bytes);
  }

  // Two tiles of rows, two of tokens.
  void Square(const BFloat16* w, const float* x, float* c, Ahead<BFloat16>& next) const {
    const long w_bytes = depth_ * 2, c_bytes = kTogether * 4;
    const BFloat16* const below = w + kTile * depth_;
    const float* const beside = x + kTile * depth_ / 2;
    ClearSums();
    for (long k = 0; k < depth_; k += kDepth) {
      next.Ask<2 * kTile>();
      _tile_loadd(4, w + k, w_bytes);
      _tile_loadd(6, x + k * kTile / 2, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, beside + k * kTile / 2, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, below + k, w_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + kTile, c_bytes);
    _tile_stored(2, c + kTile * kTogether, c_bytes);
    _tile_stored(3, c + kTile * kTogether + kTile, c_bytes);
  }

  const long depth_;
  Tiles tiles_;
};

#endif

}  // namespace
}  // namespace jaxllm

#endif  // JAXLLM_NATIVE_WEIGHTS_H_
