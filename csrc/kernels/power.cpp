// Compiled once per instruction set (CMakeLists.txt), each in its own namespace.
#include "kernels/power.h"

#include <math.h>

#include "simd/loop.h"
#include "simd/math.h"

namespace ppkernels::PPKERNELS_ISA {
namespace {

// ---- float32 arithmetic: one point function per formula and exact exponent

struct Identity {
  f32v operator()(f32v x) const { return x; }
};

struct SignedSquare {
  f32v operator()(f32v x) const { return x * abs(x); }
};

// Where two operations follow each other, the rounding error of the first is recovered. Two things
// can spoil that: inf − inf, so what overflows anyway is clamped, and errors so small that they are
// subnormal, so small weights are scaled up by `up` and their power down again by 2^96 =
// up^exponent.
inline f32v clamp(f32v a, float top) { return a > splat(top) ? splat(top) : a; }

template <class Magnitude>
inline f32v recovered(f32v x, float up, float top, const Magnitude& magnitude) {
  const f32v a = clamp(abs(x), top);
  const i32v is_small = a < splat(0x1p-20f);
  const f32v power = magnitude(is_small ? a * up : a);
  return with_sign(is_small ? power * 0x1p-96f : power, x);
}

struct ThreeHalves {
  f32v operator()(f32v x) const {
    return recovered(x, 0x1p64f, 0x1p86f, [](f32v a) {
      const f32v root = sqrt(a);
      const f32v rest = fma(-root, root, a) / (root + root);
      return a == splat(0.0f) ? a : fma(a, root, a * rest);
    });
  }
};

struct Cube {
  f32v operator()(f32v x) const {
    return recovered(x, 0x1p32f, 0x1p43f, [](f32v a) {
      const f32v square = a * a;
      return fma(square, a, fma(a, a, -square) * a);
    });
  }
};

struct SignedFourth {
  f32v operator()(f32v x) const {
    return recovered(x, 0x1p24f, 0x1p33f, [](f32v a) {
      const f32v square = a * a;
      return fma(square, square, (square + square) * fma(a, a, -square));
    });
  }
};

struct SignedRoot {
  f32v operator()(f32v x) const { return with_sign(sqrt(abs(x)), x); }
};

struct SignedPower {
  explicit SignedPower(double exponent) : power(exponent, 1) {}
  f32v operator()(f32v x) const {
    const f32v a = abs(x);
    return with_sign(is_special(a) ? a : power(a), x);
  }
  Power power;
};

struct BackwardIdentity {
  f32v operator()(f32v grad, f32v) const { return grad; }
};

struct BackwardThreeHalves {
  f32v operator()(f32v grad, f32v weight) const { return grad * (sqrt(abs(weight)) * 1.5f); }
};

struct BackwardSquare {
  f32v operator()(f32v grad, f32v weight) const { return grad * (abs(weight) * 2.0f); }
};

struct BackwardCube {
  f32v operator()(f32v grad, f32v weight) const {
    const f32v a = clamp(abs(weight), 0x1.8p63f);
    const f32v square = a * a;
    return grad * fma(square, splat(3.0f), fma(a, a, -square) * 3.0f);
  }
};

struct BackwardPower {
  explicit BackwardPower(double alpha) : power(alpha - 1, alpha) {}
  f32v operator()(f32v grad, f32v weight) const {
    const f32v a = abs(weight);
    return grad * (is_special(a) ? a : power(a));
  }
  Power power;
};

struct DoubleBackwardPower {
  explicit DoubleBackwardPower(double alpha)
      : power(alpha - 2, alpha * (alpha - 1)), at_infinity(alpha < 2   ? 0
                                                           : alpha > 2 ? INFINITY
                                                                       : 2) {}
  f32v operator()(f32v grad_grad, f32v grad, f32v weight) const {
    const f32v a = abs(weight);
    // Of the special lanes, NaN stays, infinity has a limit of its own, 0 is set at the end.
    const f32v limit = a == splat(INFINITY) ? splat(at_infinity) : a;
    const f32v curvature = with_sign(is_special(a) ? limit : power(a), weight);
    return a == splat(0.0f) ? splat(0.0f) : grad_grad * grad * curvature;
  }
  Power power;
  float at_infinity;
};

// ---- float64 arithmetic

double signed_power(double x, double exponent) { return copysign(pow(fabs(x), exponent), x); }

double power_backward(double grad, double weight, double alpha) {
  return grad * (alpha * pow(fabs(weight), alpha - 1));
}

double power_double_backward(double grad_grad, double grad, double weight, double alpha) {
  if (weight == 0 || alpha == 1) return 0;
  if (isnan(weight)) return weight;
  const double curvature = alpha * (alpha - 1) * pow(fabs(weight), alpha - 2);
  return grad_grad * grad * copysign(curvature, weight);
}

// ---- exponents outside the range of `Power`: float32 in, float64 arithmetic, lane by lane

struct WidePower {
  double exponent;
  f32v operator()(f32v x) const {
    f32v r;
    for (int i = 0; i < kLanes; ++i) r[i] = (float)signed_power(x[i], exponent);
    return r;
  }
};

struct WideBackward {
  double alpha;
  f32v operator()(f32v grad, f32v weight) const {
    f32v r;
    for (int i = 0; i < kLanes; ++i) r[i] = (float)power_backward(grad[i], weight[i], alpha);
    return r;
  }
};

struct WideDoubleBackward {
  double alpha;
  f32v operator()(f32v grad_grad, f32v grad, f32v weight) const {
    f32v r;
    for (int i = 0; i < kLanes; ++i)
      r[i] = (float)power_double_backward(grad_grad[i], grad[i], weight[i], alpha);
    return r;
  }
};

bool in_range(double exponent) {
  const double size = fabs(exponent);
  return (size >= Power::kSmallestExponent && size <= Power::kLargestExponent) || size == 0;
}

// ---- entry points; `words` is the mask of each, or null

template <class Point, class T, class... In>
void run_cached(const Point& point, const uint8_t* words, T* out, int64_t n, const In*... in) {
  words == nullptr ? map(All{}, point, out, n, in...) : map(Masked{words}, point, out, n, in...);
}

template <class Point, class T, class... In>
void run(const Point& point, const uint8_t* words, T* out, int64_t n, bool stream,
         const In*... in) {
  if (!stream) return run_cached(point, words, out, n, in...);
  words == nullptr ? map_streaming(All{}, point, out, n, in...)
                   : map_streaming(Masked{words}, point, out, n, in...);
}

// float64: `point` takes the number of an element.
template <class Point>
void run_doubles(const Point& point, const uint8_t* words, void* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    ((double*)out)[i] = words == nullptr || bit(words, i) ? point(i) : 0;
}

template <class T>
void signed_power_as(double exponent, const void* x_, const uint8_t* words, void* out_, int64_t n,
                     bool stream) {
  const T* x = (const T*)x_;
  T* out = (T*)out_;
  if (exponent == 1) return run(Identity{}, words, out, n, stream, x);
  if (exponent == 0.5) return run(SignedRoot{}, words, out, n, stream, x);
  if (exponent == 1.5) return run(ThreeHalves{}, words, out, n, stream, x);
  if (exponent == 2) return run(SignedSquare{}, words, out, n, stream, x);
  if (exponent == 3) return run(Cube{}, words, out, n, stream, x);
  if (exponent == 4) return run(SignedFourth{}, words, out, n, stream, x);
  if (in_range(exponent)) return run(SignedPower(exponent), words, out, n, stream, x);
  run_cached(WidePower{exponent}, words, out, n, x);
}

void signed_power_entry(Type type, double exponent, const void* x, const uint8_t* words, void* out,
                        int64_t n, bool stream) {
  switch (type) {
    case Type::kFloat32:
      return signed_power_as<float>(exponent, x, words, out, n, stream);
    case Type::kBFloat16:
      return signed_power_as<bf16>(exponent, x, words, out, n, stream);
    case Type::kFloat16:
      return signed_power_as<f16>(exponent, x, words, out, n, stream);
    case Type::kFloat64:
      return run_doubles([=](int64_t i) { return signed_power(((const double*)x)[i], exponent); },
                         words, out, n);
  }
}

template <class T>
void power_backward_as(double alpha, const void* grad_, const void* weight_, const uint8_t* words,
                       void* out_, int64_t n, bool stream) {
  const T *grad = (const T*)grad_, *weight = (const T*)weight_;
  T* out = (T*)out_;
  if (alpha == 1) return run(BackwardIdentity{}, words, out, n, stream, grad, weight);
  if (alpha == 1.5) return run(BackwardThreeHalves{}, words, out, n, stream, grad, weight);
  if (alpha == 2) return run(BackwardSquare{}, words, out, n, stream, grad, weight);
  if (alpha == 3) return run(BackwardCube{}, words, out, n, stream, grad, weight);
  if (in_range(alpha - 1)) return run(BackwardPower(alpha), words, out, n, stream, grad, weight);
  run_cached(WideBackward{alpha}, words, out, n, grad, weight);
}

void power_backward_entry(Type type, double alpha, const void* grad, const void* weight,
                          const uint8_t* words, void* out, int64_t n, bool stream) {
  switch (type) {
    case Type::kFloat32:
      return power_backward_as<float>(alpha, grad, weight, words, out, n, stream);
    case Type::kBFloat16:
      return power_backward_as<bf16>(alpha, grad, weight, words, out, n, stream);
    case Type::kFloat16:
      return power_backward_as<f16>(alpha, grad, weight, words, out, n, stream);
    case Type::kFloat64:
      return run_doubles(
          [=](int64_t i) {
            return power_backward(((const double*)grad)[i], ((const double*)weight)[i], alpha);
          },
          words, out, n);
  }
}

template <class T>
void power_double_backward_as(double alpha, const void* grad_grad_, const void* grad_,
                              const void* weight_, const uint8_t* words, void* out_, int64_t n) {
  const T *grad_grad = (const T*)grad_grad_, *grad = (const T*)grad_, *weight = (const T*)weight_;
  T* out = (T*)out_;
  if (alpha != 1 && in_range(alpha - 2)) {
    run_cached(DoubleBackwardPower(alpha), words, out, n, grad_grad, grad, weight);
  } else {
    run_cached(WideDoubleBackward{alpha}, words, out, n, grad_grad, grad, weight);
  }
}

void power_double_backward_entry(Type type, double alpha, const void* grad_grad, const void* grad,
                                 const void* weight, const uint8_t* words, void* out, int64_t n) {
  switch (type) {
    case Type::kFloat32:
      return power_double_backward_as<float>(alpha, grad_grad, grad, weight, words, out, n);
    case Type::kBFloat16:
      return power_double_backward_as<bf16>(alpha, grad_grad, grad, weight, words, out, n);
    case Type::kFloat16:
      return power_double_backward_as<f16>(alpha, grad_grad, grad, weight, words, out, n);
    case Type::kFloat64:
      return run_doubles(
          [=](int64_t i) {
            return power_double_backward(((const double*)grad_grad)[i], ((const double*)grad)[i],
                                         ((const double*)weight)[i], alpha);
          },
          words, out, n);
  }
}

}  // namespace

extern const PowerKernels kPower;
const PowerKernels kPower = {signed_power_entry, power_backward_entry, power_double_backward_entry};

}  // namespace ppkernels::PPKERNELS_ISA
