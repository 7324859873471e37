// The kernels of sparse products over raw memory, against loops in double precision.
// Longer than 350 lines: each kernel of the op, and weights and batches for them. Buffers are heap
// blocks of exactly the size in use, so that the address sanitizer sees any step outside.
#include "kernels/spmm.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "check.h"
#include "values.h"

namespace {

using ppkernels::SpmmEntries;
using ppkernels::SpmmMatrix;
using ppkernels::SpmmOutput;
using ppkernels::Type;
using ppkernels_test::bfloat_value;
using ppkernels_test::kInf;
using ppkernels_test::kNaN;
using ppkernels_test::Random;
using ppkernels_test::same;
using ppkernels_test::to_bits;

const ppkernels::SpmmKernels* kernels;

// Numbers of a type, and what they are.
struct Numbers {
  Numbers(Type type_, int64_t n, uint64_t seed) : type(type_), value(size_t(n)) {
    Random random{seed};
    for (float& each : value) each = random.centered();
    bytes.resize(value.size() * (type == Type::kFloat32 ? 4 : 2));
    for (size_t i = 0; i < value.size(); ++i) set(i, value[i]);
  }

  void set(size_t i, float x) {
    if (type == Type::kFloat32) {
      std::memcpy(bytes.data() + 4 * i, &x, 4);
    } else {
      const uint16_t upper = uint16_t(to_bits(x) >> 16);
      std::memcpy(bytes.data() + 2 * i, &upper, 2);
      x = float(bfloat_value(upper));
    }
    value[i] = x;
  }

  Type type;
  std::vector<float> value;
  std::vector<uint8_t> bytes;
};

// A weight of random entries; some rows have none.
struct Weight {
  Weight(int64_t rows_, int64_t columns_count, double kept, bool wide_, Type type, bool ordered,
         uint64_t seed)
      : rows(rows_), wide(wide_), offsets(1, 0), values(type, 0, 0) {
    Random random{seed};
    for (int64_t n = 0; n < rows; ++n) {
      const bool empty = random.next() % 5 == 0;
      for (int64_t k = 0; k < columns_count; ++k) {
        if (!empty && random.next() < kept * 4294967296.0) columns.push_back(int32_t(k));
      }
      offsets.push_back(int32_t(columns.size()));
    }
    narrow.assign(columns.begin(), columns.end());
    values = Numbers(type, int64_t(columns.size()), seed + 1);
    if (!ordered) return;
    for (size_t e = 0; e < columns.size(); ++e) order.push_back(int32_t(columns.size() - 1 - e));
  }

  SpmmEntries entries() const {
    const void* stand = wide ? (const void*)columns.data() : (const void*)narrow.data();
    return {{offsets.data(), stand, wide, int64_t(columns.size())},
            values.type,
            values.bytes.data(),
            order.empty() ? nullptr : order.data()};
  }
  double value(size_t e) const { return values.value[order.empty() ? e : size_t(order[e])]; }

  int64_t rows;
  bool wide;
  std::vector<int32_t> offsets, columns, order;
  std::vector<uint16_t> narrow;
  Numbers values;
};

// A batch [count, features] with one of its strides 1, and gaps between.
struct Batch {
  Batch(Type type, int64_t count_, int64_t features_, bool by_rows_, uint64_t seed)
      : count(count_), features(features_), by_rows(by_rows_),
        pitch((by_rows ? features : count) + 3),
        numbers(type, (by_rows ? count : features) * pitch, seed) {}

  size_t place(int64_t b, int64_t k) const {
    return size_t(by_rows ? b * pitch + k : k * pitch + b);
  }
  double at(int64_t b, int64_t k) const { return numbers.value[place(b, k)]; }
  SpmmMatrix matrix() const {
    return {numbers.type, numbers.bytes.data(), by_rows ? pitch : 1, by_rows ? 1 : pitch};
  }

