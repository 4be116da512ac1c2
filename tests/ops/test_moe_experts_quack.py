"""moe_experts by quack-kernels: its refusals, and its wiring against a stand-in of the package.

The stand-in says in plain torch what the source of quack-kernels 0.6.5 says of gate and up columns,
offsets and indices; the real kernels need a GPU and have not been run.
"""

import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from deepfusion_kernels import backends, moe_experts
from deepfusion_kernels.catalog import CATALOG
from deepfusion_kernels.ops.moe_experts import quack_impl, reference
from tests.ops.moe_experts_inputs import make

STEM = "moe_experts"
GATES = {"swiglu": "silu", "geglu": "gelu_tanh"}


def alternating(matrix, dim):
    """[gate; up] along a dimension to gate, up, gate, up."""
    return torch.stack(matrix.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


def gemm(A, B, *, cu_seqlens_m=None, cu_seqlens_k=None, A_idx=None, concat_layout=(), tuned):
    assert not tuned, "a search at run time"
    bounds = (cu_seqlens_k if cu_seqlens_m is None else cu_seqlens_m).tolist()
    spans = list(pairwise(bounds))
    if cu_seqlens_m is not None:
        A = A if A_idx is None else A[A_idx]
        if "B" in concat_layout:
            B = alternating(B, 2 if B.stride(1) == 1 else 1)
        # rows that no expert has hold anything
        out = torch.full((A.shape[0], B.shape[2]), torch.nan)
        for expert, (begin, end) in enumerate(spans):
            out[begin:end] = A[begin:end] @ B[expert]
        return out
    A = A if A_idx is None else A[:, A_idx]
    parts = [A[:, a:b] @ B[a:b] if b > a else torch.full((len(A), B.shape[1]), torch.nan)
             for a, b in spans]  # fmt: skip
    out = torch.stack(parts)
    return torch.cat([out[:, ::2], out[:, 1::2]], 1) if "out" in concat_layout else out


def gemm_gated(A, B, *, activation, **options):
    h = gemm(A, B, **options)
    return h, reference.activate(h[:, ::2], GATES[activation])[0] * h[:, 1::2]


def gemm_dgated(A, B, PreAct, *, activation, colvec_scale, colvec_reduce, **options):
    assert colvec_reduce
    product = gemm(A, B, **options)
    gate, up = PreAct[:, ::2], PreAct[:, 1::2]
    value, slope = reference.activate(gate, GATES[activation])
    da, scale = product * colvec_scale[:, None], colvec_scale[:, None]
    dh = torch.stack([da * up * slope, da * value], 2).flatten(1)
    return dh, scale * value * up, (product * value * up).sum(1)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_wiring_equals_the_reference(activation, monkeypatch):
    stand_in = SimpleNamespace(gemm=gemm, gemm_gated=gemm_gated, gemm_dgated=gemm_dgated)
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace(gemm_interface=stand_in))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", stand_in)
    inputs = {name: each.detach() for name, each in make(13, 16, 8, 4, 2).items()}
    inputs["experts"].clamp_(max=2)
    inputs["experts"][::4, 1], inputs["experts"][5] = -1, 4
    with torch.no_grad():
        inputs["weights"][5] = torch.nan
    tensors = tuple(inputs[name] for name in ("hidden", "gate_up_proj", "down_proj", "experts"))
    tensors = (*tensors, inputs["weights"])
    dout = torch.randn(13, 16)
    both = []
    for impl in (quack_impl, reference):
        out, *saved = impl.forward(*tensors, activation)
        both.append([out, *impl.backward(dout, *tensors, *saved, activation, (True,) * 4)])
    for ours, wanted in zip(*both, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_it_declines_with_its_reason(monkeypatch):
    impls = CATALOG["moe_experts"].impls
    hidden = torch.zeros(2, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(quack_impl, "find_spec", lambda name: None)
    assert backends.declines("quack", hidden, impls) == (
        "needs quack-kernels: pip install quack-kernels"
    )
    with pytest.raises(NotImplementedError, match="quack: needs quack-kernels"):
        moe_experts(**make(2, 8, 8, 2, 1), backend="quack")
    monkeypatch.setattr(quack_impl, "find_spec", lambda name: object())
    assert backends.declines("quack", hidden, impls) == "needs CUDA tensors, got cpu"
    for capability, facts, told in (
        ((8, 0), {}, "needs compute capability 9.x or 10.x, got 8.0"),
        ((9, 0), {"widths": (8, 12)}, "needs D % 8 == 0 and F % 8 == 0"),
        ((10, 0), {"activation": "gelu"}, "its gates are those of silu, gelu_tanh"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
        assert told in quack_impl.declines("quack", on_gpu, **facts)
    assert quack_impl.declines("quack", on_gpu, activation="silu", widths=(8, 8)) is None
