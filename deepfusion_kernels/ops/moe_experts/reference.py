"""Grouped gated MLP in plain torch: every expert sees all tokens, those of others as zeros.

    h = W1 x = [g; u];  a = act(g) u;  y = W2 a;  out_t = sum_k w_tk y_tk

Backward, dO = dout_t:
    dA' = W2^T dO;  dw = <dA', a>;  da = w dA';  dh = [da u act'(g); da act(g)]
    dW2 += dO (w a)^T;  dW1 += dh x_t^T;  dx_t = sum_k W1^T dh
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..shared import moe_plan

ROOT_2_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def activate(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(gate) and act'(gate)."""
    if activation == "silu":
        sigmoid = gate.sigmoid()
        return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    if activation == "gelu":
        below = torch.special.ndtr(gate)
        density = torch.exp(-gate.square() / 2) / math.sqrt(2 * math.pi)
        return gate * below, below + gate * density
    inner = ROOT_2_OVER_PI * (gate + CUBIC * gate**3)
    slope = ROOT_2_OVER_PI * (1 + 3 * CUBIC * gate.square())
    tanh = inner.tanh()
    return gate * (1 + tanh) / 2, (1 + tanh) / 2 + gate * (1 - tanh.square()) * slope / 2


def _wide(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def forward(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [T, D]; then h [R, 2F] and the plan order [R], slots [T, K], offsets [E+1]."""
    E, F2, _ = gate_up_proj.shape
    T, K = experts.shape
    plan = moe_plan.plan(experts, E)
    x_TD, weights_TK = _wide(hidden, hidden), _wide(weights, hidden)
    out_TD = torch.zeros_like(x_TD)
    h_TKF = x_TD.new_zeros(T, K, F2)
    for expert in range(E):
        is_mine_TK = experts == expert
        # zeros in place of rows of others, not a zero weight: their NaN must not leak
        x_mine = torch.where(is_mine_TK.any(1, keepdim=True), x_TD, 0)
        h_TF = x_mine @ _wide(gate_up_proj[expert], hidden).T
        gate, up = h_TF.chunk(2, 1)
        weight_T1 = torch.where(is_mine_TK, weights_TK, 0).sum(1, keepdim=True)
        act = activate(gate, activation)[0] * up
        out_TD += weight_T1 * (act @ _wide(down_proj[expert], hidden).T)
        h_TKF = torch.where(is_mine_TK[:, :, None], h_TF[:, None], h_TKF)
    h_RF = h_TKF.flatten(0, 1)[plan.order.clamp(min=0)]
    h_RF = torch.where(plan.order[:, None] >= 0, h_RF, 0)
    return out_TD.to(hidden.dtype), h_RF.to(hidden.dtype), *plan


def backward(
    dout: Tensor,
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    experts: Tensor,
    weights: Tensor,
    h: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool, bool],
) -> list[Tensor]:
    """The wanted ones of dhidden, dgate_up_proj, ddown_proj, dweights; h is made anew."""
    del h, order, slots, offsets
    x_TD, dout_TD, weights_TK = (_wide(each, hidden) for each in (hidden, dout, weights))
    dx_TD = torch.zeros_like(x_TD)
    dgate_up, ddown = torch.empty_like(gate_up_proj), torch.empty_like(down_proj)
    dweights_TK = torch.zeros_like(weights_TK)
    for expert in range(gate_up_proj.shape[0]):
        is_mine_TK = experts == expert
        is_mine_T1 = is_mine_TK.any(1, keepdim=True)
        x_mine, dout_mine = torch.where(is_mine_T1, x_TD, 0), torch.where(is_mine_T1, dout_TD, 0)
        W1, W2 = _wide(gate_up_proj[expert], hidden), _wide(down_proj[expert], hidden)
        gate, up = (x_mine @ W1.T).chunk(2, 1)
        value, slope = activate(gate, activation)
        act = value * up
        weight_T1 = torch.where(is_mine_TK, weights_TK, 0).sum(1, keepdim=True)
        dact = dout_mine @ W2
        dot_T1 = (dact * act).sum(1, keepdim=True)
        dweights_TK = torch.where(is_mine_TK, dot_T1, dweights_TK)
        da = weight_T1 * dact
        dh = torch.cat([da * up * slope, da * value], 1)
        dx_TD += dh @ W1
        dgate_up[expert] = dh.T @ x_mine
        ddown[expert] = dout_mine.T @ (weight_T1 * act)
    grads = dx_TD.to(hidden.dtype), dgate_up, ddown, dweights_TK.to(weights.dtype)
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]
