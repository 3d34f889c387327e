// How values stand in memory, and how the kernels compute with them: in fp32 (fp64 for fp64), rounded once.
//
// A unit is what one step of a row loop reads and writes: one value, or two neighbouring bfloat16 as one 32-bit word.
// Working on both halves of the word spares the vector unit the shuffles between 16-bit and 32-bit lanes.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "instruction_set.h"

namespace lape_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

struct __attribute__((packed, aligned(2), may_alias)) BFloat16Pair {
  uint32_t bits;
};

template <class Scalar>
using Wide = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

// The values of a unit. Not an array: the vectoriser wants them in registers.
template <class Value>
struct OneLane {
  Value first;
};

template <class Value>
struct TwoLanes {
  Value first, second;
};

template <class Value>
OneLane(Value) -> OneLane<Value>;
template <class Value>
TwoLanes(Value, Value) -> TwoLanes<Value>;

// f of the values of one or more units, lane by lane.
template <class F, class... Values>
LAPE_INLINE auto map(const F& f, const OneLane<Values>&... lanes) {
  return OneLane{f(lanes.first...)};
}

template <class F, class... Values>
LAPE_INLINE auto map(const F& f, const TwoLanes<Values>&... lanes) {
  return TwoLanes{f(lanes.first...), f(lanes.second...)};
}

template <class Scalar>
LAPE_INLINE OneLane<Wide<Scalar>> load(const Scalar& value) {
  return {static_cast<Wide<Scalar>>(value)};
}

LAPE_INLINE OneLane<float> load(const BFloat16& value) {
  return {std::bit_cast<float>(static_cast<uint32_t>(value.x) << 16)};
}

LAPE_INLINE TwoLanes<float> load(const BFloat16Pair& pair) {
  return {std::bit_cast<float>(pair.bits << 16), std::bit_cast<float>(pair.bits & 0xFFFF0000u)};
}

// The upper half of the result is the nearest bfloat16, ties to even. The low half of a NaN that comes from bfloat16
// values is zero, so adding to it cannot carry: NaN stays NaN without a test.
LAPE_INLINE uint32_t round_to_upper_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return bits + 0x7FFFu + ((bits >> 16) & 1u);
}

template <class Scalar>
LAPE_INLINE void store(const OneLane<Wide<Scalar>>& values, Scalar& target) {
  target = static_cast<Scalar>(values.first);
}

LAPE_INLINE void store(const OneLane<float>& values, BFloat16& target) {
  target.x = static_cast<uint16_t>(round_to_upper_half(values.first) >> 16);
}

LAPE_INLINE void store(const TwoLanes<float>& values, BFloat16Pair& target) {
  target.bits = (round_to_upper_half(values.first) >> 16) | (round_to_upper_half(values.second) & 0xFFFF0000u);
}

// Calls body.operator()<Unit>(first column, number of units) until the row is done.
template <class Scalar, class Body>
LAPE_INLINE void for_units(int64_t width, const Body& body) {
  if constexpr (std::is_same_v<Scalar, BFloat16>) {
    body.template operator()<BFloat16Pair>(0, width / 2);
    body.template operator()<BFloat16>(width / 2 * 2, width % 2);
  } else {
    body.template operator()<Scalar>(0, width);
  }
}

template <class Scalar>
LAPE_INLINE bool is_positive(Scalar value) {
  return value > 0;
}

// On the bits: above zero, and not above infinity, where the NaNs are.
LAPE_INLINE bool is_positive(BFloat16 value) {
  const auto bits = static_cast<int16_t>(value.x);
  return (bits > 0) & (bits <= 0x7F80);
}

LAPE_INLINE bool is_positive(Half value) {
  const auto bits = static_cast<int16_t>(value.x);
  return (bits > 0) & (bits <= 0x7C00);
}

}  // namespace lape_fast
