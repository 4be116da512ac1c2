"""Differentially private training on a device: DP-SGD (Abadi et al., arXiv 1607.00133).

    g = (1/B) [ sum_{s drawn} min(1, C / |g_s|) g_s + sigma C z ]       z ~ N(0, 1) in every value
    every one of the S sequences is drawn with probability q = B / S, anew in each step
    epsilon = RDP accountant of (sigma, q, steps) at delta, by opacus

The unit that is hidden is one sequence of `data.context_length` tokens. Gradients are taken one
sequence at a time: right for every architecture, tied weights and fused kernels included.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import files
from ..config_tables import DevicesConfig
from ..data.batches import Packed
from ..seeding import generator
from ..training import cross_entropy

SECRET_BITS = 62
LossOfOne = Callable[[Tensor], Tensor]


class PrivateSteps:
    """Batches and gradients of a private training; `secret` seeds sampling and noise.

    NOTE: the secret must not be derived from the run's seed, which the manifest tells: who knows it
    can subtract the noise.
    """

    def __init__(
        self, model: nn.Module, packed: Packed, config: DevicesConfig, secret: int, kernels: str
    ) -> None:
        self.model = model
        self.packed = packed
        self.config = config
        self.secret = secret
        self.kernels = kernels
        self.rate = min(1.0, config.batch_size / len(packed))

    def batches(self, start: int) -> Iterator[Tensor]:
        """Sequences [b, L] of every step from `start` on; b varies and may be 0."""
        for step in range(start, self.config.steps):
            draw = generator(self.secret, "sequences", step)
            yield self.packed.ids[torch.rand(len(self.packed), generator=draw) < self.rate]

    def loss_of(self, ids_bL: Tensor, step: int) -> dict[str, Tensor]:
        """Leaves the private gradient in the parameters; the mean loss of the drawn sequences."""
        learning = [one for one in self.model.parameters() if one.requires_grad]
        loss = private_gradient(
            learning,
            [ids_L[None].to(learning[0].device) for ids_L in ids_bL],
            lambda ids_1L: cross_entropy(self.model, ids_1L, self.kernels),
            clip=self.config.dp_clip,
            noise=self.config.dp_noise,
            expected=self.rate * len(self.packed),
            draw=generator(self.secret, "noise", step),
        )
        return {"loss": loss}

    def facts(self) -> dict[str, float]:
        """What the manifest says of it."""
        config = self.config
        spent = epsilon(config.dp_noise, self.rate, config.steps, config.dp_delta)
        return {
            "epsilon": spent,
            "delta": config.dp_delta,
            "noise": config.dp_noise,
            "clip": config.dp_clip,
            "rate": self.rate,
            "steps": float(config.steps),
        }


def private_gradient(
    parameters: Sequence[nn.Parameter],
    samples: Sequence[Tensor],
    loss_of: LossOfOne,
    *,
    clip: float,
    noise: float,
    expected: float,
    draw: torch.Generator,
) -> Tensor:
    """Sets every parameter's gradient to the clipped, noised mean; returns the mean loss.

    expected: sequences of a step on average, which the sum is divided by however many were drawn.
    """
    sums = [torch.zeros_like(one) for one in parameters]
    losses = []
    for sample in samples:
        loss = loss_of(sample)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        known = [one for one in found if one is not None]
        norm = torch.linalg.vector_norm(torch.stack([one.norm() for one in known]))
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"a sequence's gradient must be finite, got norm {float(norm)}; lower devices.lr"
            )
        share = min(1.0, clip / max(float(norm), 1e-12))
        for total, one in zip(sums, found, strict=True):
            if one is not None:
                total.add_(one, alpha=share)
        losses.append(loss.detach())
    for parameter, total in zip(parameters, sums, strict=True):
        if noise:
            # drawn on the CPU, where the generator lives
            total.add_(torch.randn(total.shape, generator=draw).to(total), alpha=noise * clip)
        parameter.grad = total / expected
    return torch.stack(losses).mean() if losses else torch.zeros(())


def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """What so many steps spend at `delta`. Raises ImportError where opacus is not installed."""
    try:
        from opacus.accountants import RDPAccountant
    except ImportError:
        raise ImportError(
            "devices.dp_noise > 0 needs opacus: pip install 'deepfusion-moe[privacy]'"
        ) from None
    accountant = RDPAccountant()
    accountant.history = [(noise, rate, steps)]
    return float(accountant.get_epsilon(delta))


def secret_at(path: Path | None) -> int:
    """A secret of this device, kept in a file so that an interrupted training goes on with it."""
    if path is None:
        return secrets.randbits(SECRET_BITS)
    if not path.exists():
        files.write_text(path, str(secrets.randbits(SECRET_BITS)))
    return int(path.read_text())
