// One source, compiled once per instruction-set level; the best level this processor can run
// registers itself.
//
// All CPU code stands in an anonymous namespace or in `deepfusion::inline DF_LEVEL`, so that the
// copies of one function made for different levels have different names and never replace each
// other at link time.
#pragma once

#ifndef DF_LEVEL
#error "DF_LEVEL is set by CMakeLists.txt for each copy of a CPU source"
#endif

namespace deepfusion::inline DF_LEVEL {

inline bool runs_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512cd");
#else
  return false;
#endif
}

inline bool runs_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

inline const char* best_level() {
  return runs_avx512() ? "avx512" : runs_avx2() ? "avx2" : "baseline";
}

inline bool level_is_best() {
#if defined(DF_LEVEL_avx512)
  return runs_avx512();
#elif defined(DF_LEVEL_avx2)
  return runs_avx2() && !runs_avx512();
#else
  return !runs_avx2();
#endif
}

}  // namespace deepfusion::inline DF_LEVEL

// STABLE_TORCH_LIBRARY_IMPL whose body runs only in the copy made for this processor:
//   DF_REGISTER_CPU(m) { m.impl("kl_distillation_forward",
//   TORCH_BOX(&kl_distillation_forward_cpu)); }
#define DF_REGISTER_CPU(m)                                           \
  static void register_cpu(torch::stable::detail::StableLibrary& m); \
  STABLE_TORCH_LIBRARY_IMPL(deepfusion_native, CPU, library) {       \
    if (deepfusion::level_is_best()) register_cpu(library);          \
  }                                                                  \
  static void register_cpu([[maybe_unused]] torch::stable::detail::StableLibrary& m)
