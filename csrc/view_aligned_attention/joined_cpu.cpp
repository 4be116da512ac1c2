// The joined loss, one call each way: a dozen library calls between products that take a fraction
// of a millisecond each would cost as much.
//
//   X = rows W + c    Q, K, V = X Wqkv^T    Y = attention    loss = factor sum_jn c_jn |R_jn|^2
//   dc_j = sum_bi dX    dpos_i = sum_jb dX  the rest: qkv_products.h, patch_products.h
#include "common/checks.h"
#include "common/mse_stages.h"
#include "common/scaled_gradient.h"
#include "view_aligned_attention/attention.h"
#include "view_aligned_attention/loss_rows.h"
#include "view_aligned_attention/patch_products.h"
#include "view_aligned_attention/qkv_products.h"

namespace {

#if defined(DF_LEVEL_avx512)

using namespace deepfusion;

constexpr const char* kOp = "view_aligned_attention";

// dU_j = g E_j^T Y_j, where forward kept the errors.
template <typename T>
Tensor head_gradient(const Tensor& errors, const Tensor& y, float g, KeptGroup& memory) {
  const int64_t J = errors.size(0), N = errors.size(1), M = errors.size(2), D = y.size(3);
  Tensor out = memory.empty(y, {J, M, D});
  const Products of{J, M, D, N};
  const T *source = errors.const_data_ptr<T>(), *rows = y.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const Turned<T> left(of, [&](int64_t j, int64_t n) { return source + (j * N + n) * M; });
  const bool streams = out.numel() * int64_t{sizeof(T)} >= kStreamedBytes && can_stream(to, D);
  multiply<T>(
      of, [&](int64_t j, int64_t m) { return left.at(j, m); }, left.kStrip,
      by_columns<T>([&](int64_t j, int64_t n) { return rows + (j * N + n) * D; }),
      [&](int64_t j, int64_t m, int64_t column, int64_t count, const float* sums) {
        alignas(64) float lanes[kColumns<T>];
        for (int64_t i = 0; i < kColumns<T>; ++i) lanes[i] = sums[i] * g;
        put_lanes<T>(lanes, count, streams, to + (j * M + m) * D + column);
      });
  return out;
}

// factor sum_jn c_jn |R_jn|^2
Tensor total_loss(const Tensor& scale, const Tensor& sse, const Tensor& factor) {
  const float *c = scale.const_data_ptr<float>(), *squares = sse.const_data_ptr<float>();
  double total = 0;
  for (int64_t n = 0; n < scale.numel(); ++n) total += double{c[n]} * squares[n];
  Tensor loss = torch::stable::new_empty(scale, {});
  *loss.mutable_data_ptr<float>() = static_cast<float>(total * *factor.const_data_ptr<float>());
  return loss;
}

// The loss, and what backward needs: the factor, valid, X, QKV, L, dY, delta, dU, du; nothing at
// all where a table must be refused. `needs`: the hidden side, U, u. With keeps_rows two more:
// pooled rows, and Y where the errors are in the place of dU because both are the smaller.
std::vector<Tensor> joined_forward_cpu(
    std::vector<Tensor> stages, std::vector<Tensor> targets, const Tensor& weight,
    const Tensor& bias, const Tensor& qkv_weight, const Tensor& head_weight,
    std::optional<Tensor> head_bias, std::optional<Tensor> position, std::optional<Tensor> stage,
    const Tensor& offsets, const Tensor& target_offsets, std::optional<Tensor> mask,
    std::optional<Tensor> target_mask, std::vector<double> stage_weights, int64_t heads,
    int64_t patch_size, bool causal, bool target_norm, double attention_scale,
    std::vector<int64_t> needs, bool keeps_rows) {
  for (const Tensor& target : targets) check_dense_rows(target, kOp, "teacher_stages");
  const Cut cut = cut_of(stages, offsets, mask, patch_size);
  const int64_t J = cut.count(), B = cut.batch, Q = cut.patches, D = weight.size(1),
                M = head_weight.size(1), item = weight.element_size();
  const auto empty = [&](const std::vector<int64_t>& sizes, ScalarType dtype) {
    return torch::stable::new_empty(weight, sizes, dtype);
  };
  Tensor valid = empty({B, Q}, ScalarType::Bool), scale = empty({J, B * Q}, ScalarType::Float),
         factor = empty({}, ScalarType::Float);
  if (!find_loss_rows(offsets, target_offsets, mask, target_mask, cut.length, targets[0].size(1), M,
                      stage_weights, valid, scale, factor))
    return {};
  const bool needs_hidden = needs[0], needs_head = needs[1];
  const bool keeps_errors = keeps_rows && needs_hidden && needs_head &&
                            cut.rows() * (M + D) * item <= M * D * int64_t{sizeof(float)};
  const int64_t pooled = keeps_rows && needs_hidden && !cut.p ? cut.channels : 0;
  const auto room = [&](int64_t columns) { return KeptGroup::room(J * B * Q * columns * item); };
  KeptGroup kept(4 * room(D) + room(pooled) + (keeps_errors ? room(D) : 0));
  Tensor x = kept.empty(weight, {J, B, Q, D}), qkv = kept.empty(weight, {J, B, Q, 3 * D}),
         means = kept.empty(weight, {J, B, Q, pooled}),
         y = keeps_errors ? kept.empty(weight, {J, B, Q, D})
                          : torch::stable::new_empty(weight, {J, B, Q, D}),
         lse = empty({B, heads, J * Q}, ScalarType::Float);
  for_type(weight, [&]<typename T>(T) {
    if (pooled) Rows<T>::pool(cut, means.mutable_data_ptr<T>());
    const Rows<T> rows = pooled ? Rows<T>(cut, means.const_data_ptr<T>()) : Rows<T>(cut);
    project<T>(cut, rows, weight, bias, position, stage, x);
    project_qkv<T>(x, qkv_weight, nullptr, qkv.mutable_data_ptr<T>());
    forward_heads<T>(qkv, valid, heads, causal, attention_scale, y.mutable_data_ptr<T>(), lse);
  });
  const StageErrors found = stage_errors(
      y, head_weight, head_bias, {targets, target_offsets, mask_of(target_mask), target_norm},
      scale, {needs_hidden, needs_head, bool(needs[2]), keeps_errors}, 0);
  const Tensor loss = total_loss(scale, found.sse, factor);
  if (!needs_hidden) {
    const Tensor no = empty({0}, ScalarType::Float);
    return {loss, factor, valid, no, no, no, no, no, found.dweight, found.dbias};
  }
  Tensor delta = torch::stable::new_empty(scale, {B, heads, J * Q});
  for_type(y, [&]<typename T>(T) { find_delta<T>(y, found.dy, heads, delta); });
  std::vector<Tensor> results{loss,     factor, valid,         x,          qkv, lse,
                              found.dy, delta,  found.dweight, found.dbias};
  if (keeps_rows) results.push_back(means);
  if (keeps_rows) results.push_back(keeps_errors ? y : empty({0}, ScalarType::Float));
  return results;
}

// dF of every stage, dW, dc, dWqkv, dU, du, dpos; `needs`: the stages, then W, c, Wqkv, pos. Where
// forward kept Y, it kept the errors in the place of dU.
std::vector<Tensor> joined_backward_cpu(const Tensor& upstream, std::vector<Tensor> kept,
                                        std::vector<Tensor> stages, const Tensor& weight,
                                        const Tensor& qkv_weight, const Tensor& offsets,
                                        std::optional<Tensor> mask, int64_t heads,
                                        int64_t patch_size, bool causal, double attention_scale,
                                        std::vector<int64_t> needs) {
  const Tensor &factor = kept[0], &valid = kept[1], &x = kept[2], &qkv = kept[3], &lse = kept[4],
               &dy = kept[5], &delta = kept[6], &dhead = kept[7], &dhead_bias = kept[8],
               nothing = torch::stable::new_empty(weight, {0}),
               &means = kept.size() > 9 ? kept[9] : nothing,
               &y = kept.size() > 9 ? kept[10] : nothing;
  const float g = *upstream.const_data_ptr<float>() * *factor.const_data_ptr<float>();
  const size_t J = stages.size();
  const int64_t S = x.size(0), B = x.size(1), Q = x.size(2);
  const bool needs_weight = needs[J], needs_bias = needs[J + 1], needs_qkv = needs[J + 2],
             needs_position = needs[J + 3];
  const std::vector<int64_t> wants(needs.begin(), needs.begin() + J);
  const Cut cut = cut_of(stages, offsets, mask, patch_size);
  const bool needs_x = needs_weight || needs_bias || needs_position || bytes_of_stages(cut, wants);
  std::vector<Tensor> results;
  for_type(weight, [&]<typename T>(T) {
    // dQKV lies where dF will: it is done with before
    KeptGroup of_stages(bytes_of_stages(cut, wants));
    Tensor dqkv = of_stages.lend(qkv, {S, B, Q, qkv.size(3)});
    backward_heads<T>(qkv, valid, heads, causal, attention_scale,
                      {qkv.const_data_ptr<T>(), dy.const_data_ptr<T>(), lse.const_data_ptr<float>(),
                       delta.const_data_ptr<float>(), g, dqkv.mutable_data_ptr<T>()});
    const T* rows = dqkv.const_data_ptr<T>();
    const int64_t head_elements = y.numel() ? S * dhead.size(2) * y.size(3) : dhead.numel();
    KeptGroup memory((needs_weight ? bytes_like(weight) : 0) +
                     (needs_qkv ? bytes_like(qkv_weight) : 0) +
                     KeptGroup::room(head_elements * sizeof(T)) +
                     KeptGroup::room(dhead_bias.numel() * sizeof(T)));
    Tensor dx = nothing, dqkv_weight = nothing;
    if (needs_x) {
      dx = torch::stable::new_empty(x, {S, B, Q, x.size(3)});
      find_dx<T>(rows, qkv_weight, dx);
    }
    if (needs_qkv) {
      dqkv_weight = memory.empty(qkv_weight, {qkv_weight.size(0), x.size(3)});
      find_dqkv_weight<T>(rows, x, dqkv_weight.mutable_data_ptr<T>());
    }
    dqkv = nothing;
    results = projection_gradients<T>(cut, weight, dx, wants, needs_weight,
                                      means.numel() ? means.const_data_ptr<T>() : nullptr,
                                      of_stages, memory);
    const auto summed = [&](int64_t groups, int64_t count, const auto& row_of) {
      Tensor out = torch::stable::new_empty(dx, {groups, x.size(3)});
      sum_rows(dx.const_data_ptr<T>(), x.size(3), groups, count, row_of, out.mutable_data_ptr<T>());
      return out;
    };
    const auto of_stage = [&](int64_t j, int64_t n) { return j * B * Q + n; };
    results.push_back(needs_bias ? summed(S, B * Q, of_stage) : nothing);
    results.push_back(dqkv_weight);
    results.push_back(y.numel() ? head_gradient<T>(dhead, y, g, memory)
                                : scaled<float, T>(dhead, g, weight, memory));
    results.push_back(scaled<float, T>(dhead_bias, g, weight, memory));
    const auto of_patch = [&](int64_t i, int64_t n) { return n * Q + i; };
    results.push_back(needs_position ? summed(Q, S * B, of_patch) : nothing);
  });
  return results;
}

#endif

}  // namespace

DF_REGISTER_CPU(m) {
#if defined(DF_LEVEL_avx512)
  m.impl("joined_forward", TORCH_BOX(&joined_forward_cpu));
  m.impl("joined_backward", TORCH_BOX(&joined_backward_cpu));
#else
  (void)m;
#endif
}
