// Rows of entries, cut into parts for threads. For what is compiled once, and the bindings.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

namespace ppkernels {

// Part p is rows cut[p] ... cut[p + 1] − 1.
using Cuts = std::vector<int64_t>;

// Parts of as many rows each.
inline Cuts even_cuts(int64_t rows, int64_t parts) {
  Cuts cut;
  for (int64_t p = 0; p <= parts; ++p) cut.push_back(rows * p / parts);
  return cut;
}

// What rows cost: an entry 1, and a row `row_cost` before it has any.
struct RowCosts {
  const int32_t* offsets;  // of all rows, the first is 0
  int64_t rows, row_cost;
  int64_t merged = 1;  // so many neighbouring rows of `offsets` are one

  // The rows in front of row n.
  int64_t before(int64_t n) const { return offsets[n * merged] + n * row_cost; }
  int64_t all() const { return before(rows); }
};

// Parts that cost about as much each; they begin at multiples of `step`.
inline Cuts equal_cuts(const RowCosts& costs, int64_t parts, int64_t step = 1) {
  const int64_t all = costs.all();
  Cuts cut = {0};
  for (int64_t p = 1; p < parts; ++p) {
    int64_t low = cut.back(), high = costs.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (costs.before(middle) * parts < all * p) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    cut.push_back(std::min((low + step / 2) / step * step, costs.rows));
  }
  cut.push_back(costs.rows);
  return cut;
}

}  // namespace ppkernels
