// The plan against its definition: stable, complete, inverse of itself, sentinels without a row.
#include "common/moe_plan.h"

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <numeric>

namespace {

// The second spelling: a stable sort of the slots that have an expert.
template <typename Id>
void check(const std::vector<Id>& experts, int64_t num_experts) {
  const int64_t num_rows = static_cast<int64_t>(experts.size());
  std::vector<int32_t> order(num_rows, 99), slots(num_rows, 99), offsets(num_experts + 1, 99);
  deepfusion::moe_plan(experts.data(), num_rows, num_experts, order.data(), slots.data(),
                       offsets.data());

  std::vector<int32_t> wanted(num_rows);
  std::iota(wanted.begin(), wanted.end(), 0);
  const auto real = [&](int32_t slot) { return experts[slot] >= 0 && experts[slot] < num_experts; };
  const auto end = std::stable_partition(wanted.begin(), wanted.end(), real);
  std::stable_sort(wanted.begin(), end,
                   [&](int32_t a, int32_t b) { return experts[a] < experts[b]; });
  std::fill(end, wanted.end(), -1);
  assert(order == wanted);

  assert(offsets[0] == 0 && offsets[num_experts] == end - wanted.begin());
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    assert(offsets[expert] <= offsets[expert + 1]);
    for (int32_t row = offsets[expert]; row < offsets[expert + 1]; ++row) {
      assert(experts[order[row]] == expert && slots[order[row]] == row);
    }
  }
  for (int32_t slot = 0; slot < num_rows; ++slot) assert(real(slot) || slots[slot] == -1);
}

template <typename Id>
void check_all() {
  const auto id = [](int64_t value) { return static_cast<Id>(value); };
  check<Id>({}, 3);
  check<Id>({id(-1), id(4), id(1 << 30), id(-(1 << 30))}, 4);
  check<Id>({id(2), id(2), id(2), id(2)}, 7);
  check<Id>({id(0)}, 1);
  check<Id>({id(1), id(0), id(1), id(-1), id(0), id(1), id(2), id(0), id(0)}, 2);
  uint64_t state = 1;
  for (const int64_t num_experts : {1, 7, 60, 128, 1000}) {
    std::vector<Id> experts(3001);
    for (Id& expert : experts) {
      state = state * 6364136223846793005ULL + 1442695040888963407ULL;
      expert = static_cast<Id>(static_cast<int64_t>((state >> 33) % (num_experts + 3)) - 1);
    }
    check(experts, num_experts);
  }
}

}  // namespace

int main() {
  check_all<int32_t>();
  check_all<int64_t>();
  check<int64_t>({int64_t{1} << 32, 0, -(int64_t{1} << 32)}, 2);
  std::puts("moe_plan: ok");
  return 0;
}
