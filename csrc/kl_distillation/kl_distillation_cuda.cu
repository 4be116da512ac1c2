// kl_distillation on CUDA: one block of threads a row, 16-byte loads, sums merged in a fixed order,
// no atomics.
#include "common/checks.h"
#include "common/kl_row.cuh"
#include "common/logit_rows.cuh"
#include "common/torch_cuda.h"
#include "kl_distillation/soft_cap.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>

namespace {

using namespace deepfusion;
using torch::headeronly::ScalarType;
using MaybeTensor = std::optional<Tensor>;

constexpr int kThreads = 256;  // not measured here
constexpr int kWarps = kThreads / kWarp;
constexpr int kStep = kThreads * kLane;

struct Call {
  Side student, teacher;
  const int64_t* labels = nullptr;
  const bool* keep = nullptr;
  int32_t shared = 0;  // columns of the divergence
  float beta = 0, inv_tau = 1, kd_scale = 0, ce_weight = 0, softcap = 0;
};

// Eight columns of one side, capped where the call asks for it.
__device__ __forceinline__ void load_capped(const void* row, int32_t first, int32_t end,
                                            const Side& side, bool aligned, float cap,
                                            float (&out)[kLane]) {
  load_columns(row, first, end, side.kind, aligned, out);
  if (cap == 0.0f) return;
#pragma unroll
  for (int i = 0; i < kLane; ++i) out[i] = soft_capped(out[i], cap);
}

// Second sweep of jsd: K_s = KL(q | m), K_t = KL(p | m) from the final statistics.
__device__ void jsd_sums(const Call& call, const void* student, const void* teacher, bool s_aligned,
                         bool t_aligned, RowStats<float>& stats) {
  __shared__ float shared[kWarps];
  float k_s = 0.0f, k_t = 0.0f;
  for (int32_t first = threadIdx.x * kLane; first < call.shared; first += kStep) {
    float s[kLane], t[kLane];
    load_capped(student, first, call.shared, call.student, s_aligned, call.softcap, s);
    load_capped(teacher, first, call.shared, call.teacher, t_aligned, call.softcap, t);
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const float ln_q = log_prob(s[i], stats.m_s, stats.ln_l_s, call.inv_tau);
      const float ln_p = log_prob(t[i], stats.m_t, stats.ln_l_t, call.inv_tau);
      const JsdPoint<float> at = jsd_point(ln_q, ln_p, call.beta);
      k_s += exp_nonpositive(ln_q) * at.v;
      k_t -= exp_nonpositive(ln_p) * at.w;
    }
  }
  stats.k_s = block_sum(k_s, shared);
  stats.k_t = block_sum(k_t, shared);
}

// NaN for a label outside the row, +inf where the label's own logit is missing.
__device__ float cross_entropy(const void* row, int64_t label, const Side& student,
                               const RowStats<float>& stats, float cap) {
  if (label < 0 || label >= student.V) return NAN;
  const float at_label = soft_capped(load1(row, label, student.kind), cap);
  const float ln_z = stats.m_1 + stats.ln_l_1;
  return at_label <= kMissing ? ln_z + INFINITY : ln_z - at_label;
}

// Three blocks a multiprocessor: left alone, ptxas aims at four on sm_90a and spills jsd's cap.
template <Divergence kDivergence>
__global__ void __launch_bounds__(kThreads, 3)
    kl_forward_kernel(Call call, float* loss, RowStats<float>* saved) {
  const int64_t row = blockIdx.x;
  if (call.keep && !call.keep[row]) {
    if (threadIdx.x == 0) loss[row] = 0.0f, saved[row] = RowStats<float>{};
    return;
  }
  const void* student = call.student.row(row);
  const void* teacher = call.shared > 0 ? call.teacher.row(row) : nullptr;
  const bool s_aligned = is_aligned16(student), t_aligned = is_aligned16(teacher);
  const bool own_sum = call.labels && (call.inv_tau != 1.0f || call.student.V > call.shared);
  KLState<float> pair;
  ExpSum<float> at_one;
  for (int32_t first = threadIdx.x * kLane; first < call.shared; first += kStep) {
    float s[kLane], t[kLane];
    load_capped(student, first, call.shared, call.student, s_aligned, call.softcap, s);
    load_capped(teacher, first, call.shared, call.teacher, t_aligned, call.softcap, t);
    pair = merge(pair, state8(s, t, call.inv_tau), call.inv_tau);
  }
  if (own_sum) {
    for (int32_t first = threadIdx.x * kLane; first < call.student.V; first += kStep) {
      float s[kLane];
      load_capped(student, first, call.student.V, call.student, s_aligned, call.softcap, s);
      at_one = merge(at_one, exp_sum8(s, max8(s), 1.0f), 1.0f);
    }
  }
  pair = block_merge<kWarps>(pair, call.inv_tau);
  at_one = own_sum ? block_merge<kWarps>(at_one, 1.0f) : pair.s;
  RowStats<float> stats{pair.s.m, log_sum(pair.s), pair.t.m,       log_sum(pair.t), 0.0f,
                        0.0f,     at_one.m,        log_sum(at_one)};
  float total = 0.0f;
  if (call.shared > 0 && kDivergence == Divergence::kJSD) {
    jsd_sums(call, student, teacher, s_aligned, t_aligned, stats);
    total = call.kd_scale * (call.beta * stats.k_t + (1.0f - call.beta) * stats.k_s);
  } else if (call.shared > 0) {
    stats.k_s = stats.k_t = finish_kl(pair, kDivergence == Divergence::kReverseKL);
    total = call.kd_scale * stats.k_s;
  }
  if (threadIdx.x != 0) return;
  if (call.labels)
    total += call.ce_weight *
             cross_entropy(student, call.labels[row], call.student, stats, call.softcap);
  loss[row] = total;
  saved[row] = stats;
}

