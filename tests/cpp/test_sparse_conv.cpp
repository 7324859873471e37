// The three products of a convolution by a sparse weight, against loops in double precision over
// every tap of every pixel, on any geometry. Buffers are heap blocks of exactly the size in use, so
// that the address sanitizer sees any step outside.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "kernels/convolution.h"
#include "values.h"

namespace {

using ppkernels::Convolution;
using ppkernels::MutableMemory;
using ppkernels::SparseIndices;
using ppkernels::Type;
using ppkernels::TypedMemory;
using ppkernels_test::bfloat_value;
using ppkernels_test::kNaN;
using ppkernels_test::Random;
using ppkernels_test::to_bits;

ppkernels::Isa isa;

// ---- numbers of either type

struct Numbers {
  Numbers(Type type_, size_t n) : type(type_), bytes(n * size(), 0xff), count(n) {}

  size_t size() const { return type == Type::kFloat32 ? 4 : 2; }
  double operator[](size_t i) const {
    float single;
    uint16_t half;
    if (type == Type::kFloat32) return std::memcpy(&single, &bytes[4 * i], 4), double(single);
    return std::memcpy(&half, &bytes[2 * i], 2), bfloat_value(half);
  }
  void set(size_t i, float value) {
    const uint16_t upper = uint16_t(to_bits(value) >> 16);
    if (type == Type::kFloat32) std::memcpy(&bytes[4 * i], &value, 4);
    if (type == Type::kBFloat16) std::memcpy(&bytes[2 * i], &upper, 2);
  }
  operator TypedMemory() const { return {type, bytes.data()}; }
  MutableMemory out() { return {type, bytes.data()}; }

  Type type;
  std::vector<uint8_t> bytes;
  size_t count;
};

Numbers drawn(Type type, int64_t n, Random& random) {
  Numbers x(type, size_t(n));
  for (size_t i = 0; i < size_t(n); ++i) x.set(i, random.centered());
  return x;
}

// ---- a weight's entries

struct Indices {
  std::vector<int32_t> offsets = {0}, wide;
  std::vector<uint16_t> narrow;
  std::vector<int32_t> order;  // of the transposed

  void add(int64_t column) {
    wide.push_back(int32_t(column));
    narrow.push_back(uint16_t(column));
  }
  SparseIndices as(bool is_wide) const {
    const void* columns = is_wide ? (const void*)wide.data() : (const void*)narrow.data();
    return {offsets.data(), columns, is_wide, int64_t(wide.size())};
  }
};

Indices drawn_indices(const Convolution& c, double kept, Random& random) {
  Indices found;
  for (int64_t n = 0; n < c.features; ++n) {
    // Every fourth row of a weight that is not whole has no entry.
    const bool is_empty = kept < 1 && n % 4 == 1;
    for (int64_t k = 0; k < c.channels * c.taps(); ++k) {
      if (random.next() * 0x1p-32 < kept && !is_empty) found.add(k);
    }
    found.offsets.push_back(int32_t(found.wide.size()));
  }
  return found;
}

Indices transposed(const Convolution& c, const Indices& indices) {
  Indices found;
  for (int64_t k = 0; k < c.channels * c.taps(); ++k) {
    for (int64_t n = 0; n < c.features; ++n) {
      for (int32_t e = indices.offsets[size_t(n)]; e < indices.offsets[size_t(n + 1)]; ++e) {
        if (indices.wide[size_t(e)] != k) continue;
        found.add(n * c.taps() + k % c.taps());
        found.order.push_back(e);
      }
    }
    found.offsets.push_back(int32_t(found.wide.size()));
  }
  return found;
}

// ---- the definition

// body(entry, output, input) for each product: numbers of the entry, the output pixel and the input
// pixel.
template <class Body>
void for_each_product(const Convolution& c, const Indices& indices, const Body& body) {
  for (int64_t b = 0; b < c.images; ++b) {
    for (int64_t n = 0; n < c.features; ++n) {
      for (int32_t e = indices.offsets[size_t(n)]; e < indices.offsets[size_t(n + 1)]; ++e) {
        const int64_t k = indices.wide[size_t(e)], channel = k / c.taps(), tap = k % c.taps();
        for (int64_t i = 0; i < c.output[0]; ++i) {
          const int64_t y = i * c.stride[0] + tap / c.kernel[1] * c.dilation[0] - c.padding[0];
          if (y < 0 || y >= c.input[0]) continue;
          for (int64_t j = 0; j < c.output[1]; ++j) {
            const int64_t x = j * c.stride[1] + tap % c.kernel[1] * c.dilation[1] - c.padding[1];
            if (x < 0 || x >= c.input[1]) continue;
            body(size_t(e), size_t(((b * c.features + n) * c.output[0] + i) * c.output[1] + j),
                 size_t(((b * c.channels + channel) * c.input[0] + y) * c.input[1] + x));
          }
        }
      }
    }
  }
}

struct Sum {
  double value = 0, size = 0;  // of the products, and of their absolute values
  void add(double product) {
    value += product;
    size += std::fabs(product);
  }
};

// Every number is the sum, rounded in float32 as it is added up and to its type in the end.
void check_sums(const char* what, const Convolution& c, const Numbers& came,
                const std::vector<Sum>& wanted) {
  CHECK(came.count == wanted.size(), "%s: %d numbers", what, int(came.count));
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double last = came.type == Type::kFloat32 ? 0x1p-24 : 0x1p-8;
    const double bound = wanted[i].size * 0x1p-20 + std::fabs(wanted[i].value) * last;
    CHECK(std::fabs(came[i] - wanted[i].value) <= bound,
          "%s of (%d, %d, %d, %d) by (%d, %d, %d, %d), stride %d %d, padding %d %d, dilation %d "
          "%d: number %d is %g, not %g",
          what, int(c.images), int(c.channels), int(c.input[0]), int(c.input[1]), int(c.features),
          int(c.channels), int(c.kernel[0]), int(c.kernel[1]), int(c.stride[0]), int(c.stride[1]),
          int(c.padding[0]), int(c.padding[1]), int(c.dilation[0]), int(c.dilation[1]), int(i),
          came[i], wanted[i].value);
  }
}

