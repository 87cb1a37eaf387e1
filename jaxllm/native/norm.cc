// Norms of rows, in float32: x / sqrt(mean(x^2) + eps), of x or of x - mean(x), then scaled.
//
// XLA:CPU takes passes over intermediate arrays as large as the rows, and sums of rows that wait
// for each other. Here a row is read three times at most, and lies in the first cache after the
// first.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "padding.h"
#include "parallel.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace jaxllm {
namespace {

namespace ffi = xla::ffi;

constexpr long kNumbers = 1 << 15;  // of rows that one thread takes at once

using Element = JAXLLM_ELEMENT;

constexpr ffi::DataType kType = std::is_same_v<Element, float>      ? ffi::DataType::F32
                                : std::is_same_v<Element, BFloat16> ? ffi::DataType::BF16
                                                                    : ffi::DataType::F16;

struct Norm {
  const Element *x, *scale, *bias;  // [rows, size]; [size] or null
  Element* y;
  long rows, size;
  float eps, more;            // what is added to the scale
  bool is_centered, rounded;  // minus the mean; rounded before it is scaled, too
};

inline Floats Rounded(Floats x) {
  Element numbers[kLanes];
  Store(numbers, x);
  return Load(numbers);
}

void Row(const Norm& n, const Element* x, Element* y) {
  float mean = 0;
  if (n.is_centered) {
    Floats sum = {};
    ForVectors(n.size, [&](long i, long count) { sum += LoadUpTo(x + i, count); });
    mean = Sum(sum) / n.size;
  }
  Floats squares = {};
  ForVectors(n.size, [&](long i, long count) {
    Floats left = LoadUpTo(x + i, count) - mean;
    for (long lane = count; lane < kLanes; ++lane) left[lane] = 0;
    squares += left * left;
  });
  const float factor = 1.0f / std::sqrt(Sum(squares) / n.size + n.eps);
  ForVectors(n.size, [&](long i, long count) {
    Floats to = (LoadUpTo(x + i, count) - mean) * factor;
    if (n.rounded) to = Rounded(to);
    if (n.scale) to *= LoadUpTo(n.scale + i, count) + n.more;
    if (n.bias) to += LoadUpTo(n.bias + i, count);
    StoreUpTo(y + i, to, count);
  });
}

Element* Data(ffi::AnyBuffer buffer) {
  return buffer.element_count() ? static_cast<Element*>(buffer.untyped_data()) : nullptr;
}

ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
               Count count, ffi::Result<ffi::AnyBuffer> y, float eps, float more, bool is_centered,
               bool rounded) {
  if (x.element_type() != kType || scale.element_type() != kType || bias.element_type() != kType)
    return ffi::Error::Internal("jaxllm: a norm of another type than its kernel's.");
  const auto sizes = x.dimensions();
  const Norm n{Data(x),  Data(scale), Data(bias), Data(*y),    Counted(count, sizes[0]),
               sizes[1], eps,         more,       is_centered, rounded};
  const long together = std::max(1L, kNumbers / std::max(1L, n.size));
  ParallelFor(pool, (n.rows + together - 1) / together, [&](long i) {
    const long last = std::min((i + 1) * together, n.rows);
    for (long r = i * together; r < last; ++r) Row(n, n.x + r * n.size, n.y + r * n.size);
  });
  ClearRows(pool, n.y, n.rows, sizes[0], n.size);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(norm, jaxllm::Run,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jaxllm::Count>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<float>("more")
                                  .Attr<bool>("is_centered")
                                  .Attr<bool>("rounded"));
