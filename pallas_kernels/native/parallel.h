// Work shared by the calling thread and XLA's own. Knows no kernels.

#ifndef JAXINFER_NATIVE_PARALLEL_H_
#define JAXINFER_NATIVE_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace jaxinfer {

// Calls work(i) for every i below num_items, in any order, and returns when all are done.
// `make_worker()` is called once on each thread that takes part; what it returns is called with i.
template <typename MakeWorker>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t num_items, const MakeWorker& make_worker) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  const int64_t num_helpers = std::min<int64_t>(pool.num_threads() - 1, num_items - 1);
  if (num_helpers <= 0) {
    auto worker = make_worker();
    for (int64_t i = 0; i < num_items; ++i) worker(i);
    return;
  }
  auto shared = std::make_shared<Shared>();
  // A helper that starts after the end finds no item left and touches nothing but `shared`.
  auto take_part = [shared, num_items, make = &make_worker] {
    int64_t i = shared->next.fetch_add(1);
    if (i >= num_items) return;
    auto worker = (*make)();
    for (; i < num_items; i = shared->next.fetch_add(1)) {
      worker(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < num_helpers; ++i) pool.Schedule([take_part] { take_part(); });
  take_part();
  while (shared->done.load(std::memory_order_acquire) < num_items) std::this_thread::yield();
}

}  // namespace jaxinfer

#endif
