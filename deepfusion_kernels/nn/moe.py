"""A mixture-of-experts block: route, then experts, and a shared expert if there is one.

z = x W_gate^T in float32;  w, experts = route(z);  out = sum_k w_k expert_k(x)
with a shared expert, as in Qwen2-MoE:  out += sigmoid(x w_shared) shared(x)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.moe_experts.op import moe_experts
from ..ops.moe_routing.op import Routing, moe_route

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class MoEConfig:
    """One MoELayer in plain values: `MoEConfig(**json.load(file))` is what `asdict` wrote."""

    hidden_width: int
    expert_width: int
    num_experts: int
    top_k: int
    shared_width: int | None = None
    selection_bias: bool = False
    activation: str = "silu"
    score: str = "softmax"
    order: str = "score_then_topk"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int | None = None
    top_groups: int | None = None
    group_score: str = "max"
    balance_loss_weight: float = 0.0
    z_loss_weight: float = 0.0


class Router(nn.Module):
    """Router logits in float32 whatever the model's dtype: lowered ones send tokens elsewhere."""

    e_score_correction_bias: Tensor | None

    def __init__(self, hidden_width: int, num_experts: int, selection_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_width))
        bias = torch.zeros(num_experts) if selection_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(wide), self.weight.to(wide))


class Experts(nn.Module):
    """The weights of all experts, stacked and named as upstream.

    A checkpoint with one matrix an expert, `0.gate_proj.weight` [F, D] and so on as model hubs hold
    it, is stacked while it is loaded.
    """

    def __init__(self, hidden_width: int, expert_width: int, num_experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_width, hidden_width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_width, expert_width))
        self.register_load_state_dict_pre_hook(_stack_experts)  # type: ignore[no-untyped-call]


def _stack_experts(module: Experts, state: dict[str, Tensor], prefix: str, *unused: object) -> None:
    names = [f"{prefix}{e}.{{}}_proj.weight" for e in range(module.down_proj.shape[0])]
    wanted = [name.format(kind) for name in names for kind in ("gate", "up", "down")]
    # a missing matrix is left for load_state_dict to report, by its name
    if not all(name in state for name in wanted):
        return
    gate, up, down = (
        torch.stack([state.pop(name.format(kind)) for name in names])
        for kind in ("gate", "up", "down")
    )
    state[f"{prefix}gate_up_proj"] = torch.cat([gate, up], 1)
    state[f"{prefix}down_proj"] = down


class SharedExpert(nn.Module):
    """A gated MLP that every token takes."""

    def __init__(self, hidden_width: int, width: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_width, width, bias=False)
        self.up_proj = nn.Linear(hidden_width, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_width, bias=False)
        self.activation = activation

    def forward(self, hidden: Tensor) -> Tensor:
        gated = ACTIVATIONS[self.activation](self.gate_proj(hidden)) * self.up_proj(hidden)
        out: Tensor = self.down_proj(gated)
        return out


class MoELayer(nn.Module):
    """Tokens to their K experts and back: hidden [..., D] -> (out [..., D], Routing).

        out = sum_k w_k W2[e_k] (act(g) u),  [g; u] = W1[e_k] x     (+ sigmoid(x w) shared(x))

    `routing` takes the keyword options of `moe_route`; add the Routing's aux_loss to the loss.
    shared_width adds Qwen2-MoE's gated shared expert; selection_bias a buffer
    `gate.e_score_correction_bias`, which the caller updates. Parameters are named as upstream:
    `gate.weight` [E, D], `experts.gate_up_proj` [E, 2F, D], `experts.down_proj` [E, D, F],
    `shared_expert.*`, `shared_expert_gate.weight` [1, D].

    Raises ValueError for options that `moe_route` refuses, TypeError for ones it does not have.
    """

    @classmethod
    def from_config(cls, config: MoEConfig, backend: str | None = None) -> MoELayer:
        """The layer that a MoEConfig describes, freshly drawn."""
        return cls(**asdict(config), backend=backend)

    def __init__(
        self,
        hidden_width: int,
        expert_width: int,
        num_experts: int,
        top_k: int,
        *,
        shared_width: int | None = None,
        selection_bias: bool = False,
        activation: str = "silu",
        backend: str | None = None,
        **routing: Any,
    ) -> None:
        super().__init__()
        # no tokens: only the options are looked at, so that a mistake shows here and not later
        moe_route(torch.empty(0, num_experts), top_k, **routing)
        self.top_k, self.routing = top_k, routing
        self.activation, self.backend = activation, backend
        self.gate = Router(hidden_width, num_experts, selection_bias)
        self.experts = Experts(hidden_width, expert_width, num_experts)
        if shared_width is not None:
            self.shared_expert = SharedExpert(hidden_width, shared_width, activation)
            self.shared_expert_gate = nn.Linear(hidden_width, 1, bias=False)
        self.has_shared_expert = shared_width is not None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every matrix from N(0, 1 / fan_in), so that activations keep their size."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Routing]:
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        routing = moe_route(
            self.gate(hidden_TD),
            self.top_k,
            selection_bias=self.gate.e_score_correction_bias,
            backend=self.backend,
            **self.routing,
        )
        out_TD = moe_experts(
            hidden_TD,
            self.experts.gate_up_proj,
            self.experts.down_proj,
            routing.experts,
            routing.weights,
            activation=self.activation,
            backend=self.backend,
        )
        if self.has_shared_expert:
            share_T1 = self.shared_expert_gate(hidden_TD).sigmoid()
            out_TD = out_TD + share_T1 * self.shared_expert(hidden_TD)
        return out_TD.view(hidden.shape), routing
