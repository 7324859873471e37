// Compiled once per instruction set (CMakeLists.txt), each in its own namespace.
// Longer than 350 lines: forms, optimizers and the loop are one pass, read together.
#include "kernels/step.h"

#include <math.h>

#include "simd/math.h"
#include "simd/pack.h"

namespace ppkernels::PPKERNELS_ISA {
namespace {

// Note [A step on θ alone]
//
// With Ψ(x) = x|x|^(α−1), φ moves by δ and shrinks by the decoupled decay's factor c:
//
//     θ' = Ψ(cφ + δ) = c^α·θ·Ψ(1 + r),    r = δ/(cφ)
//     virtual: δ = −lr·u·α|φ|^(α−1),      r = −(lr·α/c)·u·sign(θ)·|θ|^((α−2)/α)
//     chain:   δ = −lr·u,                 r = −(lr/c)·u·sign(θ)·|θ|^(−1/α)
//
// r is small, and what it is multiplied with needs no more than single accuracy: `ShortPower`.
// While |r| <= near, Ψ(1 + r) = 1 + x, x = r·(polynomial in r), the binomial series; θ' = c^α·θ·(1
// + x) is rounded once more than exact. A step of zero gives x = 0 and leaves θ bit-equal. Lanes
// where r is larger (tiny θ, mostly) take the full `Power`, and those that may overflow, or hold
// what is not finite, go through float64.

// ---- float64 arithmetic: float64 tensors, and the lanes that float32 cannot serve

struct Motion {
  Motion(const StepOptions& options, const StepTensor& tensor, double lr_)
      : alpha(tensor.alpha), lr(lr_), chain(options.chain) {
    const double rate = options.decoupled ? options.lr * options.weight_decay : 0;
    const bool is_plain = tensor.alpha == 1 || tensor.holds_phi;
    // The factors of φ and of θ; they differ by the exponent.
    if (options.decay_of_phi || tensor.alpha == 1) {
      keep_phi = 1 - rate;
      keep_theta = exp(tensor.alpha * log1p(-rate));
    } else {
      keep_phi = exp(log1p(-rate) / tensor.alpha);
      keep_theta = 1 - rate;
    }
    keep_stored = is_plain ? keep_phi : keep_theta;
  }

  // θ' from θ and the optimizer's direction u.
  double operator()(double theta, double u) const {
    if (theta == 0) return isfinite(u) ? theta : 0 * u;
    const double phi = copysign(pow(fabs(theta), 1 / alpha), theta);
    const double delta = -lr * u * (chain ? 1 : alpha * pow(fabs(theta), (alpha - 1) / alpha));
    const double kept = theta * keep_theta;
    if (delta == 0) return kept;
    // The power of a rounded φ loses bits, so that a step that is small beside it starts at θ.
    const double r = delta / (keep_phi * phi);
    if (fabs(r) < 0.5) {
      const double y = alpha * log1p(r);
      return fabs(y) < 0.5 ? kept + kept * expm1(y) : kept * exp(y);
    }
    const double moved = keep_phi * phi + delta;
    return copysign(pow(fabs(moved), alpha), moved);
  }

  double alpha, lr, keep_phi, keep_theta, keep_stored;
  bool chain;
};

// ---- coupled decay: λ times the gradient of a penalty, added to the gradient

class CoupledDecay {
 public:
  CoupledDecay(const StepOptions& options, const StepTensor& tensor)
      : rate(options.decoupled ? 0 : options.weight_decay), exponent(1), is_before(true) {
    if (rate == 0 || tensor.alpha == 1 || options.decay_of_phi == tensor.holds_phi) {
      return;  // λ times what is stored, on the gradient as it comes
    }
    if (tensor.holds_phi) {
      // ∂/∂φ of λ/2·|θ|².
      exponent = 2 * tensor.alpha - 1;
      rate *= tensor.alpha;
    } else {
      // λφ; under the chain rule it joins the gradient of φ.
      exponent = 1 / tensor.alpha;
      is_before = !options.chain;
    }
  }

  double rate, exponent;
  bool is_before;

