// Paged attention on CPU: writes the step's keys and values, then attends, pages where they lie.
//
// The tokens of a step are laid out by the host (`jaxllm/batch.py`): rows with one token each, then
// query blocks of the chunks of longer rows. A unit of work is some tokens of one row and the query
// heads of one KV head, against parts of the keys (`products.h`). The softmax is that of Milakov
// and Gimelshein (arXiv:1805.02867): a running maximum, and sums that are scaled when it grows.

#include <type_traits>

#include "padding.h"
#include "parallel.h"
#include "products.h"
#include "step.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace jaxllm {
namespace {

namespace ffi = xla::ffi;

constexpr long kUnitRows = 96;  // rows of queries that a unit aims at
constexpr long kWritten = 16;   // rows of one token whose keys are written by one call
constexpr float kMasked = -1e30f;

using Element = JAXLLM_ELEMENT;  // what queries, keys and values are: the compiler's command says

// What is summed over the parts of so many keys, for each row of queries.
struct Sums {
  const long keys;
  float *scores, *out;    // [rows, keys]; [rows, padded D], scaled by the maximum so far
  float *highest, *rest;  // [rows]: that maximum, and what it made of what was summed before
  float* total;           // [rows, kLanes]: the sum of probabilities, a part of it in each lane

  Sums(Scratch& scratch, long rows, long padded, long keys)
      : keys(keys),
        scores(Room(scratch.scores, rows * keys)),
        out(Room(scratch.out, rows * padded)),
        highest(Room(scratch.highest, RoundUp(rows))),
        rest(Room(scratch.rest, RoundUp(rows))),
        total(Room(scratch.total, rows * kLanes)) {
    Clear(out, rows * padded);
    Clear(total, rows * kLanes);
    std::fill_n(highest, RoundUp(rows), kMasked);
    std::fill_n(rest, RoundUp(rows), kMasked);
  }
};

// Masks the keys of a row outside of [low, high), and scales and caps the scores if there is a cap;
// returns the largest.
template <class E>
inline float Mask(const Step<E>& s, float* scores, long low, long high, long columns) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Floats highest = Splat(kMasked);
  for (long j = 0; j < columns; j += kLanes) {
    Floats x = Load(scores + j);
    const bool whole = low <= j && j + kLanes <= high;
    if (s.softcap != 0) x = Tanh(x * s.scale / s.softcap) * s.softcap;
    if (!whole) {
      const Ints key = lane + static_cast<int32_t>(j);
      x = Choose((key >= static_cast<int32_t>(low)) & (key < static_cast<int32_t>(high)), x,
                 Splat(kMasked));
    }
    if (!whole || s.softcap != 0) Store(scores + j, x);
    highest = Larger(x, highest);
  }
  return Largest(highest);
}

// Turns the scores of a part into probabilities, of which the largest so far is 1, and scales what
// was summed before. A row has `columns` of them, whole vectors, the first of which are of keys.
// Probabilities take the place of scores, or are rounded.
template <class E, class P>
void Softmax(const Step<E>& s, const Unit& u, const Sums& sums, long rows, long padded,
             const Part& part, long columns, P* probs) {
  const float scale = s.softcap != 0 ? 1.0f : s.scale;
  for (long r = 0; r < rows; ++r) {
    const long next = u.position + r / s.G + 1 - part.begin;  // one past the query's own key
    const float most = Mask(s, sums.scores + r * sums.keys, s.window ? next - s.window : 0,
                            std::min(part.Size(), next), columns);
    sums.rest[r] = sums.highest[r];
    sums.highest[r] = std::max(most * scale, sums.highest[r]);
  }
  for (long r = 0; r < rows; r += kLanes)
    Store(sums.rest + r, Exp(Load(sums.rest + r) - Load(sums.highest + r)));
  for (long r = 0; r < rows; ++r) {
    const float* const scores = sums.scores + r * sums.keys;
    Floats total = Load(sums.total + r * kLanes) * sums.rest[r];
    for (long j = 0; j < columns; j += kLanes) {
      const Floats x = Load(scores + j);
      const Floats p = Choose(x == kMasked, Floats{}, Exp(x * scale - sums.highest[r]));
      StoreNormal(probs + r * sums.keys + j, p);
      total += p;
    }
    Store(sums.total + r * kLanes, total);
    float* const out = sums.out + r * padded;
    if (sums.rest[r] != 1.0f)
      for (long d = 0; d < padded; d += kLanes) Store(out + d, Load(out + d) * sums.rest[r]);
  }
}

