// Row kernels of the fused linear loss on tiles of logits: some rows, some columns of each.
//
// A row's sums are float64 and outlive its tiles, so that the vocabulary may come in any number of
// slices. The teacher's tile may be narrower than the student's: columns beyond it only serve CE.
#include "common/checks.h"
#include "common/cpu.h"
#include "common/kl_row.h"

#include <array>
#include <optional>
#include <tuple>

namespace {

using namespace deepfusion;
using torch::headeronly::ScalarType;

// Of one row, while its tiles come by; the order of the tensor `sums` [T, kNumSums], float64.
struct RowSums {
  KLState<double> kd;
  ExpSum<double> at_one;
  double chosen = 0;  // s[label]
  JsdSums jsd;
};
constexpr int64_t kNumSums = 13;

RowSums load(const double* from) {
  RowSums sums;
  sums.kd.s = {from[0], from[1]};
  sums.kd.t = {from[2], from[3]};
  sums.kd.a = from[4];
  sums.kd.r = from[5];
  sums.kd.teacher_alone = from[6] != 0;
  sums.kd.student_alone = from[7] != 0;
  sums.at_one = {from[8], from[9]};
  sums.chosen = from[10];
  sums.jsd = {from[11], from[12]};
  return sums;
}

void store(const RowSums& sums, double* to) {
  const std::array<double, kNumSums> values = {sums.kd.s.m,
                                               sums.kd.s.l,
                                               sums.kd.t.m,
                                               sums.kd.t.l,
                                               sums.kd.a,
                                               sums.kd.r,
                                               double(sums.kd.teacher_alone),
                                               double(sums.kd.student_alone),
                                               sums.at_one.m,
                                               sums.at_one.l,
                                               sums.chosen,
                                               sums.jsd.k_s,
                                               sums.jsd.k_t};
  std::copy(values.begin(), values.end(), to);
}

template <typename W>
RowStats<W> load_stats(const W* from) {
  return {from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7]};
}

// One tile: the student's logits, the teacher's where there are any, and what goes with its rows.
template <typename W>
struct Tile {
  Tile(const Tensor& student_tile, const std::optional<Tensor>& teacher_tile, const Tensor& scale)
      : rows(student_tile.size(0)),
        columns(student_tile.size(1)),
        compared(teacher_tile ? teacher_tile->size(1) : 0),
        student(student_tile.const_data_ptr<W>()),
        teacher(teacher_tile ? teacher_tile->const_data_ptr<W>() : nullptr),
        scales(scale.const_data_ptr<W>()) {}

  int64_t rows, columns, compared;
  const W *student, *teacher, *scales;
};

int64_t label_of(const std::optional<Tensor>& labels, int64_t row, int64_t first_column) {
  return labels ? labels->const_data_ptr<int64_t>()[row] - first_column : -1;
}

template <typename W>
void accumulate(const Tile<W>& tile, const std::optional<Tensor>& labels, double* all_sums,
                int64_t first_column, bool own_sum, const RowOptions<W>& options) {
  const auto in_place = [](const W* row) {
    return [row](int64_t begin, int64_t, W*) { return row + begin; };
  };
  for_rows(tile.rows, 4, [&](int64_t row) {
    if (tile.scales[row] == W(0)) return;
    alignas(64) W s_buffer[kBlock], t_buffer[kBlock];
    const auto student = in_place(tile.student + row * tile.columns);
    const auto teacher = in_place(tile.teacher + row * tile.compared);
    RowSums sums = load(all_sums + row * kNumSums);
    for (int64_t begin = 0; begin < tile.columns;) {
      const int64_t end = begin < tile.compared ? tile.compared : tile.columns;
      const int64_t count = std::min(kBlock, end - begin);
      const Block<W> of_s = load_block(student, begin, count, s_buffer);
      if (begin < tile.compared) {
        const Block<W> of_t = load_block(teacher, begin, count, t_buffer);
        sums.kd = merge(sums.kd, kl_sums(of_s, of_t, count, options), double(options.inv_tau));
      }
      if (own_sum) sums.at_one = merge(sums.at_one, exp_sum(of_s, count, W(1)), 1.0);
      begin += count;
    }
    const int64_t label = label_of(labels, row, first_column);
    if (label >= 0 && label < tile.columns) sums.chosen = tile.student[row * tile.columns + label];
    store(sums, all_sums + row * kNumSums);
  });
}

