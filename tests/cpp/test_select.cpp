// The selection: its passes against loops that take one element at a time, the whole against a
// sort. Longer than 350 lines: passes and search share values and types.
//
// Buffers are heap blocks of exactly the size in use, so that the address sanitizer sees any step
// outside.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "kernels/selection.h"
#include "values.h"

namespace {

using namespace ppkernels;
using ppkernels_test::from_bits;
using ppkernels_test::kInf;
using ppkernels_test::kNaN;
using ppkernels_test::Random;
using ppkernels_test::to_bits;

const SelectKernels* kernels;

using Words = std::vector<uint8_t>;

bool bit(const Words& words, int64_t i) { return (words[size_t(i / 8)] >> (i % 8)) & 1; }

Words random_words(int64_t n, uint32_t share_of_eight, uint64_t seed) {
  Random random{seed};
  Words words(size_t((n + 7) / 8), 0);
  for (int64_t i = 0; i < n; ++i) {
    if (random.next() % 8 < share_of_eight) words[size_t(i / 8)] |= uint8_t(1u << (i % 8));
  }
  return words;
}

// ---- element types, as bits in a uint64_t

const Type kTypes[] = {Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16};

int64_t bytes_of(Type type) { return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2; }

// A tensor's memory, with one element written and read at a time.
struct Memory {
  Memory(Type type_, int64_t n) : type(type_), bytes(size_t(n * bytes_of(type_))) {}

  void set(int64_t i, uint64_t element) {
    std::memcpy(bytes.data() + i * bytes_of(type), &element, size_t(bytes_of(type)));
  }
  double magnitude(int64_t i) const {
    uint64_t element = 0;
    std::memcpy(&element, bytes.data() + i * bytes_of(type), size_t(bytes_of(type)));
    if (type == Type::kFloat64) {
      double x;
      std::memcpy(&x, &element, sizeof x);
      return std::fabs(x);
    }
    if (type == Type::kFloat32) return std::fabs(from_bits(uint32_t(element)));
    if (type == Type::kBFloat16) return std::fabs(from_bits(uint32_t(element) << 16));
    const int exponent = (element >> 10) & 31, mantissa = element & 1023;
    if (exponent == 31) return mantissa ? kNaN : kInf;
    return exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  }