  int64_t count, features;
  bool by_rows;
  int64_t pitch;
  Numbers numbers;
};

struct Aligned {
  explicit Aligned(int64_t floats)
      : start(static_cast<float*>(std::aligned_alloc(64, size_t(floats + 16) / 16 * 64))) {
    std::fill_n(start, floats, float(kNaN));
  }
  Aligned(const Aligned&) = delete;
  ~Aligned() { std::free(start); }
  float* start;
};

int64_t width_for(int64_t count) {
  return (count + kernels->lanes - 1) / kernels->lanes * kernels->lanes;
}

double read(const std::vector<uint8_t>& bytes, Type type, size_t i) {
  float single;
  uint16_t half;
  if (type == Type::kFloat32) return std::memcpy(&single, bytes.data() + 4 * i, 4), double(single);
  return std::memcpy(&half, bytes.data() + 2 * i, 2), bfloat_value(half);
}

// How far a sum of `terms` products may be off, of which the absolute values add up to `size`.
double bound(double size, int64_t terms, Type type) {
  const double sums = size * double(terms + 2) * 0x1p-24;
  return sums + (type == Type::kBFloat16 ? size * 0x1p-8 : 0) + 1e-30;
}

// ---- packing

void test_pack(Type type) {
  for (bool by_rows : {true, false}) {
    for (int64_t count = 0; count <= 4 * kernels->lanes; count += count < 5 ? 1 : 7) {
      for (int64_t features : {0, 1, 15, 16, 17, 33, 64}) {
        const Batch x(type, count + 2, features, by_rows, 7);
        const int64_t width = std::max(width_for(count), kernels->lanes);
        const int64_t begin = features / 3;
        Aligned panel((features - begin) * width);
        kernels->pack(x.matrix(), 1, count, begin, features, width, panel.start);
        for (int64_t k = begin; k < features; ++k) {
          for (int64_t b = 0; b < width; ++b) {
            const float wanted = b < count ? float(x.at(1 + b, k)) : 0.0f;
            const float got = panel.start[(k - begin) * width + b];
            CHECK(same(got, wanted), "column %d, number %d of %d: %g, not %g", int(k), int(b),
                  int(count), double(got), double(wanted));
          }
        }
      }
    }
  }
}

// ---- the forward and grad_input

struct Case {
  int64_t rows, columns;
  double kept;
};
const Case kCases[] = {{0, 5, 0.5}, {1, 1, 1},      {3, 0, 0},      {5, 17, 0},     {16, 33, 0.3},
                       {17, 50, 1}, {64, 40, 0.02}, {65, 100, 0.1}, {150, 31, 0.4}, {33, 300, 0.2}};

void check_multiply(const Weight& w, const Batch& x, Type out_type, bool has_bias) {
  const std::vector<float> bias = Numbers(Type::kFloat32, w.rows, 5).value;
  const int64_t width = width_for(x.count), stride = w.rows + 2;
  const size_t bytes = out_type == Type::kFloat32 ? 4 : 2;
  std::vector<uint8_t> out(size_t(x.count * stride) * bytes, 0xaa);
  Aligned panel(x.features * width);
  kernels->pack(x.matrix(), 0, x.count, 0, x.features, width, panel.start);
  // In two parts, as two threads would.
  const int64_t middle = w.rows / 2 / 16 * 16;
  for (const auto& [begin, end] : {std::pair(int64_t(0), middle), std::pair(middle, w.rows)}) {
    kernels->multiply(w.entries(), panel.start, width, has_bias ? bias.data() : nullptr,
                      {out_type, out.data(), stride, x.count}, begin, end);
  }
  for (int64_t b = 0; b < x.count; ++b) {
    for (int64_t n = 0; n < stride; ++n) {
      const size_t place = size_t(b * stride + n);
      if (n >= w.rows) {
        CHECK(out[place * bytes] == 0xaa, "written behind row %d", int(n));
        continue;
      }
      double sum = has_bias ? bias[size_t(n)] : 0, size = std::fabs(sum);
      for (int32_t e = w.offsets[size_t(n)]; e < w.offsets[size_t(n) + 1]; ++e) {
        const double product = w.value(size_t(e)) * x.at(b, w.columns[size_t(e)]);
        sum += product;
        size += std::fabs(product);
      }
      const double got = read(out, out_type, place);
      CHECK(std::fabs(got - sum) <= bound(size, x.features, out_type),
            "%d x %d, batch %d: out[%d, %d] = %g, not %g", int(w.rows), int(x.features),
            int(x.count), int(b), int(n), got, sum);
    }
  }
}

// The other kernel for a batch of one.
void check_multiply_one(const Weight& w, const Batch& x, Type out_type, bool has_bias) {
  const std::vector<float> bias = Numbers(Type::kFloat32, w.rows, 5).value;
  const size_t bytes = out_type == Type::kFloat32 ? 4 : 2;
  std::vector<uint8_t> out(size_t(w.rows) * bytes, 0xaa);
  std::vector<float> row(size_t(x.features), float(kNaN));
  kernels->widen(x.matrix(), x.features, row.data());
  const int64_t middle = w.rows / 2 / 16 * 16;
  for (const auto& [begin, end] : {std::pair(int64_t(0), middle), std::pair(middle, w.rows)}) {
    kernels->multiply_one(w.entries(), row.data(), has_bias ? bias.data() : nullptr,
                          {out_type, out.data(), w.rows, 1}, begin, end);
  }
  for (int64_t n = 0; n < w.rows; ++n) {
    double sum = has_bias ? bias[size_t(n)] : 0, size = std::fabs(sum);
    for (int32_t e = w.offsets[size_t(n)]; e < w.offsets[size_t(n) + 1]; ++e) {
      const double product = w.value(size_t(e)) * x.at(0, w.columns[size_t(e)]);
      sum += product;
      size += std::fabs(product);
    }
    const double got = read(out, out_type, size_t(n));
    CHECK(std::fabs(got - sum) <= bound(size, x.features, out_type),
          "%d x %d, a batch of one: out[%d] = %g, not %g", int(w.rows), int(x.features), int(n),
          got, sum);
  }
}

// ---- grad_values

void check_sample(const Weight& w, const Batch& x, const Batch& g) {
  const int64_t width = width_for(x.count), middle = w.rows / 2;
  Aligned panel(x.features * width);
  kernels->pack(x.matrix(), 0, x.count, 0, x.features, width, panel.start);
  for (bool add : {false, true}) {
    std::vector<float> sums(w.columns.size(), add ? 0.5f : float(kNaN)), one = sums;
    for (const auto& [begin, end] : {std::pair(int64_t(0), middle), std::pair(middle, w.rows)}) {
      kernels->sample(w.entries(), panel.start, width, g.matrix(), 0, x.count, sums.data(), add,
                      begin, end);
    }
    if (x.count == 1) {
      std::vector<float> row(size_t(x.features));
      kernels->widen(x.matrix(), x.features, row.data());
      kernels->sample_one(w.entries(), row.data(), g.matrix(), one.data(), 0, w.rows);
    }
    for (int64_t n = 0; n < w.rows; ++n) {
      for (int32_t e = w.offsets[size_t(n)]; e < w.offsets[size_t(n) + 1]; ++e) {
        double sum = 0, size = 0;
        for (int64_t b = 0; b < x.count; ++b) {
          const double product = g.at(b, n) * x.at(b, w.columns[size_t(e)]);
          sum += product;
          size += std::fabs(product);
        }
        const double got = sums[size_t(e)], start = add ? 0.5 : 0;
        CHECK(std::fabs(got - start - sum) <= bound(size + start, x.count, Type::kFloat32),
              "%d x %d, batch %d: sums[%d] = %g, not %g", int(w.rows), int(x.features),
              int(x.count), int(e), got, start + sum);
        if (x.count != 1) continue;
        CHECK(same(one[size_t(e)], float(sum)), "a batch of one: sums[%d] = %g, not %g", int(e),
              double(one[size_t(e)]), sum);
      }
    }
  }
}

void test_products(Type type, Type value_type) {
  uint64_t seed = 0;
  for (const Case& c : kCases) {
    for (bool ordered : {false, true}) {
      const bool wide = ++seed % 2 == 0, by_rows = seed % 3 != 0;
      const Weight w(c.rows, c.columns, c.kept, wide, value_type, ordered, seed);
      for (int64_t count : {int64_t(1), int64_t(2), kernels->lanes - 1, kernels->lanes,
                            kernels->lanes + 1, 3 * kernels->lanes, 4 * kernels->lanes}) {
        const Batch x(type, count, c.columns, by_rows, seed + 9);
        check_multiply(w, x, type, seed % 4 < 2);
        if (count == 1) check_multiply_one(w, x, type, seed % 4 < 2);
        check_sample(w, x, Batch(type, count, c.rows, !by_rows, seed + 10));
      }
    }
  }
}

// ---- what is not a usual number

// An infinity or a NaN reaches the numbers of the batch and the rows that it belongs to, and those
// alone: not those beside it in a vector, nor those that stand for nothing.
void test_special_values() {
  for (float special : {float(kInf), float(kNaN)}) {
    const int64_t count = kernels->lanes + 3, rows = 70, features = 40;
    Weight w(rows, features, 0.3, false, Type::kFloat32, false, 3);
    Batch x(Type::kFloat32, count, features, true, 4);
    x.numbers.set(x.place(2, 7), special);
    const int64_t width = width_for(count);
    Aligned panel(features * width);
    kernels->pack(x.matrix(), 0, count, 0, features, width, panel.start);
    std::vector<float> out(size_t(count * rows));
    kernels->multiply(w.entries(), panel.start, width, nullptr,
                      {Type::kFloat32, out.data(), rows, count}, 0, rows);
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t n = 0; n < rows; ++n) {
        const auto begin = w.columns.begin() + w.offsets[size_t(n)],
                   end = w.columns.begin() + w.offsets[size_t(n) + 1];
        const bool hit = b == 2 && std::find(begin, end, 7) != end;
        CHECK(std::isfinite(out[size_t(b * rows + n)]) == !hit, "out[%d, %d] is %g", int(b), int(n),
              double(out[size_t(b * rows + n)]));
      }
    }
    const Batch g(Type::kFloat32, count, rows, true, 5);
    std::vector<float> sums(w.columns.size());
    kernels->sample(w.entries(), panel.start, width, g.matrix(), 0, count, sums.data(), false, 0,
                    rows);
    for (size_t e = 0; e < sums.size(); ++e) {
      CHECK(std::isfinite(sums[e]) == (w.columns[e] != 7), "sums[%d] is %g", int(e),
            double(sums[e]));
    }
  }
}

