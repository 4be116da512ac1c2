// Every schema of `deepfusion_native`; the implementations register at the foot of their own files.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(deepfusion_native, m) {
  // kl_distillation
  m.def(
      "kl_distillation_forward(Tensor student, Tensor? teacher, Tensor? labels, Tensor? keep, "
      "int divergence, float beta, float temperature, float kd_scale, float ce_weight, "
      "float softcap) -> (Tensor loss, Tensor stats)");
  m.def(
      "kl_distillation_backward(Tensor dloss, Tensor student, Tensor? teacher, Tensor? labels, "
      "Tensor? keep, Tensor stats, int divergence, float beta, float temperature, float kd_scale, "
      "float ce_weight, float softcap, bool needs_dstudent, bool needs_dteacher) "
      "-> (Tensor dstudent, Tensor dteacher)");

  // fused_linear_kl
  m.def(
      "fused_linear_kl_accumulate(Tensor student, Tensor? teacher, Tensor? labels, Tensor scale, "
      "Tensor(a!) sums, "
      "int first_column, bool own_sum, int divergence, float temperature) -> ()");
  m.def(
      "fused_linear_kl_jsd(Tensor student, Tensor teacher, Tensor scale, Tensor stats, Tensor(a!) "
      "sums, float beta, "
      "float temperature) -> ()");
  m.def(
      "fused_linear_kl_finish(Tensor sums, Tensor scale, bool own_sum, int divergence, float beta, "
      "float kd_weight, "
      "float ce_weight) -> (Tensor, Tensor)");
  m.def(
      "fused_linear_kl_gradient(Tensor(a!) student, Tensor? teacher, Tensor? labels, Tensor scale, "
      "Tensor stats, "
      "int first_column, int divergence, float beta, float temperature, float kd_weight, float "
      "ce_weight) -> ()");

  m.def("fused_linear_kl_multiplies(Tensor like) -> bool");
  m.def(
      "fused_linear_kl_project(Tensor hidden, Tensor weight, Tensor? bias, Tensor(a!) "
      "out) -> ()");
  m.def(
      "fused_linear_kl_gradients(Tensor dlogits, Tensor hidden, Tensor weight, "
      "Tensor(a!)? dhidden, Tensor(b!)? dweight, bool first) -> ()");

  // topk_kl
  m.def(
      "topk_kl_forward(Tensor student, Tensor ids, Tensor logprobs, Tensor? labels, Tensor scale, "
      "int tail, "
      "int divergence, float beta, float temperature, float kd_weight, float ce_weight, float "
      "floor) "
      "-> (Tensor, Tensor)");
  m.def(
      "topk_kl_backward(Tensor drows, Tensor statistics, Tensor student, Tensor ids, Tensor "
      "logprobs, Tensor? labels, "
      "Tensor scale, int tail, int divergence, float beta, float temperature, float kd_weight, "
      "float ce_weight, "
      "float floor) -> Tensor");

  m.def("topk_logprobs(Tensor logits, int k, float temperature) -> (Tensor, Tensor)");

  // moe_routing
  m.def(
      "moe_route_forward(Tensor logits, Tensor? bias, int top_k, int num_groups, int top_groups, "
      "bool is_sigmoid, bool is_topk_first, bool renormalize, bool is_top2_sum, float scale, "
      "float balance, float z) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moe_route_backward(Tensor dweights, Tensor daux, Tensor logits, Tensor experts, "
      "Tensor weights, Tensor counts, Tensor picked, Tensor lse, Tensor mass, int top_k, "
      "int num_groups, int top_groups, bool is_sigmoid, bool is_topk_first, bool renormalize, "
      "bool is_top2_sum, float scale, float balance, float z) -> Tensor");

  // moe_dispatch
  m.def("moe_plan(Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor)");
  m.def("moe_dispatch_forward(Tensor hidden, Tensor order, int top_k) -> Tensor");
  m.def("moe_combine_forward(Tensor rows, Tensor slots, Tensor? weights) -> Tensor");
  m.def(
      "moe_combine_backward(Tensor dout, Tensor rows, Tensor order, Tensor slots, Tensor weights, "
      "bool needs_drows, bool needs_dweights) -> (Tensor, Tensor)");

  // moe_experts
  m.def(
      "moe_experts_forward(Tensor hidden, Tensor gate_up_proj, Tensor down_proj, Tensor experts, "
      "Tensor weights, int activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moe_experts_backward(Tensor dout, Tensor hidden, Tensor gate_up_proj, Tensor down_proj, "
      "Tensor weights, Tensor h, Tensor order, Tensor slots, Tensor offsets, int activation, "
      "bool needs_dhidden, bool needs_dgate_up, bool needs_ddown, bool needs_dweights) "
      "-> Tensor[]");

  // bytes held beside torch's allocator
  m.def("held_bytes(Tensor(a!) counts, bool restart) -> ()");

  // view_aligned_attention
  m.def(
      "pack_patches(Tensor tokens, Tensor offsets, Tensor? mask, int first, "
      "Tensor(a!) rows) -> ()");
  m.def(
      "unpack_patches(Tensor rows, Tensor offsets, Tensor? mask, int first, "
      "Tensor(a!) tokens) -> ()");
  m.def("pool_patches(Tensor tokens, Tensor offsets, Tensor? mask, Tensor(a!) rows) -> ()");
  m.def("unpool_patches(Tensor rows, Tensor offsets, Tensor? mask, Tensor(a!) tokens) -> ()");
  m.def(
      "stage_attention_forward(Tensor qkv, Tensor? valid, int heads, bool causal, float scale, "
      "Tensor(a!) y, Tensor(b!) lse) -> ()");
  m.def(
      "stage_attention_backward(Tensor qkv, Tensor lse, Tensor dy, Tensor delta, Tensor? valid, "
      "int heads, bool causal, float scale, Tensor upstream, Tensor(a!) dqkv) -> ()");

  // view_aligned_attention on CUDA alone
  m.def(
      "small_attention_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? valid, int heads, "
      "bool causal, float scale, Tensor(a!) qkv, Tensor(b!) y, Tensor(c!) lse) -> ()");
  m.def(
      "small_attention_backward(Tensor qkv, Tensor lse, Tensor dy, Tensor delta, Tensor? valid, "
      "int heads, bool causal, float scale, Tensor upstream, Tensor(a!) dqkv) -> ()");

  // view_aligned_attention on the CPU alone
  m.def("stage_attention_delta(Tensor y, Tensor dy, int heads, Tensor(a!) delta) -> ()");
  m.def(
      "loss_rows(Tensor offsets, Tensor target_offsets, Tensor? mask, Tensor? target_mask, "
      "int length, int target_length, int width, float[] stage_weights, Tensor(a!) valid, "
      "Tensor(b!) scale, Tensor(c!) factor) -> bool");
  m.def("multiplies_rows(Tensor like) -> bool");
  m.def(
      "attention_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? valid, int heads, "
      "bool causal, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor dy, Tensor y, Tensor x, Tensor weight, Tensor qkv, Tensor lse, "
      "Tensor? valid, int heads, bool causal, float scale, bool needs_x, bool needs_weight, "
      "bool needs_bias) -> (Tensor, Tensor, Tensor)");
  m.def("reads_in_place(Tensor mask, int patch_size) -> bool");
  m.def(
      "project_patches(Tensor[] stages, Tensor weight, Tensor bias, Tensor? patch_embedding, "
      "Tensor? stage_embedding, Tensor offsets, Tensor? mask, int patch_size, "
      "Tensor(a!) x) -> ()");
  m.def(
      "project_patches_backward(Tensor[] stages, Tensor weight, Tensor dx, Tensor offsets, "
      "Tensor? mask, int patch_size, int[] needs_stages, bool needs_weight) -> Tensor[]");

  m.def(
      "joined_forward(Tensor[] stages, Tensor[] targets, Tensor weight, Tensor bias, "
      "Tensor qkv_weight, Tensor head_weight, Tensor? head_bias, Tensor? patch_embedding, "
      "Tensor? stage_embedding, Tensor offsets, Tensor target_offsets, Tensor? mask, "
      "Tensor? target_mask, float[] stage_weights, int heads, int patch_size, bool causal, "
      "bool target_norm, float scale, int[] needs, bool keeps_rows) -> Tensor[]");
  m.def(
      "joined_backward(Tensor upstream, Tensor[] kept, Tensor[] stages, Tensor weight, "
      "Tensor qkv_weight, Tensor offsets, Tensor? mask, int heads, int patch_size, bool causal, "
      "float scale, int[] needs) -> Tensor[]");

  // fused_linear_mse
  m.def(
      "linear_mse_epilogue(Tensor(a!) predictions, Tensor? bias, Tensor target, Tensor offsets, "
      "Tensor? mask, Tensor scale, Tensor(b!) sse, int first, bool target_norm) -> ()");

  // fused_linear_mse on the CPU alone
  m.def(
      "linear_mse_stages(Tensor y, Tensor weight, Tensor? bias, Tensor[] targets, Tensor offsets, "
      "Tensor? mask, Tensor scale, bool target_norm, int chunk_rows, bool needs_y, "
      "bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_mse_loss(Tensor y, Tensor weight, Tensor? bias, Tensor target, Tensor offsets, "
      "Tensor? mask, Tensor? row_weight, bool is_mean, bool target_norm, int chunk_rows, "
      "bool needs_y, bool needs_weight, bool needs_bias) -> Tensor[]");
  m.def(
      "linear_mse_scaled(Tensor upstream, Tensor factor, Tensor dy, Tensor dweight, "
      "Tensor dbias, Tensor like) -> (Tensor, Tensor, Tensor)");
  m.def("linear_mse_multiplies(Tensor like) -> bool");

  // orthogonalise
  m.def(
      "orthogonalise(Tensor matrices, Tensor(a!) out, int rounds, float a, float b, float c) -> "
      "()");
  m.def(
      "muon_step(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] momenta, int rounds, "
      "float a, float b, float c, float momentum, float rate, float decay) -> ()");
}
