// y = x W^T + b on CPU: a weight is read as it lies [N, K], once for many tokens.
//
// A unit of work is a block of tokens and a run of rows of the weight. Each thread packs the tokens
// of a block for itself, as often as it changes blocks: what another core has written is slower to
// fetch than to make again. It asks ahead for the rows that it takes next itself.

#include <atomic>
#include <type_traits>

#include "parallel.h"
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
  Y* y;                        // [T, N]
  long T, K, N;
};

// Bytes of packed tokens that stay near a core, beside the rows that they meet.
inline long BlockBytes() {
  long cache = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
  cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return std::max(cache, 1L << 20) * 3 / 8;
}

struct Scratch {
  uint64_t call = 0;  // whose tokens are packed
  long block = 0;
  Lines<float> packed, results, wide;
  Lines<Element> tokens, rows;
};

// Rows of another depth, with zeros behind their numbers, and as many rows of zeros as are wanted.
template <class E>
const E* Padded(const E* from, long rows, long depth, long wanted, long padded, Lines<E>& lines) {
  E* const to = lines.Room(wanted * padded);
  std::fill_n(to, wanted * padded, E{});
  for (long r = 0; r < rows; ++r) std::copy_n(from + r * depth, depth, to + r * padded);
  return to;
}

template <class Product, class E, class Y>
void Run(ffi::ThreadPool& pool, const Map<E, Y>& m) {
  static const long block_bytes = BlockBytes();
  static std::atomic<uint64_t> calls{0};
  const uint64_t call = ++calls;
  if (m.T == 0 || m.N == 0) return;
  constexpr long kTogether = Product::kTogether, kRows = Product::kRows;
  const long depth = RoundUp(m.K, Product::kWhole);
  const long bytes = Product::Packed(kTogether, depth) * static_cast<long>(sizeof(float));
  const long most = std::max(1L, block_bytes / bytes) * kTogether;  // tokens of a block
  const long blocks = (m.T + most - 1) / most;
  const long size = RoundUp((m.T + blocks - 1) / blocks, kTogether);
  const long panels = (m.N + kRows - 1) / kRows;
  const long chunks = std::clamp(4 * static_cast<long>(pool.num_threads()) / blocks, 1L, panels);
  ParallelFor(pool, blocks * chunks, [&](long i) {
    static thread_local Scratch scratch;
    const long block = i / chunks, chunk = i % chunks;
    const long first = block * size, tokens = std::min(size, m.T - first);
    if (tokens <= 0) return;
    Product product(depth);
    float* const packed = scratch.packed.Room(Product::Packed(size, depth));
    if (scratch.call != call || scratch.block != block) {
      const E* x = m.x + first * m.K;
      if (depth != m.K) x = Padded(x, tokens, m.K, tokens, depth, scratch.tokens);
      product.Pack(x, tokens, packed);
      scratch.call = call, scratch.block = block;
    }
    float* const c = scratch.results.Room(kRows * kTogether);
    const long last = (chunk + 1) * panels / chunks;
    for (long panel = chunk * panels / chunks; panel < last; ++panel) {
      const long n = panel * kRows, rows = std::min(kRows, m.N - n);
      const E* from = m.weight + n * m.K;
      Ahead next;
      if (panel + 1 < last)
        next = {reinterpret_cast<const char*>(from + kRows * m.K),
                reinterpret_cast<const char*>(from + 2 * kRows * m.K)};
      if (rows < kRows || depth != m.K) from = Padded(from, rows, m.K, kRows, depth, scratch.rows);
      const auto* w = product.Take(from, scratch.wide);
      for (long t = 0; t < tokens; t += kTogether) {
        const long some = std::min(kTogether, tokens - t);
        product.Multiply(w, packed + Product::Packed(t, depth), some, c, next);
        for (long r = 0; m.bias && r < rows; ++r) {
          const float bias = LoadOne(m.bias + n + r);
          for (long j = 0; j < some; ++j) c[r * kTogether + j] += bias;
        }
        Turn(c, kTogether, rows, some, m.y + (first + t) * m.N + n, m.N);
      }
    }
  });
}

template <class E, class Y>
void Run(ffi::ThreadPool& pool, const Map<E, Y>& m) {
#ifdef JAXLLM_TILES
  if constexpr (std::is_same_v<E, BFloat16>)
    if (HaveTiles()) return Run<WeightsInTiles>(pool, m);
#endif
  if (m.T <= Dots<E>::kTogether) return Run<Dots<E>>(pool, m);
  Run<Broadcasts<E>>(pool, m);
}

template <class T>
T* Data(ffi::AnyBuffer buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                  ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y) {
  const auto run = [&](auto* to) {
    const Element* const added = bias.element_count() ? Data<Element>(bias) : nullptr;
    const auto sizes = weight.dimensions();
    Run(pool, Map<Element, std::remove_pointer_t<decltype(to)>>{
                  Data<Element>(x), Data<Element>(weight), added, to, x.dimensions()[0], sizes[1],
                  sizes[0]});
  };
  if (y->element_type() == ffi::DataType::F32)
    run(Data<float>(*y));
  else
    run(Data<Element>(*y));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxllm

// Whether products of the type are those of a matrix unit.
extern "C" bool linear_in_tiles() {
#ifdef JAXLLM_TILES
  return std::is_same_v<jaxllm::Element, jaxllm::BFloat16> && jaxllm::HaveTiles();
#else
  return false;
#endif
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(linear, jaxllm::Linear,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());
