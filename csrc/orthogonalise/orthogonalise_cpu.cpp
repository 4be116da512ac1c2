// Newton-Schulz rounds on a stack of matrices, one matrix a thread, all of it in the second-level
// cache:
//
//   X <- M / |M|      G = X X^T      H = b G + c G G      X <- a X + H X
//
// G and H are symmetric: half of each is computed, half mirrored. Multiplied in bfloat16 where the
// processor can, else in float32; sums in float32.
#include "common/checks.h"
#include "common/pack.h"

#include <cmath>
#include <cstdlib>
#include <memory>
#include <type_traits>

namespace {

using namespace deepfusion;
using torch::stable::Tensor;

constexpr int64_t kSquare = 16;

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : memory_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)),
                &std::free) {}
  T* get() const { return memory_.get(); }

 private:
  std::unique_ptr<T, decltype(&std::free)> memory_;
};

constexpr int64_t up(int64_t count, int64_t unit) {
  return (count + unit - 1) / unit * unit;
}

// out[c][r] = factor * in[r][c]
template <typename In, typename Out>
void flip(const In* in, int64_t rows, int64_t columns, int64_t in_stride, float factor, Out* out,
          int64_t out_stride) {
  typedef float Lanes __attribute__((vector_size(4 * kSquare)));
  for (int64_t r = 0; r < rows; r += kSquare) {
    const int64_t height = std::min(kSquare, rows - r);
    for (int64_t c = 0; c < columns; c += kSquare) {
      const int64_t width = std::min(kSquare, columns - c);
      Lanes square[kSquare] = {};
      for (int64_t i = 0; i < height; ++i) {
        float row[kSquare];
        load_lanes<kSquare>(in + (r + i) * in_stride + c, width, row);
        std::memcpy(&square[i], row, sizeof(row));
        square[i] *= factor;
      }
      transpose<Lanes, kSquare>(square);
      for (int64_t i = 0; i < width; ++i) {
        float row[kSquare];
        std::memcpy(row, &square[i], sizeof(row));
        store_lanes<kSquare>(row, height, out + (c + i) * out_stride + r);
      }
    }
  }
}

template <typename In, typename Out>
void copy_rows(const In* in, int64_t rows, int64_t columns, int64_t in_stride, float factor,
               Out* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kSquare) {
      const int64_t width = std::min(kSquare, columns - c);
      float row[kSquare];
      load_lanes<kSquare>(in + r * in_stride + c, width, row);
      for (float& value : row) value *= factor;
      store_lanes<kSquare>(row, width, out + r * out_stride + c);
    }
  }
}

// The state of one thread: X [rows, pitch], G and H [side, side], a packed panel.
template <typename S>
struct Work {
  static constexpr int64_t kWidth = kColumns<S>;
  int64_t rows, columns, pitch, side;
  Buffer<S> x, gram, mixed;
  // units of four bytes, whichever they are
  Buffer<float> packed;

  Work(int64_t rows, int64_t columns)
      : rows(rows),
        columns(columns),
        pitch(up(columns, kWidth)),
        side(up(rows, kWidth)),
        x(rows * pitch),
        gram(side * side),
        mixed(side * side),
        packed(std::max(pitch, side) * kWidth) {
    std::fill_n(x.get(), rows * pitch, S(0.0f));
    std::fill_n(gram.get(), side * side, S(0.0f));
    std::fill_n(mixed.get(), side * side, S(0.0f));
  }
  unit_t<S>* panel() const { return reinterpret_cast<unit_t<S>*>(packed.get()); }
  static const unit_t<S>* units(const S* row) { return reinterpret_cast<const unit_t<S>*>(row); }

