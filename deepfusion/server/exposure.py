"""How much a model tells of a secret: its rank among texts that it could have been.

    exposure = log2 |R| - log2 rank        rank 1: likelier than all others; R: secret and others

Carlini et al., arXiv 1802.08232, with a sample of candidates in place of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import build


@torch.no_grad()
def exposure(
    model: nn.Module, tokenizer: Any, secret: str, others: Sequence[str], batch_size: int = 64
) -> float:
    """Bits, from 0 to log2(1 + others); of equally likely texts the secret counts as the last.

    Raises ValueError where there is nothing to compare with.
    """
    if not others or secret in others:
        raise ValueError("exposure: others must be different texts, at least one")
    was_training = model.training
    model.eval()
    texts = [secret, *others]
    parts = [texts[begin : begin + batch_size] for begin in range(0, len(texts), batch_size)]
    loglik_N = torch.cat([_log_likelihood(model, tokenizer, part) for part in parts])
    model.train(was_training)
    rank = 1 + int((loglik_N[1:] >= loglik_N[0]).sum())
    return math.log2(len(texts)) - math.log2(rank)


@torch.no_grad()
def _log_likelihood(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """ln P of each text after an end-of-text token, [N] float64 on the CPU."""
    eos = tokenizer.eos_token_id
    rows = [[eos, *row] for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    longest = max(map(len, rows))
    # right padding is invisible to a causal model
    ids_NL = torch.tensor([row + [eos] * (longest - len(row)) for row in rows])
    lengths_N1 = torch.tensor([[len(row)] for row in rows])
    weight_VD = build.head_weight(model)
    ids_NL = ids_NL.to(weight_VD.device)
    hidden_NLD = build.backbone(model)(ids_NL, use_cache=False).last_hidden_state
    logprobs_NLV = F.linear(hidden_NLD[:, :-1], weight_VD).float().log_softmax(dim=-1)
    chosen_NL = logprobs_NLV.gather(2, ids_NL[:, 1:, None])[..., 0].double().cpu()
    is_text_NL = torch.arange(1, longest)[None] < lengths_N1
    return torch.where(is_text_NL, chosen_NL, 0.0).sum(dim=1)
