// The step of Muon: whole, or its Newton-Schulz rounds on a stack of matrices; one matrix a thread.
//
//   m <- m + (1 - mu) (g - m)      X <- rounds of g + mu (m - g)
//   p <- (1 - decay) p - rate sqrt(max(A, B)) X
//
// Multiplied in bfloat16 where the processor can, else in float32.
#include "common/checks.h"
#include "common/row_blocks.h"
#include "orthogonalise/newton_schulz.h"

#include <atomic>
#include <optional>
#include <vector>

namespace {

using namespace deepfusion;
using torch::stable::Tensor;

template <typename S>
void orthogonalise(const Tensor& matrices, Tensor& out, int64_t rounds, Quintic by) {
  const int64_t height = matrices.size(1), width = matrices.size(2), count = height * width;
  const float* source = matrices.const_data_ptr<float>();
  float* target = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, matrices.size(0), 1, [&](int64_t begin, int64_t end) {
    NewtonSchulz<S> rows(height, width);
    for (int64_t n = begin; n < end; ++n)
      rows.run(source + n * count, rounds, by, target + n * count);
  });
}

// One matrix [height, width] of a parameter, and what belongs to it.
struct Matrix {
  int64_t height, width;
  float* parameter;
  const float* gradient;
  float* momentum;
  int64_t count() const { return height * width; }
};

struct Step {
  float momentum, rate, decay;
};

template <typename S>
void move(const Matrix& one, const Step& step, int64_t rounds, Quintic by, NewtonSchulz<S>& rows,
          float* ahead) {
  const float ease = 1.0f - step.momentum, kept = 1.0f - step.decay;
  const int64_t count = one.count();
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float gradient = one.gradient[i];
    const float mean = one.momentum[i] + ease * (gradient - one.momentum[i]);
    one.momentum[i] = mean;
    ahead[i] = mean + ease * (gradient - mean);
  }
  rows.run(ahead, rounds, by, ahead);
  const float rate = step.rate * std::sqrt(static_cast<float>(std::max(one.height, one.width)));
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) one.parameter[i] = kept * one.parameter[i] - rate * ahead[i];
}

// Largest first, and each to whoever is free: the last ones to end are small. One shape after the
// other, since a thread's memory serves one shape.
std::vector<Matrix> in_order(std::vector<Tensor>& parameters, const std::vector<Tensor>& gradients,
                             std::vector<Tensor>& momenta) {
  std::vector<Matrix> found;
  for (size_t n = 0; n < parameters.size(); ++n) {
    Tensor& parameter = parameters[n];
    const int64_t axes = parameter.dim();
    const int64_t height = parameter.size(axes - 2), width = parameter.size(axes - 1);
    Matrix one{height, width, parameter.mutable_data_ptr<float>(),
               gradients[n].const_data_ptr<float>(), momenta[n].mutable_data_ptr<float>()};
    for (int64_t left = parameter.numel(); left > 0; left -= one.count()) {
      found.push_back(one);
      one.parameter += one.count();
      one.gradient += one.count();
      one.momentum += one.count();
    }
  }
  std::stable_sort(found.begin(), found.end(), [](const Matrix& one, const Matrix& other) {
    return std::tuple(one.count(), one.height) > std::tuple(other.count(), other.height);
  });
  return found;
}

template <typename S>
void muon_step(const std::vector<Matrix>& matrices, const Step& step, int64_t rounds, Quintic by) {
  const int64_t count = static_cast<int64_t>(matrices.size());
  if (count == 0) return;
  const int64_t shares = std::min(num_shares(), count);
  std::atomic<int64_t> next = 0;
  for_shares(shares, [&](int64_t) {
    const Aligned<float> ahead(matrices[0].count());
    std::optional<NewtonSchulz<S>> rows;
    for (int64_t n = next++; n < count; n = next++) {
      const Matrix& one = matrices[n];
      if (!rows || !rows->serves(one.height, one.width)) rows.emplace(one.height, one.width);
      move(one, step, rounds, by, *rows, ahead.get());
    }
  });
}

// body(S()) with what factors are multiplied in.
template <typename Body>
void with_factor(const Body& body) {
#if defined(DF_LEVEL_avx512)
  if (multiplies_bfloat16()) return body(BFloat16());
#endif
  body(float());
}

// out [N, A, B] <- matrices [N, A, B], float32 and contiguous both.
void orthogonalise_cpu(Tensor matrices, Tensor out, int64_t rounds, double a, double b, double c) {
  with_factor([&](auto factor) {
    orthogonalise<decltype(factor)>(matrices, out, rounds, {float(a), float(b), float(c)});
  });
}

// Parameters [..., A, B] and what belongs to them, float32 and contiguous all.
void muon_step_cpu(std::vector<Tensor> parameters, std::vector<Tensor> gradients,
                   std::vector<Tensor> momenta, int64_t rounds, double a, double b, double c,
                   double momentum, double rate, double decay) {
  with_factor([&](auto factor) {
    muon_step<decltype(factor)>(in_order(parameters, gradients, momenta),
                                {float(momentum), float(rate), float(decay)}, rounds,
                                {float(a), float(b), float(c)});
  });
}

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("orthogonalise", TORCH_BOX(&orthogonalise_cpu));
  m.impl("muon_step", TORCH_BOX(&muon_step_cpu));
}
