// Paged attention on CPU: writes the step's keys and values, then attends, pages where they lie.
//
// The tokens of a step are laid out by the host (`jaxllm/batch.py`): rows with one token each, then
// query blocks of the chunks of longer rows. A unit of work is some tokens of one row and the query
// heads of one KV head: [M, D] queries against parts of kPart keys. Both products have their right
// side as it lies in the cache, keys [D, S] and values [S, D]. The softmax is that of Milakov and
// Gimelshein (arXiv:1805.02867): a running maximum, and sums that are scaled whenever it grows.
//
// Letters: T tokens, H query heads, K KV heads, G = H / K, D head size, S slots of a page,
// P pages, B rows, M pages of a row, Q query blocks.

#include <vector>

#include "parallel.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace jaxllm {
namespace {

namespace ffi = xla::ffi;

constexpr long kPart = 64;       // keys at once: a multiple of kLanes
constexpr long kUnitRows = 96;   // rows of queries that a unit aims at
constexpr long kWritten = 16;    // rows of one token whose keys are written by one call
constexpr float kMasked = -1e30f;

using Element = JAXLLM_ELEMENT;  // what queries, keys and values are: the compiler's command says

// To whole vectors.
constexpr long RoundUp(long count) { return (count + kLanes - 1) / kLanes * kLanes; }

template <class E>
struct Step {
  const E *q, *k, *v;        // [T, H, D], [T, K, D] twice
  E *key_pages, *value_pages;  // [K, P, D, S], [K, P, S, D]
  E* out;                    // [T, H, D]
  const int32_t *slots, *table, *kv_lens;            // [T], [B, M], [B]
  const int32_t *block_rows, *block_starts, *positions;  // [Q], [Q], [T]
  long T, H, K, G, D, S, P, M;
  long decodes, blocks, block_q;
  float scale, softcap;
  long window;

  E* Keys(long head, long page) const { return key_pages + (head * P + page) * D * S; }
  E* Values(long head, long page) const { return value_pages + (head * P + page) * S * D; }
  int32_t Page(long row, long position) const { return table[row * M + position / S]; }
};

// Some tokens of a row and the queries of one KV head.
struct Unit {
  long row, head, token, tokens, position;  // of the first token, in its sequence
};

struct Scratch {
  std::vector<float> queries, scores, out, highest, total, keys, values;

  void Resize(long rows, long D, long padded) {
    queries.resize(rows * D);
    scores.resize(rows * kPart);
    out.resize(rows * padded);
    highest.resize(rows);
    total.resize(rows);
    keys.resize(D * kPart);
    values.resize(kPart * padded);
  }
};

// ------------------------------------------------------------------ writing

// Puts keys and values of tokens [begin, end) of one head into their slots.
template <class E>
void Write(const Step<E>& s, long head, long begin, long end) {
  for (long first = begin; first < end;) {
    const long page = s.slots[first] / s.S, offset = s.slots[first] % s.S;
    long last = first + 1;  // tokens of one page, side by side
    while (last < end && s.slots[last] == s.slots[first] + (last - first) && s.slots[last] / s.S == page)
      ++last;
    E* keys = s.Keys(head, page) + offset;
    for (long d = 0; d < s.D; ++d)
      for (long t = first; t < last; ++t) keys[d * s.S + (t - first)] = s.k[(t * s.K + head) * s.D + d];
    E* values = s.Values(head, page) + offset * s.D;
    for (long t = first; t < last; ++t)
      std::memcpy(values + (t - first) * s.D, s.v + (t * s.K + head) * s.D, s.D * sizeof(E));
    first = last;
  }
}

// ------------------------------------------------------------------ a part of the keys

// Where the keys or values of a part are: of type T in their page, or as float32 in the scratch.
template <class E>
struct Operand {
  const E* pages = nullptr;
  const float* copied = nullptr;
  long row = 0;

