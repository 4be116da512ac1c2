"""What the roundings of stored half-precision values may cost moe_experts, counted one by one.

A stored value z is off by at most e |z|, e = 2^-8 for bfloat16 and 2^-11 for float16; an error of z
reaches a result as itself times |d result / d z|, and errors add up as their magnitudes do. Stored
by one backend or another: h, a, y; dA', dh, a', the rows of dx; each result.
"""

import torch

from deepfusion_kernels.ops.moe_experts.reference import activate
from tests.budget import UNIT


def _slope_of_slope(gate, activation):
    gate = gate.detach().requires_grad_()
    return torch.autograd.grad(activate(gate, activation)[1].sum(), gate)[0]


def bounds(inputs, dout, activation, dtype):
    """The largest error of the output and of each gradient, by name; inputs in float64."""
    e = UNIT[dtype]
    x, w = (inputs[name].detach() for name in ("hidden", "weights"))
    gate_up, down = (inputs[name].detach() for name in ("gate_up_proj", "down_proj"))
    ids = inputs["experts"].long()
    E = gate_up.shape[0]
    is_real = (ids >= 0) & (ids < E)
    W1, W2 = (each[ids.where(is_real, 0)] for each in (gate_up, down))
    w = torch.where(is_real, w, 0)[..., None]
    hot = torch.nn.functional.one_hot(ids.where(is_real, E), E + 1)[..., :E].double()

    h = torch.einsum("tkfd,td->tkf", W1, x)
    gate, up = h.chunk(2, -1)
    gate_off, up_off = e * gate.abs(), e * up.abs()
    value, slope = activate(gate, activation)
    a = value * up
    a_of_h = (slope * up).abs() * gate_off + value.abs() * up_off
    y = torch.einsum("tkdf,tkf->tkd", W2, a)
    y_off = torch.einsum("tkdf,tkf->tkd", W2.abs(), a_of_h + e * a.abs()) + e * y.abs()

    product = torch.einsum("tkdf,td->tkf", W2, dout)
    da, da_off = w * product, e * (w * product).abs()
    dgate, dup = da * up * slope, da * value
    bend = _slope_of_slope(gate, activation)
    dgate_off = (up * slope).abs() * da_off + (da * slope).abs() * up_off
    dgate_off += (da * up * bend).abs() * gate_off + e * dgate.abs()
    dup_off = value.abs() * da_off + (da * slope).abs() * gate_off + e * dup.abs()
    dh, dh_off = torch.cat([dgate, dup], -1), torch.cat([dgate_off, dup_off], -1)
    rows = torch.einsum("tkfd,tkf->tkd", W1, dh)
    rows_off = torch.einsum("tkfd,tkf->tkd", W1.abs(), dh_off) + e * rows.abs()
    scaled_off = w.abs() * a_of_h + e * (w * a).abs()
    dw_off = (e * product * a).abs() + product.abs() * a_of_h
    return {
        "out": (w.abs() * y_off).sum(1),
        "hidden": (rows_off * is_real[..., None]).sum(1),
        "gate_up_proj": torch.einsum("tke,tkf,td->efd", hot, dh_off, x.abs()),
        "down_proj": torch.einsum("tke,td,tkf->edf", hot, dout.abs(), scaled_off),
        "weights": torch.where(is_real, dw_off.sum(-1), 0),
    }


def assert_within_roundings(ours, truth, off, what):
    """|ours - truth| <= counted roundings + the result's own + float32's sums, element by element.

    Products of two roundings are left out of the count; 1 % more than covers them.
    """
    allowed = 1.01 * (off + UNIT[ours.dtype] * truth.abs())
    allowed += UNIT[torch.float32] * truth.abs().max()
    excess = (ours.double() - truth).abs() - allowed
    worst = int(excess.nan_to_num(nan=torch.inf).argmax())
    assert excess.flatten()[worst] <= 0, (
        f"{what}[{worst}]: ours {ours.flatten()[worst]}, truth {truth.flatten()[worst]}, "
        f"allowed {allowed.flatten()[worst]}"
    )
