// The two products of a unit with a part of the keys: queries with keys, probabilities with values.
//
// Each asks for what is read `soon`. A class has both, over the same scratch: `InFloat32` for every
// processor, `InTiles` for those that multiply bfloat16 matrices. Right sides are read as they lie
// in the cache, keys [D, S] and values [S, D], or from a copy.

#ifndef JAXLLM_NATIVE_PRODUCTS_H_
#define JAXLLM_NATIVE_PRODUCTS_H_

#include <algorithm>
#include <vector>

#include "step.h"
#include "tiles.h"
#include "vectors.h"

namespace jaxllm {
namespace {

// What a thread keeps between units, so that it is allocated once.
struct Scratch {
  std::vector<float> queries, scores, out, highest, rest, total, keys, values;
  std::vector<BFloat16> queries16, probs16, keys16, values16;
};

template <class T>
T* Room(std::vector<T>& numbers, long count) {
  if (static_cast<long>(numbers.size()) < count) numbers.resize(count);
  return numbers.data();
}

// Calls `body(position, page, offset, run)` for each run of [part, part + n) within one page.
template <class E, class Body>
void ForEachRun(const Step<E>& s, long row, long part, long n, const Body& body) {
  for (long at = part; at < part + n;) {
    const long run = std::min(s.S - at % s.S, part + n - at);
    body(at, s.Page(row, at), at % s.S, run);
    at += run;
  }
}

template <class E>
inline void Widen(const E* from, float* to, long count) {
  long i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(to + i, Load(from + i));
  for (; i < count; ++i) to[i] = LoadOne(from + i);
}

template <class E>
class InFloat32 {
 public:
  static constexpr long kWholeRows = 1;  // results are of so many rows, or a multiple

  InFloat32(const Step<E>& s, const Unit& u, long rows, Scratch& scratch)
      : s_(s),
        u_(u),
        rows_(rows),
        padded_(RoundUp(s.D)),
        // Sixteen bits are widened once where many rows read them.
        as_they_lie_(s.S % kPart == 0 && (sizeof(E) == 4 || rows <= kRows)),
        queries_(Room(scratch.queries, rows * s.D)),
        keys_(Room(scratch.keys, s.D * kPart)),
        values_(Room(scratch.values, kPart * padded_)) {
    for (long r = 0; r < rows; ++r) Widen(s.q + u.Offset(s, r), queries_ + r * s.D, s.D);
  }

  // scores [rows, kPart], of which the first `columns` are written; `n` are of keys.
  void Score(float* scores, long part, long n, long columns, Soon soon) {
    if (as_they_lie_) {
      const E* keys = s_.Keys(u_.head, s_.Page(u_.row, part)) + part % s_.S;
      return Multiply(queries_, s_.D, keys, s_.S, scores, kPart, rows_, s_.D, columns, false, soon);
    }
    ForEachRun(s_, u_.row, part, n, [&](long at, long page, long offset, long run) {
      const E* from = s_.Keys(u_.head, page) + offset;
      for (long d = 0; d < s_.D; ++d) Widen(from + d * s_.S, keys_ + d * kPart + (at - part), run);
    });
    Multiply(queries_, s_.D, keys_, kPart, scores, kPart, rows_, s_.D, columns, false, soon);
  }

  // out [rows, padded D] += probs [rows, kPart] with the values of `n` keys.
  void Gather(const float* probs, float* out, long part, long n, long, Soon soon) {
    if (as_they_lie_ && s_.D == padded_) {
      const E* values = s_.Values(u_.head, s_.Page(u_.row, part)) + part % s_.S * s_.D;
      return Multiply(probs, kPart, values, s_.D, out, padded_, rows_, n, padded_, true, soon);
    }
    ForEachRun(s_, u_.row, part, n, [&](long at, long page, long offset, long run) {
      const E* from = s_.Values(u_.head, page) + offset * s_.D;
      for (long i = 0; i < run; ++i)
        Widen(from + i * s_.D, values_ + (at - part + i) * padded_, s_.D);
    });
    Multiply(probs, kPart, values_, padded_, out, padded_, rows_, n, padded_, true, soon);
  }

 private:
  const Step<E>& s_;
  const Unit& u_;
  const long rows_, padded_;
  const bool as_they_lie_;
  float *queries_, *keys_, *values_;
};

#ifdef JAXLLM_TILES

// Probabilities are rounded to bfloat16, as the values are; sums are float32.
class InTiles {
 public:
  static constexpr long kWholeRows = kTile;

  InTiles(const Step<BFloat16>& s, const Unit& u, long rows, Scratch& scratch)
      : s_(s),
        u_(u),
        rows_(rows),
        whole_(RoundUp(rows, kWholeRows)),
        padded_(RoundUp(s.D)),
        depth_(RoundUp(s.D, kDepth)),
        queries_(Room(scratch.queries16, whole_ * depth_)),
        probs_(Room(scratch.probs16, whole_ * kPart)),
        keys_(Room(scratch.keys16, depth_ * kPart)),
        values_(Room(scratch.values16, kPart * padded_)) {
    Clear(queries_, whole_ * depth_);
    for (long r = 0; r < rows; ++r)
      std::memcpy(queries_ + r * depth_, s.q + u.Offset(s, r), s.D * sizeof(BFloat16));
  }

  static bool Serves(const Step<BFloat16>& s, long rows) {
    return rows > kRows && s.S % kPart == 0 && s.D % kTile == 0 && HaveTiles();
  }

  void Score(float* scores, long part, long, long, Soon soon) {
    soon.AskAll();
    const BFloat16* keys = s_.Keys(u_.head, s_.Page(u_.row, part)) + part % s_.S;
    for (long d = 0; d < depth_; d += 2) {
      const BFloat16* first = keys + d * s_.S;
      if (d < s_.D)
        Pair(first, first + s_.S, kPart, keys_ + d * kPart);
      else
        Clear(keys_ + d * kPart, 2 * kPart);
    }
    MultiplyTiles(queries_, depth_, keys_, scores, whole_, depth_, kPart, false);
  }

  void Gather(const float* probs, float* out, long part, long n, long columns, Soon soon) {
    soon.AskAll();
    const long depth = RoundUp(n, kDepth);
    for (long r = 0; r < rows_; ++r) {
      long j = 0;
      for (; j < columns; j += kLanes) Store(probs_ + r * kPart + j, Load(probs + r * kPart + j));
      for (; j < depth; j += kLanes) Store(probs_ + r * kPart + j, Floats{});
    }
    // Behind the last value is what nobody has written.
    const BFloat16* values = s_.Values(u_.head, s_.Page(u_.row, part)) + part % s_.S * s_.D;
    for (long i = 0; i < depth; i += 2) {
      const BFloat16* first = values + i * s_.D;
      if (i < n)
        Pair(first, i + 1 < n ? first + s_.D : nullptr, padded_, values_ + i * padded_);
      else
        Clear(values_ + i * padded_, 2 * padded_);
    }
    MultiplyTiles(probs_, kPart, values_, out, whole_, depth, padded_, true);
  }

 private:
  const Step<BFloat16>& s_;
  const Unit& u_;
  const long rows_, whole_, padded_, depth_;
  BFloat16 *queries_, *probs_, *keys_, *values_;
  Tiles tiles_;
};

#endif

}  // namespace
}  // namespace jaxllm

#endif  // JAXLLM_NATIVE_PRODUCTS_H_
