// What one call of paged attention is given, and how it writes keys and values.
//
// Letters: T tokens, H query heads, K KV heads, G = H / K, D head size, S slots of a page,
// P pages in all, B rows, M pages of a row, Q query blocks.

#ifndef JAXLLM_NATIVE_STEP_H_
#define JAXLLM_NATIVE_STEP_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "turn.h"
#include "vectors.h"

namespace jaxllm {
namespace {

// Keys of a page are read as they lie where they are so many, or a multiple: of kLanes, too.
constexpr long kPage = 32;

template <class E>
constexpr long LinesOf(long count) {  // of the cache, for so many numbers
  return RoundUp(count * static_cast<long>(sizeof(E)), 64) / 64;
}

// Queries, keys or values of a step: in an array of their own, or in one that has all three.
template <class E>
struct Heads {
  const E* at;
  long token, head;  // numbers from one token to the next, and from one KV head to the next

  const E* Of(long t, long h) const { return at + t * token + h * head; }
};

// Rotary positions (arXiv:2104.09864): of a head's first numbers, i is paired with i + half.
struct Rotation {
  const float *cos, *sin;  // [T, half]
  long half;               // 0: none

  // One head of a token, of D numbers, rotated and rounded.
  template <class E>
  void Rotate(const E* from, long token, long D, E* to) const {
    ForVectors(half, [&](long i, long some) {
      const long at = token * half + i;
      const Floats c = LoadUpTo(cos + at, some), s = LoadUpTo(sin + at, some);
      const Floats x = LoadUpTo(from + i, some), y = LoadUpTo(from + half + i, some);
      StoreUpTo(to + i, x * c - y * s, some);
      StoreUpTo(to + half + i, y * c + x * s, some);
    });
    std::copy(from + 2 * half, from + D, to + 2 * half);
  }
};

template <class E>
struct Step {
  Heads<E> q, k, v;                                      // of a KV head: [G, D], [D], [D]
  Rotation rotation;                                     // of q and k
  E *key_pages, *value_pages;                            // [P, K, D, S], [P, K, S, D]
  E* out;                                                // [T, H, D]
  const int32_t *slots, *table, *kv_lens;                // [T], [B, M], [B]
  const int32_t *block_rows, *block_starts, *positions;  // [Q], [Q], [T]
  long T, H, K, G, D, S, M;
  long decodes, blocks, block_q;
  float scale, softcap;  // no cap: 0
  long window;           // none: 0

  E* Keys(long head, long page) const { return key_pages + (page * K + head) * D * S; }
  E* Values(long head, long page) const { return value_pages + (page * K + head) * S * D; }

  // The page of a row that has a position.
  int32_t Page(long row, long position) const { return table[row * M + position / S]; }

  long TokensOf(long block) const {
    const long left = kv_lens[block_rows[block]] - positions[block_starts[block]];
    return left < block_q ? left : block_q;
  }
};

// Keys [begin, end) of a row, and their values, of one KV head.
struct Part {
  long row = 0, head = 0, begin = 0, end = 0;

  long Size() const { return end - begin; }
};

// Some tokens of a row, and the queries of one KV head: rows of a matrix, a token's G together.
struct Unit {
  long row, head, token, tokens, position;  // of the first token, in its sequence

  long End() const { return position + tokens; }  // one past the last key that is seen

  // The first of the parts of so many keys.
  Part First(long keys, long window) const {
    const long first = window && position + 1 > window ? position + 1 - window : 0;
    return At(first / keys * keys, keys);
  }

  Part At(long begin, long keys) const { return {row, head, begin, std::min(begin + keys, End())}; }

  template <class E>
  E* Result(const Step<E>& s, long r) const {  // of a query
    return s.out + ((token + r / s.G) * s.H + head * s.G + r % s.G) * s.D;
  }

