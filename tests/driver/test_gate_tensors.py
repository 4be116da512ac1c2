"""The gate's table, tensors and norms: the broken upload is refused, its healthy twin passes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

from deepfusion.messages import DeviceUpdate, Manifest, UploadRefused
from deepfusion.wire.expected import load_expected, save_expected
from deepfusion.wire.gate import inspect
from deepfusion.wire.norms import check_norms
from deepfusion.wire.package import shard_name, state_revision

from .uploads import assert_refused, edit_shard, expected, packed, rewrite, toy_base, trained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    packed(tmp_path / "up")
    return tmp_path / "up"


def test_zstd_bomb(tmp_path: Path) -> None:
    packed(tmp_path / "up", "bf16")
    bomb = zstandard.ZstdCompressor(19).compress(bytes(64 << 20))
    key = "layer.bias#zstd#0"

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = torch.frombuffer(bytearray(bomb), dtype=torch.uint8)

    edit_shard(tmp_path / "up", plant, key)
    with pytest.raises(UploadRefused, match=r"'layer.bias' unpacks to more than 130 bytes"):
        inspect(tmp_path / "up", replace(expected("bf16"), shard_bytes=1 << 20), "device-00")


def test_missing_name(folder: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["scale#q#0"], tensors["scale#scale#0"]

    edit_shard(folder, drop, "scale#q#0")
    assert_refused(folder, "tensor 'scale' is missing")


def test_extra_name(folder: Path) -> None:
    edit_shard(folder, lambda tensors: tensors.update({"evil#q#0": torch.zeros(1)}), "scale#q#0")
    assert_refused(folder, "tensor 'evil' does not belong to toy")


@pytest.mark.parametrize("key", ["plain", "a#q#00", "a#q#-1", "a#Q#0", "#q#0", "a#q#99999999"])
def test_malformed_name(folder: Path, key: str) -> None:
    edit_shard(folder, lambda tensors: tensors.update({key: torch.zeros(1)}), "scale#q#0")
    assert_refused(folder, "must be <tensor>#<part>#<piece>")


def test_piece_too_many_or_missing(folder: Path) -> None:
    edit_shard(folder, lambda tensors: tensors.update({"scale#q#1": torch.zeros(1)}), "scale#q#0")
    assert_refused(folder, "tensor 'scale' part 'q' must be flat and of one type")
    edit_shard(folder, lambda tensors: tensors.update({"scale#q#50": torch.zeros(1)}), "scale#q#0")
    assert_refused(folder, "tensor 'scale' part 'q' has a piece 50 too many")


def test_wrong_shape(folder: Path) -> None:
    longer = torch.ones(2, dtype=torch.int8)
    edit_shard(folder, lambda tensors: tensors.update({"scale#q#0": longer}), "scale#q#0")
    assert_refused(
        folder, r"tensor 'scale' part 'q' must be torch.int8 \[1\], got torch.int8 \[2\]"
    )


def test_wrong_dtype(folder: Path) -> None:
    wider = torch.ones(1, dtype=torch.int64)
    edit_shard(folder, lambda tensors: tensors.update({"scale#q#0": wider}), "scale#q#0")
    assert_refused(folder, "tensor 'scale' part 'q' must be torch.int8")


def test_ties_the_architecture_lacks(folder: Path) -> None:
    rewrite(folder, ties={"head.weight": "embed.weight", "layer.bias": "scale"})
    assert_refused(folder, "ties must be {'head.weight': 'embed.weight'}, got")
    rewrite(folder, ties={})
    assert_refused(folder, "ties must be {'head.weight': 'embed.weight'}, got '{}'")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bad_block_scale(folder: Path, value: float) -> None:
    bad = torch.tensor([value]).half()
    edit_shard(folder, lambda tensors: tensors.update({"scale#scale#0": bad}), "scale#q#0")
    assert_refused(folder, "tensor 'scale' holds 1 (non-finite|negative) block scales")


@pytest.mark.parametrize("codec", ["bf16", "xor"])
def test_non_finite_weights(tmp_path: Path, codec: str) -> None:
    packed(tmp_path / "up", codec)
    base = toy_base()["layer.bias"].view(torch.int16)
    nan = torch.full((65,), 0x7FC0, dtype=torch.int16)
    bits = (nan ^ base if codec == "xor" else nan).numpy().view("uint16")
    planes = torch.from_numpy(bits >> 8).byte(), torch.from_numpy(bits & 0xFF).byte()
    packed_planes = zstandard.ZstdCompressor().compress(torch.cat(planes).numpy().tobytes())
    hostile = torch.frombuffer(bytearray(packed_planes), dtype=torch.uint8)
    key = "layer.bias#zstd#0"
    edit_shard(tmp_path / "up", lambda tensors: tensors.update({key: hostile}), key)
    with pytest.raises(UploadRefused, match=r"tensor 'layer.bias' holds 65 non-finite values"):
        inspect(tmp_path / "up", expected(codec), "device-00")


def test_scaled_upload(folder: Path) -> None:
    norms = inspect(folder, expected(), "device-00").norms
    largest = max(norms, key=lambda name: norms[name])
    inspect(folder, expected(max_update_norm=norms[largest] * 1.001), "device-00")
    bound = norms[largest] * 0.999
    wanted = rf"tensor '{largest}' must differ from the base by at most .*max_update_norm"
    assert_refused(folder, wanted, max_update_norm=bound)


def updates(sizes: list[float], architecture: str = "toy") -> list[DeviceUpdate]:
    manifest = Manifest(1, "", architecture, "", "", 1, "delta-int8", {}, (), "", 7, {})
    return [
        DeviceUpdate(
            Path(),
            replace(manifest, device=f"{architecture}-{index}"),
            torch.ones(2),
            {"a": size, "b": 2 * size},
        )
        for index, size in enumerate(sizes)
    ]


def test_median_rule_names_the_scaled_upload() -> None:
    verdict = check_norms(updates([1.0, 1.1, 0.9, 15.0]))
    assert list(verdict.refused) == ["toy-3"]
    assert (
        "toy-3: tensor 'a' must differ from the base by at most 10 times"
        in verdict.refused["toy-3"]
    )
    assert verdict.unchecked == ()
    assert check_norms(updates([1.0, 1.1, 0.9, 9.0])).refused == {}


def test_median_rule_says_where_it_cannot_judge() -> None:
    verdict = check_norms(updates([1.0, 99.0]) + updates([1.0, 1.0, 99.0], "other"))
    assert list(verdict.refused) == ["other-2"]
    assert verdict.unchecked == ("toy",)


def test_median_rule_with_a_tensor_left_alone() -> None:
    """Most devices did not move 'a': a small move of one is no attack, a huge one is."""
    honest = updates([0.0, 0.0, 0.0])
    moved = [replace(one, norms={"a": 0.0, "b": 1.0}) for one in honest]
    small = replace(moved[2], norms={"a": 5.0, "b": 1.0})
    huge = replace(moved[2], norms={"a": 11.0, "b": 1.0})
    assert check_norms([*moved[:2], small]).refused == {}
    assert list(check_norms([*moved[:2], huge]).refused) == ["toy-2"]


@pytest.mark.parametrize("on_meta", [False, True])
def test_expectations_survive_the_disk(tmp_path: Path, on_meta: bool) -> None:
    wanted = expected("bf16" if on_meta else "delta-int8")
    if on_meta:
        (spec,) = wanted.architectures.values()
        base = {name: tensor.to("meta") for name, tensor in spec.base.items()}
        wanted = replace(wanted, architectures={"toy": replace(spec, base=base)})
    save_expected(tmp_path / "expected", wanted)
    found = load_expected(tmp_path / "expected")
    packed(tmp_path / "up", wanted.codec)
    update = inspect(tmp_path / "up", found, "device-00")
    assert bool(update.norms) is not on_meta
    assert found.architectures["toy"].ties == wanted.architectures["toy"].ties


def test_base_that_was_changed_on_disk_is_refused(tmp_path: Path) -> None:
    save_expected(tmp_path / "expected", expected())
    tensors = load_file(tmp_path / "expected" / "base-0.safetensors")
    tensors["scale"] += 1
    save_file(tensors, tmp_path / "expected" / "base-0.safetensors")
    with pytest.raises(ValueError, match="must be base revision"):
        load_expected(tmp_path / "expected")


def test_revision_of_the_toy_base_is_what_devices_name() -> None:
    assert trained().base_revision == state_revision(toy_base())
    assert shard_name(0, 1) == "model-00001-of-00001.safetensors"
