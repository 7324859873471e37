// Several vectors side by side, each operation done on all of them before the next one.
//
// A formula of 50 dependent instructions is bound by their latency: the processor looks only so far
// ahead, and with one vector after the other that is a few chains at a time. Side by side, as many
// chains run as there are vectors. Formulas are templates over V, which is f32v or Pack<f32v>; the
// arithmetic of an element, and so its bits, are the same either way.
#pragma once

#include "simd/vec.h"

namespace ppkernels::PPKERNELS_ISA {

// Measured, op `step`: ops/step/README.md.
#if defined(__AVX512F__)
constexpr int kPack = 3;
#else
constexpr int kPack = 2;
#endif

template <class V>
struct Pack {
  V v[kPack];
};

template <class T>
PPKERNELS_INLINE const T& part(const T& same, int) {
  return same;
}
template <class V>
PPKERNELS_INLINE const V& part(const Pack<V>& pack, int i) {
  return pack.v[i];
}

// op over the vectors of each pack; what is no pack goes to all of them.
template <class Op, class... In>
PPKERNELS_INLINE auto each(const Op& op, const In&... in) {
  Pack<decltype(op(part(in, 0)...))> result;
  for (int i = 0; i < kPack; ++i) result.v[i] = op(part(in, i)...);
  return result;
}

#define PPKERNELS_OPERATOR(symbol)                                            \
  template <class A, class B>                                                 \
  PPKERNELS_INLINE auto operator symbol(const Pack<A>& a, const Pack<B>& b) { \
    return each([](const A& x, const B& y) { return x symbol y; }, a, b);     \
  }                                                                           \
  template <class A, class B>                                                 \
  PPKERNELS_INLINE auto operator symbol(const Pack<A>& a, const B& b) {       \
    return each([](const A& x, const B& y) { return x symbol y; }, a, b);     \
  }                                                                           \
  template <class A, class B>                                                 \
  PPKERNELS_INLINE auto operator symbol(const A& a, const Pack<B>& b) {       \
    return each([](const A& x, const B& y) { return x symbol y; }, a, b);     \
  }
PPKERNELS_OPERATOR(+)
PPKERNELS_OPERATOR(-)
PPKERNELS_OPERATOR(*)
PPKERNELS_OPERATOR(/)
PPKERNELS_OPERATOR(&)
PPKERNELS_OPERATOR(|)
PPKERNELS_OPERATOR(^)
PPKERNELS_OPERATOR(>>)
PPKERNELS_OPERATOR(==)
PPKERNELS_OPERATOR(!=)
PPKERNELS_OPERATOR(<=)
#undef PPKERNELS_OPERATOR

// ---- the functions of vec.h

PPKERNELS_INLINE Pack<u32v> bits(const Pack<f32v>& x) {
  return each([](f32v v) { return bits(v); }, x);
}
PPKERNELS_INLINE Pack<f32v> from_bits(const Pack<u32v>& x) {
  return each([](u32v v) { return from_bits(v); }, x);
}
PPKERNELS_INLINE Pack<f32v> abs(const Pack<f32v>& x) {
  return each([](f32v v) { return abs(v); }, x);
}
PPKERNELS_INLINE Pack<f32v> sqrt(const Pack<f32v>& x) {
  return each([](f32v v) { return sqrt(v); }, x);
}

// a·b + c, rounded once, where some of the three are packs.
template <class A, class B, class C>
PPKERNELS_INLINE Pack<f32v> fma(const A& a, const B& b, const C& c) {
  return each([](f32v x, f32v y, f32v z) { return fma(x, y, z); }, a, b, c);
}

// b where the mask's lane is set, else a.
PPKERNELS_INLINE f32v select(i32v mask, f32v a, f32v b) { return mask ? a : b; }
template <class A, class B>
PPKERNELS_INLINE Pack<f32v> select(const Pack<i32v>& mask, const A& a, const B& b) {
  return each([](i32v m, f32v x, f32v y) { return m ? x : y; }, mask, a, b);
}

// Lane by lane the largest of the vectors, taken for signed integers.
PPKERNELS_INLINE i32v largest(u32v x) { return (i32v)x; }
PPKERNELS_INLINE i32v largest(const Pack<u32v>& x) {
  i32v result = (i32v)x.v[0];
  for (int i = 1; i < kPack; ++i) {
    const i32v other = (i32v)x.v[i];
    result = other > result ? other : result;
  }
  return result;
}

// x with its sign changed where `sign` is negative.
template <class V>
PPKERNELS_INLINE V times_sign(const V& x, const V& sign) {
  return from_bits(bits(x) ^ (bits(sign) & kSignBit));
}

// ---- memory

template <class V>
struct Width {
  static constexpr int kElements = kLanes;
};
template <class V>
struct Width<Pack<V>> {
  static constexpr int kElements = kLanes * kPack;
};

template <class V, class T>
PPKERNELS_INLINE V load_as(const T* p) {
  if constexpr (Width<V>::kElements == kLanes) {
    return load(p);
  } else {
    V x;
    for (int i = 0; i < kPack; ++i) x.v[i] = load(p + i * kLanes);
    return x;
  }
}

template <class T>
PPKERNELS_INLINE void store_all(T* p, f32v x) {
  store<false>(p, x);
}
template <class T>
PPKERNELS_INLINE void store_all(T* p, const Pack<f32v>& x) {
  for (int i = 0; i < kPack; ++i) store<false>(p + i * kLanes, x.v[i]);
}

// As `lane_mask`, for the lanes of V.
template <class V>
PPKERNELS_INLINE auto mask_as(const uint8_t* words, int64_t i) {
  if constexpr (Width<V>::kElements == kLanes) {
    return lane_mask(words, i);
  } else {
    Pack<i32v> mask;
    for (int k = 0; k < kPack; ++k) mask.v[k] = lane_mask(words, i + k * kLanes);
    return mask;
  }
}

}  // namespace ppkernels::PPKERNELS_ISA
