// One row against the textbook in float64: blocks, tails, offsets, missing columns.
#include "common/kl_row.h"

#include <cassert>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

using namespace deepfusion;

struct Row {
  std::vector<float> values;
  const float* operator()(int64_t begin, int64_t, float*) const { return values.data() + begin; }
};

Row random_row(int64_t columns, float spread, float offset, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(offset, spread);
  Row row{std::vector<float>(columns)};
  for (float& v : row.values) v = normal(generator);
  return row;
}

std::vector<double> log_softmax(const Row& row, double tau) {
  double m = -INFINITY, l = 0;
  for (float v : row.values) m = std::max(m, v / tau);
  for (float v : row.values) l += std::exp(v / tau - m);
  std::vector<double> result;
  for (float v : row.values) result.push_back(v / tau - m - std::log(l));
  return result;
}

double textbook(Divergence divergence, const std::vector<double>& ln_q,
                const std::vector<double>& ln_p, double beta) {
  double kd = 0;
  for (size_t v = 0; v < ln_q.size(); ++v) {
    const double q = std::exp(ln_q[v]), p = std::exp(ln_p[v]);
    if (divergence == Divergence::kForwardKL) kd += p * (ln_p[v] - ln_q[v]);
    if (divergence == Divergence::kReverseKL) kd += q * (ln_q[v] - ln_p[v]);
    if (divergence == Divergence::kJSD) {
      const double m = beta * p + (1 - beta) * q;
      kd +=
          (p > 0 ? beta * p * std::log(p / m) : 0) + (q > 0 ? (1 - beta) * q * std::log(q / m) : 0);
    }
  }
  return kd;
}

RowOptions<float> options_for(Divergence divergence, int64_t columns, double tau) {
  RowOptions<float> options;
  options.divergence = divergence;
  options.beta = 0.3f;
  options.inv_tau = static_cast<float>(1 / tau);
  options.kd_columns = options.all_columns = columns;
  options.with_ce = true;
  return options;
}

void value_and_gradient_agree(Divergence divergence, int64_t columns, double tau, float spread,
                              float offset) {
  const Row student = random_row(columns, spread, offset, 1),
            teacher = random_row(columns, spread, offset, 2);
  const RowOptions<float> options = options_for(divergence, columns, tau);
  const RowResult<float> result = row_statistics(student, teacher, options);
  const std::vector<double> ln_q = log_softmax(student, tau), ln_p = log_softmax(teacher, tau);
  const double kd = textbook(divergence, ln_q, ln_p, options.beta);
  assert(std::abs(result.kd - kd) <= 4e-6 * std::max(1.0, kd));
  const std::vector<double> ln_1 = log_softmax(student, 1);
  const double ce = result.stats.m_1 + result.stats.ln_l_1 - student.values[0];
  assert(std::abs(ce + ln_1[0]) <= 4e-6 * std::max(1.0, std::abs(ln_1[0])));

  std::vector<float> ds(columns), dt(columns);
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t count = std::min(kBlock, columns - begin);
    gradient_block(student(begin, count, nullptr), teacher(begin, count, nullptr), begin, count,
                   result.stats, options, RowScales<float>{2.0f, 0.0f, -1}, ds.data() + begin,
                   dt.data() + begin);
  }
  // a step along the gradient's own column must change the textbook value as the gradient says
  for (int64_t v : {int64_t{0}, columns / 2, columns - 1}) {
    std::vector<double> up = ln_q, down = ln_q;
    const double h = 1e-5, q = std::exp(ln_q[v]);
    for (int64_t i = 0; i < columns; ++i) {
      up[i] += (i == v ? h : 0) - std::log1p(q * std::expm1(h));
      down[i] -= (i == v ? h : 0) + std::log1p(q * std::expm1(-h));
    }
    const double slope = (textbook(divergence, up, ln_p, options.beta) -
                          textbook(divergence, down, ln_p, options.beta)) /
                         (2 * h);
    assert(std::abs(ds[v] - 2 * slope) < 2e-5);
  }
  double sum = 0;
  for (float g : dt) sum += g;
  assert(std::abs(sum) < 1e-4);
}

void missing_columns_are_flagged() {
  const int64_t columns = 1500;
  Row student = random_row(columns, 2, 0, 3), teacher = random_row(columns, 2, 0, 4);
  for (int64_t v = 0; v < kBlock; ++v) student.values[v] = teacher.values[v] = -INFINITY;
  const RowOptions<float> forward = options_for(Divergence::kForwardKL, columns, 1e-6);
  assert(std::isfinite(row_statistics(student, teacher, forward).kd));
  student.values[1200] = -INFINITY;
  assert(std::isinf(row_statistics(student, teacher, forward).kd));
  const RowOptions<float> reverse = options_for(Divergence::kReverseKL, columns, 1e-6);
  assert(std::isfinite(row_statistics(student, teacher, reverse).kd));
  assert(std::isinf(row_statistics(teacher, student, reverse).kd));
  const RowOptions<float> jsd = options_for(Divergence::kJSD, columns, 1);
  assert(std::isfinite(row_statistics(student, teacher, jsd).kd));
  for (float& v : student.values) v = -INFINITY;
  for (const RowOptions<float>& options : {forward, reverse, jsd}) {
    assert(std::isnan(row_statistics(student, teacher, options).kd));
  }
}

void primitives_are_accurate() {
  for (float x = 0; x > -86; x -= 0.0137f) {
    assert(std::abs(exp_nonpositive(x) - std::exp(double{x})) <= 2e-7 * std::exp(double{x}));
    assert(std::abs(expm1_nonpositive(x) - std::expm1(double{x})) <=
           3e-7 * std::abs(std::expm1(double{x})));
  }
  for (float y = 0; y > -1; y = y * 1.01f - 1e-7f) {
    assert(std::abs(log1p_nonpositive(y) - std::log1p(double{y})) <=
           3e-7 * std::abs(std::log1p(double{y})));
  }
  assert(exp_nonpositive(-1e30f) == 0 && expm1_nonpositive(-1e30f) == -1);
  assert(std::isnan(exp_nonpositive(NAN)) && std::isnan(exp_fast(NAN)) &&
         std::isnan(log1p_nonpositive(NAN)));
  assert(std::isinf(exp_fast(89.0f)) && exp_fast(-INFINITY) == 0);
}

}  // namespace

int main() {
  primitives_are_accurate();
  for (Divergence divergence : {Divergence::kForwardKL, Divergence::kReverseKL, Divergence::kJSD}) {
    for (int64_t columns : {1, 33, 1023, 1024, 1025, 3000}) {
      value_and_gradient_agree(divergence, columns, 1, 3, 0);
      value_and_gradient_agree(divergence, columns, 2, 10, 30);
      value_and_gradient_agree(divergence, columns, 0.5, 1, -30);
    }
  }
  missing_columns_are_flagged();
  std::puts("test_kl_row: passed");
}
