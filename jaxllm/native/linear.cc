// y = x W^T + b, or z + that, on CPU: a weight is read as it lies [N, K], once for many tokens.
//
// A unit of work is a block of tokens and a run of panels, some rows of the weight each. A thread
// that needs tokens in another order packs those of a block for itself, as often as it changes
// blocks: what another core has written is slower to fetch than to make again. It asks ahead for
// the rows that it takes next itself.
//
// Programs are made for some numbers of tokens. Those that only fill one up are not computed.

#include <atomic>
#include <type_traits>

#include "padding.h"
#include "parallel.h"
#include "turned.h"
#include "weights.h"
#include "xla/ffi/api/ffi.h"

#if defined(__linux__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace jaxllm {
namespace {

namespace ffi = xla::ffi;

using Element = JAXLLM_ELEMENT;  // what tokens and weights are: the compiler's command says

// Letters: T tokens, K inputs, N outputs. Y is the type of results.
template <class E, class Y>
struct Map {
  const E *x, *weight, *bias;  // [T, K], [N, K], [N] or null
  const Y* onto;               // [T, N] or null: what products are added to, once they are rounded
  Y* y;                        // [T, N]
  long T, K, N;

  // Completes y, which has products, of so many tokens and outputs from (t, n) on.
  void AddOnto(long t, long n, long tokens, long outputs) const {
    if (!onto) return;
    for (long at = t * N + n; tokens > 0; --tokens, at += N)
      ForVectors(outputs, [&](long i, long some) {
        const Floats sum = LoadUpTo(onto + at + i, some) + LoadUpTo(y + at + i, some);
        StoreUpTo(y + at + i, sum, some);
      });
  }
};

// Bytes of a core's second cache: the tokens of a block stay there, beside the rows that they meet.
inline long CacheBytes() {
  long cache = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  cache = found;
#endif
  return std::max(cache, 1L << 20);
}

template <class E>
struct Scratch {
  uint64_t call = 0;  // whose tokens are packed
  long block = 0;
  Lines<float> packed, results, wide;
  Lines<E> tokens, rows, turned;
};

// How a product is divided into units: `together` tokens and `rows` of the weight are its grain.
struct Division {
  long size, blocks, panels, chunks;  // tokens of a block; runs of panels

  Division(long tokens, long outputs, long most, long together, long rows, long threads) {
    blocks = (tokens + most - 1) / most;
    size = RoundUp((tokens + blocks - 1) / blocks, together);
    panels = (outputs + rows - 1) / rows;
    chunks = std::clamp(4 * threads / blocks, 1L, panels);
  }

