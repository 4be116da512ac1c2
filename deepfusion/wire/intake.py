"""A round of uploads through gate, audit and ledger: used, refused, and what each weighed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ledger import Ledger, Transfer, weigh_upload
from ..messages import DeviceUpdate, Manifest, TooFewUploads, UploadRefused
from .audit import Audit, Decision
from .contents import sent
from .expected import ArchitectureSpec, Expected
from .gate import inspect
from .norms import check_norms

AT_ONCE = 256  # verdicts for which the disk is waited for once


@dataclass(frozen=True)
class Intake:
    """Uploads that may be used, and the reason for every other one.

    unchecked: architectures with too few uploads for the median rule of the norms.
    """

    updates: list[DeviceUpdate]
    refused: dict[str, str]
    unchecked: tuple[str, ...]


def take_in(
    folders: Sequence[Path], expected: Expected, ledger: Ledger, audit: Audit, min_devices: int
) -> Intake:
    """Judge and weigh every upload; a folder's name is the device's, as the transport gave it.

    Raises TooFewUploads naming every refusal if fewer than `min_devices` are good.
    """
    # what went down over a network was noted with the node that it went to
    nodes = {row.device: row.node for row in ledger.transfers if row.node}
    passed, refused = _judged(folders, expected, audit, nodes)
    norms = check_norms(list(passed.values()))
    audit.append_all(
        Decision(passed[device].folder, device, nodes.get(device, ""), "refused", reason)
        for device, reason in norms.refused.items()
    )
    refused |= norms.refused
    updates = [update for update in passed.values() if update.device not in refused]
    rows: list[Transfer] = []
    for folder in folders:
        update = passed.get(folder.name)
        manifest, is_refused = update.manifest if update else None, folder.name in refused
        rows += _weigh(folder, manifest, is_refused, expected, nodes.get(folder.name, ""))
    ledger.add(*rows)
    if len(updates) < min_devices:
        reasons = "".join(f"\n  {reason}" for reason in refused.values())
        raise TooFewUploads(
            f"gather: good uploads must be at least federation.min_devices = {min_devices}, "
            f"got {len(updates)} of {len(folders)}{reasons}"
        )
    return Intake(updates, refused, norms.unchecked)


def _judged(
    folders: Sequence[Path], expected: Expected, audit: Audit, nodes: Mapping[str, str]
) -> tuple[dict[str, DeviceUpdate], dict[str, str]]:
    """What passed and what was refused, by device; every verdict is audited before it is used."""
    passed: dict[str, DeviceUpdate] = {}
    refused: dict[str, str] = {}
    decisions: list[Decision] = []
    for number, folder in enumerate(folders, 1):
        try:
            passed[folder.name] = inspect(folder, expected, folder.name)
        except UploadRefused as refusal:
            refused[folder.name] = str(refusal)
        reason = refused.get(folder.name, "")
        verdict, node = "refused" if reason else "accepted", nodes.get(folder.name, "")
        decisions.append(Decision(folder, folder.name, node, verdict, reason))
        if number % AT_ONCE == 0 or number == len(folders):
            audit.append_all(decisions)
            decisions.clear()
    return passed, refused


def _weigh(
    folder: Path, manifest: Manifest | None, refused: bool, expected: Expected, node: str
) -> list[Transfer]:
    spec = expected.architectures.get(manifest.architecture) if manifest else None
    content = expected.content
    travels = sent(content, spec.base) if spec else {}
    tied = spec.ties if spec and content.kind == "weights" else {}
    own = [tensor for name, tensor in travels.items() if name not in tied]
    raw = sum(one.numel() * (4 if one.is_floating_point() else one.element_size()) for one in own)
    return weigh_upload(
        folder,
        folder.name,
        manifest,
        parameters=sum(one.numel() for one in own),
        bytes_raw=raw,
        node=node,
        status="refused" if refused else "done",
    )


def parameters_of(spec: ArchitectureSpec) -> int:
    """Values of an architecture; tied ones count once."""
    return sum(spec.base[name].numel() for name in spec.base.keys() - spec.ties.keys())


def device_facts(
    updates: Sequence[DeviceUpdate], expected: Expected, ledger: Ledger
) -> list[Mapping[str, object]]:
    """One row a device for the report: architecture, tokens, parameters, bytes."""
    totals = ledger.by_device()
    return [
        {
            "device": update.device,
            "architecture": update.architecture,
            "tokens": update.tokens,
            "parameters": parameters_of(expected.architectures[update.architecture]),
            "bytes_wire": totals[update.device].bytes_up,
            "privacy": dict(update.manifest.privacy),
        }
        for update in updates
    ]