template <Divergence kDivergence>
__global__ void __launch_bounds__(kThreads)
    kl_backward_kernel(Call call, const float* dloss, const RowStats<float>* saved, Side dstudent,
                       Side dteacher) {
  const int64_t row = blockIdx.x;
  const bool kept = !call.keep || call.keep[row];
  const void* student = call.student.row(row);
  const void* teacher = call.shared > 0 ? call.teacher.row(row) : nullptr;
  void* ds_row = dstudent.data ? dstudent.row(row) : nullptr;
  void* dt_row = dteacher.data ? dteacher.row(row) : nullptr;
  const bool s_aligned = is_aligned16(student), t_aligned = is_aligned16(teacher);
  const bool ds_aligned = is_aligned16(ds_row), dt_aligned = is_aligned16(dt_row);
  const RowStats<float> stats = saved[row];
  const float c = dloss[row] * call.kd_scale * call.inv_tau, g = dloss[row] * call.ce_weight;
  const int64_t label = call.labels ? call.labels[row] : -1;
  const float hit = label >= 0 && label < call.student.V ? g : NAN;
  const int32_t end = max(ds_row ? dstudent.V : 0, dt_row ? dteacher.V : 0);
  for (int32_t first = threadIdx.x * kLane; first < end; first += kStep) {
    float ds[kLane] = {}, dt[kLane] = {};
    if (kept) {
      float s[kLane], t[kLane];
      load_capped(student, first, call.student.V, call.student, s_aligned, call.softcap, s);
      load_capped(teacher, first, call.shared, call.teacher, t_aligned, call.softcap, t);
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        if (first + i < call.shared) {
          const float ln_q = log_prob(s[i], stats.m_s, stats.ln_l_s, call.inv_tau);
          const float ln_p = log_prob(t[i], stats.m_t, stats.ln_l_t, call.inv_tau);
          const float q = exp_nonpositive(ln_q), p = exp_nonpositive(ln_p);
          ds[i] = c * student_slope<kDivergence>(ln_q, ln_p, q, p, call.beta, stats.k_s);
          if (dt_row)
            dt[i] = c * teacher_slope<kDivergence>(ln_q, ln_p, q, p, call.beta, stats.k_t);
        }
        if (call.labels) {
          ds[i] += hit * (exp_nonpositive(log_prob(s[i], stats.m_1, stats.ln_l_1, 1.0f)) -
                          (first + i == label));
        }
        if (call.softcap != 0.0f) {
          ds[i] *= soft_cap_slope(s[i], call.softcap);
          dt[i] *= soft_cap_slope(t[i], call.softcap);
        }
      }
    }
    if (ds_row) store_columns(ds_row, first, dstudent.V, dstudent.kind, ds_aligned, ds);
    if (dt_row) store_columns(dt_row, first, dteacher.V, dteacher.kind, dt_aligned, dt);
  }
}

Side describe(const Tensor& logits, bool written) {
  const ScalarType dtype = logits.scalar_type();
  const bool is_float = dtype == ScalarType::Float, is_bf16 = dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(is_float || is_bf16 || dtype == ScalarType::Half,
                  "kl_distillation: logits must be float32, bfloat16 or float16");
  check_shape(logits, "kl_distillation", "logits", "[A, B, V]", {-1, -1, -1});
  check_dense_rows(logits, "kl_distillation", "logits");
  Side side;
  side.data = written ? logits.mutable_data_ptr() : const_cast<void*>(logits.const_data_ptr());
  side.kind = is_float ? Kind::kFloat : is_bf16 ? Kind::kBFloat16 : Kind::kHalf;
  side.V = static_cast<int32_t>(logits.size(2));
  side.B = logits.size(1);
  side.stride_a = logits.stride(0);
  side.stride_b = logits.stride(1);
  return side;
}

