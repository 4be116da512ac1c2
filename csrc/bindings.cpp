// Build facts for `python -m deepfusion_kernels`; no torch header, since pybind11 here and inside
// torch may differ.
#include <pybind11/pybind11.h>

#include <string>

namespace {

std::string cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("f16c");
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd");
  return v4 ? "avx512" : v3 ? "avx2" : "baseline";
#else
  return "baseline";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "What the native library was built with.";
  module.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = __VERSION__;
    info["cpu_levels"] = DF_LEVELS;
    info["cpu_level_here"] = cpu_level();
    info["cuda_archs"] = DF_CUDA_ARCHS;
    return info;
  });
}