  double operator()(double grad, double weight) const {
    if (rate == 0) return grad;
    return ::fma(rate, exponent == 1 ? weight : copysign(pow(fabs(weight), exponent), weight),
                 grad);
  }
};

// λ times a power of the weight, added to the gradient. Rare, so out of the loop's way.
__attribute__((noinline, cold)) f32v plus_power(const CoupledDecay& decay, f32v grad, f32v weight) {
  const double e = decay.exponent;
  const f32v a = abs(weight);
  f32v result;
  if (e > Power::kLargestExponent) {
    for (int i = 0; i < kLanes; ++i) result[i] = (float)decay(grad[i], weight[i]);
    return result;
  }
  const f32v power = e <= ShortPower::kLargestExponent ? ShortPower(e)(a) : Power(e, 1)(a);
  result = with_sign(is_special(a) ? a : power, weight);
  return fma(splat((float)decay.rate), result, grad);
}

PPKERNELS_INLINE Pack<f32v> plus_power(const CoupledDecay& decay, const Pack<f32v>& grad,
                                       const Pack<f32v>& weight) {
  return each([&](f32v g, f32v w) { return plus_power(decay, g, w); }, grad, weight);
}

class CoupledDecayLanes {
 public:
  explicit CoupledDecayLanes(const CoupledDecay& decay)
      : exact_(&decay), rate_(splat((float)decay.rate)), is_before_(decay.is_before),
        is_power_(decay.exponent != 1), is_there_(decay.rate != 0) {}

  template <class V>
  PPKERNELS_INLINE V before(const V& grad, const V& weight) const {
    return is_there_ && is_before_ ? plus(grad, weight) : grad;
  }

  template <class V>
  PPKERNELS_INLINE V after(const V& grad, const V& weight) const {
    return is_there_ && !is_before_ ? plus(grad, weight) : grad;
  }

 private:
  template <class V>
  PPKERNELS_INLINE V plus(const V& grad, const V& weight) const {
    return is_power_ ? plus_power(*exact_, grad, weight) : fma(rate_, weight, grad);
  }

  const CoupledDecay* exact_;
  f32v rate_;
  bool is_before_, is_power_, is_there_;
};

// ---- forms: what the stored weight is, and how a direction moves it

// What decoupled decay leaves of a weight. A factor close to 1, rounded, would be off by the same
// in every step; as the little that it takes away it is exact enough.
class Kept {
 public:
  explicit Kept(double factor)
      : is_one_(factor == 1), is_close_(factor > 0.5),
        factor_(splat((float)(is_close_ ? factor - 1 : factor))) {}

  template <class V>
  PPKERNELS_INLINE V of(const V& x) const {
    if (is_one_) return x;
    return is_close_ ? fma(x, factor_, x) : x * factor_;
  }

 private:
  bool is_one_, is_close_;
  f32v factor_;
};

// θ' where r is not small: r and the power of 1 + r to the last bit.
class Far {
 public:
  explicit Far(const Motion& motion) : motion_(motion), keep_(motion.keep_theta) {}

  __attribute__((noinline, cold)) f32v operator()(f32v theta, f32v u) {
    if (!is_ready_) prepare();
    // At θ = 0, and where θ has no power, this is noise.
    const f32v base = 1.0f - times_sign(u * factor_(abs(theta)), theta);
    const f32v a = abs(base);
    // θ last: with a small one, any other product could be subnormal and lose its last bits.
    const f32v power = with_sign(is_special(a) ? a : power_(a), base);
    const f32v result = theta * keep_.of(power);
    const i32v is_regular = (a <= splat(largest_)) & (theta != splat(0.0f));
    return any(~is_regular) ? one_by_one(theta, u, is_regular, result) : result;
  }

  // −r = u·sign(θ)·rate·|θ|^exponent.
  static double exponent(const Motion& motion) {
    return motion.chain ? -1 / motion.alpha : (motion.alpha - 2) / motion.alpha;
  }
  static double rate(const Motion& motion) {
    return motion.lr / motion.keep_phi * (motion.chain ? 1 : motion.alpha);
  }

 private:
  f32v one_by_one(f32v theta, f32v u, i32v is_regular, f32v result) const {
    for (int i = 0; i < kLanes; ++i) {
      if (!is_regular[i]) result[i] = (float)motion_(theta[i], u[i]);
    }
    return result;
  }

  // Put off to the first use, for many small tensors have none.
  void prepare() {
    is_ready_ = true;
    factor_ = Power(exponent(motion_), rate(motion_));
    power_ = Power(motion_.alpha, 1);
    // Beyond, a power may overflow that the product with θ brings back. For exponents above 8 the
    // rounding of 1 + r, α times as large in the power, would show.
    largest_ = motion_.alpha <= 8 ? (float)exp2(126 / motion_.alpha) : -1.0f;
  }

