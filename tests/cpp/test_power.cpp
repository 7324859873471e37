// The power kernels over raw memory: accuracy, special values, remainders, alignment, aliasing,
// masks.
// Buffers are heap blocks of exactly the size in use, so that the address sanitizer sees any step
// outside.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "check.h"
#include "kernels/power.h"
#include "values.h"

namespace {

using ppkernels::Type;
using ppkernels_test::bfloat_value;
using ppkernels_test::from_bits;
using ppkernels_test::half_value;
using ppkernels_test::kInf;
using ppkernels_test::kNaN;
using ppkernels_test::same;

const ppkernels::PowerKernels* kernels;

struct Random : ppkernels_test::Random {
  float weight() { return centered() * 0.4f; }
};

std::vector<float> power(double exponent, const std::vector<float>& x, bool stream = false) {
  std::vector<float> y(x.size(), kNaN);
  kernels->signed_power(Type::kFloat32, exponent, x.data(), nullptr, y.data(), int64_t(x.size()),
                        stream);
  return y;
}

// Units in the last place of float at the exact value, which must be normal.
double ulps(float y, double exact) {
  int exponent;
  std::frexp(exact, &exponent);
  return std::fabs(y - exact) / std::ldexp(1.0, exponent - 24);
}

void test_accuracy() {
  const double exponents[] = {1,   1.0001, 1.1, 1.25, 1.5, 1.75, 2,   2.5,     3,
                              3.7, 4,      5,   6.3,  7,   8,    0.5, 1 / 1.5, 0.125};
  for (double exponent : exponents) {
    std::vector<float> x;
    Random random;
    // Every exponent of float, random mantissas: 1,000,003 is coprime to the mantissas' 2^23.
    for (uint64_t bits = 1; bits < 0x7f800000u; bits += random.next() % 40000)
      x.push_back(from_bits(uint32_t(bits)));
    const std::vector<float> y = power(exponent, x);
    for (size_t i = 0; i < x.size(); ++i) {
      const double exact = std::pow(double(x[i]), exponent);
      if (exact < 0x1p-126 || exact > 0x1.fffffep127) continue;
      CHECK(ulps(y[i], exact) <= 1, "|%a|^%g is %a, exactly %a: %.3f ULP", x[i], exponent, y[i],
            exact, ulps(y[i], exact));
    }
  }
}

void test_special_values() {
  const std::vector<float> x = {0.0f, -0.0f, kInf, -kInf, kNaN, 1.0f, -1.0f};
  for (double exponent : {1.0, 1.25, 2.0, 3.0, 4.0, 8.0, 200.0, 0.5, 1e-12}) {
    const std::vector<float> y = power(exponent, x);
    for (size_t i = 0; i < x.size(); ++i)
      CHECK(same(y[i], x[i]), "power %g of %g is %g", exponent, x[i], y[i]);
  }
  // The limits of float: overflow, underflow, subnormal results.
  CHECK(power(3, {-0x1p100f})[0] == -kInf, "overflow");
  CHECK(same(power(1.5, {-0x1p-120f})[0], -0.0f), "underflow");
  CHECK(power(1.25, {0x1p-112f})[0] == 0x1p-140f, "subnormal result");
  CHECK(power(1.25, {0x1p-149f})[0] == 0.0f, "subnormal input");
  CHECK(power(0.5, {0x1p-148f})[0] == 0x1p-74f, "root of a subnormal");
}

void test_backward() {
  for (double alpha : {1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 8.0, 150.0}) {
    Random random;
    std::vector<float> g(1003), h(1003), x(1003), out(1003, kNaN);
    for (size_t i = 0; i < x.size(); ++i) {
      g[i] = random.weight();
      h[i] = random.weight();
      x[i] = 4 * random.weight();
    }
    kernels->power_backward(Type::kFloat32, alpha, g.data(), x.data(), nullptr, out.data(), 1003,
                            false);
    for (size_t i = 0; i < x.size(); ++i) {
      const double exact = g[i] * (alpha * std::pow(std::fabs(double(x[i])), alpha - 1));
      if (std::fabs(exact) < 0x1p-126) continue;
      CHECK(ulps(out[i], exact) <= 2.5, "gradient at %a, alpha %g: %a, exactly %a", x[i], alpha,
            out[i], exact);
    }
    kernels->power_double_backward(Type::kFloat32, alpha, h.data(), g.data(), x.data(), nullptr,
                                   out.data(), 1003);
    for (size_t i = 0; i < x.size(); ++i) {
      const double size = alpha * (alpha - 1) * std::pow(std::fabs(double(x[i])), alpha - 2);
      const double exact = double(h[i]) * g[i] * std::copysign(size, double(x[i]));
      if (std::fabs(exact) < 0x1p-126) continue;
      CHECK(ulps(out[i], exact) <= 4, "second gradient at %a, alpha %g: %a, exactly %a", x[i],
            alpha, out[i], exact);
    }
    // At weight 0: the factor is 0 (1 for alpha = 1), and an infinite gradient must show.
    const float grads[] = {3, kInf}, zeros[] = {-0.0f, 0.0f};
    float at_zero[2];
    kernels->power_backward(Type::kFloat32, alpha, grads, zeros, nullptr, at_zero, 2, false);
    CHECK(at_zero[0] == (alpha == 1 ? 3 : 0), "alpha %g: %g", alpha, at_zero[0]);
    CHECK(!std::isfinite(at_zero[1]), "alpha %g: %g", alpha, at_zero[1]);
    kernels->power_double_backward(Type::kFloat32, alpha, grads, grads, zeros, nullptr, at_zero, 2);
    CHECK(at_zero[0] == 0 && at_zero[1] == 0, "alpha %g: %g %g", alpha, at_zero[0], at_zero[1]);
  }
}

// Any length, any alignment, around the cache or through it, in place or not: the same bits.
void test_memory() {
  Random random;
  std::vector<float> x(203);
  for (float& value : x) value = random.weight();
  for (double exponent : {1.0, 1.25, 2.0, 3.0, 150.0}) {
    const std::vector<float> whole = power(exponent, x);
    for (int64_t n = 0; n <= 70; ++n) {
      for (int64_t offset = 0; offset < 3; ++offset) {
        for (bool stream : {false, true}) {
          auto in = std::make_unique<float[]>(size_t(n + offset));
          auto out = std::make_unique<float[]>(size_t(n + offset));
          std::memcpy(in.get() + offset, x.data(), size_t(n) * sizeof(float));
          kernels->signed_power(Type::kFloat32, exponent, in.get() + offset, nullptr,
                                out.get() + offset, n, stream);
          for (int64_t i = 0; i < n; ++i)
            CHECK(same(out[size_t(i + offset)], whole[size_t(i)]), "n %d, offset %d, stream %d",
                  int(n), int(offset), int(stream));
        }
      }
    }
    std::vector<float> in_place = x;
    kernels->signed_power(Type::kFloat32, exponent, in_place.data(), nullptr, in_place.data(), 203,
                          false);
    for (size_t i = 0; i < x.size(); ++i) CHECK(same(in_place[i], whole[i]), "in place, %zu", i);
  }
}

// Every instruction set gives the bits of the baseline.
void test_same_bits() {
  const ppkernels::PowerKernels& baseline = ppkernels::power_kernels(ppkernels::Isa::kBaseline);
  Random random;
  std::vector<float> x(20000), g(20000), a(20000), b(20000);
  for (float& value : x) value = from_bits(random.next());
  for (float& value : g) value = from_bits(random.next());
  const int64_t n = int64_t(x.size());
  for (double exponent : {0.3, 0.5, 1.0, 1.1, 1.25, 1.5, 2.0, 2.7, 3.0, 4.0, 8.0, 127.0, 200.0}) {
    kernels->signed_power(Type::kFloat32, exponent, x.data(), nullptr, a.data(), n, false);
    baseline.signed_power(Type::kFloat32, exponent, x.data(), nullptr, b.data(), n, false);
    for (size_t i = 0; i < a.size(); ++i)
      CHECK(same(a[i], b[i]), "%a to the power %g: %a, baseline %a", x[i], exponent, a[i], b[i]);
    if (exponent < 1) continue;
    kernels->power_backward(Type::kFloat32, exponent, g.data(), x.data(), nullptr, a.data(), n,
                            false);
    baseline.power_backward(Type::kFloat32, exponent, g.data(), x.data(), nullptr, b.data(), n,
                            false);
    for (size_t i = 0; i < a.size(); ++i)
      CHECK(same(a[i], b[i]), "gradient at %a, alpha %g: %a, %a", x[i], exponent, a[i], b[i]);
  }
}

void test_float64() {
  const double x[] = {0.3, -0.0, -2.0, 1e-300}, g[] = {1, 2, 3, 4};
  double y[4];
  kernels->signed_power(Type::kFloat64, 1.7, x, nullptr, y, 4, false);
  for (int i = 0; i < 4; ++i)
    CHECK(y[i] == std::copysign(std::pow(std::fabs(x[i]), 1.7), x[i]), "%d: %g", i, y[i]);
  kernels->power_backward(Type::kFloat64, 1.7, g, x, nullptr, y, 4, false);
  CHECK(y[1] == 0 && y[0] == 1.7 * std::pow(0.3, 0.7), "%g %g", y[0], y[1]);
}

// ---- half precisions: every value there is

// `x` rounded to `bits` mantissa bits, ties to even, subnormals below 2^smallest.
double rounded(double x, int bits, int smallest, double largest) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - bits, smallest));
  const double y = std::nearbyint(x / unit) * unit;
  return std::fabs(y) > largest ? std::copysign(double(kInf), x) : y;
}

