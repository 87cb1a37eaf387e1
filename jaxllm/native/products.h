// The two products of a unit with a part of the keys: queries with keys, probabilities with values.
//
// Each asks for the same of the part that comes `next`. A class has both, with so many keys at once
// (`kKeys`), over the same scratch: `AsTheyLie` for few rows of queries, which reads the cache
// where it lies, keys [D, S] and values [S, D]; `Copied` for many, and for pages of any size;
// `InTiles` for many where the processor multiplies bfloat16 matrices.

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

template <class E>
inline void Widen(const E* from, float* to, long count) {
  long i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(to + i, Load(from + i));
  for (; i < count; ++i) to[i] = LoadOne(from + i);
}

// The queries of a unit in float32.
template <class E>
const float* Queries(const Step<E>& s, const Unit& u, long rows, Scratch& scratch) {
  float* const queries = Room(scratch.queries, rows * s.D);
  static thread_local std::vector<E> rotated;
  E* const room = Room(rotated, s.D);
  for (long r = 0; r < rows; ++r) Widen(u.Query(s, r, room), queries + r * s.D, s.D);
  return queries;
}

template <class E>
class AsTheyLie {
 public:
  static constexpr long kKeys = kPage;
  static constexpr long kWholeRows = 1;  // results are of so many rows, or a multiple
  static constexpr long kWholeColumns = kLanes;

  AsTheyLie(const Step<E>& s, const Unit& u, long rows, Scratch& scratch)
      : s_(s), rows_(rows), queries_(Queries(s, u, rows, scratch)) {}

  // Sixteen bits are widened once where many rows read them.
  static bool Serves(const Step<E>& s, long rows) {
    return s.S % kKeys == 0 && s.D % kLanes == 0 && rows <= (sizeof(E) == 4 ? 16 : kRows);
  }

  // scores [rows, kKeys], of which the first `columns` are written.
  void Score(const Part& part, float* scores, long columns, const Part& next) {
    Multiply(queries_, s_.D, KeysAt(s_, part), s_.S, scores, kKeys, rows_, s_.D, columns, false,
             KeysOf(s_, next));
  }

  // Where probabilities go, [rows, kKeys].
  float* Probs(float* scores) const { return scores; }

  // out [rows, padded D] += probs [rows, kKeys] with the values.
  void Gather(const Part& part, const float* probs, float* out, const Part& next) {
    Multiply(probs, kKeys, ValuesAt(s_, part), s_.D, out, s_.D, rows_, part.Size(), s_.D, true,
             ValuesOf(s_, next));
  }

 private:
  const Step<E>& s_;
  const long rows_;
  const float* const queries_;
};

template <class E>
class Copied {
 public:
  static constexpr long kKeys = 64, kWholeRows = 1, kWholeColumns = kLanes;

  Copied(const Step<E>& s, const Unit& u, long rows, Scratch& scratch)
      : s_(s),
        rows_(rows),
        padded_(RoundUp(s.D)),
        queries_(Queries(s, u, rows, scratch)),
        keys_(Room(scratch.keys, s.D * kKeys)),
        values_(Room(scratch.values, kKeys * padded_)) {}

  void Score(const Part& part, float* scores, long columns, const Part& next) {
    AskForKeys(s_, next);
    for (Part run = RunAt(s_, part, part.begin); run.Size() > 0; run = RunAt(s_, part, run.end)) {
      const E* const from = KeysAt(s_, run);
      float* const to = keys_ + (run.begin - part.begin);
      for (long d = 0; d < s_.D; ++d) Widen(from + d * s_.S, to + d * kKeys, run.Size());
    }
    Multiply(queries_, s_.D, keys_, kKeys, scores, kKeys, rows_, s_.D, columns, false, Soon{});
  }

  float* Probs(float* scores) const { return scores; }

