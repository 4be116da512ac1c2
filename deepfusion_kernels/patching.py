"""Our experts and routers inside models of transformers, with no forward of theirs copied.

`register()` adds the experts implementation "deepfusion" to transformers; `enable(model)` selects
it in one model and binds its routers; `disable(model)` puts back what was there. Experts of another
form (interleaved, transposed, biased, other gate) are served by transformers' own grouped_mm.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops.moe_experts.op import moe_experts
from .ops.moe_routing.op import moe_route

KEY = "deepfusion"
# flags of transformers' decorator, with what a module without the flag means
WANTED_FLAGS = {
    "has_gate": (True, True),
    "is_concatenated": (True, True),
    "is_transposed": (False, False),
    "has_bias": (False, False),
    "has_post_expert_norm": (False, False),
}


def register() -> None:
    """Make `experts_implementation="deepfusion"` known to transformers, in the whole process.

    Calling it again is harmless.
    Raises ImportError for transformers < 5.7, RuntimeError if the key is another function's.
    """
    moe = _transformers_moe()
    held = moe.ALL_EXPERTS_FUNCTIONS.get(KEY) if KEY in moe.ALL_EXPERTS_FUNCTIONS else None
    if held not in (None, experts_forward):
        raise RuntimeError(
            f"patching: the experts key {KEY!r} is held by {held.__module__}.{held.__qualname__}; "
            "two packages cannot serve one key in one process"
        )
    moe.ALL_EXPERTS_FUNCTIONS.register(KEY, experts_forward)


def enable(model: nn.Module, backend: str | None = None) -> dict[str, str]:
    """Let our ops serve the experts and routers of a transformers model; twice is harmless.

    Returns {module name: "patched" or why not}. The choice is not stored in config.json: a saved
    model loads without this package. Raises ImportError and RuntimeError as `register` does.
    """
    register()
    told: dict[str, str] = {}
    for name, module in model.named_modules():
        if hasattr(type(module), "_apply_gate"):
            told[name] = why_not_experts(module) or "patched"
        elif type(module).__name__ in ROUTERS:
            told[name] = _bind(module) or "patched"
        else:
            continue
        module._deepfusion_backend = backend
    if told and not hasattr(model, "_deepfusion_before"):
        before = model.get_experts_implementation()  # type: ignore[operator]
        model._deepfusion_before = before
        model.set_experts_implementation(KEY)  # type: ignore[operator]
    return told


def disable(model: nn.Module) -> None:
    """Undo `enable`: the experts implementation and every router's forward are as they were."""
    before = getattr(model, "_deepfusion_before", None)
    if before is not None:
        model.set_experts_implementation(before)  # type: ignore[operator]
        del model._deepfusion_before
    for module in model.modules():
        if _is_bound(module):
            del module.forward
        if hasattr(module, "_deepfusion_backend"):
            del module._deepfusion_backend


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls for the key: hidden [T, D], ids and weights [T, K] -> [T, D]."""
    reason = why_not_experts(self)
    if reason is not None:
        if not torch.compiler.is_compiling():
            _say_once(type(self).__name__, reason)
        fallback = _transformers_moe().grouped_mm_experts_forward
        out: Tensor = fallback(self, hidden_states, top_k_index, top_k_weights)
        return out
    return moe_experts(
        hidden_states,
        _local(self.gate_up_proj),
        _local(self.down_proj),
        top_k_index,
        top_k_weights,
        activation=_activation(self.act_fn) or "",
        backend=getattr(self, "_deepfusion_backend", None),
    )


def why_not_experts(module: nn.Module) -> str | None:
    """Why moe_experts does not compute what this experts module computes, or None if it does."""
    for flag, (absent, wanted) in WANTED_FLAGS.items():
        if bool(getattr(module, flag, absent)) != wanted:
            return f"{flag} is {not wanted}"
    default = _transformers_moe()._default_apply_gate
    if "_apply_gate" in vars(module) or getattr(type(module), "_apply_gate", None) is not default:
        return "it has a gate of its own"
    activation = getattr(module, "act_fn", None)
    if _activation(activation) is None:
        return f"its activation is {type(activation).__name__}"
    return None


@cache
def _say_once(experts: str, reason: str) -> None:
    warnings.warn(
        f"patching: {experts} is served by transformers' grouped_mm, since {reason}", stacklevel=3
    )


def _activation(act_fn: object) -> str | None:
    """Our name of an activation module of torch or transformers, or None."""
    if isinstance(act_fn, nn.GELU):
        return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    names = {
        "SiLU": "silu",
        "SiLUActivation": "silu",
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
        "NewGELUActivation": "gelu_tanh",
    }
    return names.get(type(act_fn).__name__)


def _local(weight: Any) -> Tensor:
    """A distributed tensor's own part; torch.distributed need not be there to ask."""
    local: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return local