// ------------------------------------------------------------------ a unit

// Attends of a unit, and asks for what `after` begins with, if there is one.
template <class Products, class E>
void Attend(const Step<E>& s, const Unit& u, const Unit* after, long rows, Scratch& scratch) {
  constexpr long kKeys = Products::kKeys;
  const long padded = RoundUp(s.D);
  Products products(s, u, rows, scratch);
  const Sums sums(scratch, RoundUp(rows, Products::kWholeRows), padded, kKeys);
  for (Part part = u.First(kKeys, s.window), next; part.Size() > 0; part = next) {
    next = u.At(part.begin + kKeys, kKeys);
    const Part soon = next.Size() > 0 || !after ? next : after->First(kKeys, s.window);
    const long columns = RoundUp(part.Size(), Products::kWholeColumns);
    products.Score(part, sums.scores, columns, soon);
    auto* const probs = products.Probs(sums.scores);
    Softmax(s, u, sums, rows, padded, part, columns, probs);
    products.Gather(part, probs, sums.out, soon);
  }
  for (long r = 0; r < rows; ++r) {
    E* const to = u.Result(s, r);
    const float* const from = sums.out + r * padded;
    const float share = 1.0f / Sum(Load(sums.total + r * kLanes));
    long d = 0;
    for (; d + kLanes <= s.D; d += kLanes) Store(to + d, Load(from + d) * share);
    for (; d < s.D; ++d) StoreOne(to + d, from[d] * share);
  }
}

template <class E>
void Attend(const Step<E>& s, const Unit& u, const Unit* after = nullptr) {
  static thread_local Scratch scratch;
  const long rows = u.tokens * s.G;
#ifdef JAXLLM_TILES
  if constexpr (std::is_same_v<E, BFloat16>)
    if (InTiles::Serves(s, rows)) return Attend<InTiles>(s, u, after, rows, scratch);
#endif
  if (AsTheyLie<E>::Serves(s, rows)) return Attend<AsTheyLie<E>>(s, u, after, rows, scratch);
  Attend<Copied<E>>(s, u, after, rows, scratch);
}

// Heads [begin, end) of a row with one token.
template <class E>
void AttendHeads(const Step<E>& s, long row, long begin, long end) {
  if (s.kv_lens[row] == 0)
    return Clear(s.out + (row * s.H + begin * s.G) * s.D, (end - begin) * s.G * s.D);
  Unit u{row, begin, row, 1, s.kv_lens[row] - 1};
  AskForKeys(s, u.First(kPage, s.window));
  AskForValues(s, u.First(kPage, s.window));
  for (; u.head < end; ++u.head) {
    Unit next = u;
    Attend(s, u, ++next.head < end ? &next : nullptr);
  }
}

// ------------------------------------------------------------------ a step

