// kl_distillation on the CPU: rows in parallel, one sweep forward (two for jsd), one backward.
#include "common/checks.h"
#include "common/kl_row.h"
#include "common/logit_rows.h"
#include "kl_distillation/soft_cap.h"

#include <optional>
#include <tuple>

namespace {

using namespace deepfusion;
using MaybeTensor = std::optional<Tensor>;

struct Options {
  Divergence divergence;
  double beta, temperature, kd_scale, ce_weight, softcap;
};

// What both directions know of the call.
struct Call {
  LogitRows student, teacher;
  const int64_t* labels = nullptr;
  const bool* keep = nullptr;
  Options options;
  int64_t T = 0, kd_columns = 0;
  bool is_double = false;

  bool kept(int64_t t) const { return !keep || keep[t]; }
};

Call describe(const Tensor& student, const MaybeTensor& teacher, const MaybeTensor& labels,
              const MaybeTensor& keep, const Options& options) {
  const char* op = "kl_distillation";
  check_shape(student, op, "student", "[A, B, V_s]", {-1, -1, -1});
  check_dense_rows(student, op, "student");
  Call call;
  call.options = options;
  call.student = LogitRows(student, false);
  call.T = student.size(0) * student.size(1);
  call.is_double = student.scalar_type() == ScalarType::Double;
  if (teacher) {
    check_shape(*teacher, op, "teacher", "[A, B, V_t]", {student.size(0), student.size(1), -1});
    check_dense_rows(*teacher, op, "teacher");
    call.teacher = LogitRows(*teacher, false);
    call.kd_columns = std::min(call.student.V, call.teacher.V);
    call.is_double |= teacher->scalar_type() == ScalarType::Double;
  }
  if (labels) {
    check_shape(*labels, op, "labels", "[T]", {call.T});
    call.labels = labels->const_data_ptr<int64_t>();
  }
  if (keep) {
    check_shape(*keep, op, "keep", "[T]", {call.T});
    call.keep = keep->const_data_ptr<bool>();
  }
  return call;
}

template <typename W>
RowOptions<W> row_options(const Call& call) {
  RowOptions<W> row;
  row.divergence = call.options.divergence;
  row.beta = static_cast<W>(call.options.beta);
  row.inv_tau = static_cast<W>(1 / call.options.temperature);
  row.with_kd = call.kd_columns > 0;
  row.with_ce = call.labels != nullptr;
  row.kd_columns = call.kd_columns;
  row.all_columns = call.student.V;
  return row;
}

// One side of a row, capped where the call asks for it.
template <typename W>
struct Side {
  LogitRow<W> row;
  W cap;

