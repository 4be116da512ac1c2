"""Tensors to parts and back: exact where promised, within the stated error elsewhere."""

import numpy as np
import pytest
import torch
import zstandard
from torch import Tensor

from deepfusion.wire.codecs import BLOCK, CODECS, decode, encode, largest_bytes, part_names

SHAPES = [(), (0,), (1,), (63,), (64,), (65,), (7, 11), (3, 5, 13), (1, 1000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pair(shape: tuple[int, ...], dtype: torch.dtype, size: float) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(len(shape))
    base = torch.randn(shape, generator=source)
    return (base + size * torch.randn(shape, generator=source)).to(dtype), base.to(dtype)


def share_of_update(ours: Tensor, weights: Tensor, base: Tensor) -> float:
    return float((ours - weights).norm() / (weights - base).norm())


def wire_bytes(parts: dict[str, Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in parts.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_round_trip(codec: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weights, base = pair(shape, dtype, 1e-2)
    parts = encode(codec, "w", weights, base)
    assert tuple(sorted(parts)) == part_names(codec, base)
    assert all(part.dim() == 1 for part in parts.values())
    assert wire_bytes(parts) <= largest_bytes(codec, base)
    found = decode(codec, "w", parts, base)
    assert found.dtype == torch.float32
    assert found.shape == weights.shape
    if codec == "delta-int8":
        scale = parts["scale"].float().repeat_interleave(BLOCK)[: weights.numel()]
        rounding = torch.finfo(torch.float32).eps * weights.float().abs()
        error = (found - weights.float()).abs()
        assert (error <= scale.reshape(shape) / 2 * (1 + 1e-3) + rounding).all()
    else:
        assert torch.equal(found, weights.to(torch.bfloat16).float())


@pytest.mark.parametrize("codec", CODECS)
def test_zero_update_is_exact(codec: str) -> None:
    base = torch.randn(130).bfloat16().float()
    found = decode(codec, "w", encode(codec, "w", base.clone(), base), base)
    assert torch.equal(found, base)


def test_delta_error_is_under_one_per_cent_of_the_update() -> None:
    source = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(1 << 18, generator=source)
    weights = base + 2e-4 * torch.randn(1 << 18, generator=source)
    parts = encode("delta-int8", "w", weights, base)
    assert share_of_update(decode("delta-int8", "w", parts, base), weights, base) < 0.007
    assert wire_bytes(parts) / base.numel() == 1 + 2 / BLOCK


def test_quantised_weights_would_fail_that_bound() -> None:
    """Negative control: the same blocks over the weights instead of the update."""
    source = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(1 << 18, generator=source)
    weights = base + 2e-4 * torch.randn(1 << 18, generator=source)
    nothing = torch.zeros_like(base)
    parts = encode("delta-int8", "w", weights, nothing)
    assert share_of_update(decode("delta-int8", "w", parts, nothing), weights, base) > 0.3


def test_sizes_of_the_lossless_codecs() -> None:
    source = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(1 << 18, generator=source)).bfloat16()
    weights = (base.float() + 2e-4 * torch.randn(1 << 18, generator=source)).bfloat16()
    assert wire_bytes(encode("xor", "w", weights, base)) / base.numel() < 0.8
    assert wire_bytes(encode("bf16", "w", weights, base)) / base.numel() < 1.5


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 1e3])
def test_delta_never_clips_whatever_the_scale(size: float) -> None:
    base = torch.zeros(1000)
    weights = size * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    parts = encode("delta-int8", "w", weights, base)
    scale = parts["scale"].float().repeat_interleave(BLOCK)[:1000]
    error = (decode("delta-int8", "w", parts, base) - weights).abs()
    assert (error <= scale * 0.501).all()
    # fp16's smallest step is 6e-8: below it the error is that step's half, and says so here
    assert (scale <= weights.abs().max() / 127 * 1.001 + 6e-8).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "value", [torch.arange(7), torch.tensor(True), torch.zeros(3, dtype=torch.uint8)]
)
def test_integers_travel_as_they_are(codec: str, value: Tensor) -> None:
    found = decode(codec, "w", encode(codec, "w", value, value), value)
    assert found.dtype == value.dtype
    assert torch.equal(found, value)


def test_bf16_needs_the_shape_of_the_base_alone() -> None:
    weights = torch.randn(5, 7).bfloat16()
    base = torch.empty(5, 7, device="meta")
    parts = encode("bf16", "w", weights, base)
    assert torch.equal(decode("bf16", "w", parts, base), weights.float())


@pytest.mark.parametrize("codec", CODECS)
def test_encoder_refuses_what_it_cannot_hold(codec: str) -> None:
    base = torch.zeros(4)
    with pytest.raises(ValueError, match=r"'w' must be finite, got 1"):
        encode(codec, "w", torch.tensor([0.0, 1.0, float("nan"), 2.0]), base)
    with pytest.raises(ValueError, match=r"'w' must be \[4\] as in the base, got \[5\]"):
        encode(codec, "w", torch.zeros(5), base)
    with pytest.raises(ValueError, match="codec must be one of"):
        encode("int8", "w", base, base)


def test_delta_refuses_an_update_beyond_fp16_scales() -> None:
    with pytest.raises(ValueError, match=r"less than 8e6 for delta-int8, got 1e\+08"):
        encode("delta-int8", "w", torch.full((3,), 1e8), torch.zeros(3))
    with pytest.raises(ValueError, match="must fit into bf16"):
        encode("bf16", "w", torch.full((3,), 3.4e38), torch.zeros(3))


def flat(values: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values).to(dtype)


HEALTHY = {"q": flat([1] * 70, torch.int8), "scale": flat([0.1, 0.1], torch.half)}


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"scale": flat([0.1, float("nan")], torch.half)}, "holds 1 non-finite block scales"),
        ({"scale": flat([0.1, float("inf")], torch.half)}, "holds 1 non-finite block scales"),
        ({"scale": flat([0.1, -0.1], torch.half)}, "holds 1 negative block scales"),
        ({"scale": flat([0.1], torch.half)}, r"part 'scale' must be torch.float16 \[2\]"),
        ({"scale": flat([0.1, 0.1], torch.float)}, "part 'scale' must be torch.float16"),
        ({"q": flat([1] * 71, torch.int8)}, r"part 'q' must be torch.int8 \[70\], got"),
        ({"q": flat([1] * 70, torch.int8).reshape(7, 10)}, "part 'q' must be"),
        ({"extra": flat([1], torch.int8)}, "must have part 'q' of 2"),
    ],
)
def test_hostile_delta_is_refused(change: dict[str, Tensor], wanted: str) -> None:
    base = torch.zeros(70)
    decode("delta-int8", "w", HEALTHY, base)
    with pytest.raises(ValueError, match=wanted):
        decode("delta-int8", "w", HEALTHY | change, base)


