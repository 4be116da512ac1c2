"""What a router does, as plain numbers, once the door has checked them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """In the order of the ops' lists: sizes, flags, factors. num_groups 0: no groups."""

    top_k: int
    num_groups: int
    top_groups: int
    is_sigmoid: bool
    is_topk_first: bool
    renormalize: bool
    is_top2_sum: bool
    scale: float
    balance: float
    z: float

    @property
    def sizes(self) -> list[int]:
        return list(self[:3])

    @property
    def flags(self) -> list[bool]:
        return list(self[3:7])

    @property
    def factors(self) -> list[float]:
        return list(self[7:])

    @property
    def is_selected_softmax(self) -> bool:
        """Renormalised softmax scores are the softmax of the selected logits."""
        return not self.is_sigmoid and (self.renormalize or self.is_topk_first)

    def chooses_by_logit(self, bias: Tensor | None) -> bool:
        """Scores grow with logits: comparing logits gives the same choice, free of rounding."""
        return self.is_topk_first or (bias is None and not self.is_top2_sum)

    @property
    def needs_lse(self) -> bool:
        """Whether the backward needs the softmax over all experts."""
        balanced = self.balance != 0 and not self.is_sigmoid
        return balanced or self.z != 0 or not (self.is_sigmoid or self.is_selected_softmax)

    @property
    def needs_mass(self) -> bool:
        """Whether the backward needs the sum of a row's sigmoid scores."""
        return self.balance != 0 and self.is_sigmoid


def unpack(sizes: Sequence[int], flags: Sequence[bool], factors: Sequence[float]) -> Options:
    """The options from the three lists that a schema can carry."""
    top_k, num_groups, top_groups = sizes
    is_sigmoid, is_topk_first, renormalize, is_top2_sum = flags
    counts = (top_k, num_groups, top_groups)
    return Options(*counts, is_sigmoid, is_topk_first, renormalize, is_top2_sum, *factors)