  // A query, rotated; `room` for one of those.
  template <class E>
  const E* Query(const Step<E>& s, long r, E* room) const {
    const long t = token + r / s.G;
    const E* const from = s.q.Of(t, head) + r % s.G * s.D;
    if (s.rotation.half == 0) return from;
    s.rotation.Rotate(from, t, s.D, room);
    return room;
  }
};

// What lies in one page of a part, from `begin` on; an empty part behind its end. No call with a
// function for each: one that only asks for memory would be dropped (`JAXLLM_PREFETCHES`).
template <class E>
inline Part RunAt(const Step<E>& s, const Part& part, long begin) {
  return {part.row, part.head, begin, std::min(part.end, begin + s.S - begin % s.S)};
}

// Where the first key of a part lies, [D, S], and its value, [S, D].
template <class E>
inline const E* KeysAt(const Step<E>& s, const Part& part) {
  return s.Keys(part.head, s.Page(part.row, part.begin)) + part.begin % s.S;
}

template <class E>
inline const E* ValuesAt(const Step<E>& s, const Part& part) {
  return s.Values(part.head, s.Page(part.row, part.begin)) + part.begin % s.S * s.D;
}

// What is read of a part within one page, to be asked for ahead; nothing of an empty one. Pages lie
// anywhere in memory: from one of them the processor can't tell the next.
template <class E>
inline Soon KeysOf(const Step<E>& s, const Part& part) {
  if (part.Size() <= 0) return {};
  return {reinterpret_cast<const char*>(KeysAt(s, part)), s.S * static_cast<long>(sizeof(E)), s.D,
          LinesOf<E>(part.Size())};
}

template <class E>
inline Soon ValuesOf(const Step<E>& s, const Part& part) {
  if (part.Size() <= 0) return {};
  return {reinterpret_cast<const char*>(ValuesAt(s, part)), s.D * static_cast<long>(sizeof(E)),
          part.Size(), LinesOf<E>(s.D)};
}

// Asks for a part that may lie in several pages.
template <class E>
JAXLLM_PREFETCHES void AskForKeys(const Step<E>& s, const Part& part) {
  for (Part run = RunAt(s, part, part.begin); run.Size() > 0; run = RunAt(s, part, run.end))
    KeysOf(s, run).AskAll();
}

template <class E>
JAXLLM_PREFETCHES void AskForValues(const Step<E>& s, const Part& part) {
  for (Part run = RunAt(s, part, part.begin); run.Size() > 0; run = RunAt(s, part, run.end))
    ValuesOf(s, run).AskAll();
}

// Asks for where the key of a token goes: a line of memory for each number, all far from the core.
template <class E>
JAXLLM_PREFETCHES void PrefetchSlot(const Step<E>& s, long head, long token) {
  const E* keys = s.Keys(head, s.slots[token] / s.S) + s.slots[token] % s.S;
  for (long d = 0; d < s.D; ++d) __builtin_prefetch(keys + d * s.S, 1, 2);
}

// Keys of tokens [first, last) of one head, rotated; and how many numbers are between them.
template <class E>
std::pair<const E*, long> KeysOfStep(const Step<E>& s, long head, long first, long last) {
  if (s.rotation.half == 0) return {s.k.Of(first, head), s.k.token};
  static thread_local std::vector<E> rotated;
  rotated.resize((last - first) * s.D);
  for (long t = first; t < last; ++t)
    s.rotation.Rotate(s.k.Of(t, head), t, s.D, rotated.data() + (t - first) * s.D);
  return {rotated.data(), s.D};
}

// Puts keys and values of tokens [begin, end) of one head into their slots.
template <class E>
void Write(const Step<E>& s, long head, long begin, long end) {
  for (long first = begin; first < end;) {
    const long page = s.slots[first] / s.S, offset = s.slots[first] % s.S;
    long last = first + 1;  // tokens of one page, side by side
    while (last < end && s.slots[last] == s.slots[last - 1] + 1 && s.slots[last] / s.S == page)
      ++last;
    E* keys = s.Keys(head, page) + offset;
    const auto [from, row] = KeysOfStep(s, head, first, last);
    if (last - first == 1)
      for (long d = 0; d < s.D; ++d) keys[d * s.S] = from[d];
    else
      TurnAsIs(from, row, last - first, s.D, keys, s.S);
    E* values = s.Values(head, page) + offset * s.D;
    for (long t = first; t < last; ++t)
      std::memcpy(values + (t - first) * s.D, s.v.Of(t, head), s.D * sizeof(E));
    first = last;
  }
}

}  // namespace
}  // namespace jaxllm

#endif  // JAXLLM_NATIVE_STEP_H_
