"""moe_experts: wanted gradients, memory, determinism, strides, registration, refusals."""

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from deepfusion_kernels import moe_experts
from deepfusion_kernels.catalog import CATALOG
from tests.ops.moe_experts_inputs import NAMES, make, run

STEM = "moe_experts"


@pytest.mark.parametrize(
    "wanted",
    [{"hidden"}, {"gate_up_proj"}, {"down_proj"}, {"weights"}, {"hidden", "weights"}],
    ids=lambda wanted: "+".join(sorted(wanted)),
)
def test_only_wanted_gradients(backend, device, wanted, poisoned_memory, monkeypatch):
    inputs = make(23, 14, 10, 4, 2, device=device)
    dout = torch.randn(23, 14, device=device)
    everything = run(moe_experts, inputs, dout, backend=backend)
    leaves = {name: each.detach().requires_grad_(name in wanted) for name, each in inputs.items()}
    impl = CATALOG[STEM].impls[backend]
    counts, original = [], impl.backward
    monkeypatch.setattr(
        impl, "backward", lambda *args: counts.append(original(*args)) or counts[-1]
    )
    moe_experts(**leaves, backend=backend).backward(dout)
    assert len(counts[0]) == len(wanted)
    for name in NAMES:
        if name in wanted:
            assert torch.equal(leaves[name].grad, everything[name]), name
        else:
            assert leaves[name].grad is None


def test_saved_bytes_are_h_and_the_plan(backend, device):
    T, D, F, E, K = 40, 16, 12, 4, 2
    inputs = make(T, D, F, E, K, torch.bfloat16, device=device)
    given = {each.data_ptr() for each in inputs.values()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: saved.append(each) or each, lambda each: each
    ):
        moe_experts(**inputs, backend=backend)
    ours = sum(each.nbytes for each in saved if each.data_ptr() not in given)
    R = T * K
    assert ours == 2 * R * 2 * F + 4 * R + 4 * R + 4 * (E + 1)


def test_same_bits_every_time_and_for_any_number_of_threads(backend, device):
    inputs = make(130, 48, 40, 3, 2, torch.bfloat16, device=device)
    dout = torch.randn_like(inputs["hidden"])
    threads = torch.get_num_threads()
    first = run(moe_experts, inputs, dout, backend=backend)
    try:
        for count in (1, 2, 3, 5) if backend == "cpu" else (threads,) * 3:
            torch.set_num_threads(count)
            again = run(moe_experts, inputs, dout, backend=backend)
            assert all(torch.equal(first[name], again[name]) for name in first), count
    finally:
        torch.set_num_threads(threads)


def test_strided_inputs(backend, device):
    inputs = make(19, 12, 8, 3, 2, device=device)
    strided = {
        "hidden": inputs["hidden"].detach().T.contiguous().T,
        "gate_up_proj": inputs["gate_up_proj"]
        .detach()
        .transpose(1, 2)
        .contiguous()
        .transpose(1, 2),
        "down_proj": inputs["down_proj"].detach().repeat_interleave(2, 1)[:, ::2],
        "experts": inputs["experts"].repeat_interleave(2, 0)[::2],
        "weights": inputs["weights"].detach().T.contiguous().T,
    }
    dout = torch.randn(12, 19, device=device).T
    dense = run(moe_experts, inputs, dout.contiguous(), backend=backend)
    for name, value in run(moe_experts, strided, dout, backend=backend).items():
        assert torch.equal(value, dense[name]), name


def test_weights_keep_their_dtype(backend, device):
    inputs = make(19, 12, 8, 3, 2, torch.bfloat16, device=device)
    inputs["weights"] = inputs["weights"].detach().float().requires_grad_()
    out = moe_experts(**inputs, backend=backend)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert inputs["weights"].grad.dtype == torch.float32