// ---- checks

// As many parts as that, one after the other: what threads do, in a fixed order.
ppkernels::ParallelFor threads(int64_t count) {
  return [count](int64_t n, int64_t, const auto& body) {
    for (int64_t k = count; k-- > 0;) {
      const int64_t begin = k * n / count, end = (k + 1) * n / count;
      if (begin < end) body(begin, end);
    }
  };
}

struct Results {
  Numbers output, grad_input, grad_values;
};

struct Operands {
  Numbers input, grad_output, values;
  const float* bias;
  Indices indices, columns;
  bool is_wide;
};

Results called(const Convolution& c, const Operands& o, Type values, int64_t thread_count) {
  const auto& kernels = ppkernels::sparse_conv_kernels(isa);
  const auto parallel = threads(thread_count);
  const SparseIndices indices = o.indices.as(o.is_wide), columns = o.columns.as(o.is_wide);
  Results r = {Numbers(o.input.type, o.grad_output.count), Numbers(o.input.type, o.input.count),
               Numbers(values, o.values.count)};
  CHECK(convolution(kernels, c, o.input, o.values, indices, o.bias, r.output.out(), parallel),
        "the output was refused");
  CHECK(convolution_grad_input(kernels, c, o.grad_output, o.values, columns, o.columns.order.data(),
                               r.grad_input.out(), parallel),
        "the gradient of the input was refused");
  CHECK(convolution_grad_values(kernels, c, o.grad_output, o.input, indices, r.grad_values.out(),
                                parallel),
        "the gradient of the values was refused");
  return r;
}

void check_convolution(const Convolution& c, Type type, Type value_type, double kept, bool has_bias,
                       bool is_wide, uint64_t seed) {
  Random random{seed};
  const Indices indices = drawn_indices(c, kept, random);
  std::vector<float> bias;
  for (int64_t n = 0; n < c.features; ++n) bias.push_back(random.centered());
  const Operands o = {drawn(type, c.images * c.channels * c.input[0] * c.input[1], random),
                      drawn(type, c.images * c.features * c.output[0] * c.output[1], random),
                      drawn(value_type, int64_t(indices.wide.size()), random),
                      has_bias ? bias.data() : nullptr,
                      indices,
                      transposed(c, indices),
                      is_wide};
  const Results r = called(c, o, value_type, 1);
  std::vector<Sum> output(r.output.count), grad_input(r.grad_input.count),
      grad_values(r.grad_values.count);
  const size_t pixels = size_t(c.output[0] * c.output[1]);
  for (size_t i = 0; has_bias && i < output.size(); ++i)
    output[i].add(bias[i / pixels % size_t(c.features)]);
  for_each_product(c, indices, [&](size_t e, size_t out, size_t in) {
    output[out].add(o.values[e] * o.input[in]);
    grad_input[in].add(o.values[e] * o.grad_output[out]);
    grad_values[e].add(o.grad_output[out] * o.input[in]);
  });
  check_sums("output", c, r.output, output);
  check_sums("gradient of the input", c, r.grad_input, grad_input);
  check_sums("gradient of the values", c, r.grad_values, grad_values);
  // The same bits on any number of threads.
  for (int64_t count : {2, 7}) {
    const Results other = called(c, o, value_type, count);
    CHECK(other.output.bytes == r.output.bytes && other.grad_input.bytes == r.grad_input.bytes &&
              other.grad_values.bytes == r.grad_values.bytes,
          "%d threads: other bits, of %d images", int(count), int(c.images));
  }
}