  // out = finish(left left^T), left [rows, depth]: panels of columns, each from its own rows on
  template <typename Finish>
  void symmetric(const S* left, int64_t stride, int64_t depth, S* out, const Finish& finish) {
    for (int64_t first = 0; first < rows; first += kWidth) {
      const S* sources[kWidth];
      for (int64_t lane = 0; lane < kWidth; ++lane)
        sources[lane] = first + lane < rows ? left + (first + lane) * stride : nullptr;
      pack_rows<S>(sources, depth, panel());
      sweep<S>([&](int64_t i) { return units(left + (first + i) * stride); }, rows - first, 1,
               panel(), steps_of<S>(depth),
               [&](int64_t i, float* sums) {
                 S* row = out + (first + i) * side + first;
                 finish((first + i) * side + first, sums);
                 store_lanes<kWidth>(sums, kWidth, row);
               });
      const int64_t below = first + kWidth;
      if (below < rows)
        flip(out + below * side + first, rows - below, kWidth, side, 1.0f,
             out + first * side + below, side);
    }
  }

  void round(float a, float b, float c) {
    S *X = x.get(), *G = gram.get(), *H = mixed.get();
    symmetric(X, pitch, columns, G, [](int64_t, float*) {});
    symmetric(G, side, rows, H, [&](int64_t at, float* sums) {
      float old[kWidth];
      load_lanes<kWidth>(G + at, kWidth, old);
      for (int64_t lane = 0; lane < kWidth; ++lane) sums[lane] = c * sums[lane] + b * old[lane];
    });
    for (int64_t first = 0; first < columns; first += kWidth) {
      pack_columns<S, kWidth>([&](int64_t k) { return X + k * pitch + first; }, rows, kWidth,
                              panel());
      sweep<S>([&](int64_t i) { return units(H + i * side); }, rows, 1, panel(), steps_of<S>(rows),
               [&](int64_t i, float* sums) {
                 S* row = X + i * pitch + first;
                 float old[kWidth];
                 load_lanes<kWidth>(row, kWidth, old);
                 for (int64_t lane = 0; lane < kWidth; ++lane) sums[lane] += a * old[lane];
                 store_lanes<kWidth>(sums, kWidth, row);
               });
    }
  }
};

float inverse_norm(const float* matrix, int64_t count) {
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < count; ++i) squares += static_cast<double>(matrix[i]) * matrix[i];
  return static_cast<float>(1 / std::max(std::sqrt(squares), 1e-7));
}

template <typename S>
void orthogonalise(const Tensor& matrices, Tensor& out, int64_t rounds, float a, float b, float c) {
  const int64_t rows = matrices.size(1), columns = matrices.size(2), count = rows * columns;
  const bool tall = rows > columns;
  const float* source = matrices.const_data_ptr<float>();
  float* target = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, matrices.size(0), 1, [&](int64_t begin, int64_t end) {
    Work<S> work(std::min(rows, columns), std::max(rows, columns));
    for (int64_t n = begin; n < end; ++n) {
      const float* matrix = source + n * count;
      const float share = inverse_norm(matrix, count);
      const auto enter = tall ? flip<float, S> : copy_rows<float, S>;
      enter(matrix, rows, columns, columns, share, work.x.get(), work.pitch);
      for (int64_t round = 0; round < rounds; ++round) work.round(a, b, c);
      const auto leave = tall ? flip<S, float> : copy_rows<S, float>;
      leave(work.x.get(), work.rows, work.columns, work.pitch, 1.0f, target + n * count, columns);
    }
  });
}

// out [N, A, B] <- matrices [N, A, B], float32 and contiguous both.
void orthogonalise_cpu(Tensor matrices, Tensor out, int64_t rounds, double a, double b, double c) {
  auto run = orthogonalise<float>;
#if defined(DF_LEVEL_avx512)
  if (multiplies_bfloat16()) run = orthogonalise<BFloat16>;
#endif
  run(matrices, out, rounds, static_cast<float>(a), static_cast<float>(b), static_cast<float>(c));
}

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("orthogonalise", TORCH_BOX(&orthogonalise_cpu));
}
