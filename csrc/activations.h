// The activations and their derivatives, written so that loops over them vectorise: no branches, no calls, no tables.
//
// Both polynomials were fitted for this file: minimax in relative error, by iteratively reweighted least squares
// (Lawson) on 400 Chebyshev points against 40-digit values, the coefficients then rounded to fp32. The errors given
// beside them were measured on 4 million points against fp64, fp32 rounding included.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>

#include "instruction_set.h"

namespace lape_fast {

// In the order of ACTIVATIONS in lape_fast/ops/gated_activation.py.
enum class Activation : int64_t { silu, gelu, gelu_tanh, relu };

template <class Wide>
struct ValueAndSlope {
  Wide value;  // act(x)
  Wide slope;  // d act(x) / d x
};

// exp(x): 0 below -87.7, infinity above 88.4; NaN is not kept, callers multiply by x. The polynomial is 9e-8 from 2^f;
// relative error of the whole 3e-7 for |x| <= 10 (6e-7 without fused multiply-add), growing with |x| to 4e-6.
LAPE_INLINE float exponential(float x) {
  // Clamps to [-88, 89] by the bits, because the compiler turns comparisons of floats into branches around the caller's
  // divisions: as signed integers only positive floats exceed another positive one, as unsigned ones only negative ones
  // exceed another negative one.
  constexpr int32_t kHighest = std::bit_cast<int32_t>(89.0f);
  constexpr uint32_t kLowest = std::bit_cast<uint32_t>(-88.0f);
  const int32_t high = std::bit_cast<int32_t>(x);
  const uint32_t low = high < kHighest ? high : kHighest;
  x = std::bit_cast<float>(low < kLowest ? low : kLowest);
  // Adding 1.5 * 2^23 rounds to an integer n, which then stands in the low bits of the sum: exp(x) = 2^n 2^f.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float f = x * 1.44269504f - (shifted - 12582912.0f);
  float power = 0.00132646831f;
  power = power * f + 0.00967156608f;
  power = power * f + 0.0555073433f;
  power = power * f + 0.240222409f;
  power = power * f + 0.693147004f;
  power = power * f + 1.0f;
  // n = -127 gives the bits of 0, n = 128 those of infinity.
  const float scale = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3F800000u);
  return power * scale;
}

LAPE_INLINE double exponential(double x) { return std::exp(x); }

// P(N > t) for a standard normal N and t >= 0, given density = exp(-t^2 / 2): density times a polynomial in
// 1 / (1 + 0.295 t). The polynomial is 3e-8 from the ratio; relative error 4e-7, density's own not counted.
LAPE_INLINE float normal_tail(float t, float density) {
  const float u = 1.0f / (1.0f + 0.295f * t);
  float polynomial = 0.0397218727f;
  polynomial = polynomial * u + -0.184764862f;
  polynomial = polynomial * u + 0.273617089f;
  polynomial = polynomial * u + -0.119818605f;
  polynomial = polynomial * u + 0.168037608f;
  polynomial = polynomial * u + 0.0840596929f;
  polynomial = polynomial * u + 0.121860497f;
  polynomial = polynomial * u + 0.117268577f;
  polynomial = polynomial * u + 1.81301748e-05f;
  return density * polynomial;
}

LAPE_INLINE double normal_tail(double t, double) { return 0.5 * std::erfc(t / std::numbers::sqrt2); }

// 2 sqrt(2 / pi) (x + 0.044715 x^3): the tanh form of GELU is x / (1 + exp(-this)).
template <class Wide>
LAPE_INLINE Wide gelu_tanh_logit(Wide x) {
  return Wide(1.5957691216057308) * (x + Wide(0.044715) * x * x * x);
}

template <Activation activation, class Wide>
LAPE_INLINE Wide activate(Wide x) {
  if constexpr (activation == Activation::silu) {
    return x / (1 + exponential(-x));
  } else if constexpr (activation == Activation::gelu) {
    const Wide tail = normal_tail(std::abs(x), exponential(Wide(-0.5) * x * x));
    return x * (x > 0 ? 1 - tail : tail);
  } else if constexpr (activation == Activation::gelu_tanh) {
    return x / (1 + exponential(-gelu_tanh_logit(x)));
  } else {
    return x < 0 ? Wide(0) : x;
  }
}

// The derivative of x * sigmoid(logit(x)), given the derivative of logit.
template <class Wide>
LAPE_INLINE ValueAndSlope<Wide> differentiate_sigmoid_product(Wide x, Wide logit, Wide logit_slope) {
  const Wide inverse_odds = exponential(-logit);
  const Wide sigmoid = 1 / (1 + inverse_odds);
  // 1 - sigmoid would lose its leading digits near 1, and inverse_odds * sigmoid is infinity * 0 near 0.
  const Wide complement = x > 0 ? inverse_odds * sigmoid : 1 - sigmoid;
  const Wide value = x * sigmoid;
  return {value, sigmoid + value * complement * logit_slope};
}

template <Activation activation, class Wide>
LAPE_INLINE ValueAndSlope<Wide> differentiate(Wide x) {
  if constexpr (activation == Activation::silu) {
    return differentiate_sigmoid_product(x, x, Wide(1));
  } else if constexpr (activation == Activation::gelu) {
    const Wide density = exponential(Wide(-0.5) * x * x);
    const Wide tail = normal_tail(std::abs(x), density);
    const Wide below = x > 0 ? 1 - tail : tail;
    return {x * below, below + x * (Wide(0.3989422804014327) * density)};
  } else if constexpr (activation == Activation::gelu_tanh) {
    // Beyond |x| = 100 the slope of the sigmoid is 0; the bound keeps it from being multiplied by infinity.
    const Wide square = x * x > 10000 ? Wide(10000) : x * x;
    return differentiate_sigmoid_product(x, gelu_tanh_logit(x),
                                         Wide(1.5957691216057308) * (1 + Wide(3 * 0.044715) * square));
  } else {
    return {x < 0 ? Wide(0) : x, x > 0 ? Wide(1) : Wide(0)};
  }
}

}  // namespace lape_fast
