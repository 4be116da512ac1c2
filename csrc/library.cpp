// Every schema of `deepfusion_native`; the implementations register at the foot of their own files.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(deepfusion_native, m) {
  // kl_distillation

  // fused_linear_kl

  // topk_kl

  // moe_routing

  // moe_dispatch

  // moe_experts

  // view_aligned_attention

  // fused_linear_mse
}