  Motion motion_;
  bool is_ready_ = false;
  Power factor_, power_;
  Kept keep_;
  float largest_ = -1;
};

// A product with a number that is mostly 1; the branch is cheaper than the multiplication.
class Scale {
 public:
  explicit Scale(double factor) : factor_(splat((float)factor)), is_one_(factor == 1) {}

  template <class V>
  PPKERNELS_INLINE V times(const V& x) const {
    if (is_one_) return x;
    return x * factor_;
  }

 private:
  f32v factor_;
  bool is_one_;
};

// The weight as it is: α = 1, or φ with its own gradient.
class Plain {
 public:
  Plain(const Motion& motion, Far*) : keep_(motion.keep_stored), rate_(splat((float)-motion.lr)) {}

  template <class V>
  struct Point {
    PPKERNELS_INLINE V gradient(const V& grad) const { return grad; }
  };
  template <class V>
  PPKERNELS_INLINE Point<V> at(const V&) const {
    return {};
  }

  template <class V>
  PPKERNELS_INLINE V moved(const Point<V>&, const V& weight, const V& u) const {
    return fma(u, rate_, keep_.of(weight));
  }

 private:
  Kept keep_;
  f32v rate_;
};

// θ' = keep·θ·Ψ(1 + r) for both rules.
class Multiplied {
 public:
  Multiplied(const Motion& motion, Far* far) : far_(far), keep_(motion.keep_theta) {
    double coefficient = 1;
    for (int k = 0; k < kTerms; ++k) {
      coefficient *= (motion.alpha - k) / (k + 1);
      terms_[k] = splat((float)coefficient);
    }
    // The first term left away is below 2^-27 there, and 1 + x is 1/4 or more, which leaves the sum
    // most of its bits where a step brings θ close to 0.
    const double rest = fabs(coefficient * (motion.alpha - kTerms) / (kTerms + 1));
    const double series = rest == 0 ? 1 : pow(0x1p-27 / rest, 1.0 / (kTerms + 1));
    const double limit = motion.alpha < 2 ? 0.5 : 1 / motion.alpha;
    near_ = (i32v)bits(splat((float)(series > limit ? limit : series)));
    // Terms beyond float32: no r is near.
    if (motion.alpha > kLargestAlpha) near_ = i32v{} - 1;
  }

  template <class V>
  PPKERNELS_INLINE V operator()(const V& theta, const V& r, const V& u) const {
    V x = fma(terms_[5], r, terms_[4]);
    x = fma(x, r, terms_[3]);
    x = fma(x, r, terms_[2]);
    x = fma(x, r, terms_[1]);
    x = fma(x, r, terms_[0]) * r;
    const V kept = keep_.of(theta);
    // Near, the sign of θ stays; written back, for the sum makes +0 of −0.
    const V result = from_bits(bits(fma(kept, x, kept)) | (bits(theta) & kSignBit));
    // Sizes compared as integers, which puts NaN above them all.
    const auto size = bits(abs(r));
    if (__builtin_expect(any(largest(size) > near_), 0)) {
      return corrected(result, size, theta, u);
    }
    return result;
  }

 private:
  static constexpr int kTerms = 6;
  // α^6 / 6! is a float.
  static constexpr double kLargestAlpha = 0x1p21;

  PPKERNELS_INLINE f32v corrected(f32v result, u32v size, f32v theta, f32v u) const {
    return (i32v)size > near_ ? (*far_)(theta, u) : result;
  }
  PPKERNELS_INLINE Pack<f32v> corrected(Pack<f32v> result, const Pack<u32v>& size,
                                        const Pack<f32v>& theta, const Pack<f32v>& u) const {
    for (int i = 0; i < kPack; ++i) {
      if (!any((i32v)size.v[i] > near_)) continue;
      result.v[i] = corrected(result.v[i], size.v[i], theta.v[i], u.v[i]);
    }
    return result;
  }

  Far* far_;
  f32v terms_[kTerms];
  i32v near_;
  Kept keep_;
};

// The virtual rule on θ.
class Virtual {
 public:
  Virtual(const Motion& motion, Far* far)
      : multiplied_(motion, far), factor_(Far::exponent(motion), -Far::rate(motion)),
        rate_(splat((float)-Far::rate(motion))), has_power_(motion.alpha != 2) {}

  template <class V>
  struct Point {
    PPKERNELS_INLINE V gradient(const V& grad) const { return grad; }
  };
  template <class V>
  PPKERNELS_INLINE Point<V> at(const V&) const {
    return {};
  }

