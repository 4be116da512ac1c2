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


def _times(weights, rows, ids):
    """weights[e] row of every slot with an expert e, zeros for the others: [T, K, *]."""
    out = rows.new_zeros(*ids.shape, weights.shape[1])
    for expert, weight in enumerate(weights):
        out[ids == expert] = rows[ids == expert] @ weight.T
    return out


def _summed(left, right, ids, like):
    """sum of left right^T over each expert's slots."""
    out = torch.zeros_like(like)
    for expert in range(len(like)):
        out[expert] = left[ids == expert].T @ right[ids == expert]
    return out


def bounds(inputs, dout, activation, dtype):
    """The largest error of the output and of each gradient, by name; inputs in float64."""
    e = UNIT[dtype]
    W1, W2 = (inputs[name].detach() for name in ("gate_up_proj", "down_proj"))
    ids = inputs["experts"]
    is_real = ((ids >= 0) & (ids < len(W1)))[..., None]
    w = torch.where(is_real, inputs["weights"].detach()[..., None], 0)
    x, dout = (
        each.detach()[:, None].expand(-1, ids.shape[1], -1) for each in (inputs["hidden"], dout)
    )

    gate, up = _times(W1, x, ids).chunk(2, -1)
    gate_off, up_off = e * gate.abs(), e * up.abs()
    value, slope = activate(gate, activation)
    a = value * up
    a_of_h = (slope * up).abs() * gate_off + value.abs() * up_off
    y_off = _times(W2.abs(), a_of_h + e * a.abs(), ids) + e * _times(W2, a, ids).abs()

    product = _times(W2.transpose(1, 2), dout, ids)
    da, da_off = w * product, e * (w * product).abs()
    dgate, dup = da * up * slope, da * value
    bend = _slope_of_slope(gate, activation)
    dgate_off = (up * slope).abs() * da_off + (da * slope).abs() * up_off
    dgate_off += (da * up * bend).abs() * gate_off + e * dgate.abs()
    dup_off = value.abs() * da_off + (da * slope).abs() * gate_off + e * dup.abs()
    dh, dh_off = torch.cat([dgate, dup], -1), torch.cat([dgate_off, dup_off], -1)
    back = W1.transpose(1, 2)
    rows_off = _times(back.abs(), dh_off, ids) + e * _times(back, dh, ids).abs()
    scaled_off = w.abs() * a_of_h + e * (w * a).abs()
    dw_off = (e * product * a).abs() + product.abs() * a_of_h
    return {
        "out": (w.abs() * y_off).sum(1),
        "hidden": rows_off.sum(1),
        "gate_up_proj": _summed(dh_off, x.abs(), ids, W1),
        "down_proj": _summed(dout.abs(), scaled_off, ids, W2),
        "weights": dw_off.sum(-1),
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
