"""What travels for each kind of upload, and what it is encoded against."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..messages import Content
from . import adapters, codecs, kept

KINDS = ("weights", "adapter", "logprobs")


def sent(content: Content, base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Name -> base of the tensors of an upload; `base`: the common start.

    weights: the start itself; adapter: zeros; logprobs: meta tensors. Raises ValueError for a kind
    that nobody knows, and where rank or top_k do not fit.
    """
    if content.kind == "adapter":
        return adapters.factors(base, content.rank)
    if content.kind == "logprobs":
        return kept.shapes(content)
    if content.kind != "weights":
        raise ValueError(f"content must be one of {', '.join(KINDS)}, got {content.kind[:64]!r}")
    return base


def codec_of(content: Content, codec: str) -> str:
    """The codec of an upload: `upload.codec`, which is for weights; log-probabilities go as they
    are."""
    return codecs.RAW if content.kind == "logprobs" else codec
