"""A toy architecture, its package, and the tools of a hostile device, for the wire's tests."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepfusion.messages import Manifest, TrainedDevice, UploadRefused
from deepfusion.wire.expected import ArchitectureSpec, Expected
from deepfusion.wire.gate import inspect
from deepfusion.wire.package import MANIFEST, state_revision, write_package

SHARD_BYTES = 4096
DIMENSIONS = 16


def toy_base(seed: int = 0) -> dict[str, Tensor]:
    """Odd sizes, a scalar, a tie, an integer buffer, two dtypes."""
    source = torch.Generator().manual_seed(seed)
    embed = torch.randn(37, 11, generator=source)
    return {
        "embed.weight": embed,
        "head.weight": embed,
        "layer.weight": torch.randn(63, 65, generator=source),
        "layer.bias": torch.randn(65, generator=source).bfloat16(),
        "scale": torch.tensor(0.5),
        "steps": torch.arange(5),
    }


def trained(device: str = "device-00", seed: int = 1, size: float = 1e-2) -> TrainedDevice:
    """The toy base after an update of about `size` in every value."""
    source = torch.Generator().manual_seed(seed)
    base = toy_base()
    state = {
        name: tensor + size * torch.randn(tensor.shape, generator=source).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in base.items()
        if name != "head.weight"
    }
    state["head.weight"] = state["embed.weight"]
    return TrainedDevice(
        device=device,
        architecture="toy",
        state=state,
        base=base,
        base_revision=state_revision(base),
        embedding=torch.randn(DIMENSIONS, generator=source),
        tokens=1234,
        tokenizer_fingerprint="fp",
        seed=7,
    )


def expected(codec: str = "delta-int8", max_update_norm: float = 0.0) -> Expected:
    """What a server that knows the toy architecture alone asks of an upload."""
    base = toy_base()
    spec = ArchitectureSpec.of(base, codec, state_revision(base))
    return Expected(
        architectures={"toy": spec},
        tokenizer_fingerprint="fp",
        codec=codec,
        embedding_dimensions=DIMENSIONS,
        max_update_norm=max_update_norm,
        shard_bytes=SHARD_BYTES,
    )


def packed(folder: Path, codec: str = "delta-int8", **changes: object) -> Manifest:
    """Write the toy device's package; `changes` replace fields of what was trained."""
    return write_package(replace(trained(), **changes), folder, codec, SHARD_BYTES)  # type: ignore[arg-type]


def rewrite(folder: Path, **changes: Any) -> None:
    """Change facts of the manifest, as a hostile device would."""
    facts = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**facts, **changes}))


def reseal(folder: Path) -> None:
    """Make the manifest's lengths and hashes true again after the files were changed."""
    shards = []
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        shards.append({"name": path.name, "bytes": len(content), "sha256": sha256})
    embedding = hashlib.sha256((folder / "embedding.bin").read_bytes()).hexdigest()
    rewrite(folder, shards=shards, embedding_sha256=embedding)


def edit_shard(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], key: str) -> None:
    """Change the tensors of the shard that holds `key`."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if key in tensors:
            edit(tensors)
            save_file(tensors, path)
            reseal(folder)
            return
    raise AssertionError(f"no shard holds {key}")


def assert_refused(folder: Path, wanted: str, **limits: Any) -> None:
    with pytest.raises(UploadRefused, match=wanted) as caught:
        inspect(folder, replace(expected(), **limits), "device-00")
    assert str(caught.value).startswith("device-00: ")
    assert str(caught.value).endswith("; refused, see audit.jsonl")
