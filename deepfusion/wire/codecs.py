"""A tensor to named flat parts and back, in fp32.

    delta-int8   d = w - base; blocks of 64: s = max|d| / 127 in fp16, rounded up; q = round(d / s)
                 base + s q;  |error| <= s / 2                          1 + 2/64 bytes a value
    xor          bf16(w) XOR bf16(base), high bytes, low bytes, zstd    lossless for bf16 weights
    bf16         bf16(w), high bytes, low bytes, zstd                   needs no common base

    raw          as it is                                               log-probabilities

Tensors that are not floating point travel as they are (part `raw`). Long tensors are encoded a
stretch at a time: no second copy of a tensor is in memory beside its code.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

Bits = NDArray[np.uint16]
CODECS = ("delta-int8", "xor", "bf16")
RAW = "raw"  # not for weights: `upload.codec` does not offer it
BLOCK = 64
ZSTD_LEVEL = 3  # speeds in federation.md 4 were measured at zstd's own default
PIECE_BYTES = 1 << 20
STRETCH = 1 << 20  # values encoded at a time; a multiple of BLOCK
WINDOW_BYTES = 1 << 23  # level 3 asks for 2 MiB; a hostile frame may ask for gigabytes


def needs_base(codec: str) -> bool:
    """Whether `decode` reads the base's values, and not its shape alone."""
    return codec in ("delta-int8", "xor")


def encode(codec: str, name: str, tensor: Tensor, base: Tensor) -> dict[str, Tensor]:
    """Parts of one tensor, each flat. tensor, base [*] of one shape; for bf16 base may be meta.

    Raises ValueError for values that are not finite, or beyond what the codec can hold.
    """
    _expect_codec(codec)
    if tensor.shape != base.shape:
        raise ValueError(
            f"encode: {name!r} must be {list(base.shape)} as in the base, got {list(tensor.shape)}"
        )
    flat = tensor.detach().cpu().reshape(-1)
    if not flat.is_floating_point():
        return {"raw": flat}
    stretches = (flat[begin : begin + STRETCH] for begin in range(0, flat.numel(), STRETCH))
    if bad := sum(int((~one.isfinite()).sum()) for one in stretches):
        raise ValueError(f"encode: {name!r} must be finite, got {bad} values that are not")
    if codec == RAW:
        return {"raw": flat.to(base.dtype)}
    flat_base = base.reshape(-1)
    if codec == "delta-int8":
        return _encode_delta(name, flat, flat_base.cpu())
    return {"zstd": _compress(name, flat, flat_base.cpu() if codec == "xor" else None)}


