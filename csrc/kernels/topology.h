// The indices of sparse weights, over raw memory.
//
// Each function does one thread's part, the rows begin ... end − 1 or what else is said, and reads
// and writes nothing outside of it; parts may run at the same time. Outputs are apart from inputs
// and from each other. All but `fault` trust the indices that they are given.
#pragma once

#include <stdint.h>

#include "kernels/indices.h"
#include "kernels/isa.h"

namespace ppkernels {

// Where the elements of a weight [N, K] lie, in bytes from its first one: element (n, k) at
// n·row_bytes + k·column_bytes, or, with a table [K], at n·row_bytes + table[k]. An element has
// 1, 2, 4 or 8 bytes and is moved as it is.
struct WeightLayout {
  int64_t element_bytes, row_bytes, column_bytes;
  const int64_t* table;
};

// Which rule the indices of a topology break; the first one in this order.
enum class TopologyFault { kNone = 0, kOffsets = 1, kOutside = 2, kOrder = 3 };

struct TopologyKernels {
  // counts[n] = how many of the bits n·K ... (n + 1)·K − 1 of a mask's words are set.
  void (*count_rows)(const uint8_t* words, int64_t in_features, int64_t begin, int64_t end,
                     int64_t* counts);

  // The columns of a mask's set bits, columns[offsets[begin]] ... columns[offsets[end] − 1].
  void (*columns_of)(const uint8_t* words, int64_t in_features, const int32_t* offsets,
                     int64_t begin, int64_t end, void* columns, bool wide);

  // The opposite: the bits of the rows, as bytes of `words` from bit begin·K on, a multiple of 8.
  // The bits behind the last row, up to the end of its last byte, become 0.
  void (*bits_of)(const SparseIndices& indices, int64_t in_features, int64_t begin, int64_t end,
                  uint8_t* words);

  // counts[k] += the number of entries in column k, for the entries of the rows.
  void (*count_columns)(const SparseIndices& indices, int64_t begin, int64_t end, int32_t* counts);

  // The entries column by column: the first entry of these rows that stands in column k goes to
  // place next[k], and next[k] grows by 1. For entry e at (n, k), rows[place] = n·taps + k mod
  // taps, order[place] = e.
  void (*transpose)(const SparseIndices& indices, int64_t in_features, int64_t taps, int64_t begin,
                    int64_t end, int32_t* next, void* rows, bool wide_rows, int32_t* order);

  // values[e] = the element of entry e, for the entries of the rows.
  void (*gather)(const SparseIndices& indices, const void* weight, const WeightLayout& layout,
                 int64_t begin, int64_t end, void* values);

  // weight [N, K], row-major: the values at the entries of the rows, zero bytes elsewhere in them.
  void (*scatter)(const SparseIndices& indices, int64_t in_features, const void* values,
                  int64_t element_bytes, int64_t begin, int64_t end, void* weight);

  // The rows without some entries and with others. `drop`: positions of those to leave out, `grow`:
  // places n·K + k of new ones; both ascend, and are those of these rows alone. The new entries go
  // to new_columns[at] and on, as wide as the old ones, and where each of them was to origin[at]
  // and on, −1 for grown ones; new_offsets[n + 1] = where row n ends. Returns the first place of
  // `grow` that an entry has which is left, or −1.
  int64_t (*change)(const SparseIndices& indices, int64_t in_features, int64_t begin, int64_t end,
                    const int64_t* drop, int64_t drops, const int64_t* grow, int64_t grows,
                    int64_t at, int32_t* new_offsets, void* new_columns, int64_t* origin);

  // What is wrong with the rows; nothing is trusted but how many columns there are.
  TopologyFault (*fault)(const SparseIndices& indices, int64_t in_features, int64_t begin,
                         int64_t end);
};

// The kernels of one instruction set, which must be available.
const TopologyKernels& topology_kernels(Isa isa);

}  // namespace ppkernels
