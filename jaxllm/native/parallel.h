// A loop whose rounds are shared among the threads of XLA.

#ifndef JAXLLM_NATIVE_PARALLEL_H_
#define JAXLLM_NATIVE_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

namespace jaxllm {
namespace {

// Calls `body(i)` for each i in [0, count), in any order and on any thread; returns when all ended.
//
// This thread takes rounds like the others and waits only for those that are begun: XLA may call
// from a thread of its pool, which would wait forever for work that no thread is left to begin.
template <class Pool, class Body>
void ParallelFor(Pool& pool, long count, const Body& body) {
  struct Shared {
    std::atomic<long> next{0}, ended{0};
  };
  const long helpers = std::min<long>(pool.num_threads(), count) - 1;
  if (helpers <= 0) {
    for (long i = 0; i < count; ++i) body(i);
    return;
  }
  auto shared = std::make_shared<Shared>();  // a helper may begin after all has ended
  const auto work = [shared, count, &body] {
    for (long i; (i = shared->next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      body(i);
      shared->ended.fetch_add(1, std::memory_order_release);
    }
  };
  for (long i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  while (shared->ended.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

}  // namespace
}  // namespace jaxllm

#endif  // JAXLLM_NATIVE_PARALLEL_H_
