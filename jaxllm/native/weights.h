// Products of some rows of a weight with some tokens, which are packed once for all rows.
//
// Each class has its way: `Dots` for few tokens, `Broadcasts` for many, `WeightsInTiles` for up to
// 64 in bfloat16 where the processor multiplies matrices (`turned.h` has more). It takes panels of
// `kRows` rows of the weight as they lie, of a depth (the inputs) that is a multiple of `kWhole`,
// so many of the inputs at once (`Piece`), and up to `kTogether` tokens. It is told where it
// begins a panel (`Begin`) and asks for what it reads later. Results are float32: a row for each
// row of the weight, tokens side by side; a piece is added to the pieces before it.

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

// What is read after a panel of so many rows, where more panels follow: the next one.
template <class E>
Ahead<E> NextPanel(const E* panel, long row, long rows, long panels) {
  if (panels <= 1) return {};
  return {reinterpret_cast<const char*>(panel + rows * row),
          reinterpret_cast<const char*>(panel + 2 * rows * row)};
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

  void Begin(const E* panel, long row, long panels, long) {
    next_ = NextPanel(panel, row, kRows, panels);
  }

  void Multiply(const E* w, const float* x, const Some&, long tokens, float* c) {
    if (tokens <= 1) return Rows<1>(w, x, c);
    if (tokens <= 2) return Rows<2>(w, x, c);
    if (tokens <= 4) return Rows<4>(w, x, c);
    return Rows<8>(w, x, c);
  }

 private:
  static constexpr int kSums = kVectors > 2 ? 24 : 8;  // that registers hold beside the rest

  template <int kM>
  void Rows(const E* w, const float* x, float* c) {
    constexpr int kN = std::min(8, kSums / kM);
    static_assert(kRows % kN == 0);
    for (long n = 0; n < kRows; n += kN)
      Dot<kN, kM>(w + n * depth_, depth_, x, c + n * kTogether, kTogether, next_);
  }

  const long depth_;
  Ahead<E> next_;
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

  void Begin(const E* panel, long row, long panels, long) {
    next_ = NextPanel(panel, row, kRows, panels);
  }

  void Multiply(const float* w, const float* x, const Some& some, long tokens, float* c) {
    if (tokens <= kLanes) return Rows<12, 1>(w, x, some, c);
    if constexpr (kVectors > 2)
      if (tokens <= 2 * kLanes) return Rows<12, 2>(w, x, some, c);
    Rows<jaxllm::kRows, kVectors>(w, x, some, c);
  }

 private:
  static constexpr bool kWidens = sizeof(E) != sizeof(float);
  static constexpr long kPiece = 256;

  template <int kR, int kV>
  void Rows(const float* w, const float* x, const Some& some, float* c) {
    const long row = kWidens ? kPiece : depth_;
    for (long n = 0; n < kRows; n += kR)
      Tile<float, kR, kV>(w + n * row, row, x + some.begin * kTogether, kTogether,
                          c + n * kTogether, kTogether, some.numbers, some.begin > 0, next_);
  }

  const long depth_;
  Ahead<E> next_;
};

#ifdef JAXLLM_TILES

// ------------------------------------------------------------------ bfloat16 in tiles

// All tokens meet a row at once, so that its lines come from memory at an even pace: while tiles
// are read again, nothing would.
class WeightsInTiles {
 public:
  static constexpr long kTogether = 4 * kTile;
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

  void Begin(const BFloat16* panel, long row, long panels, long tokens) {
    const long bytes = row * static_cast<long>(sizeof(BFloat16));
    ahead_ = Across(panel, bytes, panels * kRows, TilesOfRows(tokens) * kTile);
  }

  void Multiply(const BFloat16* w, const float* x, const Some&, long tokens, float* c) {
    if (tokens <= kTile) return Rows<1>(w, x, c);
    if (tokens <= 2 * kTile) return Rows<2>(w, x, c);
    if (tokens <= 3 * kTile) return Rows<3>(w, x, c);
    Rows<4>(w, x, c);
  }

 private:
  // How many tiles of rows meet so many tokens at once: there are four for results.
  static constexpr long TilesOfRows(long tokens) {
    return tokens <= kTile ? 4 : tokens <= 2 * kTile ? 2 : 1;
  }

  template <int kTokens>
  void Rows(const BFloat16* w, const float* x, float* c) {
    constexpr long kTiles = TilesOfRows(kTokens * kTile);
    for (long n = 0; n < kRows; n += kTiles * kTile)
      Block<kTiles, kTokens>(w + n * depth_, x, c + n * kTogether);
  }

  // Tiles 0 to 3 sum, 4 and 5 have rows of the weight, 6 and 7 tokens: the number of a tile is a
  // constant of the instruction.
  template <long kTiles, long kTokens>
  void Block(const BFloat16* w, const float* x, float* c) {
    const long w_bytes = depth_ * 2, w_tile = kTile * depth_, x_tile = w_tile / 2;
    Across ahead = ahead_;  // in registers
    ClearSums();
    for (long k = 0; k < depth_; k += kDepth) {
      ahead.Ask<kTiles * kTile>();
      const float* const right = x + k * kTile / 2;
      _tile_loadd(4, w + k, w_bytes);
      _tile_loadd(6, right, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kTokens == 1) {
        _tile_loadd(5, w + w_tile + k, w_bytes);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(4, w + 2 * w_tile + k, w_bytes);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, w + 3 * w_tile + k, w_bytes);
        _tile_dpbf16ps(3, 5, 6);
      } else {
        _tile_loadd(7, right + x_tile, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kTokens == 2) {
        _tile_loadd(5, w + w_tile + k, w_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      if constexpr (kTokens >= 3) {
        _tile_loadd(6, right + 2 * x_tile, 64);
        _tile_dpbf16ps(2, 4, 6);
      }
      if constexpr (kTokens == 4) {
        _tile_loadd(7, right + 3 * x_tile, 64);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
    const auto to = [c](long tile) {  // one for each of these rows and tokens
      return c + tile / kTokens * kTile * kTogether + tile % kTokens * kTile;
    };
    constexpr long kBytes = kTogether * sizeof(float);
    _tile_stored(0, to(0), kBytes);
    _tile_stored(1, to(1), kBytes);
    _tile_stored(2, to(2), kBytes);
    if constexpr (kTokens != 3) _tile_stored(3, to(3), kBytes);
    ahead_ = ahead;
  }

  const long depth_;
  Across ahead_;
  Tiles tiles_;
};

#endif

}  // namespace
}  // namespace jaxllm

#endif  // JAXLLM_NATIVE_WEIGHTS_H_
