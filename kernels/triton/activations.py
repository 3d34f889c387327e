"""The activations and their slopes, shared by the kernels: act(gate) = gate * share(gate).

The share is what the activation lets through of its input: a sigmoid for SiLU and for tanh-GELU, the normal
distribution function for GELU, zero or one for ReLU. The slope follows: share + gate * share'.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from lape_fast.ops import ACTIVATIONS

SILU = tl.constexpr(ACTIVATIONS.index("silu"))
GELU = tl.constexpr(ACTIVATIONS.index("gelu"))
GELU_TANH = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))
RELU = tl.constexpr(ACTIVATIONS.index("relu"))

SQRT_HALF = tl.constexpr(math.sqrt(0.5))
NORMAL_DENSITY_AT_ZERO = tl.constexpr(1 / math.sqrt(2 * math.pi))
# GELU's tanh form is gate * (1 + tanh(y)) / 2 with y = sqrt(2 / pi) * (gate + 0.044715 * gate^3), which is
# gate * sigmoid(z) with z = 2 y: no tanh is needed, and the left tail keeps its digits.
TANH_LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
TANH_CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)


@triton.jit
def widen(values):
    """The dtype to compute in: fp64 stays, everything else becomes fp32."""
    if values.dtype == tl.float64:
        return values
    else:
        return values.to(tl.float32)


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """act(gate) for a widened gate. Where an exponential overflows, the result is 0 and not NaN."""
    if ACTIVATION == SILU:
        activated = gate / (1 + tl.exp(-gate))
    elif ACTIVATION == GELU:
        activated = gate * (0.5 + 0.5 * tl.math.erf(gate * SQRT_HALF))
    elif ACTIVATION == GELU_TANH:
        activated = gate / (1 + tl.exp(-gate * (TANH_LINEAR + TANH_CUBIC * gate * gate)))
    elif ACTIVATION == RELU:
        # Not maximum(gate, 0): a NaN must pass.
        activated = tl.where(gate < 0, 0.0, gate)
    return activated


@triton.jit
def activate_with_slope(gate, ACTIVATION: tl.constexpr):
    """act(gate) and d act(gate) / d gate for a widened gate."""
    if ACTIVATION == SILU:
        share = 1 / (1 + tl.exp(-gate))
        activated = gate * share
        slope = share + activated * (1 - share)
    elif ACTIVATION == GELU:
        share = 0.5 + 0.5 * tl.math.erf(gate * SQRT_HALF)
        activated = gate * share
        slope = share + gate * (NORMAL_DENSITY_AT_ZERO * tl.exp(-0.5 * gate * gate))
    elif ACTIVATION == GELU_TANH:
        # With e = exp(-|z|), share' = z' e / (1 + e)^2: written as share * (1 - share) it would lose its digits where
        # the share is near one, and z' is large there.
        z = gate * (TANH_LINEAR + TANH_CUBIC * gate * gate)
        decay = tl.exp(-tl.abs(z))
        share = tl.where(z > 0, 1.0, decay) / (1 + decay)
        activated = gate * share
        slope = share + gate * (decay / ((1 + decay) * (1 + decay))) * (TANH_LINEAR + 3 * TANH_CUBIC * gate * gate)
    elif ACTIVATION == RELU:
        activated = tl.where(gate < 0, 0.0, gate)
        slope = tl.where(gate > 0, 1.0, 0.0)
    return activated, slope