// ---- bits

// A number's sums are the same beside other ones, in a panel of another width, and as part of
// another range of rows.
void test_same_bits() {
  const int64_t rows = 130, features = 90, lanes = kernels->lanes;
  const Weight w(rows, features, 0.2, false, Type::kFloat32, false, 11);
  const Batch x(Type::kFloat32, 4 * lanes, features, true, 12);
  std::vector<float> all(size_t(x.count * rows));
  Aligned panel(features * x.count);
  kernels->pack(x.matrix(), 0, x.count, 0, features, x.count, panel.start);
  kernels->multiply(w.entries(), panel.start, x.count, nullptr,
                    {Type::kFloat32, all.data(), rows, x.count}, 0, rows);
  for (int64_t first = 0; first < x.count; first += lanes) {
    std::vector<float> part(size_t(lanes * rows));
    kernels->pack(x.matrix(), first, lanes, 0, features, lanes, panel.start);
    for (int64_t n = 0; n < rows; n += 48) {
      kernels->multiply(w.entries(), panel.start, lanes, nullptr,
                        {Type::kFloat32, part.data(), rows, lanes}, n, std::min(n + 48, rows));
    }
    for (size_t i = 0; i < part.size(); ++i) {
      CHECK(same(part[i], all[size_t(first * rows) + i]), "number %d: %a and %a", int(first),
            double(part[i]), double(all[size_t(first * rows) + i]));
    }
  }
}