def decode(codec: str, name: str, parts: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """The tensor again, float32 (integers as they were), of the base's shape.

    Raises ValueError where parts are missing, of a wrong length or type, or not finite: nothing of
    what another machine sent is trusted here.
    """
    _expect_codec(codec)
    if codec == RAW or not base.is_floating_point():
        raw = _part(name, parts, "raw", base.dtype, base.numel(), of=1)
        return raw.reshape(base.shape)
    if codec == "delta-int8":
        return _decode_delta(name, parts, base)
    packed = _part(name, parts, "zstd", torch.uint8, None, of=1)
    bits = _decompress(name, packed, base.numel())
    if codec == "xor":
        bits = bits ^ _bf16_bits("base", base.cpu().reshape(-1))
    values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
    _expect_finite(name, values, "values")
    return values.reshape(base.shape)


def part_names(codec: str, base: Tensor) -> tuple[str, ...]:
    """The parts a tensor of this type has."""
    if codec == RAW or not base.is_floating_point():
        return ("raw",)
    return ("q", "scale") if codec == "delta-int8" else ("zstd",)


def largest_bytes(codec: str, base: Tensor) -> int:
    """The most bytes an honest encoder makes of one tensor."""
    count = base.numel()
    if codec == RAW or not base.is_floating_point():
        return count * base.element_size()
    if codec == "delta-int8":
        return count + 2 * -(-count // BLOCK)
    # zstd's own bound for data that cannot be compressed
    return 2 * count + (2 * count >> 8) + 256


def _encode_delta(name: str, flat: Tensor, base: Tensor) -> dict[str, Tensor]:
    count = flat.numel()
    codes = torch.empty(count, dtype=torch.int8)
    scale = torch.empty(-(-count // BLOCK), dtype=torch.half)
    for begin in range(0, count, STRETCH):
        values = slice(begin, min(begin + STRETCH, count))
        blocks = slice(begin // BLOCK, -(-values.stop // BLOCK))
        delta = flat[values].float() - base[values].float()
        codes[values], scale[blocks] = _encode_stretch(name, delta)
    return {"q": codes, "scale": scale}


def _encode_stretch(name: str, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and block scales of some whole blocks, of which the last may be short."""
    blocks = torch.nn.functional.pad(delta, (0, -delta.numel() % BLOCK)).reshape(-1, BLOCK)
    wanted = blocks.abs().amax(1) / 127
    scale = wanted.half()
    # fp16 rounds to nearest: one step up where it fell short, so that no value is clipped
    scale = torch.where(
        scale.float() < wanted, (scale.view(torch.int16) + 1).view(torch.half), scale
    )
    if not bool(scale.isfinite().all()):
        raise ValueError(
            f"encode: {name!r} must differ from the base by less than 8e6 for delta-int8, "
            f"got {float(delta.abs().max()):.3g}; use codec 'bf16'"
        )
    steps = scale.float().clamp_min(torch.finfo(torch.float32).tiny)
    codes = (blocks / steps[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes.reshape(-1)[: delta.numel()], scale


def _decode_delta(name: str, parts: Mapping[str, Tensor], base: Tensor) -> Tensor:
    count = base.numel()
    codes = _part(name, parts, "q", torch.int8, count, of=2)
    scale = _part(name, parts, "scale", torch.half, -(-count // BLOCK), of=2)
    _expect_finite(name, scale, "block scales")
    if negative := int((scale < 0).sum()):
        raise ValueError(f"tensor {name!r} holds {negative} negative block scales")
    steps = scale.float().repeat_interleave(BLOCK)[:count]
    values = base.float().cpu().reshape(-1) + codes.float() * steps
    _expect_finite(name, values, "values")
    return values.reshape(base.shape)


def _bf16_bits(name: str, tensor: Tensor) -> Bits:
    rounded = tensor.detach().cpu().to(torch.bfloat16).reshape(-1)
    if not bool(rounded.isfinite().all()):
        raise ValueError(f"encode: {name!r} must fit into bf16, got values beyond 3.4e38")
    bits: Bits = rounded.view(torch.int16).numpy().view(np.uint16)
    return bits


def _compress(name: str, flat: Tensor, base: Tensor | None) -> Tensor:
    """Planes of high bytes (sign and exponent: few values) and low bytes, one zstd frame."""
    packer = zstandard.ZstdCompressor(ZSTD_LEVEL).compressobj(size=2 * flat.numel())
    packed = []
    for shift in (8, 0):
        for begin in range(0, flat.numel(), STRETCH):
            values = slice(begin, begin + STRETCH)
            bits = _bf16_bits(name, flat[values])
            if base is not None:
                bits = bits ^ _bf16_bits("base", base[values])
            packed.append(packer.compress((bits >> shift).astype(np.uint8).tobytes()))
    packed.append(packer.flush())
    return torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.uint8)


def _decompress(name: str, packed: Tensor, count: int) -> Bits:
    """Unpack into a buffer of 2 count bytes; a frame that holds more ends at the piece over it."""
    wanted, filled = 2 * count, 0
    planes = np.empty(wanted, np.uint8)
    # NOTE: zstd ignores max_output_size if the frame declares a size; reading by pieces caps it.
    reader = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).stream_reader(
        packed.numpy().tobytes()
    )
    try:
        while piece := reader.read(PIECE_BYTES):
            if filled + len(piece) > wanted:
                raise ValueError(f"tensor {name!r} unpacks to more than {wanted} bytes")
            planes[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
            filled += len(piece)
    except (zstandard.ZstdError, MemoryError):
        raise ValueError(f"tensor {name!r} must be a zstd frame, got something else") from None
    if filled != wanted:
        raise ValueError(f"tensor {name!r} must unpack to {wanted} bytes, got {filled}")
    high, low = planes[:count].astype(np.uint16), planes[count:].astype(np.uint16)
    return (high << np.uint16(8)) | low


def _part(
    name: str,
    parts: Mapping[str, Tensor],
    part: str,
    dtype: torch.dtype,
    count: int | None,
    of: int,
) -> Tensor:
    if part not in parts or len(parts) != of:
        raise ValueError(f"tensor {name!r} must have part {part!r} of {of}, got {sorted(parts)}")
    tensor = parts[part]
    if tensor.dtype != dtype or tensor.dim() != 1 or count not in (None, tensor.numel()):
        raise ValueError(
            f"tensor {name!r} part {part!r} must be {dtype} [{'*' if count is None else count}], "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor


def _expect_finite(name: str, values: Tensor, what: str) -> None:
    if bad := int((~values.isfinite()).sum()):
        raise ValueError(f"tensor {name!r} holds {bad} non-finite {what}")


def _expect_codec(codec: str) -> None:
    if codec not in (*CODECS, RAW):
        raise ValueError(f"codec must be one of {', '.join(map(repr, CODECS))}, got {codec!r}")
