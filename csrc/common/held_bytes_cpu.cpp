// The count of common/held_bytes.h, for benchmarks.
#include "common/held_bytes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace {

using namespace deepfusion;
using torch::stable::Tensor;

// counts [2] int64 <- held now, the most since the count was last restarted.
void held_bytes_cpu(Tensor counts, bool restart) {
  if (restart) HeldBytes::restart();
  int64_t* found = counts.mutable_data_ptr<int64_t>();
  found[0] = HeldBytes::now();
  found[1] = HeldBytes::most();
}

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("held_bytes", TORCH_BOX(&held_bytes_cpu));
}
