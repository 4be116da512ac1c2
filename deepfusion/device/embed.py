"""What a device says about the kind of its text: one unit vector of r numbers.

z_d = l2(Enc(d)) of every document,   e = l2(mean_d z_d)
"""

from collections.abc import Sequence

from torch import Tensor

from ..data.documents import Document
from ..data.encoding import Encoder


def embed(documents: Sequence[Document], encode: Encoder) -> Tensor:
    """The embedding of a shard, [r] float32 of length 1; documents of equal weight.

    Raises ValueError for a shard without a document or without a word.
    """
    if not documents:
        raise ValueError("embed: documents must be at least one, got none")
    mean = encode([document.text for document in documents]).double().mean(dim=0)
    length = float(mean.norm())
    if not length > 0:
        raise ValueError(f"embed: {len(documents)} documents must hold words, got none in any")
    return (mean / length).float()
