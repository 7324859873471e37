// The step kernels over raw memory: every option on every instruction set, parts, masks, masters.
// Longer than 350 lines: the calls and the checks that go through all of them are read together.
// Buffers are heap blocks of exactly the size in use, so that the address sanitizer sees any step
// outside.
#include "kernels/step.h"

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "check.h"
#include "values.h"

namespace {

using ppkernels::AdamOptions;
using ppkernels::SgdOptions;
using ppkernels::StepKernels;
using ppkernels::StepOptions;
using ppkernels::StepTensor;
using ppkernels::Type;
using ppkernels_test::from_bits;
using ppkernels_test::kInf;
using ppkernels_test::kNaN;
using ppkernels_test::same;
using ppkernels_test::to_bits;

const StepKernels* kernels;

struct Random : ppkernels_test::Random {
  // A number of a usual size, of any size, or a special one.
  float any() {
    const float special[] = {0.0f, -0.0f,     kInf,       -kInf,
                             kNaN, 0x1p-149f, -0x1p-126f, 0x1.fffffep127f};
    switch (next() % 8) {
      case 0:
        return special[next() % 8];
      case 1:
        return from_bits(next());
      case 2:
        return centered() * std::ldexp(1.0f, -int(next() % 120));
      default:
        return centered();
    }
  }
};

// ---- calls

enum Optimizer { kSgd, kMomentum, kNesterov, kAdam, kAmsgrad, kOptimizers };
constexpr int kStateCounts[] = {0, 1, 1, 2, 3};

struct Call {
  Optimizer optimizer;
  StepOptions options;
  double alpha;
  bool holds_phi;
};

// Every optimizer with every rule, kind of decay and kind of exponent.
std::vector<Call> all_calls() {
  std::vector<Call> calls;
  for (int optimizer = 0; optimizer < kOptimizers; ++optimizer) {
    for (double alpha : {1.0, 1.05, 1.5, 2.0, 2.7, 3.0, 8.0, 130.0, 1e7}) {
      for (int bits = 0; bits < 32; ++bits) {
        const double rate = bits & 16 ? 0.2 : 0;
        if (rate == 0 && bits & 3) continue;
        const StepOptions options = {
            0.1, bits & 8 ? -1.0 : 0.125, rate, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
        calls.push_back({Optimizer(optimizer), options, alpha, false});
        if (alpha > 1) calls.push_back({Optimizer(optimizer), options, alpha, true});
      }
    }
  }
  return calls;
}

// The tensors of one weight, of element type W, states and master of type S.
template <class W, class S>
struct Tensors {
  explicit Tensors(int64_t count) : n(count), weight(new W[size_t(n)]), grad(new W[size_t(n)]) {
    for (auto& state : states) state.reset(new S[size_t(n)]);
  }
  int64_t n;
  std::unique_ptr<W[]> weight, grad;
  std::unique_ptr<S[]> states[3], master;
  std::vector<uint8_t> mask;

  Tensors copy() const {
    Tensors other(n);
    const size_t weights = size_t(n) * sizeof(W), others = size_t(n) * sizeof(S);
    std::memcpy(other.weight.get(), weight.get(), weights);
    std::memcpy(other.grad.get(), grad.get(), weights);
    for (int k = 0; k < 3; ++k) std::memcpy(other.states[k].get(), states[k].get(), others);
    if (master) {
      other.master.reset(new S[size_t(n)]);
      std::memcpy(other.master.get(), master.get(), others);
    }
    other.mask = mask;
    return other;
  }
};

using Floats = Tensors<float, float>;

Floats random_floats(int64_t n, uint64_t seed, bool is_masked = false) {
  Random random{seed};
  Floats t(n);
  for (int64_t i = 0; i < n; ++i) {
    t.weight[i] = random.any();
    t.grad[i] = random.any();
    t.states[0][i] = random.any();
    t.states[1][i] = std::fabs(random.any());
    t.states[2][i] = std::fabs(random.any());
  }
  if (is_masked) {
    t.mask.resize(size_t((n + 7) / 8));
    for (uint8_t& byte : t.mask) byte = uint8_t(random.next());
  }
  return t;
}

template <class W, class S>
void step(const StepKernels& isa, const Call& call, Tensors<W, S>& t, int64_t begin, int64_t end,
          Type type = Type::kFloat32, Type state_type = Type::kFloat32) {
  StepTensor tensor{};
  tensor.type = type;
  tensor.state_type = state_type;
  tensor.weight = t.weight.get();
  tensor.master = t.master.get();
  tensor.grad = t.grad.get();
  // The states that the optimizer has; the others stay null.
  for (int k = 0; k < kStateCounts[call.optimizer]; ++k) tensor.states[k] = t.states[k].get();
  tensor.mask = t.mask.empty() ? nullptr : t.mask.data();
  tensor.alpha = call.alpha;
  tensor.holds_phi = call.holds_phi;
  tensor.bias_correction1 = 1 - std::pow(0.9, 3);
  tensor.bias_correction2 = 1 - std::pow(0.999, 3);
  if (call.optimizer < kAdam) {
    SgdOptions options{};
    static_cast<StepOptions&>(options) = call.options;
    options.momentum = 0.9;
    // No short binary number: its products with gradients would lie on ties between two floats,
    // where the fma that the baseline computes in double rounds twice.
    options.dampening = 0.3;
    options.nesterov = call.optimizer == kNesterov;
    isa.sgd(options, tensor, begin, end);
  } else {
    AdamOptions options{};
    static_cast<StepOptions&>(options) = call.options;
    options.beta1 = 0.9;
    options.beta2 = 0.999;
    options.eps = 1e-8;
    isa.adam(options, tensor, begin, end);
  }
}

void check_same(const Floats& a, const Floats& b, const Floats& before, const Call& call,
                const char* what) {
  const StepOptions& o = call.options;
  for (int64_t i = 0; i < a.n; ++i) {
    // A weight that is not finite has no power, and what comes of it differs; it stays as it is.
    if (!std::isfinite(before.weight[i])) {
      CHECK(!std::isfinite(a.weight[i]) && !std::isfinite(b.weight[i]), "%s: %a became %a and %a",
            what, before.weight[i], a.weight[i], b.weight[i]);
      continue;
    }
    CHECK(
        same(a.weight[i], b.weight[i]),
        "%s: optimizer %d, alpha %g, phi %d, chain %d, decay %g (decoupled %d, of phi %d): weight "
        "%a, gradient %a, states %a %a %a give %a and %a",
        what, call.optimizer, call.alpha, call.holds_phi, o.chain, o.weight_decay, o.decoupled,
        o.decay_of_phi, before.weight[i], before.grad[i], before.states[0][i], before.states[1][i],
        before.states[2][i], a.weight[i], b.weight[i]);
    for (int k = 0; k < 3; ++k) {
      CHECK(same(a.states[k][i], b.states[k][i]),
            "%s: optimizer %d, alpha %g: state %d of weight %a, gradient %a: %a and %a", what,
            call.optimizer, call.alpha, k, before.weight[i], before.grad[i], a.states[k][i],
            b.states[k][i]);
    }
  }
}

// ---- checks

// Every instruction set gives the bits of the baseline.
void test_same_bits() {
  const StepKernels& baseline = ppkernels::step_kernels(ppkernels::Isa::kBaseline);
  uint64_t seed = 0;
  for (const Call& call : all_calls()) {
    ++seed;
    const Floats before = random_floats(611, seed, seed % 3 == 0);
    Floats a = before.copy(), b = before.copy();
    step(*kernels, call, a, 0, a.n);
    step(baseline, call, b, 0, b.n);
    check_same(a, b, before, call, "baseline");
  }
}

// Parts of a tensor, in any order, give what the whole gives, and a part writes nothing else.
void test_parts() {
  uint64_t seed = 1;
  const std::vector<Call> calls = all_calls();
  for (size_t c = 0; c < calls.size(); c += 7) {
    const Floats before = random_floats(64 * 5 + 17, ++seed, true);
    Floats whole = before.copy(), parts = before.copy();
    step(*kernels, calls[c], whole, 0, whole.n);
    const int64_t bounds[] = {0, 64, 64, 256, parts.n};
    for (int part : {2, 0, 3, 1}) {
      const Floats earlier = parts.copy();
      step(*kernels, calls[c], parts, bounds[part], bounds[part + 1]);
      for (int64_t i = 0; i < parts.n; ++i) {
        if (i >= bounds[part] && i < bounds[part + 1]) continue;
        CHECK(to_bits(parts.weight[i]) == to_bits(earlier.weight[i]), "element %d", int(i));
        for (int k = 0; k < 3; ++k) {
          CHECK(to_bits(parts.states[k][i]) == to_bits(earlier.states[k][i]), "state %d of %d", k,
                int(i));
        }
      }
    }
    check_same(parts, whole, before, calls[c], "in parts");
  }
}

// Any size gives an element the same bits, and frozen ones keep theirs.
void test_sizes_and_masks() {
  const std::vector<Call> calls = all_calls();
  const Floats before = random_floats(200, 5, true);
  for (int64_t n = 0; n <= 200; ++n) {
    const Call& call = calls[size_t(n) * 13 % calls.size()];
    Floats whole = before.copy(), part(n), unmasked = before.copy();
    const size_t bytes = size_t(n) * sizeof(float);
    std::memcpy(part.weight.get(), before.weight.get(), bytes);
    std::memcpy(part.grad.get(), before.grad.get(), bytes);
    for (int k = 0; k < 3; ++k) std::memcpy(part.states[k].get(), before.states[k].get(), bytes);
    // The last byte's other bits are set, as those of a mask never are.
    part.mask.assign(before.mask.begin(), before.mask.begin() + (n + 7) / 8);
    if (n % 8 != 0) part.mask.back() |= uint8_t(0xff << (n % 8));
    if (part.mask.empty()) continue;
    unmasked.mask.clear();
    step(*kernels, call, whole, 0, whole.n);
    step(*kernels, call, part, 0, n);
    step(*kernels, call, unmasked, 0, unmasked.n);
    for (int64_t i = 0; i < n; ++i) {
      CHECK(same(part.weight[i], whole.weight[i]), "element %d of %d", int(i), int(n));
      const bool is_free = (before.mask[size_t(i / 8)] >> (i % 8)) & 1;
      const Floats& wanted = is_free ? unmasked : before;
      CHECK(is_free ? same(part.weight[i], wanted.weight[i])
                    : to_bits(part.weight[i]) == to_bits(wanted.weight[i]),
            "element %d of %d, free %d", int(i), int(n), is_free);
      for (int k = 0; k < 3; ++k) {
        CHECK(is_free ? same(part.states[k][i], wanted.states[k][i])
                      : to_bits(part.states[k][i]) == to_bits(wanted.states[k][i]),
              "state %d, element %d of %d, free %d", k, int(i), int(n), is_free);
      }
    }
  }
}

// A master copy is stepped as a float32 weight, and its rounding is what the weight shows.
void test_master() {
  const std::vector<Call> calls = all_calls();
  for (size_t c = 0; c < calls.size(); c += 5) {
    const Floats before = random_floats(101, c + 1, c % 2 == 0);
    Tensors<uint16_t, float> half(before.n);
    Floats single = before.copy();
    half.master.reset(new float[size_t(before.n)]);
    half.mask = before.mask;
    for (int64_t i = 0; i < before.n; ++i) {
      // bfloat16 is the upper half of a float; the master has one more bit than that.
      half.weight[i] = uint16_t(to_bits(before.weight[i]) >> 16);
      half.grad[i] = uint16_t(to_bits(before.grad[i]) >> 16);
      const float shown = from_bits(uint32_t(half.weight[i]) << 16);
      half.master[i] = std::isfinite(shown) ? from_bits(to_bits(shown) | 0x1000u) : shown;
      single.weight[i] = half.master[i];
      single.grad[i] = from_bits(uint32_t(half.grad[i]) << 16);
      for (int k = 0; k < 3; ++k) half.states[k][i] = before.states[k][i];
    }
    const Floats earlier = single.copy();
    step(*kernels, calls[c], half, 0, half.n, Type::kBFloat16, Type::kFloat32);
    step(*kernels, calls[c], single, 0, single.n);
    for (int64_t i = 0; i < before.n; ++i) {
      CHECK(same(half.master[i], single.weight[i]), "alpha %g, from %a: %a, not %a", calls[c].alpha,
            earlier.weight[i], half.master[i], single.weight[i]);
      const float shown = from_bits(uint32_t(half.weight[i]) << 16);
      const float error = std::fabs(shown - half.master[i]);
      CHECK(same(shown, half.master[i]) ||
                error <= std::fabs(half.master[i]) * 0x1p-8f + 0x1p-133f || std::isinf(shown),
            "the weight shows %a for %a", shown, half.master[i]);
      for (int k = 0; k < kStateCounts[calls[c].optimizer]; ++k)
        CHECK(same(half.states[k][i], single.states[k][i]), "state %d", k);
    }
  }
}

// Half types without a master, and float64: nothing outside, the same for any part.
template <class W>
void check_type(Type type) {
  const std::vector<Call> calls = all_calls();
  Random random{3};
  for (size_t c = 0; c < calls.size(); c += 11) {
    Tensors<W, W> whole(77);
    for (int64_t i = 0; i < whole.n; ++i) {
      // 0.2 to 0.9, whatever the type: the upper bits of a number with a constant exponent.
      const W ones[] = {W(0x3800), W(0x3e800000u), W(0x3fd0000000000000ull)};
      const int kind = sizeof(W) == 2 ? 0 : sizeof(W) == 4 ? 1 : 2;
      const auto number = [&] {
        return W(ones[kind] | W(random.next() % 1024) << (sizeof(W) == 8 ? 42 : 0));
      };
      whole.weight[i] = number();
      whole.grad[i] = number();
      for (auto& state : whole.states) state[i] = number();
    }
    Tensors<W, W> parts = whole.copy();
    step(*kernels, calls[c], whole, 0, whole.n, type, type);
    step(*kernels, calls[c], parts, 64, parts.n, type, type);
    step(*kernels, calls[c], parts, 0, 64, type, type);
    for (int64_t i = 0; i < whole.n; ++i) {
      CHECK(whole.weight[i] == parts.weight[i], "type %d, element %d", int(type), int(i));
      for (int k = 0; k < 3; ++k)
        CHECK(whole.states[k][i] == parts.states[k][i], "type %d, state %d", int(type), k);
    }
  }
}

}  // namespace

int main() {
  kernels = &ppkernels::step_kernels(ppkernels_test::isa_under_test());
  test_same_bits();
  test_parts();
  test_sizes_and_masks();
  test_master();
  check_type<uint16_t>(Type::kBFloat16);
  check_type<uint16_t>(Type::kFloat16);
  check_type<uint64_t>(Type::kFloat64);
  std::printf("step: all checks passed\n");
  return 0;
}
