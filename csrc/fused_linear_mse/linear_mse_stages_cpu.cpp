// The loss of all stages and its gradients, where rows are multiplied as they lie
// (common/row_products.h); errors exist for a chunk of rows at a time:
//
//   R_n = U y_n + u - G_n    sse_n = |R_n|^2    E_n = 2 c_n R_n    dy_n = U^T E_n    dU = sum_n E_n
//   y_n^T    du = sum_n E_n
//
// G_n is pooled from the target's tokens where the sums of a row's columns are at hand. A row of
// scale c_n = 0 has E = 0 and its target is not read.
#include "common/checks.h"
#include "common/patches.h"
#include "common/row_products.h"

#include <optional>
#include <vector>

namespace {

using namespace deepfusion;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "fused_linear_mse";

bool linear_mse_multiplies_cpu(const Tensor& like) {
  bool multiplies = false;
  DF_DISPATCH_FLOAT(like.scalar_type(), kOp, [&] { multiplies = multiplies_rows<scalar_t>(); });
  return multiplies;
}

#if defined(DF_LEVEL_avx512)

constexpr float kNormEps = 1e-6f;
// errors of a chunk over all stages: 4 MiB of float32, beside which the packed factors stay small
constexpr int64_t kChunkErrors = int64_t{1} << 20;
constexpr int64_t kLeastRows = 64;

// What a target's row is shifted and scaled by.
struct Norm {
  float mean, scale;
};

template <typename T>
struct Stages {
  int64_t J, N, M, D;
  const T *y, *weight, *bias;
  const std::vector<Tensor>& targets;
  const Tensor& offsets;
  const bool* mask;
  const float* scale;
  bool target_norm;
  float *sse, *dweight, *dbias;
  T* dy;

  int64_t patches() const { return offsets.size(1) - 1; }
  int64_t length() const { return targets[0].size(1); }
  Patch patch(int64_t n) const {
    return patch_at(offsets.const_data_ptr<int32_t>(), mask, patches(), length(), n / patches(),
                    n % patches());
  }
  const T* tokens(int64_t j, int64_t n) const {
    return targets[j].const_data_ptr<T>() + n / patches() * targets[j].stride(0);
  }
};

// One chunk of rows: errors [J, rows, M], and sums of squares by panel.
template <typename T>
struct Chunk {
  int64_t first, rows, panels;
  Aligned<T> errors;
  Aligned<float> squares;
  std::vector<Norm> norms;

  Chunk(const Stages<T>& of, int64_t limit)
      : first(0),
        rows(limit),
        panels((of.M + kColumns<T> - 1) / kColumns<T>),
        errors(of.J * limit * of.M),
        squares(of.J * limit * panels),
        norms(of.target_norm ? of.J * limit : 0) {}
  int64_t row(int64_t j, int64_t r) const { return j * rows + r; }
  T* error(const Stages<T>& of, int64_t j, int64_t r) const {
    return errors.get() + row(j, r) * of.M;
  }
};

template <typename T>
void find_norms(const Stages<T>& of, Chunk<T>& chunk) {
  for_rows(of.J * chunk.rows, 8, [&](int64_t task) {
    const int64_t j = task / chunk.rows, n = chunk.first + task % chunk.rows;
    if (of.scale[j * of.N + n] == 0) return;
    thread_local std::vector<float> goal;
    goal.resize(of.M);
    pool_row(of.tokens(j, n), of.targets[j].stride(1), of.patch(n), of.M, goal.data());
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t m = 0; m < of.M; ++m) sum += goal[m];
    const float mean = sum / static_cast<float>(of.M);
#pragma omp simd reduction(+ : squares)
    for (int64_t m = 0; m < of.M; ++m) squares += (goal[m] - mean) * (goal[m] - mean);
    chunk.norms[task] = {mean, 1.0f / std::sqrt(squares / static_cast<float>(of.M) + kNormEps)};
  });
}

// goal <- columns [column, column + count) of the pooled target of row n.
template <typename T>
void pool_lanes(const Stages<T>& of, int64_t j, int64_t n, int64_t column, int64_t count,
                float* goal) {
  constexpr int64_t WIDTH = kColumns<T>;
  const Patch patch = of.patch(n);
  const T* tokens = of.tokens(j, n) + column;
  const int64_t pitch = of.targets[j].stride(1);
  std::fill_n(goal, WIDTH, 0.0f);
  int64_t held = 0;
  for (int64_t t = patch.begin; t < patch.end; ++t) {
    if (!patch.holds(t)) continue;
    ++held;
    alignas(64) float lanes[WIDTH];
    load_lanes<WIDTH>(tokens + t * pitch, count, lanes);
    for (int64_t i = 0; i < WIDTH; ++i) goal[i] += lanes[i];
  }
  const float share = 1.0f / static_cast<float>(std::max<int64_t>(held, 1));
  for (int64_t i = 0; i < WIDTH; ++i) goal[i] *= share;
}

