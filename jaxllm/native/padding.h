// Rows that only fill an array up: a program is made for some numbers of tokens, and a step may
// have fewer. Kernels compute the first rows, and write zeros behind them: NaN there would be one
// of the step.

#ifndef JAXLLM_NATIVE_PADDING_H_
#define JAXLLM_NATIVE_PADDING_H_

#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace jaxllm {
namespace {

using Count = xla::ffi::Buffer<xla::ffi::S32>;  // [], how many rows are computed; [0]: all

inline long Counted(const Count& count, long rows) {
  if (count.element_count() == 0) return rows;
  return std::clamp<long>(*count.typed_data(), 0, rows);
}

// Rows [first, last) of a matrix with so many columns become zeros.
template <class Pool, class E>
void ClearRows(Pool& pool, E* matrix, long first, long last, long columns) {
  constexpr long kBytes = 1 << 18;  // that one thread takes at once
  const long together = std::max(1L, kBytes / std::max(1L, columns * static_cast<long>(sizeof(E))));
  ParallelFor(pool, (last - first + together - 1) / together, [&](long i) {
    const long begin = first + i * together, end = std::min(begin + together, last);
    Clear(matrix + begin * columns, (end - begin) * columns);
  });
}

}  // namespace
}  // namespace jaxllm

#endif  // JAXLLM_NATIVE_PADDING_H_
