// The GEMMs of the fused linear loss on bfloat16 factors with float32 results, which the library
// does not offer on the CPU: twice the rate of widened factors, and no widened copies.
//
//   logits = hidden W^T + bias        dhidden += dS W        dW (+)= dS^T hidden, dS rounded once
#include "common/checks.h"
#include "common/pack.h"

#include <cstdlib>
#include <memory>
#include <optional>

namespace {

using namespace deepfusion;
using torch::headeronly::ScalarType;

bool fused_linear_kl_multiplies_bfloat16_cpu(const Tensor&) {
  return multiplies_bfloat16();
}

#if defined(DF_LEVEL_avx512)

using Unit = unit_t<BFloat16>;
constexpr int64_t kWidth = kColumns<BFloat16>;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory on a cache line's boundary, as panels want it.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : memory_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {}
  T* get() const { return memory_.get(); }

 private:
  std::unique_ptr<T, Free> memory_;
};

const Unit* units(const BFloat16* elements) {
  return reinterpret_cast<const Unit*>(elements);
}

void project(const BFloat16* hidden, const BFloat16* weight, const float* bias, int64_t T,
             int64_t D, int64_t V, float* out, int64_t pitch) {
  const int64_t steps = steps_of<BFloat16>(D);
  torch::stable::parallel_for(0, (V + kWidth - 1) / kWidth, 1, [&](int64_t begin, int64_t end) {
    // whole squares are packed: up to one vector's steps beyond the last
    const Scratch<uint32_t> panel((steps + kLanes<BFloat16>)*kWidth);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kWidth, count = std::min(kWidth, V - first);
      const BFloat16* sources[kWidth];
      for (int64_t v = 0; v < kWidth; ++v)
        sources[v] = v < count ? weight + (first + v) * D : nullptr;
      pack_rows<BFloat16>(sources, D, panel.get());
      sweep<BFloat16>([&](int64_t t) { return units(hidden + t * D); }, T, 1, panel.get(), steps,
                      Ahead{},
                      [&](int64_t t, const float* sums) {
                        float* to = out + t * pitch + first;
                        for (int64_t v = 0; v < count; ++v)
                          to[v] = sums[v] + (bias ? bias[first + v] : 0.0f);
                      });
    }
  });
}

// dS of a tile in bfloat16, rows padded to whole units.
struct Slopes {
  Slopes(const float* dlogits, int64_t rows, int64_t columns)
      : pitch((columns + 1) / 2 * 2), memory(rows * pitch) {
    for_rows(rows, 16, [&](int64_t t) {
      BFloat16* to = row(t);
      for (int64_t v = 0; v < columns; ++v) to[v] = from_wide<BFloat16>(dlogits[t * columns + v]);
      if (pitch > columns) to[columns] = from_wide<BFloat16>(0.0f);
    });
  }
  BFloat16* row(int64_t t) const { return memory.get() + t * pitch; }

  int64_t pitch;
  Scratch<BFloat16> memory;
};

void add_dhidden(const Slopes& slopes, const BFloat16* weight, int64_t T, int64_t D, int64_t V,
                 float* dhidden) {
  const int64_t steps = steps_of<BFloat16>(V);
  torch::stable::parallel_for(0, (D + kWidth - 1) / kWidth, 1, [&](int64_t begin, int64_t end) {
    const Scratch<uint32_t> panel(steps * kWidth);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kWidth, count = std::min(kWidth, D - first);
      pack_columns<BFloat16, kWidth>([&](int64_t v) { return weight + v * D + first; }, V, count,
                                     panel.get());
      sweep<BFloat16>([&](int64_t t) { return units(slopes.row(t)); }, T, 1, panel.get(), steps,
                      Ahead{},
                      [&](int64_t t, const float* sums) {
                        float* to = dhidden + t * D + first;
                        for (int64_t d = 0; d < count; ++d) to[d] += sums[d];
                      });
    }
  });
}

template <typename Out>
void write_dweight(const Slopes& slopes, const BFloat16* hidden, int64_t T, int64_t D, int64_t V,
                   bool first_block, Out* dweight) {
  const int64_t steps = steps_of<BFloat16>(T), groups = (D + kWidth - 1) / kWidth;
  const Scratch<uint32_t> hidden_panels(groups * steps * kWidth);
  for_rows(groups, 1, [&](int64_t group) {
    const int64_t first = group * kWidth, count = std::min(kWidth, D - first);
    pack_columns<BFloat16, kWidth>([&](int64_t t) { return hidden + t * D + first; }, T, count,
                                   hidden_panels.get() + group * steps * kWidth);
  });
  torch::stable::parallel_for(0, (V + kWidth - 1) / kWidth, 1, [&](int64_t begin, int64_t end) {
    const Scratch<uint32_t> turned(steps * kWidth);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t top = block * kWidth, rows = std::min(kWidth, V - top);
      pack_columns<BFloat16, kWidth>([&](int64_t t) { return slopes.row(t) + top; }, T, rows,
                                     turned.get());
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * kWidth, count = std::min(kWidth, D - first);
        sweep<BFloat16>([&](int64_t v) -> const Unit* { return turned.get() + v; }, rows, kWidth,
                        hidden_panels.get() + group * steps * kWidth, steps, Ahead{},
                        [&](int64_t v, const float* sums) {
                          Out* to = dweight + (top + v) * D + first;
                          for (int64_t d = 0; d < count; ++d) {
                            const float before = first_block ? 0.0f : to_wide(to[d]);
                            to[d] = from_wide<Out>(before + sums[d]);
                          }
                        });
      }
    }
  });
}

void fused_linear_kl_project_bfloat16_cpu(const Tensor& hidden, const Tensor& weight,
                                          const std::optional<Tensor>& bias, Tensor out) {
  project(hidden.const_data_ptr<BFloat16>(), weight.const_data_ptr<BFloat16>(),
          bias ? bias->const_data_ptr<float>() : nullptr, hidden.size(0), hidden.size(1),
          weight.size(0), out.mutable_data_ptr<float>(), out.stride(0));
}

void fused_linear_kl_gradients_bfloat16_cpu(const Tensor& dlogits, const Tensor& hidden,
                                            const Tensor& weight, std::optional<Tensor> dhidden,
                                            std::optional<Tensor> dweight, bool first) {
  const int64_t T = dlogits.size(0), V = dlogits.size(1), D = hidden.size(1);
  const Slopes slopes(dlogits.const_data_ptr<float>(), T, V);
  if (dhidden)
    add_dhidden(slopes, weight.const_data_ptr<BFloat16>(), T, D, V,
                dhidden->mutable_data_ptr<float>());
  const BFloat16* rows = hidden.const_data_ptr<BFloat16>();
  if (dweight && dweight->scalar_type() == ScalarType::Float) {
    write_dweight(slopes, rows, T, D, V, first, dweight->mutable_data_ptr<float>());
  } else if (dweight) {
    write_dweight(slopes, rows, T, D, V, first, dweight->mutable_data_ptr<BFloat16>());
  }
}

#endif

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("fused_linear_kl_multiplies_bfloat16",
         TORCH_BOX(&fused_linear_kl_multiplies_bfloat16_cpu));
#if defined(DF_LEVEL_avx512)
  m.impl("fused_linear_kl_project_bfloat16", TORCH_BOX(&fused_linear_kl_project_bfloat16_cpu));
  m.impl("fused_linear_kl_gradients_bfloat16", TORCH_BOX(&fused_linear_kl_gradients_bfloat16_cpu));
#endif
}
