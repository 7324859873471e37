// The indices of a sparse weight's entries, as every kernel takes them.
#pragma once

#include <stdint.h>

namespace ppkernels {

// Of a weight [N, K]: row n has the entries offsets[n] ... offsets[n + 1] − 1, and entry e stands
// in column columns[e]; columns ascend within a row. `count` entries in all. Of the transposed
// weight the rows are columns, and `columns` are what op `transpose_topology` calls rows.
struct SparseIndices {
  const int32_t* offsets;
  const void* columns;  // uint16_t, or int32_t if `wide`
  bool wide;
  int64_t count;
};

}  // namespace ppkernels
