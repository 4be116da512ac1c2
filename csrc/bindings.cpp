// Build facts for `python -m deepfusion_kernels`; no torch header, since pybind11 here and inside
// torch may differ.
#include "common/cpu_level.h"

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, module) {
  module.doc() = "What the native library was built with.";
  module.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = __VERSION__;
    info["cpu_levels"] = DF_LEVELS;
    info["cpu_level_here"] = deepfusion::best_level();
    info["cuda_archs"] = DF_CUDA_ARCHS;
    return info;
  });
}
