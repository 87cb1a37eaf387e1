// The first of the greatest numbers of each row: where it is, and whether it is finite.
//
// A NaN is greater than all, as in NumPy. A row is read once, by blocks, of which the greatest says
// which one to search.

#include <algorithm>
#include <cstdint>
#include <limits>

#include "parallel.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace jaxllm {
namespace {

namespace ffi = xla::ffi;

constexpr long kBlock = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The largest of the numbers; a NaN if there is one.
inline float LargestOf(const float* numbers, long count) {
  Floats largest = Splat(-kInfinity);
  Ints broken = {};
  long i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats x = Load(numbers + i);
    largest = Larger(x, largest);
    broken |= x != x;
  }
  float found = Largest(largest);
  for (int lane = 0; lane < kLanes; ++lane)
    if (broken[lane]) return std::numeric_limits<float>::quiet_NaN();
  for (; i < count; ++i) {
    if (numbers[i] != numbers[i]) return numbers[i];
    found = std::max(found, numbers[i]);
  }
  return found;
}

// Returns where the first of a row's greatest numbers is, and says what it is.
inline long Greatest(const float* row, long count, float& greatest) {
  long block = 0;
  greatest = -kInfinity;
  for (long begin = 0; begin < count; begin += kBlock) {
    const float found = LargestOf(row + begin, std::min(kBlock, count - begin));
    if (found <= greatest) continue;
    block = begin, greatest = found;
    if (found != found) break;
  }
  for (long i = block; i < count; ++i)
    if (row[i] == greatest || row[i] != row[i]) return i;
  return 0;
}

ffi::Error Run(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits,
               ffi::Result<ffi::Buffer<ffi::S32>> tokens,
               ffi::Result<ffi::Buffer<ffi::PRED>> finite) {
  const long rows = logits.dimensions()[0], count = logits.dimensions()[1];
  const float* const numbers = logits.typed_data();
  int32_t* const where = tokens->typed_data();
  bool* const is_finite = finite->typed_data();
  ParallelFor(pool, rows, [&](long r) {
    float greatest;
    where[r] = static_cast<int32_t>(Greatest(numbers + r * count, count, greatest));
    is_finite[r] = greatest > -kInfinity && greatest < kInfinity;
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(greatest, jaxllm::Run,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::PRED>>());
