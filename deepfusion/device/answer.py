"""What a device's model says after every position of the public text: its likeliest tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from deepfusion_kernels import topk_logprobs

from ..messages import Content
from ..models import build
from ..wire import kept


class Answers(Mapping[str, Tensor]):
    """Blocks by name as `wire.kept` has them, each computed when it is asked for.

    text [S, L] int64; answers stand for positions 0 .. L - 2 of every sequence. Tokens beyond
    `content.vocabulary` (a padded head) are left out of the distribution.
    """

    def __init__(
        self,
        model: nn.Module,
        text: Tensor,
        content: Content,
        batch_size: int,
        backend: str | None = None,
    ) -> None:
        self.model = model.eval()
        self.text = text
        self.content = content
        self.batch_size = batch_size
        self.backend = backend
        self._names = list(kept.shapes(content))
        self._held: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._held:
            # a block's two tensors are asked for one after the other
            self._held = self._block(name.partition(".")[0])
        return self._held[name]

    @torch.no_grad()
    def _block(self, name: str) -> dict[str, Tensor]:
        first = int(name) * kept.BLOCK_ROWS
        last = min(first + kept.BLOCK_ROWS, self.content.rows)
        positions = self.text.shape[1] - 1
        begin = first // positions
        found = [self._answer(part) for part in self._batches(begin, -(-last // positions))]
        rows = slice(first - begin * positions, last - begin * positions)
        ids, logprobs = (torch.cat(parts)[rows] for parts in zip(*found, strict=True))
        return {
            f"{name}.{kept.IDS}": ids.to(kept.id_dtype(self.content.vocabulary)),
            f"{name}.{kept.LOGPROBS}": kept.half_down(logprobs),
        }

    def _batches(self, begin: int, end: int) -> tuple[Tensor, ...]:
        return torch.split(self.text[begin:end], self.batch_size)

    def _answer(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [B (L - 1), k] on the CPU."""
        head_VD = build.head_weight(self.model)[: self.content.vocabulary]
        backbone = build.backbone(self.model)
        hidden_BLD = backbone(ids_BL.to(head_VD.device), use_cache=False).last_hidden_state
        ids, logprobs = topk_logprobs(
            hidden_BLD[:, :-1].flatten(0, 1),
            self.content.top_k,
            weight=head_VD,
            backend=self.backend,
        )
        return ids.cpu(), logprobs.cpu()