  template <class V>
  PPKERNELS_INLINE V moved(const Point<V>&, const V& theta, const V& u) const {
    if (!has_power_) return multiplied_(theta, times_sign(u * rate_, theta), u);
    const V a = abs(theta);
    const V factor = select(a == splat(0.0f), splat(0.0f), factor_(a));
    return multiplied_(theta, times_sign(u * factor, theta), u);
  }

 private:
  Multiplied multiplied_;
  ShortPower factor_;
  f32v rate_;
  bool has_power_;
};

// The chain rule on θ: gradient and states are those of φ.
class Chain {
 public:
  Chain(const Motion& motion, Far* far)
      : multiplied_(motion, far), slope_(1 - 1 / motion.alpha, motion.alpha),
        rate_(splat((float)(-Far::rate(motion) / motion.alpha))) {}

  template <class V>
  struct Point {
    V slope, inverse;  // α|φ|^(α−1) and α/|φ|; both 0 at 0
    PPKERNELS_INLINE V gradient(const V& grad) const { return grad * slope; }
  };

  template <class V>
  PPKERNELS_INLINE Point<V> at(const V& theta) const {
    // The slope itself, not by way of 1/|φ|, which is no float for the smallest θ.
    const V a = abs(theta), slope = slope_(a);
    const auto is_zero = a == splat(0.0f);
    return {select(is_zero, splat(0.0f), slope), select(is_zero, splat(0.0f), slope / a)};
  }

  template <class V>
  PPKERNELS_INLINE V moved(const Point<V>& point, const V& theta, const V& u) const {
    return multiplied_(theta, times_sign(u * rate_ * point.inverse, theta), u);
  }

 private:
  Multiplied multiplied_;
  ShortPower slope_;
  f32v rate_;
};

// ---- optimizers: from gradient and states to a direction

struct Sgd {
  static constexpr int kStates = 0;
  Sgd(const SgdOptions&, const StepTensor&) {}
  static double lr(const SgdOptions& o, const StepTensor&) { return o.lr; }
  template <class V>
  PPKERNELS_INLINE V direction(const V& grad, V*) const {
    return grad;
  }
};

struct Momentum {
  static constexpr int kStates = 1;

  Momentum(const SgdOptions& o, const StepTensor&)
      : momentum(splat((float)o.momentum)), undamped(splat((float)(1 - o.dampening))),
        nesterov(o.nesterov) {}

  static double lr(const SgdOptions& o, const StepTensor&) { return o.lr; }

  template <class V>
  PPKERNELS_INLINE V direction(const V& grad, V* state) const {
    state[0] = fma(grad, undamped, state[0] * momentum);
    if (nesterov) return fma(state[0], momentum, grad);
    return state[0];
  }

  f32v momentum, undamped;
  bool nesterov;
};

// With a third state, the largest second moment so far: AMSGrad.
template <int kStateCount>
struct Adam {
  static constexpr int kStates = kStateCount;

  Adam(const AdamOptions& o, const StepTensor& t)
      : rest1(splat((float)(1 - o.beta1))), beta2(splat((float)o.beta2)),
        rest2(splat((float)(1 - o.beta2))), eps(splat((float)o.eps)),
        inverse(splat((float)(1 / ::sqrt(t.bias_correction2)))) {}

  // The first moment's bias correction goes into the learning rate.
  static double lr(const AdamOptions& o, const StepTensor& t) { return o.lr / t.bias_correction1; }

  template <class V>
  PPKERNELS_INLINE V direction(const V& grad, V* state) const {
    state[0] = fma(rest1, grad - state[0], state[0]);
    state[1] = fma(rest2, grad * grad, state[1] * beta2);
    if constexpr (kStates == 3) {
      // A NaN must show, whichever of the two it is in.
      state[2] = select((state[1] <= state[2]) | (state[2] != state[2]), state[2], state[1]);
    }
    return state[0] / fma(sqrt(state[kStates - 1]), inverse, eps);
  }

