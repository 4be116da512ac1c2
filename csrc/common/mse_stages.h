// The loss of all stages and its gradients, where rows are multiplied as they lie
// (common/row_products.h); errors exist for a chunk of rows at a time:
//
//   R_n = U y_n + u - G_n    sse_n = |R_n|^2    E_n = 2 c_n R_n    dy_n = U^T E_n    dU = sum_n E_n
//   y_n^T    du = sum_n E_n
//
// G_n is pooled from the target's tokens. A row of scale c_n = 0 in every stage has E = 0, its
// target is not read, and it is in no product.
#pragma once

#include "common/kept_group.h"
#include "common/patches.h"
#include "common/row_products.h"

#include <optional>
#include <vector>

#if defined(DF_LEVEL_avx512)
namespace deepfusion::inline DF_LEVEL {

// errors of a chunk over all stages: 4 MiB of float32, beside which the packed factors stay small
constexpr int64_t kChunkErrors = int64_t{1} << 20;
constexpr int64_t kLeastRows = 64;

template <typename T>
struct Stages {
  int64_t J, N, M, D;
  const T *y, *weight, *bias;
  const Tensor* targets;
  const Tensor& offsets;
  const bool* mask;
  const float* scale;
  bool target_norm;
  float *sse, *dweight, *dbias;
  T *dy, *errors;

  // `count` stages from `first` on
  Stages part(int64_t first, int64_t count) const {
    const auto from = [first](auto* all, int64_t each) { return all ? all + first * each : all; };
    return {count,
            N,
            M,
            D,
            from(y, N * D),
            from(weight, M * D),
            from(bias, M),
            targets + first,
            offsets,
            mask,
            from(scale, N),
            target_norm,
            from(sse, N),
            from(dweight, M * D),
            from(dbias, M),
            from(dy, N * D),
            from(errors, N * M)};
  }
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

// One chunk of rows: pooled targets and errors [J, rows, M], in float32 in one place; sums of
// squares by panel.
template <typename T>
struct Chunk {
  static constexpr bool kShared = std::is_same_v<T, float>;
  int64_t first, rows, panels;
  std::vector<int64_t> live;
  Aligned<float> goals;
  Aligned<T> errors;
  Aligned<float> squares;

