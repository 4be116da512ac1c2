// How many bytes our kernels hold beside torch's allocator: kept blocks that are in use, and
// scratch.
#pragma once

#include "common/cpu_level.h"

#include <atomic>
#include <cstdint>

namespace deepfusion::inline DF_LEVEL {

class HeldBytes {
 public:
  static void add(int64_t bytes) {
    const int64_t held = now_.fetch_add(bytes) + bytes;
    int64_t most = most_.load();
    while (held > most && !most_.compare_exchange_weak(most, held)) {
    }
  }
  static int64_t now() { return now_.load(); }
  static int64_t most() { return most_.load(); }
  // the most is counted anew from what is held now
  static void restart() { most_.store(now_.load()); }

 private:
  static inline std::atomic<int64_t> now_{0};
  static inline std::atomic<int64_t> most_{0};
};

}  // namespace deepfusion::inline DF_LEVEL
