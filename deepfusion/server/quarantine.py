"""Uploads scored on public text by domain, before any of them is averaged or teaches.

nll_nd        = mean over tokens of domain d of -ln P_n(x_t | x_<t)
entropy_nd    = mean over tokens of the entropy of P_n
agreement_nd  = mean over tokens of the share of other uploads with the same most likely token

past_nd   if   nll_nd > median over n of nll_nd + bound
out_n     if   past_nd in every domain        else it stays, and does not teach where it is past

An honest minority looks like an outlier everywhere but in its own domain: there it stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from ..data.batches import Packed
from .evaluate import next_token_logits

LEAST_UPLOADS = 3  # of two, nobody can tell which one is wrong

Scores = dict[str, dict[str, "ProbeScore"]]


@dataclass(frozen=True)
class ProbeScore:
    """One upload on one domain's public text: nats per token, nats, a share."""

    nll: float
    entropy: float
    agreement: float

    @property
    def perplexity(self) -> float:
        """e^nll; infinite where that is no float."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


@dataclass(frozen=True)
class Quarantine:
    """medians [nats] by domain; past: device -> its domains over the bound; out: past in all.

    judged: whether there were uploads enough for a median.
    """

    medians: Mapping[str, float]
    past: Mapping[str, tuple[str, ...]]
    out: tuple[str, ...]
    judged: bool


def probe_text(sequences: Packed, per_domain: int) -> dict[str, Packed]:
    """The first sequences of every domain that the public text has."""
    found = {}
    for index, domain in enumerate(sequences.domains):
        rows = (sequences.domain == index).nonzero().flatten()[:per_domain]
        if len(rows):
            found[domain] = sequences.take(rows)
    return found


@torch.no_grad()
def probe(
    uploads: Iterable[tuple[str, Callable[[], nn.Module]]],
    text: Mapping[str, Packed],
    batch_size: int,
) -> Scores:
    """Device -> domain -> score; one model is in memory at a time, beside its most likely tokens.

    A model whose predictions are not finite has infinite nll.
    """
    sums: dict[str, dict[str, tuple[float, float]]] = {}
    tops: dict[str, list[Tensor]] = {domain: [] for domain in text}
    for device, load in uploads:
        model = load().eval()
        sums[device] = {}
        for domain, packed in text.items():
            nll, entropy, top_T = _read(model, packed.ids, batch_size)
            sums[device][domain] = nll, entropy
            tops[domain].append(top_T)
    shares = {domain: agreement(torch.stack(rows)) for domain, rows in tops.items() if rows}
    return {
        device: {domain: ProbeScore(*own[domain], float(shares[domain][row])) for domain in shares}
        for row, (device, own) in enumerate(sums.items())
    }


def _read(model: nn.Module, ids_SL: Tensor, batch_size: int) -> tuple[float, float, Tensor]:
    """Mean nll, mean entropy, most likely tokens [T] int32."""
    nll = entropy = 0.0
    tops = []
    for ids_BL in torch.split(ids_SL, batch_size):
        for logits_TV, labels_T in next_token_logits(model, ids_BL):
            logp_TV = logits_TV.log_softmax(dim=-1)
            nll -= float(logp_TV.gather(1, labels_T[:, None]).double().sum())
            entropy -= float((logp_TV.exp() * logp_TV).sum(dim=-1).double().sum())
            tops.append(logits_TV.argmax(dim=-1).int())
    count = ids_SL[:, 1:].numel()
    means = [one / count if math.isfinite(one) else math.inf for one in (nll, entropy)]
    return means[0], means[1], torch.cat(tops)


def agreement(top_NT: Tensor) -> Tensor:
    """Mean share of the other rows with the same token, [N]; a lone row agrees with nobody: 0."""
    num_uploads, num_tokens = top_NT.shape
    if num_uploads == 1:
        return torch.zeros(1)
    alike_N = torch.zeros(num_uploads)
    for top_N in top_NT.unbind(dim=1):
        _, owner_N, counts = torch.unique(top_N, return_inverse=True, return_counts=True)
        alike_N += (counts[owner_N] - 1) / (num_uploads - 1)
    return alike_N / num_tokens


def judge(scores: Mapping[str, Mapping[str, ProbeScore]], bound: float) -> Quarantine:
    """Who is past the bound, by domain, and who is past it everywhere.

    With fewer than LEAST_UPLOADS uploads nobody is judged. Raises ValueError for a bound that is
    not positive.
    """
    if bound <= 0:
        raise ValueError(f"quarantine.bound must be > 0, got {bound}")
    domains: Sequence[str] = list(next(iter(scores.values()), {}))
    medians = {domain: median(one[domain].nll for one in scores.values()) for domain in domains}
    if len(scores) < LEAST_UPLOADS:
        return Quarantine(medians, {}, (), judged=False)
    past = {
        device: tuple(domain for domain in domains if own[domain].nll > medians[domain] + bound)
        for device, own in scores.items()
    }
    out = tuple(device for device, found in past.items() if len(found) == len(domains) > 0)
    return Quarantine(medians, {d: found for d, found in past.items() if found}, out, judged=True)


def keep_from_teaching(
    nearness_SK: Tensor,
    sequences: Packed,
    members: Sequence[Sequence[str]],
    past: Mapping[str, Sequence[str]],
) -> Tensor:
    """Nearness with -1 where every member of a cluster is past the bound in a sequence's domain.

    members: the devices of each cluster. -1 is below every threshold and every honest nearness.
    """
    barred_DK = torch.tensor(
        [
            [all(domain in past.get(device, ()) for device in inside) for inside in members]
            for domain in sequences.domains
        ]
    )
    return nearness_SK.masked_fill(barred_DK[sequences.domain], -1.0)