def test_autocast_lowers_the_products(backend, device):
    inputs = make(19, 12, 8, 3, 2, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out = moe_experts(**inputs, backend=backend)
    lowered = {
        name: each.detach().bfloat16() if name in NAMES[:3] else each
        for name, each in inputs.items()
    }
    assert torch.equal(out, moe_experts(**lowered, backend=backend))
    out.sum().backward()
    assert inputs["gate_up_proj"].grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_gives_the_same_gradients(backend, device, use_reentrant):
    inputs = make(19, 12, 8, 3, 2, device=device)

    def call(*tensors: Tensor) -> Tensor:
        named = dict(zip(NAMES, tensors, strict=True))
        return moe_experts(**named, experts=inputs["experts"], backend=backend)

    leaves = [inputs[name] for name in NAMES]
    plain = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    checkpoint(call, *leaves, use_reentrant=use_reentrant).square().sum().backward()
    assert all(torch.equal(each.grad, grad) for each, grad in zip(leaves, plain, strict=True))


def test_checkpoint_keeps_the_inputs_alone(backend, device, monkeypatch):
    inputs = make(19, 12, 8, 3, 2, device=device)
    impl = CATALOG[STEM].impls[backend]
    saved, original = [], impl.forward

    def watched(*args):
        out, *rest = original(*args)
        saved[:] = [StorageWeakRef(each.untyped_storage()) for each in rest]
        return out, *rest

    monkeypatch.setattr(impl, "forward", watched)
    out = moe_experts(**inputs, backend=backend)
    assert not any(each.expired() for each in saved)
    out = checkpoint(lambda: moe_experts(**inputs, backend=backend), use_reentrant=False)
    assert all(each.expired() for each in saved)
    out.sum().backward()
    assert not inputs["hidden"].grad.isnan().any()


def test_double_backward_raises(backend, device):
    inputs = make(5, 4, 3, 2, 1, device=device)
    out = moe_experts(**inputs, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_registration(backend, device):
    for case in CATALOG[STEM].cases[:2]:
        inputs = case.make(device, torch.float32, 0)
        order = ("hidden", "gate_up_proj", "down_proj", "experts", "weights")
        torch.library.opcheck(
            torch.ops.deepfusion.moe_experts.default,
            (*(inputs[name] for name in order), "silu", backend),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(backend, device, dynamic):
    # what other tests compiled of this door counts against its limit of recompilations
    torch._dynamo.reset()
    inputs = make(11, 6, 4, 3, 2, device=device)
    dout = torch.randn(11, 6, device=device)
    compiled = torch.compile(moe_experts, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    ours, plain = (run(each, inputs, dout, backend=backend) for each in (compiled, moe_experts))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"hidden": torch.zeros(5, 7)},
            r"gate_up_proj must be \[E, 2F, D\] = \[E, 2F, 7\], got \[3, 4, 6\]",
        ),
        (
            {"gate_up_proj": torch.zeros(3, 5, 6)},
            r"gate_up_proj must be \[E, 2F, D\] with an even 2F, got 5",
        ),
        (
            {"down_proj": torch.zeros(3, 6, 3)},
            r"down_proj must be \[E, D, F\] = \[3, 6, 2\], got \[3, 6, 3\]",
        ),
        (
            {"down_proj": torch.zeros(3, 6, 2, dtype=torch.float64)},
            "down_proj must have dtype float32, got float64",
        ),
        ({"experts": torch.zeros(5, 2)}, "experts must have dtype int64, int32, got float32"),
        (
            {"experts": torch.zeros(4, 2, dtype=torch.int64)},
            r"experts must be \[T, K\] = \[5, K\], got \[4, 2\]",
        ),
        ({"weights": torch.zeros(5, 3)}, r"weights must be \[T, K\] = \[5, 2\], got \[5, 3\]"),
        ({"weights": torch.zeros(5, 2, device="meta")}, "weights must be on cpu, got meta"),
        (
            {"activation": "relu"},
            "activation must be one of 'silu', 'gelu', 'gelu_tanh', got 'relu'",
        ),
    ],
)
def test_bad_input_is_named(change, sentence):
    with pytest.raises(ValueError, match="moe_experts: " + sentence):
        moe_experts(**(make(5, 6, 2, 3, 2) | change))