  void Gather(const Part& part, const float* probs, float* out, const Part& next) {
    AskForValues(s_, next);
    for (Part run = RunAt(s_, part, part.begin); run.Size() > 0; run = RunAt(s_, part, run.end)) {
      const E* const from = ValuesAt(s_, run);
      float* const to = values_ + (run.begin - part.begin) * padded_;
      for (long i = 0; i < run.Size(); ++i) Widen(from + i * s_.D, to + i * padded_, s_.D);
    }
    Multiply(probs, kKeys, values_, padded_, out, padded_, rows_, part.Size(), padded_, true,
             Soon{});
  }

 private:
  const Step<E>& s_;
  const long rows_, padded_;
  const float* const queries_;
  float *keys_, *values_;
};

#ifdef JAXLLM_TILES

// Probabilities are rounded to bfloat16, as the values are; sums are float32.
class InTiles {
 public:
  static constexpr long kKeys = 128, kWholeRows = kTile, kWholeColumns = kDepth;

  InTiles(const Step<BFloat16>& s, const Unit& u, long rows, Scratch& scratch)
      : s_(s),
        rows_(rows),
        whole_(RoundUp(rows, kWholeRows)),
        padded_(RoundUp(s.D)),
        depth_(RoundUp(s.D, kDepth)),
        queries_(Room(scratch.queries16, whole_ * depth_)),
        probs_(Room(scratch.probs16, whole_ * kKeys)),
        keys_(Room(scratch.keys16, depth_ * kKeys)),
        values_(Room(scratch.values16, kKeys * padded_)) {
    Clear(queries_, whole_ * depth_);
    for (long r = 0; r < rows; ++r) {
      BFloat16* const to = queries_ + r * depth_;
      const BFloat16* const from = u.Query(s, r, to);
      if (from != to) std::memcpy(to, from, s.D * sizeof(BFloat16));
    }
    Clear(keys_ + s.D * kKeys, (depth_ - s.D) * kKeys);
  }

  static bool Serves(const Step<BFloat16>& s, long rows) {
    return rows > kRows && s.S % kPage == 0 && s.D % kTile == 0 && HaveTiles();
  }

  // Scores behind the last key are of what nobody has written.
  void Score(const Part& part, float* scores, long columns, const Part& next) {
    AskForKeys(s_, next);
    for (Part run = RunAt(s_, part, part.begin); run.Size() > 0; run = RunAt(s_, part, run.end)) {
      const BFloat16* const from = KeysAt(s_, run);
      BFloat16* const to = keys_ + 2 * (run.begin - part.begin);
      for (long d = 0; d < s_.D; d += 2)
        Pair(from + d * s_.S, from + (d + 1) * s_.S, RoundUp(run.Size(), kTile), to + d * kKeys);
    }
    MultiplyTiles(queries_, depth_, keys_, scores, kKeys, whole_, depth_, columns, false);
  }

  BFloat16* Probs(float*) const { return probs_; }

  void Gather(const Part& part, const BFloat16* probs, float* out, const Part& next) {
    AskForValues(s_, next);
    const long depth = RoundUp(part.Size(), kDepth);
    long filled = 0;
    for (Part run = RunAt(s_, part, part.begin); run.Size() > 0; run = RunAt(s_, part, run.end)) {
      for (long i = 0; i < run.Size(); i += 2, filled += 2) {
        const BFloat16* const from = ValuesAt(s_, run) + i * s_.D;
        // Behind the last value is what nobody has written.
        Pair(from, i + 1 < run.Size() ? from + s_.D : nullptr, padded_, values_ + filled * padded_);
      }
    }
    Clear(values_ + filled * padded_, (depth - filled) * padded_);
    MultiplyTiles(probs, kKeys, values_, out, padded_, whole_, depth, padded_, true);
  }

 private:
  const Step<BFloat16>& s_;
  const long rows_, whole_, padded_, depth_;
  BFloat16 *queries_, *probs_, *keys_, *values_;
  Tiles tiles_;
};

#endif

}  // namespace
}  // namespace jaxllm

#endif  // JAXLLM_NATIVE_PRODUCTS_H_