  // Calls `body(block, its first token, its tokens, first panel, one past the last)` of each unit.
  template <class Body>
  void ForEach(ffi::ThreadPool& pool, long tokens, const Body& body) const {
    ParallelFor(pool, blocks * chunks, [&](long i) {
      const long block = i / chunks, chunk = i % chunks, first = block * size;
      const long some = std::min(size, tokens - first);
      if (some > 0)
        body(block, first, some, chunk * panels / chunks, (chunk + 1) * panels / chunks);
    });
  }
};

uint64_t NextCall() {
  static std::atomic<uint64_t> calls{0};
  return ++calls;
}

template <class E>
Scratch<E>& ThreadScratch() {
  static thread_local Scratch<E> scratch;
  return scratch;
}

template <class Product, class E, class Y>
void Run(ffi::ThreadPool& pool, const Map<E, Y>& m) {
  constexpr long kTogether = Product::kTogether, kRows = Product::kRows;
  const uint64_t call = NextCall();
  const long depth = RoundUp(m.K, Product::kWhole);
  const long bytes = Product::Packed(kTogether, depth) * static_cast<long>(sizeof(float));
  const long most = std::max(1L, CacheBytes() * 3 / 8 / bytes) * kTogether;
  const Division division(m.T, m.N, most, kTogether, kRows, pool.num_threads());
  division.ForEach(pool, m.T, [&](long block, long first, long tokens, long panel, long last) {
    Scratch<E>& scratch = ThreadScratch<E>();
    Product product(depth);
    float* const packed = scratch.packed.Room(Product::Packed(division.size, depth));
    if (scratch.call != call || scratch.block != block) {
      const E* x = m.x + first * m.K;
      if (depth != m.K) x = Padded(x, m.K, tokens, m.K, tokens, depth, scratch.tokens);
      product.Pack(x, tokens, packed);
      scratch.call = call, scratch.block = block;
    }
    float* const c = scratch.results.Room(kRows * division.size);
    for (; panel < last; ++panel) {
      const long n = panel * kRows, rows = std::min(kRows, m.N - n);
      const E* from = m.weight + n * m.K;
      product.Begin(from, m.K, last - panel, tokens);
      if (rows < kRows || depth != m.K)
        from = Padded(from, m.K, rows, m.K, kRows, depth, scratch.rows);
      for (Some some{0, 0}; some.begin < depth; some.begin += some.numbers) {
        some.numbers = std::min(product.Piece(), depth - some.begin);
        const auto* w = product.Take(from, some, scratch.wide);
        for (long t = 0; t < tokens; t += kTogether) {
          const long count = std::min(kTogether, tokens - t);
          float* const results = c + t * kRows;
          product.Multiply(w, packed + Product::Packed(t, depth), some, count, results);
          if (some.begin + some.numbers < depth) continue;
          for (long r = 0; m.bias && r < rows; ++r) {
            const float bias = LoadOne(m.bias + n + r);
            for (long j = 0; j < count; ++j) results[r * kTogether + j] += bias;
          }
          Turn(results, kTogether, rows, count, m.y + (first + t) * m.N + n, m.N);
          m.AddOnto(first + t, n, count, rows);
        }
      }
    }
  });
}

#ifdef JAXLLM_TILES

// Many tokens of bfloat16 (`turned.h`).
template <class Y>
void RunTurned(ffi::ThreadPool& pool, const Map<BFloat16, Y>& m) {
  const uint64_t call = NextCall();
  const long depth = RoundUp(m.K, kDepth);
  const long bytes = kSide * depth * static_cast<long>(sizeof(BFloat16));
  const long most = std::max(1L, CacheBytes() / 2 / bytes) * kSide;
  const Division division(m.T, m.N, most, kSide, kSide, pool.num_threads());
  division.ForEach(pool, m.T, [&](long block, long first, long tokens, long panel, long last) {
    Scratch<BFloat16>& scratch = ThreadScratch<BFloat16>();
    Tiles configured;
    const BFloat16* const at = m.x + first * m.K;
    const long whole = depth == m.K ? tokens / kSide * kSide : 0, rest = tokens - whole;
    const Tokens x{at, scratch.tokens.Room(RoundUp(rest, kSide) * depth), m.K, depth, whole};
    if (rest && (scratch.call != call || scratch.block != block)) {
      Padded(at + whole * m.K, m.K, rest, m.K, RoundUp(rest, kSide), depth, scratch.tokens);
      scratch.call = call, scratch.block = block;
    }
    float* const c = scratch.results.Room(division.size * kSide);
    BFloat16* turned = scratch.turned.Room(2 * kPieceNumbers);
    BFloat16* after = turned + kPieceNumbers;  // what is turned meanwhile
    const Pieces pieces(m.weight, m.N, m.K, panel, last);
    Turner(pieces.WholeAt(0, scratch.rows), turned).Finish();
    for (long i = 0; i < pieces.count(); ++i) {
      const long tiles = pieces.At(i).tiles, n = pieces.Output(i);
      const long steps = RoundUp(tokens, kSide) / kSide * tiles;
      Turner turner(pieces.WholeAt(i + 1, scratch.rows), after);
      Soon soon = pieces.At(i + 2).Ask();
      const long turns = (turner.left() + steps - 1) / steps;
      for (long t = 0; t < tokens; t += kSide) {
        const long some = std::min(kSide, tokens - t);
        float* const square = c + t * kSide;
        const auto multiply = some > kTile ? MultiplyTurned<true> : MultiplyTurned<false>;
        multiply(x.From(t) + pieces.Input(i), x.Row(t), turned, tiles, square, !pieces.Begins(i),
                 turner, turns, soon);
        if (!pieces.Ends(i)) continue;
        Finish(square, some, m.bias ? m.bias + n : nullptr, pieces.Outputs(i),
               m.y + (first + t) * m.N + n, m.N);
        m.AddOnto(first + t, n, some, pieces.Outputs(i));
      }
      turner.Finish();
      std::swap(turned, after);
    }
  });
}

#endif

template <class E, class Y>
void Run(ffi::ThreadPool& pool, const Map<E, Y>& m) {
  if (m.T == 0 || m.N == 0) return;
#ifdef JAXLLM_TILES
  if constexpr (std::is_same_v<E, BFloat16>)
    if (HaveTiles()) return m.T < kMany ? Run<WeightsInTiles>(pool, m) : RunTurned(pool, m);
#endif
  if (m.T <= Dots<E>::kTogether) return Run<Dots<E>>(pool, m);
  Run<Broadcasts<E>>(pool, m);
}

template <class T>
T* Data(ffi::AnyBuffer buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                  ffi::AnyBuffer bias, ffi::AnyBuffer onto, Count count,
                  ffi::Result<ffi::AnyBuffer> y) {
  if (onto.element_count() && onto.element_type() != y->element_type())
    return ffi::Error::Internal("jaxllm: products are added to another type than theirs.");
  const auto run = [&](auto* to) {
    using Y = std::remove_pointer_t<decltype(to)>;
    const Element* const added = bias.element_count() ? Data<Element>(bias) : nullptr;
    const Y* const stream = onto.element_count() ? Data<Y>(onto) : nullptr;
    const auto sizes = weight.dimensions();
    const long tokens = x.dimensions()[0], counted = Counted(count, tokens);
    Run(pool, Map<Element, Y>{Data<Element>(x), Data<Element>(weight), added, stream, to, counted,
                              sizes[1], sizes[0]});
    ClearRows(pool, to, counted, tokens, sizes[0]);
  };
  if (y->element_type() == ffi::DataType::F32)
    run(Data<float>(*y));
  else
    run(Data<Element>(*y));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(linear, jaxllm::Linear,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jaxllm::Count>()
                                  .Ret<xla::ffi::AnyBuffer>());
