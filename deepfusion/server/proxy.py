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
            ties = ties_of(state)
            kinds = {name: state[name].dtype for name in ties}
        elif state.keys() != ties.keys():
            raise _unlike(device.device, devices[0].device)
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


def ties_of(state: Mapping[str, Tensor]) -> dict[str, str]:
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


def expect_alike(
    state: Mapping[str, Tensor],
    first: Mapping[str, Tensor],
    ties: Mapping[str, str],
    device: str,
    first_device: str,
) -> None:
    """Names and shapes of one member's tensors against the first's; integers must be equal.

    Raises ValueError naming device and tensor.
    """
    if state.keys() != first.keys():
        raise _unlike(device, first_device)
    for name in ties:
        _expect_shape(name, state[name], first[name], device)
        if not state[name].is_floating_point() and not torch.equal(state[name], first[name]):
            raise _unequal(name, device)


def _unlike(device: str, first_device: str) -> ValueError:
    return ValueError(f"cluster: {device} must hold the tensors of {first_device}")


def _unequal(name: str, device: str) -> ValueError:
    return ValueError(f"cluster: {device}: integer tensor {name!r} differs; it cannot be averaged")


def _expect_shape(name: str, tensor: Tensor, wanted: Tensor, device: str) -> None:
    if tensor.shape != wanted.shape:
        raise ValueError(
            f"cluster: {device}: tensor {name!r} must be {list(wanted.shape)}, "
            f"got {list(tensor.shape)}"
        )


def _accumulate(
    means: dict[str, Tensor], name: str, tensor: Tensor, share: float, device: str
) -> None:
    exact = not tensor.is_floating_point()
    if name not in means:
        means[name] = tensor.clone() if exact else tensor.to(torch.float32, copy=True)
        return
    _expect_shape(name, tensor, means[name], device)
    if not exact:
        means[name].lerp_(tensor.float(), share)
    elif not torch.equal(tensor, means[name]):
        raise _unequal(name, device)