template <class E>
void Run(ffi::ThreadPool& pool, const Step<E>& s) {
  // All keys first: a row may read pages of its prefix that another row writes in this step.
  const long groups = (s.decodes + kWritten - 1) / kWritten;
  ParallelFor(pool, (groups + s.blocks) * s.K, [&](long i) {
    const long head = i % s.K, group = i / s.K, block = group - groups;
    if (block >= 0) {
      const long start = s.block_starts[block];
      return Write(s, head, start, start + s.TokensOf(block));
    }
    const long last = std::min((group + 1) * kWritten, s.decodes);
    for (long row = group * kWritten; row < last; ++row) {
      if (row + 1 < last) PrefetchSlot(s, head, row + 1);
      if (s.kv_lens[row] > 0) Write(s, head, row, row + 1);
    }
  });
  const long size = std::max(1L, kUnitRows / s.G), pieces = (s.block_q + size - 1) / size;
  const long chunked = s.blocks * pieces * s.K;
  // With rows enough for all threads, one has all heads of a row, and asks for the next ahead.
  const long heads = s.decodes >= 4 * pool.num_threads() ? s.K : 1, parts = s.K / heads;
  ParallelFor(pool, chunked + s.decodes * parts, [&](long i) {
    if (i >= chunked) {
      const long row = s.decodes - 1 - (i - chunked) / parts;  // the last have most keys
      const long head = (i - chunked) % parts * heads;
      return AttendHeads(s, row, head, head + heads);
    }
    const long head = i % s.K, piece = i / s.K % pieces;
    const long block = s.blocks - 1 - i / s.K / pieces;  // the last of a row have most keys
    const long begin = piece * size, end = std::min(begin + size, s.TokensOf(block));
    if (begin >= end) return;
    const long start = s.block_starts[block] + begin;
    Attend(s, Unit{s.block_rows[block], head, start, end - begin, s.positions[start]});
  });
  const long covered =
      s.blocks ? s.block_starts[s.blocks - 1] + s.TokensOf(s.blocks - 1) : s.decodes;
  ClearRows(pool, s.out, covered, s.T, s.H * s.D);
}

Element* Data(ffi::AnyBuffer buffer) { return static_cast<Element*>(buffer.untyped_data()); }

using Numbers = ffi::Buffer<ffi::S32>;
using Tables = ffi::Buffer<ffi::F32>;

// Queries, keys and values are three arrays, or one [T, K, G + 2, D], and two without numbers.
ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                          ffi::AnyBuffer v, ffi::AnyBuffer key_pages, ffi::AnyBuffer value_pages,
                          Numbers slots, Numbers table, Numbers kv_lens, Numbers num_decodes,
                          Numbers block_rows, Numbers block_starts, Numbers positions,
                          Numbers num_blocks, Tables cos, Tables sin,
                          ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> keys_out,
                          ffi::Result<ffi::AnyBuffer> values_out, int64_t block_q, int64_t window,
                          float scale, float softcap) {
  if (keys_out->untyped_data() != key_pages.untyped_data() ||
      values_out->untyped_data() != value_pages.untyped_data())
    return ffi::Error::Internal("jaxllm: the pages of attention were copied.");
  Step<Element> s;
  s.out = Data(*out);
  s.key_pages = Data(key_pages), s.value_pages = Data(value_pages);
  s.slots = slots.typed_data(), s.table = table.typed_data(), s.kv_lens = kv_lens.typed_data();
  s.block_rows = block_rows.typed_data(), s.block_starts = block_starts.typed_data();
  s.positions = positions.typed_data();
  const auto pages = key_pages.dimensions();
  s.K = pages[1], s.D = pages[2], s.S = pages[3];
  const auto results = out->dimensions();
  s.T = results[0], s.H = results[1], s.G = s.H / s.K, s.M = table.dimensions()[1];
  if (k.element_count() == 0) {
    const long head = (s.G + 2) * s.D, token = s.K * head;
    s.q = {Data(q), token, head};
    s.k = {Data(q) + s.G * s.D, token, head};
    s.v = {Data(q) + (s.G + 1) * s.D, token, head};
  } else {
    s.q = {Data(q), s.H * s.D, s.G * s.D};
    s.k = {Data(k), s.K * s.D, s.D};
    s.v = {Data(v), s.K * s.D, s.D};
  }
  s.rotation = {cos.typed_data(), sin.typed_data(), cos.element_count() ? cos.dimensions()[1] : 0};
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
                                  .Arg<jaxllm::Tables>()
                                  .Arg<jaxllm::Tables>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("block_q")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap"));
