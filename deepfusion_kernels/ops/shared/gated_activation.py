"""Triton device functions of a gated MLP: act(g) and act'(g) of the gate half, in float32.

silu       g s                        s = 1 / (1 + e^-g)    slope  s (1 + g (1 - s))
gelu       g Phi(g)                                         slope  Phi(g) + g phi(g)
gelu_tanh  g s,  s = 1 / (1 + e^-2z)  z = c (g + 0.044715 g^3)
           slope  s + 2 g s (1 - s) c (1 + 3 * 0.044715 g^2)      1 + tanh z = 2 s
"""

from __future__ import annotations

from ..._triton import tl, triton

# a kernel's ACTIVATION is the place in this list
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_1_OVER_2PI = tl.constexpr(0.3989422804014327)
ROOT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """act(g)."""
    if ACTIVATION == 0:
        return g * tl.sigmoid(g)
    elif ACTIVATION == 1:
        return g * 0.5 * (1.0 + tl.erf(g * ROOT_HALF))
    else:
        return g * tl.sigmoid(2.0 * ROOT_2_OVER_PI * (g + CUBIC * g * g * g))


@triton.jit
def activate_with_slope(g, ACTIVATION: tl.constexpr):
    """act(g) and act'(g)."""
    if ACTIVATION == 0:
        s = tl.sigmoid(g)
        return g * s, s * (1.0 + g * (1.0 - s))
    elif ACTIVATION == 1:
        below = 0.5 * (1.0 + tl.erf(g * ROOT_HALF))
        return g * below, below + g * (ROOT_1_OVER_2PI * tl.exp(-0.5 * g * g))
    else:
        s = tl.sigmoid(2.0 * ROOT_2_OVER_PI * (g + CUBIC * g * g * g))
        slope = ROOT_2_OVER_PI * (1.0 + 3.0 * CUBIC * g * g)
        return g * s, s + 2.0 * g * s * (1.0 - s) * slope