// The same bits on every instruction set, whatever the lanes; batches of one as well.
void test_same_bits_on_all_sets() {
  const int64_t rows = 200, features = 150;
  for (int64_t count : {1, 4, 20}) {
    const Weight w(rows, features, 0.3, false, Type::kFloat32, false, 13);
    const Batch x(Type::kFloat32, count, features, true, 14);
    std::vector<std::vector<float>> results;
    for (int i = 0; i < ppkernels::kIsaCount; ++i) {
      if (!ppkernels::is_available(ppkernels::Isa(i))) continue;
      const auto& set = ppkernels::spmm_kernels(ppkernels::Isa(i));
      std::vector<float> out(size_t(count * rows)), row(static_cast<size_t>(features));
      Aligned panel(features * set.lanes);
      for (int64_t first = 0; first < count && count > 1; first += set.lanes) {
        const int64_t numbers = std::min(set.lanes, count - first);
        set.pack(x.matrix(), first, numbers, 0, features, set.lanes, panel.start);
        set.multiply(w.entries(), panel.start, set.lanes, nullptr,
                     {Type::kFloat32, out.data() + first * rows, rows, numbers}, 0, rows);
      }
      if (count == 1) {
        set.widen(x.matrix(), features, row.data());
        set.multiply_one(w.entries(), row.data(), nullptr, {Type::kFloat32, out.data(), rows, 1}, 0,
                         rows);
      }
      results.push_back(out);
    }
    for (const auto& other : results) {
      for (size_t i = 0; i < other.size(); ++i)
        CHECK(same(other[i], results[0][i]), "batch %d: %a and %a", int(count), double(other[i]),
              double(results[0][i]));
    }
  }
}

