// Top-k distillation on tensors: strided rows of logits, K teacher entries each.
#include "common/checks.h"
#include "topk_kl/topk_row.h"

#include <optional>
#include <tuple>

namespace {

using namespace deepfusion;
using namespace deepfusion::topk;

// The tensors of a call as rows.
template <typename T>
struct Rows {
  Rows(const Tensor& student, const Tensor& ids, const Tensor& logprobs,
       const std::optional<Tensor>& row_labels)
      : count(student.size(0) * student.size(1)),
        middle(student.size(1)),
        columns(student.size(2)),
        stride_a(student.stride(0)),
        stride_b(student.stride(1)),
        K(ids.size(1)),
        logits(student.const_data_ptr<T>()),
        id(ids.const_data_ptr<int64_t>()),
        ln_p(logprobs.const_data_ptr<double>()),
        labels(row_labels ? row_labels->const_data_ptr<int64_t>() : nullptr) {}

  const T* row(int64_t t) const { return logits + t / middle * stride_a + t % middle * stride_b; }
  int64_t label(int64_t t) const { return labels ? labels[t] : -1; }

  // body(t, row) for each row that is not masked, masked(t) for the others.
  template <typename Body, typename Masked>
  void each(const wide_t<T>* scale, const Options& options, const Body& body,
            const Masked& masked) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      Kept kept(columns);
      for (int64_t t = begin; t < end; ++t) {
        if (scale[t] == wide_t<T>(0)) {
          masked(t);
          continue;
        }
        kept.read(t, id + t * K, ln_p + t * K, K);
        body(t, Row<T>(row(t), kept, options));
      }
    });
  }

  int64_t count, middle, columns, stride_a, stride_b, K;
  const T* logits;
  const int64_t* id;
  const double* ln_p;
  const int64_t* labels;
};

template <typename T>
void forward_rows(const Rows<T>& rows, const Options& options, const wide_t<T>* scales,
                  wide_t<T>* losses, wide_t<T>* statistics) {
  using W = wide_t<T>;
  rows.each(
      scales, options,
      [&](int64_t t, const Row<T>& row) {
        Saved saved{};
        losses[t] = W(scales[t] * row_forward(row, rows.columns, rows.label(t), saved));
        saved.store(statistics + t * kNumSaved);
      },
      [&](int64_t t) {
        losses[t] = W(0);
        Saved{}.store(statistics + t * kNumSaved);
      });
}

template <typename T>
void backward_rows(const Rows<T>& rows, const Options& options, const wide_t<T>* scales,
                   const wide_t<T>* drows, const wide_t<T>* statistics, T* out) {
  rows.each(
      scales, options,
      [&](int64_t t, const Row<T>& row) {
        const double dloss = double(drows[t]) * scales[t];
        row_backward(row, rows.columns, rows.label(t), Saved::load(statistics + t * kNumSaved),
                     dloss, out + t * rows.columns);
      },
      [&](int64_t t) {
        std::fill(out + t * rows.columns, out + (t + 1) * rows.columns, from_wide<T>(wide_t<T>(0)));
      });
}

std::tuple<Tensor, Tensor> topk_kl_forward_cpu(const Tensor& student, const Tensor& ids,
                                               const Tensor& logprobs,
                                               const std::optional<Tensor>& labels,
                                               const Tensor& scale, int64_t tail,
                                               int64_t divergence, double beta, double temperature,
                                               double kd_weight, double ce_weight, double floor) {
  check_dense_rows(student, "topk_kl", "student_logits");
  const Options options = {static_cast<Tail>(tail),
                           static_cast<Divergence>(divergence),
                           beta,
                           1.0 / temperature,
                           kd_weight,
                           ce_weight,
                           floor};
  Tensor losses = torch::stable::empty_like(scale);
  Tensor statistics = torch::stable::new_empty(scale, {scale.size(0), kNumSaved});
  DF_DISPATCH_FLOAT(student.scalar_type(), "topk_kl_forward", [&] {
    using W = wide_t<scalar_t>;
    forward_rows(Rows<scalar_t>(student, ids, logprobs, labels), options, scale.const_data_ptr<W>(),
                 losses.mutable_data_ptr<W>(), statistics.mutable_data_ptr<W>());
  });
  return {losses, statistics};
}

Tensor topk_kl_backward_cpu(const Tensor& drows, const Tensor& statistics, const Tensor& student,
                            const Tensor& ids, const Tensor& logprobs,
                            const std::optional<Tensor>& labels, const Tensor& scale, int64_t tail,
                            int64_t divergence, double beta, double temperature, double kd_weight,
                            double ce_weight, double floor) {
  const Options options = {static_cast<Tail>(tail),
                           static_cast<Divergence>(divergence),
                           beta,
                           1.0 / temperature,
                           kd_weight,
                           ce_weight,
                           floor};
  Tensor gradient =
      torch::stable::new_empty(student, {student.size(0), student.size(1), student.size(2)});
  DF_DISPATCH_FLOAT(student.scalar_type(), "topk_kl_backward", [&] {
    using W = wide_t<scalar_t>;
    backward_rows(Rows<scalar_t>(student, ids, logprobs, labels), options,
                  scale.const_data_ptr<W>(), drows.const_data_ptr<W>(),
                  statistics.const_data_ptr<W>(), gradient.mutable_data_ptr<scalar_t>());
  });
  return gradient;
}

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("topk_kl_forward", TORCH_BOX(&topk_kl_forward_cpu));
  m.impl("topk_kl_backward", TORCH_BOX(&topk_kl_backward_cpu));
}