  Type type;
  std::vector<char> bytes;
};

uint64_t infinity_of(Type type) {
  if (type == Type::kFloat64) return 0x7ff0000000000000u;
  return type == Type::kFloat32 ? 0x7f800000u : type == Type::kBFloat16 ? 0x7f80u : 0x7c00u;
}

enum class Draw { kAny, kWeights, kMostlyZero, kGrid, kConstant };
const Draw kDraws[] = {Draw::kAny, Draw::kWeights, Draw::kMostlyZero, Draw::kGrid, Draw::kConstant};

// The bits of a number in a type, cut off where the type has fewer.
uint64_t bits_as(Type type, float x) {
  const uint32_t b = to_bits(x);
  if (type == Type::kFloat32) return b;
  if (type == Type::kBFloat16) return b >> 16;
  if (type == Type::kFloat64) {
    const double wide = x;
    uint64_t element;
    std::memcpy(&element, &wide, sizeof element);
    return element;
  }
  if (x == 0) return b >> 16;
  const int exponent = std::ilogb(x);
  if (exponent < -14) return (b >> 16) & 0x8000;
  return ((b >> 16) & 0x8000) | uint64_t(exponent + 15) << 10 | ((b >> 13) & 1023);
}

// No NaN among them.
Memory drawn(Type type, int64_t n, Draw draw, uint64_t seed) {
  Random random{seed};
  Memory memory(type, n);
  for (int64_t i = 0; i < n; ++i) {
    const float x = random.centered() * random.centered();
    if (draw == Draw::kAny) {
      const uint64_t sign = uint64_t(1) << (8 * bytes_of(type) - 1);
      const uint64_t any = uint64_t(random.next()) << 32 | random.next();
      const uint64_t magnitude = (any >> 1) & (sign - 1);
      memory.set(i, std::min(magnitude, infinity_of(type)) | (any & 1 ? sign : 0));
    } else if (draw == Draw::kWeights) {
      memory.set(i, bits_as(type, x));
    } else if (draw == Draw::kMostlyZero) {
      memory.set(i, random.next() % 10 ? bits_as(type, x > 0 ? 0.0f : -0.0f) : bits_as(type, x));
    } else {
      const float grid = float(int(random.next() % 7) - 3) / 4;
      memory.set(i, bits_as(type, draw == Draw::kGrid ? grid : -0.375f));
    }
  }
  return memory;
}

std::vector<uint64_t> keys_of(const Memory& memory, int64_t n, const Ranking& ranking) {
  std::vector<uint64_t> keys(static_cast<size_t>(n));
  kernels->keys(memory.type, memory.bytes.data(), n, ranking, keys.data());
  return keys;
}

// ---- the passes

const int64_t kSizes[] = {1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 1003, kSelectChunk};

void test_keys() {
  for (Type type : kTypes) {
    const Memory memory = drawn(type, 1003, Draw::kAny, 5);
    const std::vector<uint64_t> keys = keys_of(memory, 1003, {false, 1});
    const std::vector<uint64_t> logs = keys_of(memory, 1003, {true, 1.5});
    for (int64_t i = 0; i < 1003; ++i) {
      const double magnitude = memory.magnitude(i);
      uint64_t expected;
      std::memcpy(&expected, &magnitude, sizeof expected);
      CHECK(keys[size_t(i)] == expected, "the key of %g", magnitude);
      // The changed bits order as the numbers, and give them back.
      const uint64_t key = logs[size_t(i)];
      const uint64_t number = key >> 63 ? key ^ 0x8000000000000000u : ~key;
      double log;
      std::memcpy(&log, &number, sizeof log);
      const double exact = 1.5 * std::log2(magnitude);
      CHECK(log == exact || std::fabs(log - exact) <= 4e-16 * std::fabs(exact), "%d: log of %a: %a",
            int(type), magnitude, log);
    }
  }
}

// Bounds that part the elements at random.
SelectBounds random_bounds(Type type, uint64_t seed) {
  Random random{seed};
  uint64_t bounds[4];
  for (uint64_t& bound : bounds) {
    bound = bits_as(type, std::fabs(random.centered() * random.centered()));
    if (random.next() % 8 == 0) bound = random.next() % 2 ? 0 : infinity_of(type) + 1;
  }
  std::sort(bounds, bounds + 4);
  return {bounds[0], bounds[1], bounds[2], bounds[3]};
}

void check_sweep(Type type, int64_t n, const SelectBounds& b, const Words* within) {
  const Memory memory = drawn(type, n, n % 2 ? Draw::kWeights : Draw::kGrid, uint64_t(n));
  const std::vector<uint64_t> all = keys_of(memory, n, {false, 1});
  Words words(size_t((n + 7) / 8), 0xaa), expected(words.size(), 0);
  std::vector<uint32_t> indices(static_cast<size_t>(n)), expected_indices;
  std::vector<uint64_t> keys(static_cast<size_t>(n)), expected_keys;
  const SelectCounts counts =
      kernels->sweep(type, memory.bytes.data(), n, within ? within->data() : nullptr, {false, 1}, b,
                     words.data(), indices.data(), keys.data());
  SelectCounts expected_counts{};
  for (int64_t i = 0; i < n; ++i) {
    uint64_t x = 0;
    std::memcpy(&x, memory.bytes.data() + i * bytes_of(type), size_t(bytes_of(type)));
    x &= ~(uint64_t(1) << (8 * bytes_of(type) - 1));
    if ((within && !bit(*within, i)) || x < b.low) continue;
    if (x >= b.high) expected[size_t(i / 8)] |= uint8_t(1u << (i % 8));
    if (x >= b.after_high) {
      ++expected_counts.above;
    } else if (x >= b.high) {
      ++expected_counts.at_high;
    } else if (x >= b.after_low) {
      expected_indices.push_back(uint32_t(i));
      expected_keys.push_back(all[size_t(i)]);
    } else {
      ++expected_counts.at_low;
    }
  }
  indices.resize(size_t(counts.between));
  keys.resize(size_t(counts.between));
  CHECK(words == expected && indices == expected_indices && keys == expected_keys,
        "type %d, %d elements", int(type), int(n));
  CHECK(counts.above == expected_counts.above && counts.at_high == expected_counts.at_high &&
            counts.at_low == expected_counts.at_low && !counts.has_nan,
        "type %d, %d elements: counts", int(type), int(n));
}

void test_sweep() {
  for (Type type : kTypes) {
    for (int64_t n : kSizes) {
      const Words within = random_words(n, 5, 3);
      for (uint64_t seed = 0; seed < 20; ++seed) {
        check_sweep(type, n, random_bounds(type, seed), seed % 2 ? &within : nullptr);
      }
    }
  }
}

void test_sweep_sees_nan() {
  for (Type type : kTypes) {
    for (int64_t n : {1, 8, 65, 1003}) {
      for (int64_t place : {int64_t(0), n / 2, n - 1}) {
        Memory memory = drawn(type, n, Draw::kAny, 9);
        memory.set(place, infinity_of(type) + 1);
        Words words(size_t((n + 7) / 8)), within(words.size(), 0xff);
        std::vector<uint32_t> indices(static_cast<size_t>(n));
        std::vector<uint64_t> keys(static_cast<size_t>(n));
        const auto has_nan = [&](const uint8_t* mask) {
          return kernels
              ->sweep(type, memory.bytes.data(), n, mask, {false, 1}, {1, 1, 1, 1}, words.data(),
                      indices.data(), keys.data())
              .has_nan;
        };
        CHECK(has_nan(nullptr) && has_nan(within.data()), "NaN at %d of %d", int(place), int(n));
        within[size_t(place / 8)] ^= uint8_t(1u << (place % 8));
        CHECK(!has_nan(within.data()), "a NaN that is not looked at");
      }
    }
  }
}

void test_settle() {
  for (Type type : kTypes) {
    for (int64_t n : kSizes) {
      const Memory memory = drawn(type, n, Draw::kGrid, 1);
      const uint64_t value = bits_as(type, 0.25f);
      for (int64_t quota : {int64_t(0), int64_t(1), n / 7, n}) {
        for (bool is_masked : {false, true}) {
          const Words within = random_words(n, 4, 2);
          Words words = random_words(n, 4, 3), expected = words;
          int64_t left = quota;
          for (int64_t i = 0; i < n; ++i) {
            if (memory.magnitude(i) != 0.25 || (is_masked && !bit(within, i))) continue;
            expected[size_t(i / 8)] &= uint8_t(~(1u << (i % 8)));
            if (left > 0) expected[size_t(i / 8)] |= uint8_t(1u << (i % 8));
            left -= left > 0;
          }
          const int64_t rest =
              kernels->settle(type, memory.bytes.data(), n, is_masked ? within.data() : nullptr,
                              value, value + 1, quota, words.data());
          CHECK(words == expected && rest == left, "type %d, %d elements", int(type), int(n));
        }
      }
    }
  }
}

// ---- the whole selection

struct Tensor {
  Memory memory;
  std::vector<int64_t> shape, strides;
  double alpha;
  Words within, words;  // `within` is empty for none

