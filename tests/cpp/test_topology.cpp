// The kernels of topologies over raw memory, against loops over a matrix of bytes. Buffers are heap
// blocks of exactly the size in use, so that the address sanitizer sees any step outside.
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "check.h"
#include "kernels/topology.h"
#include "values.h"

namespace {

using ppkernels::TopologyFault;
using ppkernels_test::Random;

const ppkernels::TopologyKernels* kernels;

struct Case {
  int64_t rows, in_features, taps;
  uint32_t kept;  // of 100
};

// The columns 4095 ... 8193 are where blocks of a transposition end; 1030 rows are more than one.
const Case kCases[] = {
    {0, 5, 1, 50},    {5, 0, 1, 50},     {1, 1, 1, 100},   {3, 7, 1, 0},     {3, 7, 1, 100},
    {9, 63, 3, 30},   {8, 64, 1, 100},   {7, 65, 5, 40},   {17, 129, 1, 10}, {5, 36, 9, 60},
    {2, 8193, 1, 30}, {3, 4096, 16, 20}, {1030, 9, 9, 30}, {2, 65536, 1, 5}, {2, 65537, 1, 5},
};

// A topology made by loops, with indices of both widths.
struct Made {
  explicit Made(const Case& c) : c(c), mask(size_t(c.rows * c.in_features)), offsets(1, 0) {
    Random random{c.kept + 1};
    for (int64_t n = 0; n < c.rows; ++n) {
      for (int64_t k = 0; k < c.in_features; ++k) {
        if (random.next() % 100 >= c.kept) continue;
        mask[size_t(n * c.in_features + k)] = 1;
        wide.push_back(int32_t(k));
        narrow.push_back(uint16_t(k));
      }
      offsets.push_back(int32_t(wide.size()));
    }
  }

  int64_t count() const { return int64_t(wide.size()); }
  bool is_narrow() const { return c.in_features <= 65536; }

  ppkernels::SparseIndices indices(bool use_wide) const {
    const void* columns = use_wide ? (const void*)wide.data() : (const void*)narrow.data();
    return {offsets.data(), columns, use_wide, count()};
  }

  Case c;
  std::vector<uint8_t> mask;
  std::vector<int32_t> offsets, wide;
  std::vector<uint16_t> narrow;
};

std::vector<uint8_t> words_of(const std::vector<uint8_t>& mask) {
  std::vector<uint8_t> words((mask.size() + 7) / 8, 0);
  for (size_t i = 0; i < mask.size(); ++i) words[i / 8] |= uint8_t(mask[i] << (i % 8));
  return words;
}

// Calls body(begin, end) for one part, and for two that meet at a multiple of `step`.
template <class Body>
void in_parts(int64_t rows, int64_t step, const Body& body) {
  const int64_t middle = rows / 2 / step * step;
  body(0, middle);
  body(middle, rows);
}

void test_masks(const Made& made) {
  const auto [rows, in_features, taps, kept] = made.c;
  const std::vector<uint8_t> words = words_of(made.mask);
  std::vector<int64_t> counts(static_cast<size_t>(rows), -1);
  std::vector<int32_t> wide(made.wide.size(), -1);
  std::vector<uint16_t> narrow(made.wide.size(), 0xaaaa);
  in_parts(rows, 1, [&](int64_t begin, int64_t end) {
    kernels->count_rows(words.data(), in_features, begin, end, counts.data());
    kernels->columns_of(words.data(), in_features, made.offsets.data(), begin, end, wide.data(),
                        true);
    if (made.is_narrow()) {
      kernels->columns_of(words.data(), in_features, made.offsets.data(), begin, end, narrow.data(),
                          false);
    }
  });
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t expected = made.offsets[size_t(n + 1)] - made.offsets[size_t(n)];
    CHECK(counts[size_t(n)] == expected, "row %d has %d", int(n), int(counts[size_t(n)]));
  }
  CHECK(wide == made.wide, "%d x %d", int(rows), int(in_features));
  CHECK(!made.is_narrow() || narrow == made.narrow, "%d x %d", int(rows), int(in_features));
  for (bool use_wide : {true, false}) {
    if (!use_wide && !made.is_narrow()) continue;
    std::vector<uint8_t> back(words.size(), 0xaa);
    in_parts(rows, 8, [&](int64_t begin, int64_t end) {
      kernels->bits_of(made.indices(use_wide), in_features, begin, end, back.data());
    });
    CHECK(back == words, "%d x %d", int(rows), int(in_features));
  }
}