template <typename W>
void accumulate_jsd(const Tile<W>& tile, const W* stats, double* all_sums,
                    const RowOptions<W>& options) {
  for_rows(tile.rows, 4, [&](int64_t row) {
    if (tile.scales[row] == W(0)) return;
    const auto student = [&](int64_t begin, int64_t, W*) {
      return tile.student + row * tile.columns + begin;
    };
    const auto teacher = [&](int64_t begin, int64_t, W*) {
      return tile.teacher + row * tile.compared + begin;
    };
    const JsdSums more = jsd_sums(student, teacher, load_stats(stats + row * kNumStats), options);
    all_sums[row * kNumSums + 11] += more.k_s;
    all_sums[row * kNumSums + 12] += more.k_t;
  });
}

template <typename W>
void finish(int64_t rows, const double* all_sums, const W* scales, bool own_sum,
            Divergence divergence, double beta, double kd_weight, double ce_weight, W* losses,
            W* all_stats) {
  const bool jsd = divergence == Divergence::kJSD, reverse = divergence == Divergence::kReverseKL;
  for (int64_t row = 0; row < rows; ++row) {
    const RowSums sums = load(all_sums + row * kNumSums);
    RowStats<W> stats{};
    double loss = 0;
    if (scales[row] != W(0)) {
      const ExpSum<double> at_one = own_sum ? sums.at_one : sums.kd.s;
      stats = {W(sums.kd.s.m),  W(log_sum(sums.kd.s)), W(sums.kd.t.m), W(log_sum(sums.kd.t)),
               W(sums.jsd.k_s), W(sums.jsd.k_t),       W(at_one.m),    W(log_sum(at_one))};
      double kd = beta * sums.jsd.k_t + (1 - beta) * sums.jsd.k_s;
      if (kd_weight != 0 && !jsd) {
        kd = finish_kl(sums.kd, reverse);
        save_kl(sums.kd, kd, reverse, stats);
      }
      if (kd_weight != 0) loss += kd_weight * kd;
      if (ce_weight != 0) loss += ce_weight * (at_one.m - sums.chosen + log_sum(at_one));
      loss *= scales[row];
    }
    std::memcpy(all_stats + row * kNumStats, &stats, sizeof(stats));
    losses[row] = static_cast<W>(loss);
  }
}

// Overwrites the student's logits by their gradient.
template <typename W>
void gradient(const Tile<W>& tile, const std::optional<Tensor>& labels, const W* stats, W* out,
              int64_t first_column, RowOptions<W> options, W kd_weight, W ce_weight) {
  options.kd_columns = tile.compared;
  for_rows(tile.rows, 4, [&](int64_t row) {
    W* to = out + row * tile.columns;
    const W scale = tile.scales[row];
    if (scale == W(0)) {
      std::fill(to, to + tile.columns, W(0));
      return;
    }
    alignas(64) W logits[kBlock];
    const W* t = tile.teacher + row * tile.compared;
    const RowStats<W> of_row = load_stats(stats + row * kNumStats);
    const RowScales<W> scales = {scale * kd_weight * options.inv_tau, scale * ce_weight,
                                 label_of(labels, row, first_column)};
    for (int64_t begin = 0; begin < tile.columns;) {
      const int64_t end = begin < tile.compared ? tile.compared : tile.columns;
      const int64_t count = std::min(kBlock, end - begin);
      std::copy(to + begin, to + begin + count, logits);
      gradient_block<W>(logits, t + begin, begin, count, of_row, options, scales, to + begin,
                        nullptr);
      begin += count;
    }
  });
}

