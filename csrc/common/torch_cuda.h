// Current CUDA stream and launch check for host code; the only place that looks into libtorch_cuda.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace deepfusion {

// Looked up at run time, so that the same library also loads under a CPU-only torch.
inline cudaStream_t current_stream(int32_t device) {
  using Lookup = int32_t (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Lookup>(symbol);
  }();
  STD_TORCH_CHECK(lookup, "deepfusion: this torch build has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(lookup(device, &stream) == 0, "deepfusion: no current CUDA stream on device ",
                  device);
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace deepfusion
