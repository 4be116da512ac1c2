"""A round of uploads through gate, audit and ledger: used, refused, and what each weighed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ledger import Ledger, weigh_upload
from ..messages import DeviceUpdate, Manifest, TooFewUploads, UploadRefused
from .audit import Audit
from .contents import sent
from .expected import ArchitectureSpec, Expected
from .gate import admit, check_norms


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
    refused: dict[str, str] = {}
    passed: list[DeviceUpdate] = []
    # what went down over a network was noted with the node that it went to
    nodes = {row.device: row.node for row in ledger.transfers if row.node}
    for folder in folders:
        try:
            node = nodes.get(folder.name, "")
            passed.append(admit(folder, expected, folder.name, audit, node))
        except UploadRefused as refusal:
            refused[folder.name] = str(refusal)
    norms = check_norms(passed)
    for device, reason in norms.refused.items():
        folder = next(update.folder for update in passed if update.device == device)
        node = nodes.get(device, "")
        audit.append(folder, device=device, node=node, verdict="refused", reason=reason)
        refused[device] = reason
    updates = [update for update in passed if update.device not in refused]
    manifests = {update.device: update.manifest for update in passed}
    for folder in folders:
        manifest, is_refused = manifests.get(folder.name), folder.name in refused
        _weigh(folder, manifest, is_refused, expected, ledger, nodes.get(folder.name, ""))
    if len(updates) < min_devices:
        reasons = "".join(f"\n  {reason}" for reason in refused.values())
        raise TooFewUploads(
            f"gather: good uploads must be at least federation.min_devices = {min_devices}, "
            f"got {len(updates)} of {len(folders)}{reasons}"
        )
    return Intake(updates, refused, norms.unchecked)


def _weigh(
    folder: Path,
    manifest: Manifest | None,
    refused: bool,
    expected: Expected,
    ledger: Ledger,
    node: str,
) -> None:
    spec = expected.architectures.get(manifest.architecture) if manifest else None
    content = expected.content
    travels = sent(content, spec.base) if spec else {}
    tied = spec.ties if spec and content.kind == "weights" else {}
    own = [tensor for name, tensor in travels.items() if name not in tied]
    raw = sum(one.numel() * (4 if one.is_floating_point() else one.element_size()) for one in own)
    ledger.add(
        *weigh_upload(
            folder,
            folder.name,
            manifest,
            parameters=sum(one.numel() for one in own),
            bytes_raw=raw,
            node=node,
            status="refused" if refused else "done",
        )
    )


def parameters_of(spec: ArchitectureSpec) -> int:
    """Values of an architecture; tied ones count once."""
    return sum(spec.base[name].numel() for name in spec.base.keys() - spec.ties.keys())


def device_facts(
    updates: Sequence[DeviceUpdate], expected: Expected, ledger: Ledger
) -> list[Mapping[str, object]]:
    """One row a device for the report: architecture, tokens, parameters, bytes."""
    return [
        {
            "device": update.device,
            "architecture": update.architecture,
            "tokens": update.tokens,
            "parameters": parameters_of(expected.architectures[update.architecture]),
            "bytes_wire": ledger.totals(update.device).bytes_up,
        }
        for update in updates
    ]