  Chunk(const Stages<T>& of, int64_t limit)
      : first(0),
        rows(limit),
        panels((of.M + kColumns<T> - 1) / kColumns<T>),
        goals(kShared && of.errors ? 0 : of.J * limit * of.M),
        errors(kShared || of.errors ? 0 : of.J * limit * of.M),
        squares(of.J * limit * panels) {}
  // to rows begin .. begin + count; E, dy and |R|^2 of those that are in no product are 0
  void move(const Stages<T>& of, int64_t begin, int64_t count) {
    first = begin;
    rows = count;
    live.clear();
    for (int64_t r = 0; r < rows; ++r) {
      bool counts = false;
      for (int64_t j = 0; j < of.J; ++j) counts |= of.scale[j * of.N + first + r] != 0;
      if (counts) {
        live.push_back(r);
        continue;
      }
      for (int64_t j = 0; j < of.J; ++j) {
        const int64_t at = j * of.N + first + r;
        of.sse[at] = 0;
        if (of.dy) std::fill_n(of.dy + at * of.D, of.D, T(0));
        if (of.errors) std::fill_n(of.errors + at * of.M, of.M, T(0));
      }
    }
  }
  int64_t row(int64_t j, int64_t r) const { return j * rows + r; }
  const T* y(const Stages<T>& of, int64_t j, int64_t v) const {
    return of.y + (j * of.N + first + live[v]) * of.D;
  }
  float* goal(const Stages<T>& of, int64_t j, int64_t r) const {
    if constexpr (kShared)
      if (of.errors) return error(of, j, r);
    return goals.get() + row(j, r) * of.M;
  }
  T* error(const Stages<T>& of, int64_t j, int64_t r) const {
    if (of.errors) return of.errors + (j * of.N + first + r) * of.M;
    if constexpr (kShared)
      return goal(of, j, r);
    else
      return errors.get() + row(j, r) * of.M;
  }
};

// Whole rows in a pass of its own: the products wait for nothing that lies in memory.
template <typename T>
void find_goals(const Stages<T>& of, const Chunk<T>& chunk) {
  const int64_t rows = std::ssize(chunk.live);
  for_rows(of.J * rows, 8, [&](int64_t task) {
    const int64_t j = task / rows, r = chunk.live[task % rows], n = chunk.first + r;
    if (of.scale[j * of.N + n] == 0) return;
    float* goal = chunk.goal(of, j, r);
    pool_row(of.tokens(j, n), of.targets[j].stride(1), of.patch(n), of.M, goal);
    if (of.target_norm) normalise(goal, of.M);
  });
}

template <typename T>
void find_errors(const Stages<T>& of, const Chunk<T>& chunk) {
  constexpr int64_t WIDTH = kColumns<T>;
  const int64_t rows = std::ssize(chunk.live);
  const Products products{of.J, rows, of.M, of.D};
  multiply<T>(
      products, [&](int64_t j, int64_t v) { return as_units<T>(chunk.y(of, j, v)); }, 1,
      ByRows<T>{of.weight, &products},
      [&](int64_t j, int64_t v, int64_t column, int64_t count, const float* sums) {
        const int64_t r = chunk.live[v], n = chunk.first + r;
        const float scale = of.scale[j * of.N + n];
        T* to = chunk.error(of, j, r) + column;
        float& square = chunk.squares.get()[chunk.row(j, r) * chunk.panels + column / WIDTH];
        square = 0;
        if (scale == 0) {
          std::fill_n(to, count, T(0));
          return;
        }
        alignas(64) float goal[WIDTH], error[WIDTH] = {};
        load_lanes<WIDTH>(chunk.goal(of, j, r) + column, count, goal);
        if (of.bias) load_lanes<WIDTH>(of.bias + j * of.M + column, count, error);
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < WIDTH; ++i) {
          const float found = i < count ? sums[i] + error[i] - goal[i] : 0.0f;
          total += found * found;
          error[i] = 2 * scale * found;
        }
        square = total;
        round_lanes<T, WIDTH>(error, count, to);
        // a column lies in one task, whose rows come in order
        if (!of.dbias) return;
        float* sum = of.dbias + j * of.M + column;
        for (int64_t i = 0; i < count; ++i) sum[i] += error[i];
      });
  for_rows(of.J * rows, 1024, [&](int64_t task) {
    const int64_t j = task / rows, r = chunk.live[task % rows];
    const float* squares = chunk.squares.get() + chunk.row(j, r) * chunk.panels;
    float sum = 0;
    for (int64_t p = 0; p < chunk.panels; ++p) sum += squares[p];
    of.sse[j * of.N + chunk.first + r] = sum;
  });
}

template <typename T>
void find_dy(const Stages<T>& of, const Chunk<T>& chunk) {
  multiply<T>(
      {of.J, std::ssize(chunk.live), of.D, of.M},
      [&](int64_t j, int64_t v) { return as_units<T>(chunk.error(of, j, chunk.live[v])); }, 1,
      by_columns<T>([&](int64_t j, int64_t m) { return of.weight + (j * of.M + m) * of.D; }),
      [&](int64_t j, int64_t v, int64_t column, int64_t count, const float* sums) {
        T* to = of.dy + (j * of.N + chunk.first + chunk.live[v]) * of.D;
        round_lanes<T, kColumns<T>>(sums, count, to + column);
      });
}

template <typename T>
void add_dweight(const Stages<T>& of, const Chunk<T>& chunk) {
  constexpr int64_t WIDTH = kColumns<T>;
  const Products products{of.J, of.M, of.D, std::ssize(chunk.live)};
  if (!products.depth) {
    if (chunk.first == 0) std::fill_n(of.dweight, of.J * of.M * of.D, 0.0f);
    return;
  }
  const Turned<T> left(products,
                       [&](int64_t j, int64_t v) { return chunk.error(of, j, chunk.live[v]); });
  multiply<T>(
      products, [&](int64_t j, int64_t m) { return left.at(j, m); }, left.kStrip,
      by_columns<T>([&](int64_t j, int64_t v) { return chunk.y(of, j, v); }),
      [&](int64_t j, int64_t m, int64_t column, int64_t count, const float* sums) {
        float* to = of.dweight + (j * of.M + m) * of.D + column;
        alignas(64) float lanes[WIDTH] = {};
        if (chunk.first > 0) load_lanes<WIDTH>(to, count, lanes);
        for (int64_t i = 0; i < WIDTH; ++i) lanes[i] += sums[i];
        round_lanes<T, WIDTH>(lanes, count, to);
      });
}

// Many rows of few stages rather than few of many: a factor is packed, and dU read and written,
// once a chunk.
template <typename T>
void form_errors(const Stages<T>& all, int64_t chunk_rows) {
  const int64_t width = std::max<int64_t>(all.M, 1);
  const int64_t fitting = std::max(kLeastRows, kChunkErrors / width);
  const int64_t limit = std::min({all.N, kBlockRows, chunk_rows > 0 ? chunk_rows : fitting});
  const int64_t stages =
      std::clamp<int64_t>(kChunkErrors / (std::max<int64_t>(limit, 1) * width), 1, all.J);
  Chunk<T> chunk(all.part(0, stages), limit);
  for (int64_t j = 0; j < all.J; j += stages) {
    const Stages<T> of = all.part(j, std::min(stages, all.J - j));
    for (int64_t first = 0; first < of.N; first += limit) {
      chunk.move(of, first, std::min(limit, of.N - first));
      find_goals(of, chunk);
      find_errors(of, chunk);
      if (of.dy) find_dy(of, chunk);
      if (of.dweight) add_dweight(of, chunk);
    }
  }
}

// Where the targets lie and which of their tokens count.
struct StageTargets {
  const std::vector<Tensor>& stages;  // J times [B, L, M]
  const Tensor& offsets;
  const bool* mask;
  bool norm;
};
// What to form beside the loss. With `errors` E [J, N, M] comes in the place of dweight.
struct StageNeeds {
  bool y, weight, bias, errors;
};
struct StageErrors {
  Tensor sse, dy, dweight, dbias;
};

// y [J, ..., D], weight [J, M, D], bias [J, M], scale [J, N] to sse [J, N], dy, dweight, dbias in
// float32; what is not needed is an empty tensor. Of one stage the J may be left out.
inline StageErrors stage_errors(const Tensor& y, const Tensor& weight,
                                const std::optional<Tensor>& bias, const StageTargets& targets,
                                const Tensor& scale, const StageNeeds& needs, int64_t chunk_rows) {
  const std::vector<int64_t> heads{weight.sizes().begin(), weight.sizes().end()},
      biases{heads.begin(), heads.end() - 1};
  const int64_t D = heads.back(), M = biases.back(), J = heads.size() > 2 ? heads[0] : 1,
                N = scale.numel() / J;
  const bool sums_up = needs.weight && !needs.errors;
  KeptGroup memory(KeptGroup::room(needs.y ? y.numel() * y.element_size() : 0) +
                   KeptGroup::room(sums_up ? weight.numel() * int64_t{sizeof(float)} : 0) +
                   KeptGroup::room(needs.errors ? J * N * M * y.element_size() : 0));
  const auto nothing = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  const std::vector<int64_t> sizes{y.sizes().begin(), y.sizes().end()};
  Tensor sse = torch::stable::new_empty(scale, {J, N}),
         dy = needs.y ? memory.empty(y, sizes) : nothing(y),
         dweight = sums_up        ? memory.empty(scale, heads)
                   : needs.errors ? memory.empty(y, {J, N, M})
                                  : nothing(scale),
         dbias = needs.bias ? torch::stable::new_empty(scale, biases) : nothing(scale);
  if (needs.bias) std::fill_n(dbias.mutable_data_ptr<float>(), J * M, 0.0f);
  const auto call = [&]<typename T>(T) {
    form_errors<T>(
        {J, N, M, D, y.const_data_ptr<T>(), weight.const_data_ptr<T>(),
         bias ? bias->const_data_ptr<T>() : nullptr, targets.stages.data(), targets.offsets,
         targets.mask, scale.const_data_ptr<float>(), targets.norm, sse.mutable_data_ptr<float>(),
         sums_up ? dweight.mutable_data_ptr<float>() : nullptr,
         needs.bias ? dbias.mutable_data_ptr<float>() : nullptr,
         needs.y ? dy.mutable_data_ptr<T>() : nullptr,
         needs.errors ? dweight.mutable_data_ptr<T>() : nullptr},
        chunk_rows);
  };
  if (y.scalar_type() == ScalarType::Float)
    call(float());
  else
    call(BFloat16());
  return {sse, dy, dweight, dbias};
}

}  // namespace deepfusion::inline DF_LEVEL
#endif