template <typename T>
void find_errors(const Stages<T>& of, const Chunk<T>& chunk) {
  constexpr int64_t WIDTH = kColumns<T>;
  const Products products{of.J, chunk.rows, of.M, of.D};
  multiply<T>(
      products,
      [&](int64_t j, int64_t r) { return as_units<T>(of.y + (j * of.N + chunk.first + r) * of.D); },
      1, ByRows<T>{of.weight, &products},
      [&](int64_t j, int64_t r, int64_t column, int64_t count, const float* sums) {
        const int64_t n = chunk.first + r;
        const float scale = of.scale[j * of.N + n];
        T* to = chunk.error(of, j, r) + column;
        float& square = chunk.squares.get()[chunk.row(j, r) * chunk.panels + column / WIDTH];
        square = 0;
        if (scale == 0) {
          std::fill_n(to, count, T(0));
          return;
        }
        alignas(64) float goal[WIDTH], error[WIDTH] = {};
        pool_lanes(of, j, n, column, count, goal);
        if (of.target_norm) {
          const Norm norm = chunk.norms[chunk.row(j, r)];
          for (int64_t i = 0; i < WIDTH; ++i) goal[i] = (goal[i] - norm.mean) * norm.scale;
        }
        if (of.bias) load_lanes<WIDTH>(of.bias + j * of.M + column, count, error);
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < WIDTH; ++i) {
          const float found = i < count ? sums[i] + error[i] - goal[i] : 0.0f;
          total += found * found;
          error[i] = 2 * scale * found;
        }
        square = total;
        store_lanes<WIDTH>(error, count, to);
        // a column lies in one task, whose rows come in order
        if (!of.dbias) return;
        float* sum = of.dbias + j * of.M + column;
        for (int64_t i = 0; i < count; ++i) sum[i] += error[i];
      });
  for_rows(of.J * chunk.rows, 64, [&](int64_t task) {
    const float* squares = chunk.squares.get() + task * chunk.panels;
    float sum = 0;
    for (int64_t p = 0; p < chunk.panels; ++p) sum += squares[p];
    of.sse[task / chunk.rows * of.N + chunk.first + task % chunk.rows] = sum;
  });
}

template <typename T>
void find_dy(const Stages<T>& of, const Chunk<T>& chunk) {
  multiply<T>(
      {of.J, chunk.rows, of.D, of.M},
      [&](int64_t j, int64_t r) { return as_units<T>(chunk.error(of, j, r)); }, 1,
      by_columns<T>([&](int64_t j, int64_t m) { return of.weight + (j * of.M + m) * of.D; }),
      [&](int64_t j, int64_t r, int64_t column, int64_t count, const float* sums) {
        store_lanes<kColumns<T>>(sums, count, of.dy + (j * of.N + chunk.first + r) * of.D + column);
      });
}

template <typename T>
void add_dweight(const Stages<T>& of, const Chunk<T>& chunk) {
  constexpr int64_t WIDTH = kColumns<T>;
  const Products products{of.J, of.M, of.D, chunk.rows};
  const Turned<T> left(products, [&](int64_t j, int64_t r) { return chunk.error(of, j, r); });
  multiply<T>(
      products, [&](int64_t j, int64_t m) { return left.at(j, m); }, left.kStrip,
      by_columns<T>(
          [&](int64_t j, int64_t r) { return of.y + (j * of.N + chunk.first + r) * of.D; }),
      [&](int64_t j, int64_t m, int64_t column, int64_t count, const float* sums) {
        float* to = of.dweight + (j * of.M + m) * of.D + column;
        alignas(64) float lanes[WIDTH] = {};
        if (chunk.first > 0) load_lanes<WIDTH>(to, count, lanes);
        for (int64_t i = 0; i < WIDTH; ++i) lanes[i] += sums[i];
        store_lanes<WIDTH>(lanes, count, to);
      });
}

template <typename T>
void run(const Stages<T>& of, int64_t chunk_rows) {
  const int64_t fitting = std::max(kLeastRows, kChunkErrors / std::max<int64_t>(of.J * of.M, 1));
  const int64_t limit = std::min({of.N, kBlockRows, chunk_rows > 0 ? chunk_rows : fitting});
  Chunk<T> chunk(of, limit);
  for (; chunk.first < of.N; chunk.first += limit) {
    chunk.rows = std::min(limit, of.N - chunk.first);
    if (of.target_norm) find_norms(of, chunk);
    find_errors(of, chunk);
    if (of.dy) find_dy(of, chunk);
    if (of.dweight) add_dweight(of, chunk);
  }
}

// y [J, N, D], weight [J, M, D], bias [J, M], targets J times [B, L, M], scale and sse [J, N];
// dbias comes in zero.
void linear_mse_stages_cpu(const Tensor& y, const Tensor& weight, std::optional<Tensor> bias,
                           std::vector<Tensor> targets, const Tensor& offsets,
                           std::optional<Tensor> mask, const Tensor& scale, bool target_norm,
                           int64_t chunk_rows, Tensor sse, std::optional<Tensor> dy,
                           std::optional<Tensor> dweight, std::optional<Tensor> dbias) {
  for (const Tensor& target : targets) check_dense_rows(target, kOp, "target");
  const auto call = [&]<typename T>(T) {
    run<T>(
        {y.size(0), y.size(1), weight.size(1), y.size(2), y.const_data_ptr<T>(),
         weight.const_data_ptr<T>(), bias ? bias->const_data_ptr<T>() : nullptr, targets, offsets,
         mask ? mask->const_data_ptr<bool>() : nullptr, scale.const_data_ptr<float>(), target_norm,
         sse.mutable_data_ptr<float>(), dweight ? dweight->mutable_data_ptr<float>() : nullptr,
         dbias ? dbias->mutable_data_ptr<float>() : nullptr,
         dy ? dy->mutable_data_ptr<T>() : nullptr},
        chunk_rows);
  };
  if (y.scalar_type() == ScalarType::Float)
    call(float());
  else
    call(BFloat16());
}

#endif

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("linear_mse_multiplies", TORCH_BOX(&linear_mse_multiplies_cpu));
#if defined(DF_LEVEL_avx512)
  m.impl("linear_mse_stages", TORCH_BOX(&linear_mse_stages_cpu));
#endif
}