void test_values() {
  for (Type type : {Type::kFloat32, Type::kBFloat16}) {
    const Weight w(40, 30, 0.5, false, type, true, 21);
    std::vector<float> gathered(w.columns.size(), float(kNaN));
    kernels->gather(w.entries(), gathered.data(), 3, int64_t(gathered.size()));
    for (size_t e = 3; e < gathered.size(); ++e)
      CHECK(same(gathered[e], float(w.value(e))), "value %d is %g", int(e), double(gathered[e]));
  }
  for (int64_t n : {0, 1, 5, 16, 37}) {
    const std::vector<float> from = {1.0f, 1.00390625f, 1.01171875f, float(kInf), -0.0f};
    const uint16_t wanted[] = {0x3f80, 0x3f80, 0x3f82, 0x7f80, 0x8000};
    std::vector<float> values;
    for (int64_t i = 0; i < n; ++i) values.push_back(from[size_t(i) % from.size()]);
    std::vector<uint16_t> narrow(static_cast<size_t>(n));
    kernels->narrow(values.data(), narrow.data(), n);
    for (size_t i = 0; i < narrow.size(); ++i)
      CHECK(narrow[i] == wanted[i % 5], "%g becomes %x", double(values[i]), narrow[i]);
  }
}

}  // namespace

int main() {
  kernels = &ppkernels::spmm_kernels(ppkernels_test::isa_under_test());
  for (Type type : {Type::kFloat32, Type::kBFloat16}) {
    test_pack(type);
    for (Type value_type : {Type::kFloat32, Type::kBFloat16}) test_products(type, value_type);
  }
  test_special_values();
  test_same_bits();
  test_same_bits_on_all_sets();
  test_values();
  std::printf("spmm: all checks passed\n");
  return 0;
}