Call describe(const Tensor& student, const MaybeTensor& teacher, const MaybeTensor& labels,
              const MaybeTensor& keep, double beta, double temperature, double kd_scale,
              double ce_weight, double softcap) {
  Call call;
  call.student = describe(student, false);
  if (teacher) call.teacher = describe(*teacher, false);
  call.shared = teacher ? std::min(call.student.V, call.teacher.V) : 0;
  call.labels = labels ? labels->const_data_ptr<int64_t>() : nullptr;
  call.keep = keep ? keep->const_data_ptr<bool>() : nullptr;
  call.beta = static_cast<float>(beta);
  call.inv_tau = static_cast<float>(1 / temperature);
  call.kd_scale = static_cast<float>(kd_scale);
  call.ce_weight = static_cast<float>(ce_weight);
  call.softcap = static_cast<float>(softcap);
  return call;
}

// body(integral_constant) with the divergence known when compiling.
template <typename Body>
void with_divergence(int64_t divergence, const Body& body) {
  switch (static_cast<Divergence>(divergence)) {
    case Divergence::kForwardKL:
      return body(std::integral_constant<Divergence, Divergence::kForwardKL>());
    case Divergence::kReverseKL:
      return body(std::integral_constant<Divergence, Divergence::kReverseKL>());
    case Divergence::kJSD:
      return body(std::integral_constant<Divergence, Divergence::kJSD>());
  }
}

std::tuple<Tensor, Tensor> forward_cuda(const Tensor& student, const MaybeTensor& teacher,
                                        const MaybeTensor& labels, const MaybeTensor& keep,
                                        int64_t divergence, double beta, double temperature,
                                        double kd_scale, double ce_weight, double softcap) {
  torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  const Call call =
      describe(student, teacher, labels, keep, beta, temperature, kd_scale, ce_weight, softcap);
  const int64_t T = student.size(0) * student.size(1);
  Tensor loss = torch::stable::new_empty(student, {T}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(student, {T, kNumStats}, ScalarType::Float);
  if (T == 0) return {loss, stats};
  const cudaStream_t stream = current_stream(student.get_device_index());
  auto* saved = reinterpret_cast<RowStats<float>*>(stats.mutable_data_ptr<float>());
  with_divergence(divergence, [&](auto d) {
    kl_forward_kernel<decltype(d)::value><<<static_cast<unsigned>(T), kThreads, 0, stream>>>(
        call, loss.mutable_data_ptr<float>(), saved);
  });
  check_launch("kl_distillation");
  return {loss, stats};
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& dloss, const Tensor& student,
                                         const MaybeTensor& teacher, const MaybeTensor& labels,
                                         const MaybeTensor& keep, const Tensor& stats,
                                         int64_t divergence, double beta, double temperature,
                                         double kd_scale, double ce_weight, double softcap,
                                         bool needs_dstudent, bool needs_dteacher) {
  torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  const Call call =
      describe(student, teacher, labels, keep, beta, temperature, kd_scale, ce_weight, softcap);
  const Tensor& like = teacher ? *teacher : student;
  const auto empty_rows = [](const Tensor& rows, bool wanted) {
    if (!wanted) return torch::stable::new_empty(rows, {0});
    return torch::stable::new_empty(rows, {rows.size(0), rows.size(1), rows.size(2)});
  };
  Tensor dstudent = empty_rows(student, needs_dstudent),
         dteacher = empty_rows(like, needs_dteacher);
  const int64_t T = student.size(0) * student.size(1);
  if (T == 0) return {dstudent, dteacher};
  const Side ds = needs_dstudent ? describe(dstudent, true) : Side();
  const Side dt = needs_dteacher ? describe(dteacher, true) : Side();
  const cudaStream_t stream = current_stream(student.get_device_index());
  const auto* saved = reinterpret_cast<const RowStats<float>*>(stats.const_data_ptr<float>());
  with_divergence(divergence, [&](auto d) {
    kl_backward_kernel<decltype(d)::value><<<static_cast<unsigned>(T), kThreads, 0, stream>>>(
        call, dloss.const_data_ptr<float>(), saved, ds, dt);
  });
  check_launch("kl_distillation_backward");
  return {dstudent, dteacher};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepfusion_native, CUDA, m) {
  m.impl("kl_distillation_forward", TORCH_BOX(&forward_cuda));
  m.impl("kl_distillation_backward", TORCH_BOX(&backward_cuda));
}
