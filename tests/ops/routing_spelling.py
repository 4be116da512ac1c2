"""The router spelled a second time, and the modes its tests go through."""

import itertools
import warnings
from typing import Any

import torch
from torch import Tensor

from deepfusion_kernels import Routing, moe_route

NAN, INF = float("nan"), float("inf")
GROUPS = ({}, {"group_score": "max"}, {"group_score": "top2_sum"})
MODES = [
    {"score": score, "order": order, "renormalize": renormalize, "scale": 2.5, **group}
    for score, order, renormalize, group in itertools.product(
        ("softmax", "sigmoid"), ("score_then_topk", "topk_then_score"), (False, True), GROUPS
    )
]
LOSSES = {"balance_loss_weight": 0.7, "z_loss_weight": 0.3}


def name_of(mode: dict[str, Any]) -> str:
    parts = (mode["score"], mode["order"][:4], "renorm" if mode["renormalize"] else "plain")
    return "-".join((*parts, mode.get("group_score", "whole")))


def spelled(
    z: Tensor, K: int, mode: dict[str, Any], bias: Tensor | None, ids: Tensor | None = None
):
    """The router from torch's own functions and a sort of Python's: weights, ids, aux_loss."""
    T, E = z.shape
    z = z.float() if z.dtype != torch.float64 else z
    score = torch.sigmoid if mode["score"] == "sigmoid" else lambda x: x.softmax(-1)
    s = score(z)
    if ids is None:
        c = (s if mode["order"] == "score_then_topk" else z) + (0 if bias is None else bias)
        ids = oracle(c.detach(), K, mode)
    first = mode["order"] == "score_then_topk"
    u = s.gather(-1, ids) if first else score(z.gather(-1, ids))
    w = mode["scale"] * (u / u.sum(-1, keepdim=True) if mode["renormalize"] else u)
    f = torch.nn.functional.one_hot(ids, E).sum((0, 1)).to(z.dtype) / T
    P = (s / s.sum(-1, keepdim=True)).mean(0)
    aux = mode.get("balance_loss_weight", 0) * E * (f * P).sum()
    return w, ids, aux + mode.get("z_loss_weight", 0) * z.logsumexp(-1).square().mean()


def oracle(c: Tensor, K: int, mode: dict[str, Any]) -> Tensor:
    """The K largest, lowest index first among equals; only in the best groups."""
    E = c.shape[1]
    chosen = []
    for row in c.tolist():
        allowed = range(E)
        if "num_groups" in mode:
            width = E // mode["num_groups"]
            groups = [sorted(row[g : g + width], reverse=True) for g in range(0, E, width)]
            worth = [sum(g[:2]) if mode["group_score"] == "top2_sum" else g[0] for g in groups]
            best = sorted(range(len(groups)), key=lambda g: (-worth[g], g))[: mode["top_groups"]]
            allowed = [e for e in range(E) if e // width in best]
        chosen.append(sorted(allowed, key=lambda e: (-row[e], e))[:K])
    return torch.tensor(chosen).reshape(len(chosen), K)


def with_groups(mode: dict[str, Any], num_groups: int, top_groups: int) -> dict[str, Any]:
    if "group_score" not in mode:
        return mode
    return {**mode, "num_groups": num_groups, "top_groups": top_groups}


def route(z: Tensor, K: int, mode: dict[str, Any], bias: Tensor | None, backend: str) -> Routing:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return moe_route(z, K, selection_bias=bias, backend=backend, **mode)