  f32v rest1, beta2, rest2, eps, inverse;
};

// ---- the pass

// Where an element's numbers lie: W is the type of weight and gradient, S that of states and
// master.
template <class W, class S>
struct Rows {
  W* weight;
  const W* grad;
  S* master;
  S* states[3];
  const uint8_t* mask;
};

template <class W, class S>
Rows<W, S> rows_of(const StepTensor& t, int64_t begin) {
  const auto state = [begin](void* p) { return p == nullptr ? nullptr : (S*)p + begin; };
  return {(W*)t.weight + begin,
          (const W*)t.grad + begin,
          state(t.master),
          {state(t.states[0]), state(t.states[1]), state(t.states[2])},
          t.mask == nullptr ? nullptr : t.mask + begin / 8};
}

template <class T, class V>
PPKERNELS_INLINE V rounded_to(const V& x) {
  T buffer[Width<V>::kElements];
  store_all(buffer, x);
  return load_as<V>(buffer);
}

template <class Optimizer, class Form>
struct Step {
  static constexpr int kStates = Optimizer::kStates;

  template <class Options>
  Step(const Options& options, const StepTensor& tensor, const Motion& motion, Far* far,
       const CoupledDecay& coupled)
      : optimizer(options, tensor), form(motion, far), decay(coupled),
        grad_factor(options.grad_factor) {}

  // The elements from i on that a V holds.
  template <class V, class W, class S>
  PPKERNELS_INLINE void at(const Rows<W, S>& rows, int64_t i) const {
    constexpr bool kMayHaveMaster = sizeof(W) < sizeof(S);
    const V stored = load_as<V>(rows.weight + i);
    V weight = stored, master = stored;
    if (kMayHaveMaster && rows.master != nullptr) {
      master = load_as<V>(rows.master + i);
      weight = select(rounded_to<W>(master) == stored, master, stored);
    }
    V before[3], state[3];
    for (int k = 0; k < kStates; ++k) state[k] = before[k] = load_as<V>(rows.states[k] + i);

    const auto point = form.at(weight);
    V grad = decay.before(grad_factor.times(load_as<V>(rows.grad + i)), weight);
    grad = decay.after(point.gradient(grad), weight);
    V moved = form.moved(point, weight, optimizer.direction(grad, state));

    V shown = moved;
    if (rows.mask != nullptr) {
      const auto is_free = mask_as<V>(rows.mask, i);
      moved = select(is_free, moved, master);
      shown = select(is_free, shown, stored);
      for (int k = 0; k < kStates; ++k) state[k] = select(is_free, state[k], before[k]);
    }
    if (kMayHaveMaster && rows.master != nullptr) store_all(rows.master + i, moved);
    store_all(rows.weight + i, shown);
    for (int k = 0; k < kStates; ++k) store_all(rows.states[k] + i, state[k]);
  }