template <class Value, class Round>
void test_half(Type type, const Value& value, const Round& round) {
  std::vector<uint16_t> x(65536), y(65536);
  for (size_t i = 0; i < x.size(); ++i) x[i] = uint16_t(i);
  // Exponents whose float32 result is correctly rounded, so that one half value is right.
  for (double exponent : {1.0, 2.0}) {
    kernels->signed_power(type, exponent, x.data(), nullptr, y.data(), 65536, false);
    for (size_t i = 0; i < x.size(); ++i) {
      const double from = value(x[i]), to = value(y[i]);
      const double exact = std::copysign(std::pow(std::fabs(from), exponent), from);
      const double want = round(double(float(exact)));
      CHECK((to != to && from != from) || to == want, "%g to the power %g: %g, not %g", from,
            exponent, to, want);
    }
  }
}

// ---- masks

struct Case {
  Type type;
  size_t bytes;
};
const Case kCases[] = {
    {Type::kFloat32, 4}, {Type::kFloat64, 8}, {Type::kBFloat16, 2}, {Type::kFloat16, 2}};

// Any bits: NaN, infinities and subnormals among them.
std::vector<uint8_t> random_bytes(size_t count, uint64_t seed) {
  Random random{seed};
  std::vector<uint8_t> bytes(count);
  for (uint8_t& byte : bytes) byte = uint8_t(random.next() >> 24);
  return bytes;
}