  int64_t count() const {
    return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<int64_t>());
  }
  // Where in memory element i of the row-major order lies.
  int64_t place(int64_t i) const {
    int64_t offset = 0;
    for (size_t d = shape.size(); d-- > 0; i /= shape[d]) offset += i % shape[d] * strides[d];
    return offset;
  }
  bool is_candidate(int64_t i) const { return within.empty() || bit(within, i); }
  int64_t candidates() const {
    int64_t found = 0;
    for (int64_t i = 0; i < count(); ++i) found += is_candidate(i);
    return found;
  }
};

Tensor plain(Memory memory, double alpha = 1) {
  const int64_t n = int64_t(memory.bytes.size()) / bytes_of(memory.type);
  return {std::move(memory), {n}, {1}, alpha, {}, Words(size_t((n + 7) / 8), 0xaa)};
}

// Cuts the work into one part for each thread.
ParallelFor threads_of(int count) {
  return [count](int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    if (n <= grain || count == 1) return body(0, n);
    std::vector<std::thread> threads;
    for (int k = 0; k < count; ++k) {
      threads.emplace_back([=, &body] { body(n * k / count, n * (k + 1) / count); });
    }
    for (std::thread& thread : threads) thread.join();
  };
}

int64_t select(const SelectKernels& with, std::vector<Tensor>& tensors,
               const std::vector<int64_t>& counts, int threads) {
  std::vector<SelectTensor> all;
  for (Tensor& t : tensors) {
    all.push_back({t.memory.type, t.memory.bytes.data(), int(t.shape.size()), t.shape.data(),
                   t.strides.data(), t.within.empty() ? nullptr : t.within.data(), t.candidates(),
                   t.words.data(), t.alpha});
  }
  return select_largest(with, all, counts, threads_of(threads));
}