template <class R>
void check_transposed(const Made& made, bool use_wide) {
  const auto [rows, in_features, taps, kept] = made.c;
  const size_t columns = size_t(in_features);
  std::vector<int32_t> counts(2 * columns, 0);
  const ppkernels::SparseIndices indices = made.indices(use_wide);
  const int64_t middle = rows / 3;
  kernels->count_columns(indices, 0, middle, counts.data());
  kernels->count_columns(indices, middle, rows, counts.data() + columns);
  std::vector<R> found(made.wide.size(), R(-1)), expected;
  std::vector<int32_t> order(made.wide.size(), -1), expected_order;
  std::vector<int32_t> next(2 * columns);
  for (int64_t k = 0, at = 0; k < in_features; ++k) {
    next[size_t(k)] = int32_t(at);
    next[columns + size_t(k)] = int32_t(at + counts[size_t(k)]);
    at += counts[size_t(k)] + counts[columns + size_t(k)];
  }
  // The entries by a loop: a column after the other, its rows in order.
  std::vector<std::vector<int32_t>> of_column(columns);
  for (int64_t n = 0; n < rows; ++n) {
    for (int32_t e = made.offsets[size_t(n)]; e < made.offsets[size_t(n + 1)]; ++e) {
      const size_t k = size_t(made.wide[size_t(e)]);
      of_column[k].push_back(int32_t(n * taps + int64_t(k) % taps));
      of_column[k].push_back(e);
    }
  }
  for (const auto& column : of_column) {
    for (size_t i = 0; i < column.size(); i += 2) {
      expected.push_back(R(column[i]));
      expected_order.push_back(column[i + 1]);
    }
  }
  const bool wide_rows = sizeof(R) == 4;
  kernels->transpose(indices, in_features, taps, middle, rows, next.data() + columns, found.data(),
                     wide_rows, order.data());
  kernels->transpose(indices, in_features, taps, 0, middle, next.data(), found.data(), wide_rows,
                     order.data());
  CHECK(found == expected, "rows of %d x %d", int(rows), int(in_features));
  CHECK(order == expected_order, "order of %d x %d", int(rows), int(in_features));
}

void test_transpose(const Made& made) {
  check_transposed<int32_t>(made, true);
  check_transposed<uint16_t>(made, true);
  if (!made.is_narrow()) return;
  check_transposed<int32_t>(made, false);
  check_transposed<uint16_t>(made, false);
}

// ---- from and to a weight

template <class U>
void check_weight(const Made& made, bool use_wide) {
  const auto [rows, in_features, taps, kept] = made.c;
  const ppkernels::SparseIndices indices = made.indices(use_wide);
  const int64_t bytes = int64_t(sizeof(U));
  Random random;
  std::vector<U> weight(made.mask.size()), transposed(made.mask.size()), expected, scattered;
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t k = 0; k < in_features; ++k) {
      const size_t i = size_t(n * in_features + k);
      weight[i] = U((uint64_t(random.next()) << 32 | random.next()) | 1);
      transposed[size_t(k * rows + n)] = weight[i];
      if (made.mask[i]) expected.push_back(weight[i]);
      scattered.push_back(made.mask[i] ? weight[i] : U(0));
    }
  }
  std::vector<int64_t> table;
  for (int64_t k = 0; k < in_features; ++k) table.push_back(k * rows * bytes);
  const ppkernels::WeightLayout in_order = {bytes, in_features * bytes, bytes, nullptr};
  const ppkernels::WeightLayout by_step = {bytes, bytes, rows * bytes, nullptr};
  const ppkernels::WeightLayout by_table = {bytes, bytes, 0, table.data()};
  for (const auto& layout : {in_order, by_step, by_table}) {
    const void* from = layout.row_bytes == bytes ? transposed.data() : weight.data();
    if (in_features == 1) from = weight.data();  // both are the same
    std::vector<U> values(expected.size(), U(-1));
    in_parts(rows, 1, [&](int64_t begin, int64_t end) {
      kernels->gather(indices, from, layout, begin, end, values.data());
    });
    CHECK(values == expected, "%d bytes, %d x %d", int(bytes), int(rows), int(in_features));
  }
  std::vector<U> out(weight.size(), U(-1));
  in_parts(rows, 1, [&](int64_t begin, int64_t end) {
    kernels->scatter(indices, in_features, expected.data(), bytes, begin, end, out.data());
  });
  CHECK(out == scattered, "%d bytes, %d x %d", int(bytes), int(rows), int(in_features));
}

void test_weights(const Made& made) {
  for (bool use_wide : {true, false}) {
    if (!use_wide && !made.is_narrow()) continue;
    check_weight<uint8_t>(made, use_wide);
    check_weight<uint16_t>(made, use_wide);
    check_weight<uint32_t>(made, use_wide);
    check_weight<uint64_t>(made, use_wide);
  }
}

// ---- entries dropped and grown