  Optimizer optimizer;
  Form form;
  CoupledDecayLanes decay;
  Scale grad_factor;
};

// Elements i to i + count - 1, count < kLanes, by way of padded copies.
template <class StepT, class W, class S>
void step_part(const StepT& step, const Rows<W, S>& rows, int64_t i, int64_t count) {
  W weight[kLanes] = {}, grad[kLanes] = {};
  S master[kLanes] = {}, states[3][kLanes] = {};
  BitsOfLanes mask = {};
  if (rows.mask != nullptr) mask = bits_of_lanes(rows.mask, i, count);
  const Rows<W, S> padded = {weight,
                             grad,
                             rows.master == nullptr ? nullptr : master,
                             {states[0], states[1], states[2]},
                             rows.mask == nullptr ? nullptr : mask.words};
  for (int64_t j = 0; j < count; ++j) {
    weight[j] = rows.weight[i + j];
    grad[j] = rows.grad[i + j];
    if (rows.master != nullptr) master[j] = rows.master[i + j];
    for (int k = 0; k < StepT::kStates; ++k) states[k][j] = rows.states[k][i + j];
  }
  step.template at<f32v>(padded, 0);
  for (int64_t j = 0; j < count; ++j) {
    rows.weight[i + j] = weight[j];
    if (rows.master != nullptr) rows.master[i + j] = master[j];
    for (int k = 0; k < StepT::kStates; ++k) rows.states[k][i + j] = states[k][j];
  }
}

// `step` by value: what the stores might alias would be loaded again for each vector.
template <class W, class S, class StepT>
void run(const StepT step, const StepTensor& tensor, int64_t begin, int64_t end) {
  const Rows<W, S> rows = rows_of<W, S>(tensor, begin);
  const int64_t n = end - begin;
  int64_t i = 0;
  constexpr int kElements = Width<Pack<f32v>>::kElements;
  for (; i + kElements <= n; i += kElements) step.template at<Pack<f32v>>(rows, i);
  for (; i + kLanes <= n; i += kLanes) step.template at<f32v>(rows, i);
  if (i < n) step_part(step, rows, i, n - i);
}

template <class StepT, class Options>
void run_types(const Options& options, const StepTensor& t, const Motion& motion, Far* far,
               int64_t begin, int64_t end) {
  const CoupledDecay coupled(options, t);
  const StepT step(options, t, motion, far, coupled);
  const bool is_wide = t.state_type == Type::kFloat32;
  switch (t.type) {
    case Type::kFloat32:
      return run<float, float>(step, t, begin, end);
    case Type::kBFloat16:
      return is_wide ? run<bf16, float>(step, t, begin, end) : run<bf16, bf16>(step, t, begin, end);
    case Type::kFloat16:
      return is_wide ? run<f16, float>(step, t, begin, end) : run<f16, f16>(step, t, begin, end);
    case Type::kFloat64:
      return;  // `run_doubles`
  }
}

template <class Optimizer, class Options>
void run_forms(const Options& options, const StepTensor& t, int64_t begin, int64_t end) {
  const Motion motion(options, t, Optimizer::lr(options, t));
  if (t.alpha == 1 || t.holds_phi) {
    return run_types<Step<Optimizer, Plain>>(options, t, motion, nullptr, begin, end);
  }
  Far far(motion);
  if (options.chain) {
    return run_types<Step<Optimizer, Chain>>(options, t, motion, &far, begin, end);
  }
  run_types<Step<Optimizer, Virtual>>(options, t, motion, &far, begin, end);
}

// float64, element by element; `direction` takes a gradient and the element's states.
template <class Options, class Direction>
void run_doubles(const Options& options, const StepTensor& t, double lr, int64_t begin, int64_t end,
                 const Direction& direction) {
  const Motion motion(options, t, lr);
  const CoupledDecay decay(options, t);
  const bool is_plain = t.alpha == 1 || t.holds_phi;
  double* weights = (double*)t.weight;
  for (int64_t i = begin; i < end; ++i) {
    if (t.mask != nullptr && !bit(t.mask, i)) continue;
    const double w = weights[i];
    double grad = ((const double*)t.grad)[i] * options.grad_factor;
    if (decay.is_before) grad = decay(grad, w);
    if (options.chain && !is_plain) {
      grad *= w == 0 ? 0 : t.alpha * pow(fabs(w), (t.alpha - 1) / t.alpha);
    }
    if (!decay.is_before) grad = decay(grad, w);
    const double u = direction(grad, i);
    weights[i] = is_plain ? ::fma(u, -lr, w * motion.keep_stored) : motion(w, u);
  }
}

// ---- entry points

void sgd(const SgdOptions& options, const StepTensor& t, int64_t begin, int64_t end) {
  if (t.type != Type::kFloat64) {
    return t.states[0] == nullptr ? run_forms<Sgd>(options, t, begin, end)
                                  : run_forms<Momentum>(options, t, begin, end);
  }
  double* buffer = (double*)t.states[0];
  run_doubles(options, t, options.lr, begin, end, [&](double grad, int64_t i) {
    if (buffer == nullptr) return grad;
    buffer[i] = ::fma(grad, 1 - options.dampening, buffer[i] * options.momentum);
    return options.nesterov ? ::fma(buffer[i], options.momentum, grad) : buffer[i];
  });
}

void adam(const AdamOptions& options, const StepTensor& t, int64_t begin, int64_t end) {
  if (t.type != Type::kFloat64) {
    return t.states[2] == nullptr ? run_forms<Adam<2>>(options, t, begin, end)
                                  : run_forms<Adam<3>>(options, t, begin, end);
  }
  double *first = (double*)t.states[0], *second = (double*)t.states[1],
         *largest = (double*)t.states[2];
  const double lr = options.lr / t.bias_correction1, root = ::sqrt(t.bias_correction2);
  run_doubles(options, t, lr, begin, end, [&](double grad, int64_t i) {
    first[i] += (1 - options.beta1) * (grad - first[i]);
    second[i] = options.beta2 * second[i] + (1 - options.beta2) * grad * grad;
    double v = second[i];
    if (largest != nullptr) {
      v = v <= largest[i] || isnan(largest[i]) ? largest[i] : v;
      largest[i] = v;
    }
    return first[i] / (::sqrt(v) / root + options.eps);
  });
}

}  // namespace

extern const StepKernels kStep;
const StepKernels kStep = {sgd, adam};

}  // namespace ppkernels::PPKERNELS_ISA