  void Multiply(const float* a, long a_row, float* c, long c_row, long rows, long depth,
                long columns, bool add) const {
    if (pages) return jaxllm::Multiply(a, a_row, pages, row, c, c_row, rows, depth, columns, add);
    jaxllm::Multiply(a, a_row, copied, row, c, c_row, rows, depth, columns, add);
  }
};

template <class E>
inline void Widen(const E* from, float* to, long count) {
  long i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(to + i, Load(from + i));
  for (; i < count; ++i) to[i] = LoadOne(from + i);
}

template <class E>
inline void Clear(E* numbers, long count) {
  std::memset(static_cast<void*>(numbers), 0, count * sizeof(E));
}

// Whether a product reads 16-bit numbers as they are: with few rows, or none would be read again.
template <class E>
bool InPlace(long rows) {
  return sizeof(E) == 4 || rows <= kRows;
}

template <class E>
Operand<E> Keys(const Step<E>& s, Scratch& scratch, const Unit& u, long rows, long part, long n) {
  if (s.S % kPart == 0 && InPlace<E>(rows))
    return {s.Keys(u.head, s.Page(u.row, part)) + part % s.S, nullptr, s.S};
  for (long at = part; at < part + n;) {
    const long run = std::min(s.S - at % s.S, part + n - at);
    const E* from = s.Keys(u.head, s.Page(u.row, at)) + at % s.S;
    for (long d = 0; d < s.D; ++d)
      Widen(from + d * s.S, scratch.keys.data() + d * kPart + (at - part), run);
    at += run;
  }
  return {nullptr, scratch.keys.data(), kPart};
}

template <class E>
Operand<E> Values(const Step<E>& s, Scratch& scratch, const Unit& u, long rows, long padded,
                  long part, long n) {
  if (s.S % kPart == 0 && s.D == padded && InPlace<E>(rows))
    return {s.Values(u.head, s.Page(u.row, part)) + part % s.S * s.D, nullptr, s.D};
  for (long at = part; at < part + n; ++at) {
    const E* from = s.Values(u.head, s.Page(u.row, at)) + at % s.S * s.D;
    Widen(from, scratch.values.data() + (at - part) * padded, s.D);
  }
  return {nullptr, scratch.values.data(), padded};
}

// Asks for a part before it is read. Pages lie anywhere in memory: from one of them the processor
// can't tell the next, and would wait for the first bytes of each row.
template <class E>
void Prefetch(const Step<E>& s, const Unit& u, long part, long n) {
  if (s.S % kPart) return;
  constexpr long kLine = 64 / sizeof(E);
  const long page = s.Page(u.row, part), offset = part % s.S;
  const E* keys = s.Keys(u.head, page) + offset;
  for (long d = 0; d < s.D; ++d)
    for (long i = 0; i < n; i += kLine) __builtin_prefetch(keys + d * s.S + i, 0, 2);
  const E* values = s.Values(u.head, page) + offset * s.D;
  for (long i = 0; i < n * s.D; i += kLine) __builtin_prefetch(values + i, 0, 2);
}

// Turns the scores of one query into probabilities of which the largest so far is 1.
//
// There are `columns` of them, whole vectors; keys [low, high) of the part are seen. Returns the factor of what was summed before.
inline float Softmax(float* scores, long columns, long low, long high, float softcap,
                     float* highest, float* total) {
  for (long j = 0; j < std::min(low, columns); ++j) scores[j] = kMasked;
  for (long j = std::max(high, 0L); j < columns; ++j) scores[j] = kMasked;
  Floats most = Splat(*highest);
  for (long j = 0; j < columns; j += kLanes) {
    Floats x = Load(scores + j);
    if (softcap != 0) {
      x = Choose(x == kMasked, x, Tanh(x / softcap) * softcap);
      Store(scores + j, x);
    }
    most = Larger(x, most);
  }
  float top = most[0];
  for (int lane = 1; lane < kLanes; ++lane) top = std::max(top, most[lane]);
  Floats sums = {};
  for (long j = 0; j < columns; j += kLanes) {
    const Floats x = Load(scores + j);
    const Floats p = Choose(x == kMasked, Floats{}, Exp(x - top));
    Store(scores + j, p);
    sums += p;
  }
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  const float rest = *highest == top ? 1.0f : Exp(Splat(*highest - top))[0];
  *highest = top;
  *total = *total * rest + sum;
  return rest;
}

// ------------------------------------------------------------------ a unit

template <class E>
void Attend(const Step<E>& s, const Unit& u) {
  static thread_local Scratch scratch;
  const long rows = u.tokens * s.G, padded = RoundUp(s.D);
  scratch.Resize(rows, s.D, padded);
  for (long r = 0; r < rows; ++r) {
    const E* from = s.q + ((u.token + r / s.G) * s.H + u.head * s.G + r % s.G) * s.D;
    float* to = scratch.queries.data() + r * s.D;
    Widen(from, to, s.D);
    for (long d = 0; d < s.D; ++d) to[d] *= s.scale;
  }
  std::fill(scratch.out.begin(), scratch.out.end(), 0.0f);
  std::fill(scratch.highest.begin(), scratch.highest.end(), kMasked);
  std::fill(scratch.total.begin(), scratch.total.end(), 0.0f);

  const long last = u.position + u.tokens;  // one past the last key that is seen
  const long first = s.window ? std::max(0L, u.position + 1 - s.window) : 0;
  for (long part = first / kPart * kPart; part < last; part += kPart) {
    const long n = std::min(kPart, last - part), columns = RoundUp(n);
    Prefetch(s, u, part, n);
    const Operand<E> keys = Keys(s, scratch, u, rows, part, n);
    keys.Multiply(scratch.queries.data(), s.D, scratch.scores.data(), kPart, rows, s.D, columns, false);
    for (long r = 0; r < rows; ++r) {
      const long next = u.position + r / s.G + 1 - part;  // one past the query's own key
      const float rest =
          Softmax(scratch.scores.data() + r * kPart, columns, s.window ? next - s.window : 0,
                  std::min(n, next), s.softcap, &scratch.highest[r], &scratch.total[r]);
      float* out = scratch.out.data() + r * padded;
      if (rest != 1.0f)
        for (long d = 0; d < padded; d += kLanes) Store(out + d, Load(out + d) * rest);
    }
    const Operand<E> values = Values(s, scratch, u, rows, padded, part, n);
    values.Multiply(scratch.scores.data(), kPart, scratch.out.data(), padded, rows, n, padded, true);
  }
  for (long r = 0; r < rows; ++r) {
    E* to = s.out + ((u.token + r / s.G) * s.H + u.head * s.G + r % s.G) * s.D;
    const float* from = scratch.out.data() + r * padded;
    for (long d = 0; d < s.D; ++d) StoreOne(to + d, from[d] / scratch.total[r]);
  }
}

// ------------------------------------------------------------------ a step

template <class E>
void Run(ffi::ThreadPool& pool, const Step<E>& s) {
  const auto tokens_of = [&](long block) {
    const long left = s.kv_lens[s.block_rows[block]] - s.positions[s.block_starts[block]];
    return std::min(s.block_q, left);
  };
  // All keys first: a row may read pages of its prefix that another row writes in this step.
  const long groups = (s.decodes + kWritten - 1) / kWritten;
  ParallelFor(pool, (groups + s.blocks) * s.K, [&](long i) {
    const long head = i % s.K, group = i / s.K, block = group - groups;
    if (block >= 0) {
      const long start = s.block_starts[block];
      return Write(s, head, start, start + tokens_of(block));
    }
    for (long row = group * kWritten; row < std::min((group + 1) * kWritten, s.decodes); ++row)
      if (s.kv_lens[row] > 0) Write(s, head, row, row + 1);
  });
  const long size = std::max(1L, kUnitRows / s.G), pieces = (s.block_q + size - 1) / size;
  const long chunked = s.blocks * pieces * s.K;
  ParallelFor(pool, chunked + s.decodes * s.K, [&](long i) {
    const long head = i % s.K;
    if (i >= chunked) {
      const long row = s.decodes - 1 - (i - chunked) / s.K;  // the last have most keys
      if (s.kv_lens[row] > 0) return Attend(s, Unit{row, head, row, 1, s.kv_lens[row] - 1});
      return Clear(s.out + (row * s.H + head * s.G) * s.D, s.G * s.D);
    }
    const long piece = i / s.K % pieces, block = s.blocks - 1 - i / s.K / pieces;
    const long begin = piece * size, end = std::min(begin + size, tokens_of(block));
    if (begin >= end) return;
    const long start = s.block_starts[block] + begin;
    Attend(s, Unit{s.block_rows[block], head, start, end - begin, s.positions[start]});
  });
  // What comes after is padding; NaN there would be one of the step.
  const long covered =
      s.blocks ? s.block_starts[s.blocks - 1] + tokens_of(s.blocks - 1) : s.decodes;
  Clear(s.out + covered * s.H * s.D, (s.T - covered) * s.H * s.D);
}

Element* Data(ffi::AnyBuffer buffer) { return static_cast<Element*>(buffer.untyped_data()); }

using Numbers = ffi::Buffer<ffi::S32>;

ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                          ffi::AnyBuffer v, ffi::AnyBuffer key_pages, ffi::AnyBuffer value_pages,
                          Numbers slots, Numbers table, Numbers kv_lens, Numbers num_decodes,
                          Numbers block_rows, Numbers block_starts, Numbers positions,
                          Numbers num_blocks, ffi::Result<ffi::AnyBuffer> out,
                          ffi::Result<ffi::AnyBuffer> keys_out,
                          ffi::Result<ffi::AnyBuffer> values_out, int64_t block_q, int64_t window,
                          float scale, float softcap) {
  if (keys_out->untyped_data() != key_pages.untyped_data() ||
      values_out->untyped_data() != value_pages.untyped_data())
    return ffi::Error::Internal("jaxllm: the pages of attention were copied.");
  Step<Element> s;
  s.q = Data(q), s.k = Data(k), s.v = Data(v), s.out = Data(*out);
  s.key_pages = Data(key_pages), s.value_pages = Data(value_pages);
  s.slots = slots.typed_data(), s.table = table.typed_data(), s.kv_lens = kv_lens.typed_data();
  s.block_rows = block_rows.typed_data(), s.block_starts = block_starts.typed_data();
  s.positions = positions.typed_data();
  const auto pages = key_pages.dimensions();
  s.K = pages[0], s.P = pages[1], s.D = pages[2], s.S = pages[3];
  s.T = q.dimensions()[0], s.H = q.dimensions()[1], s.G = s.H / s.K, s.M = table.dimensions()[1];
  s.decodes = *num_decodes.typed_data(), s.blocks = *num_blocks.typed_data();
  s.block_q = block_q, s.window = window, s.scale = scale, s.softcap = softcap;
  Run(pool, s);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention, jaxllm::PagedAttention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jaxllm::Numbers>()
                                  .Arg<jaxllm::Numbers>()
                                  .Arg<jaxllm::Numbers>()
                                  .Arg<jaxllm::Numbers>()
                                  .Arg<jaxllm::Numbers>()
                                  .Arg<jaxllm::Numbers>()
                                  .Arg<jaxllm::Numbers>()
                                  .Arg<jaxllm::Numbers>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("block_q")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap"));
