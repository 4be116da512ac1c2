"""Router of a mixture of experts, in plain torch.

    s = softmax(z) or sigmoid(z);  c = s + bias, or z + bias if the choice comes first
    groups: c = -inf outside the top_groups groups of largest max (or sum of two largest)
    sel = the K largest c, lowest index first among equals
    u = s[sel], or the score of z[sel] alone if the choice comes first
    w = scale u / den,  den = sum u if renormalised (sigmoid: + 1e-20) else 1
    aux = balance E sum_e f_e P_e + z_weight mean_t lse_t^2,  f = counts / T (a constant)

A NaN sorts as -inf and makes all K weights NaN, as does a row without a logit above -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .options import Options

TINY = 1e-20


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).contiguous()


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the largest, descending; torch.topk promises no order among equals."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _choose(z_TE: Tensor, scores_TE: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    lowest = -torch.inf
    choice_TE = z_TE if options.chooses_by_logit(bias) else scores_TE
    if bias is not None:
        choice_TE = choice_TE + bias.to(z_TE.dtype)
    is_void_T1 = (z_TE == lowest).all(-1, keepdim=True)
    choice_TE = choice_TE.masked_fill(choice_TE.isnan() | is_void_T1, lowest)
    if options.num_groups:
        T, E = z_TE.shape
        grouped = choice_TE.view(T, options.num_groups, E // options.num_groups)
        best = grouped.sort(dim=-1, descending=True).values
        value_TG = best[..., :2].sum(-1) if options.is_top2_sum else best[..., 0]
        value_TG = value_TG.masked_fill(value_TG.isnan(), lowest)
        kept_TG = torch.zeros_like(value_TG, dtype=torch.bool)
        kept_TG = kept_TG.scatter(-1, _largest(value_TG, options.top_groups), True)
        choice_TE = grouped.masked_fill(~kept_TG[..., None], lowest).view(T, E)
    return _largest(choice_TE, options.top_k)


def forward(logits: Tensor, bias: Tensor | None, options: Options) -> tuple[Tensor, ...]:
    """weights, experts [T, K], counts [E], aux_loss []; for the backward picked, lse, mass."""
    z_TE = _wide(logits)
    T, E = z_TE.shape
    scores_TE = z_TE.sigmoid() if options.is_sigmoid else z_TE.softmax(-1)
    experts_TK = _choose(z_TE, scores_TE, bias, options)
    if options.is_selected_softmax:
        weights_TK = z_TE.gather(-1, experts_TK).softmax(-1)
    else:
        weights_TK = scores_TE.gather(-1, experts_TK)
    picked_TK = weights_TK.clone() if options.is_sigmoid else z_TE.new_empty(0)
    if options.is_sigmoid and options.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + TINY)
    is_broken_T1 = z_TE.isnan().any(-1, keepdim=True) | (z_TE == -torch.inf).all(-1, keepdim=True)
    weights_TK = (options.scale * weights_TK).masked_fill(is_broken_T1, torch.nan)

    flat_R = experts_TK.reshape(-1)
    counts_E = torch.zeros(E, dtype=torch.int64, device=logits.device)
    counts_E = counts_E.scatter_add(0, flat_R, torch.ones_like(flat_R))
    top_T1 = z_TE.amax(-1, keepdim=True)
    lse_T = ((z_TE - top_T1).exp().sum(-1, keepdim=True).log() + top_T1)[:, 0]
    mass_T = scores_TE.sum(-1)
    aux_loss = z_TE.new_zeros(())
    if options.balance != 0 and T > 0:
        share_E = (scores_TE / mass_T[:, None]).mean(0) if options.is_sigmoid else scores_TE.mean(0)
        aux_loss = aux_loss + options.balance * E * (counts_E.to(share_E.dtype) / T * share_E).sum()
    if options.z != 0 and T > 0:
        aux_loss = aux_loss + options.z * lse_T.square().mean()
    lse_T = lse_T if options.needs_lse else z_TE.new_empty(0)
    mass_T = mass_T if options.needs_mass else z_TE.new_empty(0)
    return weights_TK, experts_TK.contiguous(), counts_E, aux_loss, picked_TK, lse_T, mass_T


def backward(
    dweights_TK: Tensor,
    daux: Tensor,
    logits: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    counts_E: Tensor,
    picked_TK: Tensor,
    lse_T: Tensor,
    mass_T: Tensor,
    options: Options,
) -> Tensor:
    """dlogits [T, E], weights and losses together; logits are empty where nothing reads them."""
    T, E = weights_TK.shape[0], counts_E.shape[0]
    dz_TE = weights_TK.new_zeros((T, E))
    if options.is_sigmoid:
        slope_TK = picked_TK * (1 - picked_TK)
        if options.renormalize:
            den_T1 = picked_TK.sum(-1, keepdim=True) + TINY
            mean_T1 = (picked_TK / den_T1 * dweights_TK).sum(-1, keepdim=True)
            dsel_TK = options.scale * slope_TK / den_T1 * (dweights_TK - mean_T1)
        else:
            dsel_TK = options.scale * slope_TK * dweights_TK
        # a broken row's weights are NaN whatever its scores are
        dsel_TK = dsel_TK.masked_fill(weights_TK.isnan(), torch.nan)
    else:
        if options.is_selected_softmax:
            # divided before the sum: of one selected logit the gradient is then exactly 0
            mean_T1 = (weights_TK / options.scale * dweights_TK).sum(-1, keepdim=True)
            dsel_TK = weights_TK * (dweights_TK - mean_T1)
        else:
            dot_T1 = (dweights_TK * weights_TK).sum(-1, keepdim=True)
            dsel_TK = weights_TK * dweights_TK
            dz_TE = dz_TE - (_wide(logits) - lse_T[:, None]).exp() * dot_T1
    dz_TE = dz_TE.scatter_add(-1, experts_TK, dsel_TK)
    if options.balance != 0:
        pull_E = daux * options.balance * E / max(T, 1) ** 2 * counts_E
        if options.is_sigmoid:
            s_TE = _wide(logits).sigmoid()
            share_TE = s_TE / mass_T[:, None]
            mean_T1 = (pull_E * share_TE).sum(-1, keepdim=True)
            dz_TE = dz_TE + share_TE * (1 - s_TE) * (pull_E - mean_T1)
        else:
            p_TE = (_wide(logits) - lse_T[:, None]).exp()
            dz_TE = dz_TE + p_TE * (pull_E - (pull_E * p_TE).sum(-1, keepdim=True))
    if options.z != 0:
        p_TE = (_wide(logits) - lse_T[:, None]).exp()
        dz_TE = dz_TE + p_TE * (2 * daux * options.z / max(T, 1) * lse_T)[:, None]
    return dz_TE.to(logits.dtype)