bool is_nan(Type type, const uint8_t* p) {
  uint16_t half;
  float single;
  double wide;
  std::memcpy(&half, p, sizeof half);
  if (type == Type::kBFloat16) return std::isnan(bfloat_value(half));
  if (type == Type::kFloat16) return std::isnan(half_value(half));
  if (type == Type::kFloat32) return std::memcpy(&single, p, sizeof single), std::isnan(single);
  return std::memcpy(&wide, p, sizeof wide), std::isnan(wide);
}

// `masked` is `all` where the bit is set, one NaN as good as another, and +0 elsewhere.
void check_masked(const char* what, const Case& c, double alpha, const std::vector<uint8_t>& words,
                  const uint8_t* masked, const std::vector<uint8_t>& all, int64_t n) {
  const std::vector<uint8_t> zero(c.bytes, 0);
  for (size_t i = 0; i < size_t(n); ++i) {
    const bool is_set = (words[i / 8] >> (i % 8)) & 1;
    const uint8_t* wanted = is_set ? all.data() + i * c.bytes : zero.data();
    const uint8_t* came = masked + i * c.bytes;
    const bool both_nan = is_nan(c.type, came) && is_nan(c.type, wanted);
    CHECK(both_nan || std::memcmp(came, wanted, c.bytes) == 0,
          "%s, %d bytes an element, alpha %g, %d elements: element %d, bit %d", what, int(c.bytes),
          alpha, int(n), int(i), is_set);
  }
}

void test_masks() {
  for (const Case& c : kCases) {
    for (double alpha : {1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 150.0}) {
      for (int64_t n : {0, 1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 47, 63, 64, 65, 203}) {
        const size_t size = size_t(n) * c.bytes;
        const std::vector<uint8_t> x = random_bytes(size, 1), g = random_bytes(size, 2),
                                   h = random_bytes(size, 3),
                                   words = random_bytes(size_t(n + 7) / 8, 4);
        std::vector<uint8_t> all(size), masked(size, 0xaa);
        kernels->signed_power(c.type, alpha, x.data(), nullptr, all.data(), n, false);
        kernels->signed_power(c.type, alpha, x.data(), words.data(), masked.data(), n, false);
        check_masked("power", c, alpha, words, masked.data(), all, n);
        // Around the cache, at an aligned address.
        auto* out = static_cast<uint8_t*>(std::aligned_alloc(64, (size + 64) / 64 * 64));
        kernels->signed_power(c.type, alpha, x.data(), words.data(), out, n, true);
        check_masked("power, streaming", c, alpha, words, out, all, n);
        kernels->power_backward(c.type, alpha, g.data(), x.data(), nullptr, all.data(), n, false);
        kernels->power_backward(c.type, alpha, g.data(), x.data(), words.data(), out, n, true);
        check_masked("gradient, streaming", c, alpha, words, out, all, n);
        std::free(out);
        masked = g;
        kernels->power_backward(c.type, alpha, masked.data(), x.data(), words.data(), masked.data(),
                                n, false);
        check_masked("gradient, in place", c, alpha, words, masked.data(), all, n);
        kernels->power_double_backward(c.type, alpha, h.data(), g.data(), x.data(), nullptr,
                                       all.data(), n);
        kernels->power_double_backward(c.type, alpha, h.data(), g.data(), x.data(), words.data(),
                                       masked.data(), n);
        check_masked("second gradient", c, alpha, words, masked.data(), all, n);
      }
    }
  }
}

}  // namespace

int main() {
  kernels = &ppkernels::power_kernels(ppkernels_test::isa_under_test());
  test_accuracy();
  test_special_values();
  test_backward();
  test_memory();
  test_same_bits();
  test_float64();
  test_half(Type::kFloat16, half_value, [](double x) { return rounded(x, 11, -24, 65504); });
  test_half(Type::kBFloat16, bfloat_value,
            [](double x) { return rounded(x, 8, -133, 0x1.fep127); });
  test_masks();
  std::printf("power: all checks passed\n");
  return 0;
}
