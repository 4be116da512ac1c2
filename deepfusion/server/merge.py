"""Phase III, merge: K dense models of one ancestor become one mixture of experts.

expert (i, s) of layer l = neurons [s F/m, (s+1) F/m) of the FFN of M_i, index i m + s
every other tensor = (1/K) sum_i of the M_i;  norms included, tied embeddings once
shared expert = scale * mean FFN, the routed part at m (1 - scale)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config_tables import MergeConfig
from ..models import experts
from ..models.experts import MoeBlock
from ..models.moe import new_moe
from .router_init import RouterText, init_routers

State = Mapping[str, Tensor]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def merge(
    bases: Sequence[State],
    base_config: Any,
    config: MergeConfig,
    seed: int,
    text: RouterText | None = None,
    kernels: str = "auto",
) -> nn.Module:
    """The mixture whose expert i is the FFN of bases[i]; equal bases give the base's own function.

    base_config is the transformers configuration of the bases. `text` is needed by
    merge.router_init = 'centroids'. Raises ValueError where base and target do not fit, where the
    bases hold different tensors, or where a tensor of the bases has no place in the mixture.
    """
    _check(bases, config)
    num_domains, scale = len(bases), shared_scale(config)
    moe = cast(
        nn.Module,
        new_moe(
            base_config,
            target=config.target,
            num_domains=num_domains,
            top_k=config.top_k,
            segments=config.segments,
            shared=config.shared,
            shared_scale=config.shared_scale,
            renormalize=config.renormalize,
        ),
    )
    used = _fill_means(moe, bases)
    for block in experts.moe_blocks(moe):
        ffns = [_ffn(state, block.name) for state in bases]
        folded = 1.0 if experts.scales_routed(moe) else config.segments * (1 - scale)
        fill_experts(block, ffns, config.segments, folded)
        if scale > 0:
            _fill_shared(block, ffns, scale)
        used |= {f"{block.name}.{projection}.weight" for projection in PROJECTIONS}
    left = sorted(set(bases[0]) - used)
    if left:
        raise ValueError(f"merge: tensor {left[0]!r} of the bases has no place in {config.target}")
    init_routers(moe, config, num_domains, seed, text, kernels)
    return moe.eval()


def shared_scale(config: MergeConfig) -> float:
    """s: the shared expert's part of the FFN branch; 0 without one."""
    return config.shared_scale if config.shared == "mean" else 0.0


def fill_experts(
    block: MoeBlock, ffns: Sequence[Mapping[str, Tensor]], segments: int, folded: float
) -> None:
    """Cuts every FFN to `segments` experts; `folded` multiplies their down weights."""
    for i, ffn in enumerate(ffns):
        parts = zip(
            ffn["gate_proj"].chunk(segments, dim=0),
            ffn["up_proj"].chunk(segments, dim=0),
            ffn["down_proj"].chunk(segments, dim=1),
            strict=True,
        )
        for s, (gate, up, down) in enumerate(parts):
            block.gate_up[i * segments + s].copy_(torch.cat([gate, up]))
            block.down[i * segments + s].copy_(down if folded == 1.0 else down * folded)


def _check(bases: Sequence[State], config: MergeConfig) -> None:
    if not bases:
        raise ValueError("merge: bases must be at least one state, got none")
    for i, state in enumerate(bases):
        if state.keys() != bases[0].keys():
            odd = sorted(state.keys() ^ bases[0].keys())[0]
            raise ValueError(
                f"merge: base {i} must hold the tensors of base 0; they differ in {odd!r}"
            )
    if config.shared not in ("none", "mean"):
        raise ValueError(f"merge.shared must be 'none' or 'mean', got {config.shared!r}")
    if config.shared == "mean" and not 0 < config.shared_scale < 1:
        raise ValueError(f"merge.shared_scale must lie between 0 and 1, got {config.shared_scale}")


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """Elementwise mean in float32, in order, cast once; equal tensors give the tensor, bit for
    bit."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    mean = tensors[0].to(torch.float32, copy=True)
    for n, tensor in enumerate(tensors[1:], start=2):
        mean.lerp_(tensor.float(), 1 / n)
    return mean.to(tensors[0].dtype)


def _fill_means(moe: nn.Module, bases: Sequence[State]) -> set[str]:
    """Fills every tensor that the bases hold under the same name; returns those names."""
    filled: set[int] = set()
    used: set[str] = set()
    for name, tensor in moe.state_dict(keep_vars=True).items():
        if name not in bases[0]:
            continue
        used.add(name)
        # a tied tensor appears under two names and is averaged once
        if tensor.data_ptr() not in filled:
            tensor.copy_(mean_of([state[name] for state in bases]))
            filled.add(tensor.data_ptr())
    return used


def _ffn(state: State, prefix: str) -> dict[str, Tensor]:
    names = {projection: f"{prefix}.{projection}.weight" for projection in PROJECTIONS}
    missing = [name for name in names.values() if name not in state]
    if missing:
        raise ValueError(
            f"merge: the bases must hold {missing[0]!r}; every layer's FFN must be gated"
        )
    return {projection: state[name] for projection, name in names.items()}


def _fill_shared(block: MoeBlock, ffns: Sequence[Mapping[str, Tensor]], scale: float) -> None:
    """The mean FFN at `scale`; a sigmoid gate of weight 0 gives 1/2, hence the factor 2."""
    factor = scale if block.shared_gate is None else 2 * scale
    for projection in PROJECTIONS:
        mean = mean_of([ffn[projection] for ffn in ffns])
        weight = block.shared.get_submodule(projection).get_parameter("weight")
        weight.copy_(mean * factor if projection == "down_proj" else mean)
