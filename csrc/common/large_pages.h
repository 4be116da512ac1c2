// Large pages under fresh memory; no torch header.
#pragma once

#include "common/cpu_level.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace deepfusion::inline DF_LEVEL {

// Asks for large pages under a fresh gradient before it is first touched: its 4 KiB faults cost as
// much as the kernel. Only advice: refused, it changes nothing.
inline void advise_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kLarge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) / 4096 * 4096;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / 4096 * 4096;
  if (end > begin + 2 * kLarge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace deepfusion::inline DF_LEVEL
