"""What stands between the gate and the clusters: every upload's score, and who is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .config import Config
from .config_tables import ClusterConfig
from .data.batches import Packed
from .library import Library
from .messages import DeviceUpdate, TooFewUploads
from .server.cluster import Cluster
from .server.quarantine import Quarantine, judge, keep_from_teaching, probe, probe_text
from .stages import Run
from .wire.expected import Expected
from .wire.package import read_state

SCORES = "quarantine.json"


def trusted(
    here: Run,
    sequences: Packed,
    library: Library,
    expected: Expected,
    updates: Sequence[DeviceUpdate],
) -> list[DeviceUpdate]:
    """Score every upload that passed the gate; return those that may go on.

    sequences: public text by the devices' tokenizer. Raises TooFewUploads where the quarantine
    leaves fewer than federation.min_devices.
    """
    config = here.config
    # without models there is nothing that could be read on a probe text
    if config.quarantine.action == "none" or expected.content.kind == "logprobs":
        return list(updates)

    def model(update: DeviceUpdate) -> nn.Module:
        base = expected.architectures[update.architecture].base
        state = read_state(update.folder, update.manifest, base)
        loaded: nn.Module = library.of_state(update.architecture, state)
        return loaded

    def work() -> None:
        text = probe_text(sequences, config.quarantine.sequences)
        uploads = [(update.device, partial(model, update)) for update in updates]
        scores = probe(uploads, text, config.evaluate.batch_size)
        found = judge(scores, config.quarantine.bound)
        here.write(SCORES, _facts(config, scores, found))

    here.stage("quarantine", ["gate"], [SCORES], work, reads=["quarantine", "data"])
    facts = here.read(SCORES)
    for line in lines(facts) if here.ranks.first else ():
        print(line, flush=True)
    if config.quarantine.action != "exclude":
        return list(updates)
    left = [update for update in updates if update.device not in facts["out"]]
    if len(left) < config.federation.min_devices:
        raise TooFewUploads(
            f"quarantine: uploads left must be at least federation.min_devices = "
            f"{config.federation.min_devices}, got {len(left)}; out: {', '.join(facts['out'])}"
        )
    return left


def _facts(config: Config, scores: Mapping[str, Any], found: Quarantine) -> dict[str, Any]:
    return {
        "action": config.quarantine.action,
        "bound": config.quarantine.bound,
        "judged": found.judged,
        "medians": dict(found.medians),
        "past": {device: list(domains) for device, domains in found.past.items()},
        "out": list(found.out),
        "scores": {
            device: {
                domain: {**vars(score), "perplexity": score.perplexity}
                for domain, score in own.items()
            }
            for device, own in scores.items()
        },
    }


def lines(facts: Mapping[str, Any]) -> list[str]:
    """One line an upload for the screen: nll, entropy and agreement of each domain."""
    said = []
    for device, own in sorted(facts["scores"].items()):
        cells = [
            f"{domain} {one['nll']:.2f} nats, entropy {one['entropy']:.2f}, "
            f"agrees {one['agreement']:.0%}"
            for domain, one in own.items()
        ]
        past = facts["past"].get(device, [])
        verdict = "out" if device in facts["out"] else f"past in {', '.join(past)}" if past else ""
        said.append(f"  {device}: {'; '.join(cells)}{': ' if verdict else ''}{verdict}")
    return said


def clusters_for(config: ClusterConfig, num_uploads: int) -> int:
    """As many clusters as are asked for, or as there are uploads: each cluster needs one."""
    if num_uploads < config.num_clusters:
        print(f"cluster: {num_uploads} uploads are left for {config.num_clusters} clusters: as few")
    return min(config.num_clusters, num_uploads)


def allowed(
    here: Run, nearness_SK: Tensor, sequences: Packed, clusters: Sequence[Cluster]
) -> Tensor:
    """Nearness [S, K] without the domains in which a cluster may not teach."""
    if here.config.quarantine.action != "exclude":
        return nearness_SK
    members = [one.members for one in clusters]
    return keep_from_teaching(nearness_SK, sequences, members, here.read(SCORES)["past"])