def test_missing_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have part 'scale' of 2|must have part 'q' of 2"):
        decode("delta-int8", "w", {"q": HEALTHY["q"]}, torch.zeros(70))


def as_part(content: bytes) -> dict[str, Tensor]:
    return {"zstd": torch.from_numpy(np.frombuffer(content, np.uint8).copy())}


def test_zstd_bomb_stops_at_our_cap() -> None:
    """A few KB that declare and hold 64 MB; max_output_size alone would unpack them all."""
    bomb = zstandard.ZstdCompressor(19).compress(bytes(64 << 20))
    assert len(bomb) < 8192
    with pytest.raises(ValueError, match="'w' unpacks to more than 260 bytes"):
        decode("bf16", "w", as_part(bomb), torch.zeros(130))
    honest = zstandard.ZstdCompressor(19).compress(bytes(260))
    assert torch.equal(decode("bf16", "w", as_part(honest), torch.zeros(130)), torch.zeros(130))


@pytest.mark.parametrize(
    "content, wanted",
    [
        (b"", "must unpack to 260 bytes, got 0"),
        (b"not a frame", "must be a zstd frame"),
        (zstandard.compress(bytes(258)), "must unpack to 260 bytes, got 258"),
        (zstandard.compress(np.random.default_rng(0).bytes(260))[:-20], "must unpack to 260 bytes"),
        (zstandard.compress(b"\x7f" * 130 + b"\xff" * 130), "holds 130 non-finite values"),
    ],
)
def test_hostile_frame_is_refused(content: bytes, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        decode("bf16", "w", as_part(content), torch.zeros(130))


def test_hostile_window_is_refused() -> None:
    """A frame may ask the decoder for gigabytes of window before a byte comes out."""
    window = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    stream = zstandard.ZstdCompressor(compression_params=window).compressobj()
    frame = stream.compress(bytes(260)) + stream.flush()
    with pytest.raises(ValueError, match="must be a zstd frame"):
        decode("bf16", "w", as_part(frame), torch.zeros(130))