void test_change(const Made& made) {
  const auto [rows, in_features, taps, kept] = made.c;
  Random random{7};
  std::vector<int64_t> drop, grow, origin, expected_origin;
  std::vector<int32_t> offsets(size_t(rows + 1), 0), expected_offsets(1, 0), columns, expected;
  std::vector<int64_t> drops_before(1, 0), grows_before(1, 0);
  int32_t e = 0;
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t k = 0; k < in_features; ++k) {
      const bool is_kept = made.mask[size_t(n * in_features + k)] != 0;
      const bool is_dropped = is_kept && random.next() % 3 == 0;
      // A place that is dropped may be grown again.
      const bool is_grown = (is_dropped || !is_kept) && random.next() % 4 == 0;
      if (is_dropped) drop.push_back(e);
      if (is_grown) grow.push_back(n * in_features + k);
      if (is_grown || (is_kept && !is_dropped)) {
        expected.push_back(int32_t(k));
        expected_origin.push_back(is_grown ? -1 : e);
      }
      e += is_kept;
    }
    expected_offsets.push_back(int32_t(expected.size()));
    drops_before.push_back(int64_t(drop.size()));
    grows_before.push_back(int64_t(grow.size()));
  }
  columns.assign(expected.size(), -1);
  origin.assign(expected.size(), -2);
  in_parts(rows, 1, [&](int64_t begin, int64_t end) {
    const int64_t d = drops_before[size_t(begin)], g = grows_before[size_t(begin)];
    const int64_t refused = kernels->change(
        made.indices(true), in_features, begin, end, drop.data() + d, drops_before[size_t(end)] - d,
        grow.data() + g, grows_before[size_t(end)] - g, made.offsets[size_t(begin)] - d + g,
        offsets.data(), columns.data(), origin.data());
    CHECK(refused == -1, "place %d", int(refused));
  });
  CHECK(offsets == expected_offsets, "%d x %d", int(rows), int(in_features));
  CHECK(columns == expected, "%d x %d", int(rows), int(in_features));
  CHECK(origin == expected_origin, "%d x %d", int(rows), int(in_features));
}

void test_a_place_that_is_kept() {
  const int32_t offsets[] = {0, 2, 3};
  const uint16_t columns[] = {1, 3, 2};
  const int64_t grow[] = {0, 3, 6};  // entries stand at 1, 3 and 4 + 2
  int32_t new_offsets[3];
  std::vector<uint16_t> new_columns(6);
  std::vector<int64_t> origin(6);
  const int64_t refused = kernels->change({offsets, columns, false}, 4, 0, 2, nullptr, 0, grow, 3,
                                          0, new_offsets, new_columns.data(), origin.data());
  CHECK(refused == 3, "place %d", int(refused));
}

// ---- what is wrong

void test_faults() {
  struct Row {
    std::vector<int32_t> offsets, columns;
    TopologyFault fault;
  };
  const Row table[] = {
      {{0, 2, 3}, {0, 4, 2}, TopologyFault::kNone},
      {{0, 0, 3}, {0, 1, 2}, TopologyFault::kNone},
      {{0, 3, 2}, {0, 1, 2}, TopologyFault::kOffsets},
      {{-1, 2, 3}, {0, 1, 2}, TopologyFault::kOffsets},
      {{0, 2, 4}, {0, 1, 2}, TopologyFault::kOffsets},
      {{0, 1 << 30, 3}, {0, 1, 2}, TopologyFault::kOffsets},
      {{0, 2, 3}, {0, 5, 2}, TopologyFault::kOutside},
      {{0, 2, 3}, {-1, 4, 2}, TopologyFault::kOutside},
      {{0, 2, 3}, {4, 3, 5}, TopologyFault::kOutside},
      {{0, 2, 3}, {4, 3, 2}, TopologyFault::kOrder},
      {{0, 2, 3}, {3, 3, 2}, TopologyFault::kOrder},
  };
  for (const Row& row : table) {
    std::vector<uint16_t> narrow(row.columns.begin(), row.columns.end());
    const TopologyFault wide =
        kernels->fault({row.offsets.data(), row.columns.data(), true, 3}, 5, 0, 2);
    CHECK(wide == row.fault, "found %d", int(wide));
    const TopologyFault found =
        kernels->fault({row.offsets.data(), narrow.data(), false, 3}, 5, 0, 2);
    CHECK(found == row.fault, "found %d", int(found));
  }
  for (const Case& c : kCases) {
    const Made made(c);
    const TopologyFault found = kernels->fault(made.indices(true), c.in_features, 0, c.rows);
    CHECK(found == TopologyFault::kNone, "%d x %d: %d", int(c.rows), int(c.in_features),
          int(found));
  }
}

}  // namespace

int main() {
  kernels = &ppkernels::topology_kernels(ppkernels_test::isa_under_test());
  for (const Case& c : kCases) {
    const Made made(c);
    test_masks(made);
    test_transpose(made);
    test_weights(made);
    test_change(made);
  }
  test_a_place_that_is_kept();
  test_faults();
  std::printf("topology: all checks passed\n");
  return 0;
}