def _transformers_moe() -> Any:
    try:
        from transformers.integrations import moe
    except ImportError as error:
        raise ImportError("patching needs transformers >= 5.7: pip install transformers") from error
    if not hasattr(moe, "ALL_EXPERTS_FUNCTIONS"):
        raise ImportError(
            "patching needs transformers >= 5.7: an older one has a fixed list of experts "
            "implementations; pip install -U transformers"
        )
    return moe


Routed = tuple[Tensor, Tensor, Tensor]


def _route(module: Any, logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    backend = getattr(module, "_deepfusion_backend", None)
    routing = moe_route(logits, module.top_k, backend=backend, **options)
    return routing.weights, routing.experts


def _softmax(self: Any, hidden_states: Tensor) -> Routed:
    logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    weights, experts = _route(self, logits, renormalize=self.norm_topk_prob)
    return logits, weights.to(logits.dtype), experts


def _mixtral(self: Any, hidden_states: Tensor) -> Routed:
    logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    return logits, *_route(self, logits, renormalize=True)


def _float32_logits(module: Any, hidden_states: Tensor) -> Tensor:
    hidden = hidden_states.reshape(-1, module.hidden_dim)
    return F.linear(hidden.type(torch.float32), module.weight.type(torch.float32))


def _deepseek_v2(self: Any, hidden_states: Tensor) -> Routed:
    logits = _float32_logits(self, hidden_states)
    groups = {"num_groups": self.num_group, "top_groups": self.topk_group}
    options = groups if self.topk_method == "group_limited_greedy" else {}
    return logits, *_route(self, logits, scale=self.routed_scaling_factor, **options)


def _deepseek_v3(self: Any, hidden_states: Tensor) -> Routed:
    logits = _float32_logits(self, hidden_states)
    weights, experts = _route(
        self,
        logits,
        score="sigmoid",
        renormalize=self.norm_topk_prob,
        scale=self.routed_scaling_factor,
        selection_bias=self.e_score_correction_bias,
        num_groups=self.num_group,
        top_groups=self.topk_group,
        group_score="top2_sum",
    )
    return logits, weights, experts


def _gpt_oss(self: Any, hidden_states: Tensor) -> Routed:
    logits = F.linear(hidden_states, self.weight, self.bias)
    weights, experts = _route(self, logits, order="topk_then_score")
    return logits, weights.to(logits.dtype), experts


ROUTERS: dict[str, Callable[..., Routed]] = {
    "Qwen2MoeTopKRouter": _softmax,
    "Qwen3MoeTopKRouter": _softmax,
    "OlmoeTopKRouter": _softmax,
    "MixtralTopKRouter": _mixtral,
    "DeepseekV2TopkRouter": _deepseek_v2,
    "DeepseekV3TopkRouter": _deepseek_v3,
    "Glm4MoeTopkRouter": _deepseek_v3,
    "GptOssTopKRouter": _gpt_oss,
}


def _is_bound(module: nn.Module) -> bool:
    bound = vars(module).get("forward")
    return isinstance(bound, MethodType) and bound.__func__ in ROUTERS.values()


def _bind(module: Any) -> str | None:
    """Give one router our forward; returns why not."""
    if _is_bound(module):
        return None
    if not type(module).__module__.startswith("transformers.models."):
        return "a class of the same name, but not transformers' own"
    if "forward" in vars(module):
        return "its forward is already replaced"
    if getattr(module, "topk_method", "greedy") not in ("greedy", "group_limited_greedy"):
        return f"its topk_method is {module.topk_method!r}"
    if hasattr(module, "num_group") and getattr(module, "topk_method", "") != "greedy":
        held = module.num_experts // module.num_group * module.topk_group
        if module.top_k > held:
            return f"it chooses {module.top_k} experts from groups that hold {held}"
    module.forward = MethodType(ROUTERS[type(module).__name__], module)
    return None