Convolution sizes(int64_t images, int64_t channels, int64_t features, const int64_t (&input)[2],
                  const int64_t (&kernel)[2], const int64_t (&stride)[2],
                  const int64_t (&padding)[2], const int64_t (&dilation)[2]) {
  Convolution c = {images, channels, features, {}, {}, {}, {}, {}, {}};
  for (int d = 0; d < 2; ++d) {
    c.input[d] = input[d];
    c.kernel[d] = kernel[d];
    c.stride[d] = stride[d];
    c.padding[d] = padding[d];
    c.dilation[d] = dilation[d];
    c.output[d] = (input[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  }
  return c;
}

void test_geometries() {
  const Convolution table[] = {
      // Usual ones: a pass is an image, part of one, several.
      sizes(2, 5, 6, {14, 14}, {3, 3}, {1, 1}, {1, 1}, {1, 1}),
      sizes(2, 3, 5, {33, 30}, {3, 3}, {1, 1}, {1, 1}, {1, 1}),
      sizes(7, 4, 3, {7, 7}, {3, 3}, {1, 1}, {1, 1}, {1, 1}),
      sizes(2, 3, 4, {28, 28}, {3, 3}, {2, 2}, {1, 1}, {1, 1}),
      sizes(1, 3, 4, {20, 21}, {7, 7}, {2, 2}, {3, 3}, {1, 1}),
      // Nothing to copy, but for the last image.
      sizes(3, 6, 5, {14, 14}, {1, 1}, {1, 1}, {0, 0}, {1, 1}),
      sizes(2, 6, 5, {8, 8}, {1, 1}, {1, 1}, {0, 0}, {1, 1}),
      sizes(2, 6, 5, {14, 14}, {1, 1}, {2, 2}, {0, 0}, {1, 1}),
      // The axes differ; strides beyond the kernel, and patches.
      sizes(3, 2, 3, {9, 11}, {3, 2}, {1, 2}, {2, 0}, {2, 1}),
      sizes(2, 2, 3, {19, 23}, {2, 5}, {3, 1}, {0, 4}, {1, 2}),
      sizes(2, 2, 3, {17, 17}, {2, 2}, {5, 3}, {1, 0}, {1, 1}),
      sizes(2, 3, 2, {32, 24}, {8, 8}, {8, 8}, {0, 0}, {1, 1}),
      sizes(2, 2, 3, {13, 40}, {3, 3}, {2, 2}, {2, 2}, {2, 3}),
      // More padding than the kernel reaches, and less input than a stride.
      sizes(3, 2, 3, {5, 4}, {2, 2}, {1, 1}, {4, 3}, {1, 1}),
      sizes(2, 2, 3, {2, 1}, {3, 3}, {4, 4}, {2, 2}, {1, 1}),
      sizes(2, 3, 2, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}),
      sizes(1, 1, 1, {1, 70}, {1, 3}, {1, 1}, {0, 1}, {1, 1}),
      sizes(1, 1, 1, {70, 1}, {3, 1}, {1, 1}, {1, 0}, {1, 1}),
      // Nothing there.
      sizes(0, 3, 4, {6, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}),
      sizes(2, 0, 4, {6, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}),
      sizes(2, 3, 0, {6, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}),
  };
  const Type kTypes[] = {Type::kFloat32, Type::kBFloat16};
  uint64_t seed = 0;
  for (const Convolution& c : table) {
    for (double kept : {0.0, 0.2, 1.0}) {
      for (Type type : kTypes) {
        for (Type value_type : kTypes) {
          ++seed;
          check_convolution(c, type, value_type, kept, seed % 2, seed % 3 == 0, seed);
        }
      }
    }
  }
}

// Many channels: blocks of them within a pass, and an image in several tiles.
void test_blocks_and_tiles() {
  const Convolution table[] = {
      sizes(1, 96, 6, {14, 14}, {3, 3}, {1, 1}, {1, 1}, {1, 1}),
      sizes(1, 70, 5, {18, 18}, {3, 3}, {2, 2}, {1, 1}, {1, 1}),
      sizes(1, 150, 2, {40, 57}, {3, 3}, {1, 1}, {1, 1}, {1, 1}),
      sizes(1, 2, 150, {40, 57}, {3, 3}, {1, 1}, {1, 1}, {1, 1}),
  };
  uint64_t seed = 100;
  for (const Convolution& c : table) {
    for (double kept : {0.02, 0.3})
      check_convolution(c, Type::kFloat32, Type::kFloat32, kept, true, false, ++seed);
  }
}

// What cannot be addressed is refused before anything is written.
void test_too_large() {
  Convolution c = sizes(1, 1 << 12, 1, {1, 1 << 20}, {1, 3}, {1, 1}, {0, 1}, {1, 1});
  const int32_t offsets[] = {0, 1};
  const uint16_t column = 0;
  const SparseIndices indices = {offsets, &column, false, 1};
  const TypedMemory nothing = {Type::kFloat32, nullptr};
  CHECK(!convolution(ppkernels::sparse_conv_kernels(isa), c, nothing, nothing, indices, nullptr,
                     {Type::kFloat32, nullptr}, threads(1)),
        "2^32 numbers were accepted");
}

}  // namespace

int main() {
  isa = ppkernels_test::isa_under_test();
  test_geometries();
  test_blocks_and_tiles();
  test_too_large();
  std::printf("sparse_conv: all checks passed\n");
  return 0;
}
