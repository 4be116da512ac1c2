"""A teacher without a model: the likeliest tokens of every public position, as devices sent them.

    p_t(v) = sum_n w_n p_nt(v)        over the union of the devices' tokens; the k largest are kept

A token that a device did not name counts as 0 there: every kept probability is a lower bound of the
true mean, and what is missing stays in the bucket of topk_kl_distillation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from deepfusion_kernels import topk_kl_distillation

from ..messages import DeviceUpdate
from ..wire import kept

# fp16 ends at -65504; what is less likely than e^-1e4 is not told apart
LEAST_LOGPROB = -1e4


class KeptText:
    """ids, logprobs [S, L - 1, k]: what follows each position of S public sequences."""

    def __init__(self, answers: Mapping[str, Tensor], ids_SL: Tensor) -> None:
        num_sequences, length = ids_SL.shape
        shape = (num_sequences, length - 1, -1)
        self.text = ids_SL
        self.ids = answers[kept.IDS].view(shape)
        self.logprobs = answers[kept.LOGPROBS].view(shape)

    def token_sum(
        self,
        rows_B: Tensor,
        hidden_BLD: Tensor,
        head_VD: Tensor,
        beta: float,
        backend: str | None,
    ) -> Tensor:
        """Sum over next tokens of CE + beta KL(kept and rest || student), of sequences rows [B]."""
        logits_BLV = F.linear(hidden_BLD[:, :-1], head_VD)
        device = logits_BLV.device
        loss: Tensor = topk_kl_distillation(
            logits_BLV,
            self.ids[rows_B].int().to(device),
            self.logprobs[rows_B].float().to(device),
            self.text[rows_B, 1:].to(device),
            tail="bucket",
            kd_weight=beta,
            ce_weight=1.0,
            reduction="sum",
            backend=backend,
        )
        return loss

    def mean_probability(self, rows_S: Tensor) -> Tensor:
        """Mean over t of P(x_t | x_<t) of each sequence, [S] float32; 0 for a token not kept."""
        labels_SL = self.text[rows_S, 1:]
        hit_SLK = self.ids[rows_S] == labels_SL[..., None]
        p_SL = torch.where(hit_SLK, self.logprobs[rows_S].float().exp(), 0.0).sum(dim=-1)
        return p_SL.mean(dim=1)


def mean_kept(
    devices: Sequence[DeviceUpdate],
    load_state: Callable[[DeviceUpdate], Mapping[str, Tensor]],
    weights: str = "uniform",
) -> dict[str, Tensor]:
    """The mean distribution of some devices: ids [T, k] and logprobs [T, k] fp16, largest first.

    load_state gives an upload's blocks; one block of every device is in memory at a time.
    Raises ValueError for weights that nobody knows.
    """
    if weights not in ("uniform", "tokens"):
        raise ValueError(f"cluster.weights must be 'uniform' or 'tokens', got {weights!r}")
    counts = [device.tokens if weights == "tokens" else 1 for device in devices]
    shares = [count / sum(counts) for count in counts]
    sent = [load_state(device) for device in devices]
    found: dict[str, list[Tensor]] = {kept.IDS: [], kept.LOGPROBS: []}
    content = devices[0].manifest.content
    for name, _, _ in kept.blocks(content.rows):
        ids = [one[f"{name}.{kept.IDS}"] for one in sent]
        logprobs = [one[f"{name}.{kept.LOGPROBS}"] for one in sent]
        mean = (ids[0], logprobs[0]) if len(sent) == 1 else mean_of(ids, logprobs, shares)
        found[kept.IDS].append(mean[0])
        found[kept.LOGPROBS].append(mean[1])
    return {name: torch.cat(parts) for name, parts in found.items()}


def mean_of(
    ids: Sequence[Tensor], logprobs: Sequence[Tensor], shares: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of the weighted mean of some distributions, each [T, k]."""
    k = ids[0].shape[1]
    weighted = [share * one.double().exp() for one, share in zip(logprobs, shares, strict=True)]
    # equal ids become neighbours, and each run of them one sum
    sorted_TM, order_TM = torch.cat(list(ids), dim=1).long().sort(dim=1)
    p_TM = torch.cat(weighted, dim=1).gather(1, order_TM)
    begins_TM = F.pad((sorted_TM[:, 1:] != sorted_TM[:, :-1]).long(), (1, 0))
    run_TM = begins_TM.cumsum(dim=1)
    sums_TM = torch.zeros_like(p_TM).scatter_add(1, run_TM, p_TM)
    names_TM = torch.zeros_like(sorted_TM).scatter(1, run_TM, sorted_TM)
    top = sums_TM.topk(k, dim=1)
    ids_TK = names_TM.gather(1, top.indices).to(ids[0].dtype)
    return ids_TK, kept.half_down(top.values.log().clamp_min(LEAST_LOGPROB))
