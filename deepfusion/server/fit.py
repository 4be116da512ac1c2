"""How well every proxy predicts each public sequence: who knows what a text is about.

p_si = mean over t of P_i(x_t | x_<t)        fit_si = p_si - mean over i of p_si

A proxy whose devices hold a text's names expects them, whatever the kind of text: that is seen in
its predictions and not in the embeddings, which tell kinds apart. The mean of probabilities, not
of their logarithms: one confident error must not hide that the rest was expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data.batches import Packed
from .evaluate import next_token_logits
from .kept import KeptText
from .teaching import Teacher


@torch.no_grad()
def fit(
    proxies: Sequence[Teacher], sequences: Packed, batch_size: int, rows: Tensor | None = None
) -> Tensor:
    """fit [S, K] float32 in [-1, 1] of S sequences and K proxies; every row sums to 0.

    rows: the sequences that are asked about, all if None; the others' rows are 0: near to nobody.
    Raises ValueError where no proxy is given.
    """
    if not proxies:
        raise ValueError("fit: at least one proxy must be given, got none")
    rows = torch.arange(len(sequences)) if rows is None else rows
    ids_sL = sequences.ids[rows]
    mean_sK = torch.stack(
        [
            one.mean_probability(rows)
            if isinstance(one, KeptText)
            else _mean_probability(one, ids_sL, batch_size)
            for one in proxies
        ],
        dim=1,
    )
    fit_SK = mean_sK.new_zeros(len(sequences), len(proxies))
    fit_SK[rows] = mean_sK - mean_sK.mean(dim=1, keepdim=True)
    return fit_SK


def _mean_probability(proxy: nn.Module, ids_SL: Tensor, batch_size: int) -> Tensor:
    was_training = proxy.training
    proxy.eval()
    found = [
        logits_TV.softmax(dim=-1).gather(1, labels_T[:, None])
        for ids_BL in torch.split(ids_SL, batch_size)
        for logits_TV, labels_T in next_token_logits(proxy, ids_BL)
    ]
    proxy.train(was_training)
    return torch.cat(found).view(len(ids_SL), -1).mean(dim=1)
