"""Inputs and other spellings of moe_experts for its two test modules."""

import torch
from torch.nn import functional

from deepfusion_kernels import moe_experts
from tests.budget import assert_within_budget
from tests.ops.moe_experts_roundings import assert_within_roundings, bounds

# backends whose products are kernels or library calls of their own, with rows stored in between
STORES_ALL = ("triton", "torch", "quack")
NAMES = ("hidden", "gate_up_proj", "down_proj", "weights")
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
}


def make(T, D, F, E, K, dtype=torch.float32, ids=torch.int64, device="cpu"):
    values = {
        "hidden": torch.randn(T, D),
        "gate_up_proj": torch.randn(E, 2 * F, D) * D**-0.5,
        "down_proj": torch.randn(E, D, F) * F**-0.5,
        "weights": torch.rand(T, K) + 0.1,
    }
    values = {name: each.to(device, dtype).requires_grad_() for name, each in values.items()}
    return values | {"experts": torch.randint(0, E, (T, K), dtype=ids, device=device)}


def eager(hidden, gate_up_proj, down_proj, experts, weights, activation="silu"):
    """A loop over experts in the input's dtype."""
    out = torch.zeros_like(hidden)
    for expert in range(gate_up_proj.shape[0]):
        token, choice = torch.where(experts == expert)
        gate, up = (hidden[token] @ gate_up_proj[expert].T).chunk(2, -1)
        y = (ACTIVATIONS[activation](gate) * up) @ down_proj[expert].T
        out = out.index_add(0, token, (y * weights[token, choice, None]).to(out.dtype))
    return out


def spelled_as_einsum(hidden, gate_up_proj, down_proj, experts, weights, activation="silu"):
    """Every expert for every token, chosen by one-hot sums; a sentinel's one-hot row is zeros."""
    E = gate_up_proj.shape[0]
    hot_TKE = functional.one_hot(experts.where((experts >= 0) & (experts < E), E), E + 1)[..., :E]
    gate, up = torch.einsum("td,efd->tef", hidden, gate_up_proj).chunk(2, -1)
    y_TED = torch.einsum("tef,edf->ted", ACTIVATIONS[activation](gate) * up, down_proj)
    return torch.einsum("tke,tk,ted->td", hot_TKE.to(hidden.dtype), weights, y_TED)


def run(function, inputs, dout, **options):
    """Output and the four gradients by name, from fresh leaves."""
    leaves = {
        name: each.detach().requires_grad_(each.is_floating_point())
        for name, each in inputs.items()
    }
    out = function(**leaves, **options)
    grads = torch.autograd.grad(out, [leaves[name] for name in NAMES], dout)
    return {"out": out.detach()} | dict(zip(NAMES, grads, strict=True))


def in_float64(inputs):
    return {
        name: each.double() if each.is_floating_point() else each for name, each in inputs.items()
    }


def judge_roundings(ours, truth, inputs, dout, activation="silu"):
    """Half precision against the counted roundings of what the GPU backends store."""
    off = bounds(in_float64(inputs), dout.double(), activation, ours["out"].dtype)
    for name, value in ours.items():
        assert_within_roundings(value, truth[name], off[name], name)


def compare(inputs, backend, activation="silu"):
    dout = torch.randn_like(inputs["hidden"])
    ours = run(moe_experts, inputs, dout, activation=activation, backend=backend)
    plain = run(eager, inputs, dout, activation=activation)
    truth = run(
        moe_experts, in_float64(inputs), dout.double(), activation=activation, backend="reference"
    )
    if backend in STORES_ALL and ours["out"].dtype in (torch.bfloat16, torch.float16):
        judge_roundings(ours, truth, inputs, dout, activation)
    for name in ours:
        if backend not in STORES_ALL or ours[name].dtype == torch.float32:
            assert_within_budget(ours[name], plain[name], truth[name], name)
        if ours[name].dtype == torch.bfloat16 and ours[name].numel() > 1000:
            error, allowed = (
                (each[name].double() - truth[name]).square().mean() for each in (ours, plain)
            )
            assert error <= 1.2**2 * allowed, f"{name}: rms {error**0.5}, eager's {allowed**0.5}"
    return ours