  const W* operator()(int64_t begin, int64_t count, W* buffer) const {
    const W* x = row(begin, count, buffer);
    if (cap == W(0)) return x;
#pragma omp simd
    for (int64_t v = 0; v < count; ++v) buffer[v] = soft_capped(x[v], cap);
    return buffer;
  }
};

template <typename W>
Side<W> row_of(const Call& call, const LogitRows& rows, int64_t t) {
  return {{rows.row(t), rows.dtype}, static_cast<W>(call.options.softcap)};
}

template <typename W>
GradientRow<W> gradient_row_of(const LogitRows& rows, int64_t t) {
  return {rows.row(t), rows.dtype};
}

// CE of one row from its statistics; +inf where the label's own logit is missing.
template <typename W>
double cross_entropy(const Side<W>& student, int64_t label, const RowStats<W>& stats) {
  W buffer[1];
  const double at_label = *student(label, 1, buffer);
  const double ln_l = stats.ln_l_1;
  if (at_label <= kMissing) return ln_l == ln_l ? INFINITY : NAN;
  return stats.m_1 + ln_l - at_label;
}

template <typename W>
void forward_rows(const Call& call, W* loss, RowStats<W>* saved) {
  const RowOptions<W> options = row_options<W>(call);
  const double kd_scale = call.options.kd_scale, ce_weight = call.options.ce_weight;
  for_rows(call.T, 1, [&](int64_t t) {
    loss[t] = W(0);
    saved[t] = {};
    if (!call.kept(t)) return;
    const Side<W> student = row_of<W>(call, call.student, t);
    const RowResult<W> row = row_statistics(student, row_of<W>(call, call.teacher, t), options);
    saved[t] = row.stats;
    double total = options.with_kd ? kd_scale * row.kd : 0.0;
    if (options.with_ce) total += ce_weight * cross_entropy(student, call.labels[t], row.stats);
    loss[t] = static_cast<W>(total);
  });
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& student, const MaybeTensor& teacher,
                                       const MaybeTensor& labels, const MaybeTensor& keep,
                                       int64_t divergence, double beta, double temperature,
                                       double kd_scale, double ce_weight, double softcap) {
  const Options options{
      static_cast<Divergence>(divergence), beta, temperature, kd_scale, ce_weight, softcap};
  const Call call = describe(student, teacher, labels, keep, options);
  const ScalarType wide = call.is_double ? ScalarType::Double : ScalarType::Float;
  Tensor loss = torch::stable::new_empty(student, {call.T}, wide);
  Tensor stats = torch::stable::new_empty(student, {call.T, kNumStats}, wide);
  const auto run = [&](auto zero) {
    using W = decltype(zero);
    forward_rows<W>(call, static_cast<W*>(loss.mutable_data_ptr()),
                    static_cast<RowStats<W>*>(stats.mutable_data_ptr()));
  };
  call.is_double ? run(0.0) : run(0.0f);
  return {loss, stats};
}

// The gradient of raw logits from that of capped ones.
template <typename W>
void through_cap(const W* capped, int64_t count, W cap, W* gradient) {
  if (!gradient || !capped || cap == W(0)) return;
#pragma omp simd
  for (int64_t v = 0; v < count; ++v) gradient[v] *= soft_cap_slope(capped[v], cap);
}

// Columns [begin, end) of one row's gradients, in blocks.
template <typename W>
void gradient_columns(int64_t begin, int64_t end, const Side<W>& student, const Side<W>& teacher,
                      const RowStats<W>& stats, const RowOptions<W>& options,
                      const RowScales<W>& scales, const GradientRow<W>& dstudent,
                      const GradientRow<W>& dteacher) {
  alignas(64) W s_buffer[kBlock], t_buffer[kBlock], ds_buffer[kBlock], dt_buffer[kBlock];
  for (; begin < end; begin += kBlock) {
    const int64_t count = std::min(kBlock, end - begin);
    const bool shared = begin < options.kd_columns;
    const W* s = shared || dstudent.data ? student(begin, count, s_buffer) : nullptr;
    const W* t = shared ? teacher(begin, count, t_buffer) : nullptr;
    W* ds = dstudent.place(begin, ds_buffer);
    W* dt = dteacher.place(begin, dt_buffer);
    gradient_block(s, t, begin, count, stats, options, scales, ds, dt);
    through_cap(s, count, student.cap, ds);
    through_cap(t, count, teacher.cap, dt);
    dstudent.store(begin, count, ds);
    dteacher.store(begin, count, dt);
  }
}

template <typename W>
void backward_rows(const Call& call, const W* dloss, const RowStats<W>* saved,
                   const LogitRows& dstudent, const LogitRows& dteacher) {
  const RowOptions<W> options = row_options<W>(call);
  const W kd = static_cast<W>(call.options.kd_scale / call.options.temperature);
  const W ce = static_cast<W>(call.options.ce_weight);
  for_rows(call.T, 1, [&](int64_t t) {
    const GradientRow<W> ds = gradient_row_of<W>(dstudent, t), dt = gradient_row_of<W>(dteacher, t);
    if (!call.kept(t)) {
      if (ds.data) std::memset(ds.data, 0, dstudent.V * bytes_of(ds.dtype));
      if (dt.data) std::memset(dt.data, 0, dteacher.V * bytes_of(dt.dtype));
      return;
    }
    const Side<W> s = row_of<W>(call, call.student, t), u = row_of<W>(call, call.teacher, t);
    const RowScales<W> scales{dloss[t] * kd, dloss[t] * ce, call.labels ? call.labels[t] : -1};
    const GradientRow<W> none;
    const int64_t shared = options.kd_columns;
    gradient_columns(int64_t{0}, shared, s, u, saved[t], options, scales, ds, dt);
    if (ds.data) gradient_columns(shared, dstudent.V, s, u, saved[t], options, scales, ds, none);
    if (dt.data) gradient_columns(shared, dteacher.V, s, u, saved[t], options, scales, none, dt);
  });
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& dloss, const Tensor& student,
                                        const MaybeTensor& teacher, const MaybeTensor& labels,
                                        const MaybeTensor& keep, const Tensor& stats,
                                        int64_t divergence, double beta, double temperature,
                                        double kd_scale, double ce_weight, double softcap,
                                        bool needs_dstudent, bool needs_dteacher) {
  const Options options{
      static_cast<Divergence>(divergence), beta, temperature, kd_scale, ce_weight, softcap};
  const Call call = describe(student, teacher, labels, keep, options);
  const Tensor& like = teacher ? *teacher : student;
  const auto empty_like_rows = [](const Tensor& rows, bool wanted) {
    if (!wanted) return torch::stable::new_empty(rows, {0});
    return torch::stable::new_empty(rows, {rows.size(0), rows.size(1), rows.size(2)});
  };
  Tensor dstudent = empty_like_rows(student, needs_dstudent);
  Tensor dteacher = empty_like_rows(like, needs_dteacher);
  advise_large_pages(dstudent.mutable_data_ptr(),
                     dstudent.numel() * bytes_of(student.scalar_type()));
  advise_large_pages(dteacher.mutable_data_ptr(), dteacher.numel() * bytes_of(like.scalar_type()));
  const LogitRows ds = needs_dstudent ? LogitRows(dstudent, true) : LogitRows();
  const LogitRows dt = needs_dteacher ? LogitRows(dteacher, true) : LogitRows();
  const auto run = [&](auto zero) {
    using W = decltype(zero);
    backward_rows<W>(call, static_cast<const W*>(dloss.const_data_ptr()),
                     static_cast<const RowStats<W>*>(stats.const_data_ptr()), ds, dt);
  };
  call.is_double ? run(0.0) : run(0.0f);
  return {dstudent, dteacher};
}

DF_REGISTER_CPU(m) {
  m.impl("kl_distillation_forward", TORCH_BOX(&forward_cpu));
  m.impl("kl_distillation_backward", TORCH_BOX(&backward_cpu));
}

}  // namespace