// Which masks a stable sort gives.
std::vector<Words> sorted_masks(const std::vector<Tensor>& tensors, std::vector<int64_t> counts) {
  struct Entry {
    uint64_t key;
    size_t tensor;
    int64_t index;
  };
  std::vector<Words> masks;
  for (const Tensor& t : tensors) masks.emplace_back(t.words.size(), uint8_t(0));
  const bool is_one = counts.size() == 1;
  for (size_t s = 0; s < counts.size(); ++s) {
    const size_t first = is_one ? 0 : s, last = is_one ? tensors.size() : s + 1;
    bool by_log = false;
    for (size_t i = first; i < last; ++i) by_log |= tensors[i].alpha != tensors[first].alpha;
    std::vector<Entry> entries;
    for (size_t i = first; i < last; ++i) {
      const Tensor& t = tensors[i];
      const int64_t held = int64_t(t.memory.bytes.size()) / bytes_of(t.memory.type);
      const std::vector<uint64_t> keys = keys_of(t.memory, held, {by_log, t.alpha});
      for (int64_t k = 0; k < t.count(); ++k) {
        if (t.is_candidate(k)) entries.push_back({keys[size_t(t.place(k))], i, k});
      }
    }
    std::stable_sort(entries.begin(), entries.end(),
                     [](const Entry& a, const Entry& b) { return a.key > b.key; });
    for (int64_t k = 0; k < counts[s]; ++k) {
      const Entry& e = entries[size_t(k)];
      masks[e.tensor][size_t(e.index / 8)] |= uint8_t(1u << (e.index % 8));
    }
  }
  return masks;
}

void check_select(const SelectKernels& with, std::vector<Tensor>& tensors,
                  const std::vector<int64_t>& counts, const char* what) {
  const std::vector<Words> expected = sorted_masks(tensors, counts);
  for (int threads : {1, 2, 3}) {
    for (Tensor& t : tensors) t.words.assign(t.words.size(), 0xaa);
    const int64_t first_nan = select(with, tensors, counts, threads);
    CHECK(first_nan == -1, "%s: NaN in %d", what, int(first_nan));
    for (size_t i = 0; i < tensors.size(); ++i) {
      CHECK(tensors[i].words == expected[i], "%s: tensor %d, %d threads", what, int(i), threads);
    }
  }
}

void check_counts(std::vector<Tensor>& tensors, const char* what) {
  int64_t all = 0;
  std::vector<int64_t> tenths;
  for (const Tensor& t : tensors) {
    all += t.candidates();
    tenths.push_back(t.candidates() / 10);
  }
  for (int64_t count : {int64_t(0), std::min(all, int64_t(1)), all / 10, all / 2, all}) {
    check_select(*kernels, tensors, {count}, what);
  }
  check_select(*kernels, tensors, tenths, what);
}

