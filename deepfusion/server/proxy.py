"""The mean of models that share a shape, in float32, in device order, cast once.

p_n = p_(n-1) + (m_n - p_(n-1)) w_n / (w_1 + .. + w_n)        equal models give the model, bit for
bit
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..messages import DeviceUpdate


def mean_state(
    devices: Sequence[DeviceUpdate],
    load_state: Callable[[DeviceUpdate], Mapping[str, Tensor]],
    weights: str = "uniform",
) -> dict[str, Tensor]:
    """Weighted mean of the devices' tensors; names that share memory (tied weights) are averaged
    once.

    Integer and boolean buffers must be equal. Raises ValueError where names, shapes or such buffers
    differ, or where no token stands behind `weights = "tokens"`.
    """
    shares = _shares(devices, weights)
    if len(devices) == 1:
        return dict(load_state(devices[0]))
    means: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    ties: dict[str, str] = {}
    for device, share in zip(devices, shares, strict=True):
        state = load_state(device)
        if not means:
            ties = _ties(state)
            kinds = {name: state[name].dtype for name in ties}
        elif state.keys() != ties.keys():
            raise ValueError(
                f"cluster: {device.device} must hold the tensors of {devices[0].device}"
            )
        for name, first in ties.items():
            if name == first:
                _accumulate(means, name, state[name], share, device.device)
    cast = {name: mean.to(kinds[name]) for name, mean in means.items()}
    return {name: cast[first] for name, first in ties.items()}


def _shares(devices: Sequence[DeviceUpdate], weights: str) -> list[float]:
    """w_n / (w_1 + .. + w_n) for every device."""
    if weights not in ("uniform", "tokens"):
        raise ValueError(f"cluster.weights must be 'uniform' or 'tokens', got {weights!r}")
    counts = [device.tokens if weights == "tokens" else 1 for device in devices]
    if min(counts) <= 0:
        raise ValueError(
            f"cluster.weights = 'tokens' needs uploads that count their tokens, got {min(counts)}"
        )
    return [count / total for count, total in zip(counts, accumulate(counts), strict=True)]


def _ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name with the first name that holds the same memory."""
    seen: dict[tuple[int, ...], str] = {}
    ties = {}
    for name, tensor in state.items():
        # empty tensors all sit at address 0
        key = (
            (tensor.data_ptr(), *tensor.shape, *tensor.stride())
            if tensor.numel()
            else (id(tensor),)
        )
        ties[name] = seen.setdefault(key, name)
    return ties


def _accumulate(
    means: dict[str, Tensor], name: str, tensor: Tensor, share: float, device: str
) -> None:
    exact = not tensor.is_floating_point()
    if name not in means:
        means[name] = tensor.clone() if exact else tensor.to(torch.float32, copy=True)
    elif tensor.shape != means[name].shape:
        raise ValueError(
            f"cluster: {device}: tensor {name!r} must be {list(means[name].shape)}, "
            f"got {list(tensor.shape)}"
        )
    elif exact:
        if not torch.equal(tensor, means[name]):
            raise ValueError(
                f"cluster: {device}: integer tensor {name!r} differs; it cannot be averaged"
            )
    else:
        means[name].lerp_(tensor.float(), share)
