// Products of many tokens with a weight, in tiles of AMX: tokens are the left side, as they lie.
//
// A tile of the right side is pairs of inputs, side by side for each output: rows of the weight,
// turned. That is done a piece of the depth at a time, between the products with the piece before,
// for which the matrix unit does not wait. A piece stays in the core's first cache for all tokens
// of a block, of which two threads may have half each: it is short.

#ifndef JAXLLM_NATIVE_TURNED_H_
#define JAXLLM_NATIVE_TURNED_H_

#include <algorithm>

#include "tiles.h"
#include "turn.h"
#include "vectors.h"
#include "weights.h"

#ifdef JAXLLM_TILES

namespace jaxllm {
namespace {

constexpr long kSide = 2 * kTile;              // tokens, and outputs, of a square of results
constexpr long kTileNumbers = kTile * kDepth;  // of bfloat16
constexpr long kPieceTiles = 6;                // of depth
constexpr long kMany = 65;                     // tokens: with fewer, to turn takes longer
constexpr long kPieceNumbers = 2 * kPieceTiles * kTileNumbers;

// Some inputs of up to kSide rows of a weight: so many tiles of depth.
struct Piece {
  const BFloat16* from = nullptr;
  long row = 0, rows = 0, tiles = 0;

  Soon Ask() const {
    return {reinterpret_cast<const char*>(from), row * static_cast<long>(sizeof(BFloat16)), rows,
            tiles};
  }
};

// Panels [first, last) of a weight [outputs, depth], kSide rows each, in pieces that are numbered
// in the order in which they are met: all of a panel, then those of the next.
class Pieces {
 public:
  Pieces(const BFloat16* weight, long outputs, long depth, long first, long last)
      : weight_(weight),
        outputs_(outputs),
        depth_(depth),
        first_(first),
        count_((last - first) * OfPanel()) {}

  long count() const { return count_; }

  bool Begins(long i) const { return i % OfPanel() == 0; }
  bool Ends(long i) const { return (i + 1) % OfPanel() == 0; }
  long Input(long i) const { return i % OfPanel() * kPieceTiles * kDepth; }
  long Output(long i) const { return (first_ + i / OfPanel()) * kSide; }
  long Outputs(long i) const { return std::min(kSide, outputs_ - Output(i)); }

  // As it lies; an empty one behind the last.
  Piece At(long i) const {
    if (i >= count_) return {};
    return {weight_ + Output(i) * depth_ + Input(i), depth_, Outputs(i),
            std::min(kPieceTiles, Tiles() - Input(i) / kDepth)};
  }

  // The same with zeros where the weight has no rows, or no inputs.
  Piece WholeAt(long i, Lines<BFloat16>& lines) const {
    const Piece piece = At(i);
    const long wide = piece.tiles * kDepth, inputs = std::min(wide, depth_ - Input(i));
    if (piece.tiles == 0 || (piece.rows == kSide && inputs == wide)) return piece;
    return {Padded(piece.from, depth_, piece.rows, inputs, kSide, wide, lines), wide, kSide,
            piece.tiles};
  }

 private:
  long Tiles() const { return RoundUp(depth_, kDepth) / kDepth; }
  long OfPanel() const { return RoundUp(Tiles(), kPieceTiles) / kPieceTiles; }

  const BFloat16* const weight_;
  const long outputs_, depth_, first_, count_;
};

// Tokens of a block: whole squares as they lie, and the rest with zeros behind them.
struct Tokens {
  const BFloat16 *at, *rest;
  long row, rest_row;  // numbers from one token to the next
  long whole;          // tokens that lie in squares

  const BFloat16* From(long t) const {
    return t < whole ? at + t * row : rest + (t - whole) * rest_row;
  }
  long Row(long t) const { return t < whole ? row : rest_row; }
};

// Turns a piece, a tile for each step, to [tiles of depth, 2, kTile pairs, kTile outputs].
class Turner {
 public:
  Turner(const Piece& piece, BFloat16* to)
      : from_(piece.from), row_(piece.row), left_(2 * piece.tiles), to_(to) {}

  long left() const { return left_; }

  __attribute__((always_inline)) void Step() {
    if (left_ <= 0) return;
    __m512i pairs[kTile];
    for (long r = 0; r < kTile; ++r) pairs[r] = _mm512_loadu_si512(from_ + r * row_);
    TurnSquare(pairs);
    for (long r = 0; r < kTile; ++r) _mm512_store_si512(to_ + r * kDepth, pairs[r]);
    from_ += left_ % 2 ? kDepth - kTile * row_ : kTile * row_;
    to_ += kTileNumbers, --left_;
  }

  void Finish() {
    while (left_ > 0) Step();
  }

 private:
  const BFloat16* from_;
  long row_, left_;
  BFloat16* to_;
};

// c [kSide, kSide] (+)= x [kSide, depth] times a turned piece. Of the tokens all are computed, or
// the first kTile. For each tile of depth, `turner` takes `turns` steps, and `soon` one.
template <bool kAll>
inline void MultiplyTurned(const BFloat16* x, long x_row, const BFloat16* turned, long tiles,
                           float* c, bool add, Turner& turner, long turns, Soon& soon) {
  constexpr long kRow = kSide * sizeof(float);
  const BFloat16* const below = x + kTile * x_row;
  const long x_bytes = x_row * static_cast<long>(sizeof(BFloat16));
  float* const c_below = c + kTile * kSide;
  Turner steps = turner;  // in registers
  Soon ahead = soon;
  if (add) {
    _tile_loadd(0, c, kRow);
    _tile_loadd(1, c + kTile, kRow);
    if (kAll) _tile_loadd(2, c_below, kRow);
    if (kAll) _tile_loadd(3, c_below + kTile, kRow);
  } else {
    ClearSums();
  }
  for (long k = 0; k < tiles; ++k) {
    const BFloat16* const right = turned + 2 * k * kTileNumbers;
    _tile_loadd(4, x + k * kDepth, x_bytes);
    _tile_loadd(6, right, kDepth * sizeof(BFloat16));
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + kTileNumbers, kDepth * sizeof(BFloat16));
    _tile_dpbf16ps(1, 4, 7);
    if (kAll) {
      _tile_loadd(5, below + k * kDepth, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    for (long i = 0; i < turns; ++i) steps.Step();
    ahead.Ask();
  }
  _tile_stored(0, c, kRow);
  _tile_stored(1, c + kTile, kRow);
  if (kAll) _tile_stored(2, c_below, kRow);
  if (kAll) _tile_stored(3, c_below + kTile, kRow);
  turner = steps, soon = ahead;
}

// y [tokens, outputs] = c + bias, of a square's first tokens and outputs. No bias: null.
template <class Y>
inline void Finish(const float* c, long tokens, const BFloat16* bias, long outputs, Y* y,
                   long y_row) {
  const long low = std::min(kTile, outputs), high = outputs - low;
  const Floats left = bias ? LoadSome(bias, low) : Floats{};
  const Floats right = bias ? LoadSome(bias + low, high) : Floats{};
  for (long t = 0; t < tokens; ++t, c += kSide, y += y_row) {
    if (outputs == kSide) {
      StoreNormal(y, Load(c) + left);
      StoreNormal(y + kTile, Load(c + kTile) + right);
    } else {
      StoreSome(y, Load(c) + left, low);
      StoreSome(y + low, Load(c + kTile) + right, high);
    }
  }
}

}  // namespace
}  // namespace jaxllm

#endif
#endif  // JAXLLM_NATIVE_TURNED_H_