void test_select() {
  for (Draw draw : kDraws) {
    for (Type type : kTypes) {
      std::vector<Tensor> tensors;
      for (int64_t n : {0, 1, 300, 70001, 5000}) {
        tensors.push_back(plain(drawn(type, n, draw, uint64_t(n + 1))));
      }
      check_counts(tensors, "one type");
    }
    std::vector<Tensor> mixed;
    for (size_t i = 0; i < 8; ++i) {
      const int64_t n = i < 4 ? 9000 : 100;
      mixed.push_back(plain(drawn(kTypes[i % 4], n, draw, i), 1 + double(i % 3) / 2));
      if (i % 2) mixed.back().within = random_words(n, 4, i);
    }
    check_counts(mixed, "types, exponents and masks mixed");
  }
}

void test_layouts() {
  for (Type type : kTypes) {
    std::vector<Tensor> tensors;
    const auto add = [&](int64_t held, std::vector<int64_t> shape, std::vector<int64_t> strides) {
      Tensor t = plain(drawn(type, held, Draw::kGrid, uint64_t(held)));
      t.shape = std::move(shape);
      t.strides = std::move(strides);
      t.words.resize(size_t((t.count() + 7) / 8));
      tensors.push_back(std::move(t));
    };
    add(1, {}, {});
    add(0, {3, 0, 2}, {2, 2, 1});
    add(99, {50}, {2});
    add(33 * 165, {165, 33}, {1, 165});
    add(5 * 6 * 9 * 9, {5, 6, 9, 9}, {486, 1, 54, 6});
    add(40, {65, 40}, {0, 1});
    add(65, {65, 40}, {1, 0});
    add(30 * 500, {500, 20}, {30, 1});
    check_counts(tensors, "layouts");
    tensors[3].within = random_words(tensors[3].count(), 3, 1);
    check_counts(tensors, "layouts, masked");
  }
}

// ---- a sample that misleads, made by looking at what is sampled

int sweeps, histograms;
std::vector<float> sampled;

void counting_keys(Type type, const void* elements, int64_t n, const Ranking& ranking,
                   uint64_t* keys) {
  histograms += n > 1000;
  kernels->keys(type, elements, n, ranking, keys);
}

void recording_keys(Type type, const void* elements, int64_t n, const Ranking& ranking,
                    uint64_t* keys) {
  if (type == Type::kFloat32 && n < kSelectChunk) {
    sampled.insert(sampled.end(), (const float*)elements, (const float*)elements + n);
  }
  kernels->keys(type, elements, n, ranking, keys);
}

SelectCounts counting_sweep(Type type, const void* elements, int64_t n, const uint8_t* within,
                            const Ranking& ranking, const SelectBounds& bounds, uint8_t* words,
                            uint32_t* indices, uint64_t* keys) {
  ++sweeps;
  return kernels->sweep(type, elements, n, within, ranking, bounds, words, indices, keys);
}

void test_misleading_samples() {
  const int64_t n = 30 * kSelectChunk, count = n / 10;
  std::vector<Tensor> tensors;
  tensors.push_back(plain(Memory(Type::kFloat32, n)));
  const auto fill = [&](const auto& value) {
    for (int64_t i = 0; i < n; ++i) tensors[0].memory.set(i, to_bits(value(i)));
  };
  // The elements are their own indices, so that what is sampled says where it came from.
  fill([](int64_t i) { return float(i); });
  const SelectKernels recording = {recording_keys, kernels->sweep, kernels->settle};
  select(recording, tensors, {count}, 1);
  std::vector<char> is_sampled(size_t(n), 0);
  int64_t samples = 0;
  for (float x : sampled) {
    // Bounds are searched for as well, among numbers that are mostly no indices.
    if (x < float(n) && x == std::floor(x)) samples += !std::exchange(is_sampled[size_t(x)], 1);
  }
  CHECK(samples > 1000 && samples < n / 5, "%d samples", int(samples));

  const SelectKernels counting = {counting_keys, counting_sweep, kernels->settle};
  const auto check = [&](const char* what, bool is_misled) {
    sweeps = histograms = 0;
    select(counting, tensors, {count}, 1);
    CHECK((sweeps > 30) == is_misled, "%s: %d chunks were read", what, sweeps + histograms);
    check_select(*kernels, tensors, {count}, what);
  };
  const auto spread = [](int64_t i) { return float(i * 7919 % 65536) / 65536; };
  fill(spread);
  check("an honest sample", false);
  fill([&](int64_t i) { return is_sampled[size_t(i)] ? spread(i) : 2 + spread(i); });
  check("all that is sampled is small", true);
  fill([&](int64_t i) { return is_sampled[size_t(i)] ? 2 + spread(i) : spread(i); });
  check("all that is sampled is large", true);
  // What is not sampled lies close to the count-th largest of the sample.
  fill([&](int64_t i) { return is_sampled[size_t(i)] ? spread(i) : 0.9f + spread(i) / 1000; });
  check("too many elements between the bounds", true);
  fill([&](int64_t i) { return is_sampled[size_t(i)] ? spread(i) : 0.9f; });
  check("too many equal elements between the bounds", true);
}

