// The mask kernels over raw memory, against loops that take one entry at a time. Buffers are heap
// blocks of exactly the size in use, so that the address sanitizer sees any step outside.
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "check.h"
#include "kernels/bitmask.h"
#include "values.h"

namespace {

using ppkernels::Type;
using ppkernels_test::Random;

const ppkernels::BitmaskKernels* kernels;

const int64_t kSizes[] = {0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 511, 1003};

std::vector<uint8_t> random_entries(int64_t n, uint32_t seed = 1) {
  Random random{seed};
  std::vector<uint8_t> mask(static_cast<size_t>(n), 0);
  for (uint8_t& entry : mask) entry = random.next() % 3 == 0;
  return mask;
}

// The words of a mask by the definition.
std::vector<uint8_t> words_of(const std::vector<uint8_t>& mask) {
  std::vector<uint8_t> words((mask.size() + 7) / 8, 0);
  for (size_t i = 0; i < mask.size(); ++i) {
    if (mask[i]) words[i / 8] = uint8_t(words[i / 8] | (1u << (i % 8)));
  }
  return words;
}

void test_pack_and_unpack() {
  for (int64_t n : kSizes) {
    std::vector<uint8_t> mask = random_entries(n), packed((mask.size() + 7) / 8, 0xaa);
    const std::vector<uint8_t> words = words_of(mask);
    kernels->pack(mask.data(), packed.data(), n);
    CHECK(packed == words, "%d entries", int(n));
    std::vector<uint8_t> unpacked(mask.size(), 0xaa);
    kernels->unpack(words.data(), unpacked.data(), n);
    CHECK(unpacked == mask, "%d entries", int(n));
    // Any byte that is not 0 counts as set.
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = uint8_t(mask[i] * (1 + 37 * i % 255));
    kernels->pack(mask.data(), packed.data(), n);
    CHECK(packed == words, "%d entries that are not all 0 or 1", int(n));
  }
}

void test_count() {
  for (int64_t n : kSizes) {
    const std::vector<uint8_t> mask = random_entries(n);
    int64_t expected = 0;
    for (uint8_t entry : mask) expected += entry;
    const std::vector<uint8_t> words = words_of(mask);
    const int64_t counted = kernels->count(words.data(), int64_t(words.size()));
    CHECK(counted == expected, "%d bits, not %d", int(counted), int(expected));
  }
}

// ---- the masked weight

template <class U>
void check_apply(Type type, U poison) {
  for (int64_t n : kSizes) {
    const std::vector<uint8_t> mask = random_entries(n), words = words_of(mask);
    // Every bit pattern is a value: NaN, infinities and subnormals keep their bits.
    Random random;
    std::vector<U> weight(mask.size()), expected(mask.size());
    for (size_t i = 0; i < weight.size(); ++i) {
      weight[i] = U((uint64_t(random.next()) << 32 | random.next()) | (i % 5 == 0 ? poison : U(0)));
      expected[i] = mask[i] ? weight[i] : U(0);
    }
    std::vector<U> out(weight.size(), U(-1));
    kernels->apply(type, weight.data(), words.data(), out.data(), n, false);
    CHECK(out == expected, "%d bytes an element, %d elements", int(sizeof(U)), int(n));
    kernels->apply(type, weight.data(), words.data(), weight.data(), n, false);
    CHECK(weight == expected, "in place, %d elements", int(n));
  }
}

void test_apply() {
  check_apply<uint32_t>(Type::kFloat32, 0x7f800000u);
  check_apply<uint64_t>(Type::kFloat64, 0x7ff0000000000000u);
  check_apply<uint16_t>(Type::kBFloat16, 0x7f80u);
  check_apply<uint16_t>(Type::kFloat16, 0x7c00u);
}

void test_apply_streaming() {
  const int64_t n = 1003;
  const std::vector<uint8_t> mask = random_entries(n), words = words_of(mask);
  auto* out = static_cast<uint32_t*>(std::aligned_alloc(64, 64 * 63));
  const std::vector<uint32_t> weight(static_cast<size_t>(n), 0x40490fdbu);
  for (int64_t i = 0; i < 1008; ++i) out[i] = 7;
  kernels->apply(Type::kFloat32, weight.data(), words.data(), out, n, true);
  for (int64_t i = 0; i < 1008; ++i) {
    const uint32_t expected = i >= n ? 7 : mask[size_t(i)] ? 0x40490fdbu : 0;
    CHECK(out[i] == expected, "element %d is %x", int(i), out[i]);
  }
  std::free(out);
}

// ---- a mask in memory order

struct Layout {
  const char* name;
  std::vector<int64_t> shape, strides;
};

void test_arrange() {
  const Layout layouts[] = {
      {"0-dim", {}, {}},
      {"one element", {1, 1}, {1, 1}},
      {"contiguous", {5, 7}, {7, 1}},
      {"transposed", {33, 65}, {1, 33}},
      {"transposed, multiples of 8", {16, 24}, {1, 16}},
      {"channels_last", {4, 6, 3, 5}, {90, 1, 30, 6}},
      {"channels_last of 8 channels", {3, 8, 3, 3}, {72, 1, 24, 8}},
      {"channels_last of one channel", {4, 1, 3, 3}, {9, 1, 3, 1}},
      {"permuted", {3, 4, 5}, {1, 15, 3}},
  };
  for (const Layout& layout : layouts) {
    const int dims = int(layout.shape.size());
    int64_t n = 1;
    for (int64_t size : layout.shape) n *= size;
    const std::vector<uint8_t> mask = random_entries(n), words = words_of(mask);
    std::vector<uint8_t> in_memory(mask.size());
    for (int64_t i = 0; i < n; ++i) {
      int64_t rest = i, offset = 0;
      for (int d = dims - 1; d >= 0; --d) {
        offset += rest % layout.shape[size_t(d)] * layout.strides[size_t(d)];
        rest /= layout.shape[size_t(d)];
      }
      in_memory[size_t(offset)] = mask[size_t(i)];
    }
    const std::vector<uint8_t> expected = words_of(in_memory);
    for (int64_t parts : {1, 2, 5}) {
      std::vector<uint8_t> out(words.size(), 0xaa);
      const int64_t part = (int64_t(words.size()) + parts - 1) / parts * 8;
      for (int64_t begin = 0; begin < n; begin += part) {
        const int64_t end = begin + part < n ? begin + part : n;
        kernels->arrange(words.data(), out.data(), begin, end, dims, layout.shape.data(),
                         layout.strides.data());
      }
      CHECK(out == expected, "%s in %d parts", layout.name, int(parts));
    }
  }
}

}  // namespace

int main() {
  kernels = &ppkernels::bitmask_kernels(ppkernels_test::isa_under_test());
  test_pack_and_unpack();
  test_count();
  test_apply();
  test_apply_streaming();
  test_arrange();
  std::printf("bitmask: all checks passed\n");
  return 0;
}