template <typename W>
RowOptions<W> options_of(int64_t divergence, double beta, double temperature, bool with_ce) {
  RowOptions<W> options;
  options.divergence = static_cast<Divergence>(divergence);
  options.beta = static_cast<W>(beta);
  options.inv_tau = static_cast<W>(1.0 / temperature);
  options.with_ce = with_ce;
  return options;
}

void fused_linear_kl_accumulate_cpu(const Tensor& student, const std::optional<Tensor>& teacher,
                                    const std::optional<Tensor>& labels, const Tensor& scale,
                                    Tensor sums, int64_t first_column, bool own_sum,
                                    int64_t divergence, double temperature) {
  double* to = sums.mutable_data_ptr<double>();
  THO_DISPATCH_V2(student.scalar_type(), "fused_linear_kl_accumulate", AT_WRAP([&] {
                    accumulate<scalar_t>(Tile<scalar_t>(student, teacher, scale), labels, to,
                                         first_column, own_sum,
                                         options_of<scalar_t>(divergence, 0.5, temperature, false));
                  }),
                  ScalarType::Float, ScalarType::Double);
}

void fused_linear_kl_jsd_cpu(const Tensor& student, const Tensor& teacher, const Tensor& scale,
                             const Tensor& stats, Tensor sums, double beta, double temperature) {
  THO_DISPATCH_V2(student.scalar_type(), "fused_linear_kl_jsd", AT_WRAP([&] {
                    auto options = options_of<scalar_t>(2, beta, temperature, false);
                    options.kd_columns = teacher.size(1);
                    accumulate_jsd<scalar_t>(Tile<scalar_t>(student, teacher, scale),
                                             stats.const_data_ptr<scalar_t>(),
                                             sums.mutable_data_ptr<double>(), options);
                  }),
                  ScalarType::Float, ScalarType::Double);
}

std::tuple<Tensor, Tensor> fused_linear_kl_finish_cpu(const Tensor& sums, const Tensor& scale,
                                                      bool own_sum, int64_t divergence, double beta,
                                                      double kd_weight, double ce_weight) {
  const int64_t rows = sums.size(0);
  Tensor losses = torch::stable::new_empty(scale, {rows});
  Tensor stats = torch::stable::new_empty(scale, {rows, kNumStats});
  THO_DISPATCH_V2(scale.scalar_type(), "fused_linear_kl_finish", AT_WRAP([&] {
                    finish<scalar_t>(
                        rows, sums.const_data_ptr<double>(), scale.const_data_ptr<scalar_t>(),
                        own_sum, static_cast<Divergence>(divergence), beta, kd_weight, ce_weight,
                        losses.mutable_data_ptr<scalar_t>(), stats.mutable_data_ptr<scalar_t>());
                  }),
                  ScalarType::Float, ScalarType::Double);
  return {losses, stats};
}

void fused_linear_kl_gradient_cpu(Tensor student, const std::optional<Tensor>& teacher,
                                  const std::optional<Tensor>& labels, const Tensor& scale,
                                  const Tensor& stats, int64_t first_column, int64_t divergence,
                                  double beta, double temperature, double kd_weight,
                                  double ce_weight) {
  THO_DISPATCH_V2(student.scalar_type(), "fused_linear_kl_gradient", AT_WRAP([&] {
                    gradient<scalar_t>(
                        Tile<scalar_t>(student, teacher, scale), labels,
                        stats.const_data_ptr<scalar_t>(), student.mutable_data_ptr<scalar_t>(),
                        first_column,
                        options_of<scalar_t>(divergence, beta, temperature, ce_weight != 0),
                        scalar_t(kd_weight), scalar_t(ce_weight));
                  }),
                  ScalarType::Float, ScalarType::Double);
}

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("fused_linear_kl_accumulate", TORCH_BOX(&fused_linear_kl_accumulate_cpu));
  m.impl("fused_linear_kl_jsd", TORCH_BOX(&fused_linear_kl_jsd_cpu));
  m.impl("fused_linear_kl_finish", TORCH_BOX(&fused_linear_kl_finish_cpu));
  m.impl("fused_linear_kl_gradient", TORCH_BOX(&fused_linear_kl_gradient_cpu));
}