// ---- elements that somebody writes to meanwhile: any answer, but no memory that is not its own

Tensor* written_to;
uint64_t noise;

uint64_t next_noise() { return noise = noise * 6364136223846793005u + 1442695040888963407u; }

SelectCounts rewriting_sweep(Type type, const void* elements, int64_t n, const uint8_t* within,
                             const Ranking& ranking, const SelectBounds& bounds, uint8_t* words,
                             uint32_t* indices, uint64_t* keys) {
  const SelectCounts found =
      kernels->sweep(type, elements, n, within, ranking, bounds, words, indices, keys);
  // As if elements had changed between a look at their size and the one at their key.
  for (int64_t k = 0; k < found.between; k += 3) keys[k] = next_noise();
  if (next_noise() >> 61 == 0) {
    const int64_t count = int64_t(written_to->memory.bytes.size()) / 4;
    const float scale = float(next_noise() >> 40) * 0x1p-24f;
    for (int64_t i = 0; i < count; ++i) {
      written_to->memory.set(i, to_bits(scale * float(next_noise() >> 40)));
    }
  }
  return found;
}

void test_elements_that_change() {
  const SelectKernels rewriting = {kernels->keys, rewriting_sweep, kernels->settle};
  for (uint64_t seed = 0; seed < 12; ++seed) {
    noise = seed;
    std::vector<Tensor> tensors;
    tensors.push_back(plain(drawn(Type::kFloat32, 12 * kSelectChunk, Draw::kWeights, seed),
                            1 + double(seed % 2)));
    tensors.push_back(plain(drawn(Type::kFloat32, 5000, Draw::kWeights, seed)));
    written_to = &tensors[0];
    const int64_t found = select(rewriting, tensors, {int64_t(1000 + 3000 * seed)}, 1);
    CHECK(found == -1 || found == kChanged, "%d", int(found));
  }
}

void test_first_nan() {
  for (int threads : {1, 2}) {
    std::vector<Tensor> tensors;
    for (int64_t n : {100, 90000, 70000, 50}) {
      tensors.push_back(plain(drawn(Type::kFloat32, n, Draw::kWeights, uint64_t(n))));
    }
    CHECK(select(*kernels, tensors, {100}, threads) == -1, "no NaN");
    tensors[3].memory.set(49, to_bits(-kNaN));
    CHECK(select(*kernels, tensors, {100}, threads) == 3, "the last element");
    tensors[1].memory.set(80000, to_bits(kNaN));
    for (const std::vector<int64_t>& counts :
         {std::vector<int64_t>{0}, {100}, {160150}, {1, 2, 3, 4}, {100, 90000, 70000, 0}}) {
      CHECK(select(*kernels, tensors, counts, threads) == 1, "the first of two tensors");
    }
    tensors[1].within.assign(size_t(90000 / 8), 0xff);
    tensors[1].within[10000] ^= 1;
    CHECK(select(*kernels, tensors, {100}, threads) == 3, "a NaN that is not looked at");
  }
}

}  // namespace

int main() {
  kernels = &select_kernels(ppkernels_test::isa_under_test());
  test_keys();
  test_sweep();
  test_sweep_sees_nan();
  test_settle();
  test_select();
  test_layouts();
  test_misleading_samples();
  test_elements_that_change();
  test_first_nan();
  std::printf("select: all checks passed\n");
  return 0;
}
