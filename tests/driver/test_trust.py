"""A run with one poisoned upload: seen before distillation, left out, told in the report."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from deepfusion import pipeline
from deepfusion.checkpoints import StageStore, load_state
from deepfusion.config_tables import ClusterConfig
from deepfusion.device.gather import DeviceJob, gather
from deepfusion.messages import Manifest, TooFewUploads, TrainedDevice
from deepfusion.trust import clusters_for
from deepfusion.wire.package import MANIFEST, decode_embedding, read_state, write_package

from .test_pipeline import scores, tiny

LIAR, SCALE = "device-01", 300.0
SWITCHED_OFF = ("run.recipe=direct", "controls.dense=false", "controls.centralised=false")


def lying(jobs: Sequence[DeviceJob], workers: int) -> list[Path]:
    """Every device trains honestly; one then scales what it learnt."""
    folders = gather(jobs, workers)
    for job in jobs:
        if job.device == LIAR and (job.upload / MANIFEST).exists():
            _scale(job)
    return folders


def _scale(job: DeviceJob) -> None:
    manifest = Manifest.from_json((job.upload / MANIFEST).read_text())
    base, _ = load_state(job.start)
    state = read_state(job.upload, manifest, base)
    embedding = (job.upload / "embedding.bin").read_bytes()
    trained = TrainedDevice(
        device=job.device,
        architecture=job.architecture,
        state=_moved(state, base),
        base=base,
        base_revision=manifest.base_revision,
        embedding=decode_embedding(embedding, job.config.embedding.dimensions),
        tokens=manifest.tokens,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        seed=manifest.seed,
    )
    shutil.rmtree(job.upload)
    write_package(trained, job.upload, job.config.upload.codec)
    StageStore(job.run_folder).mark_done(job.device, job.inputs_hash(), [job.upload])


def _moved(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = {id(state[name]): base[name] + SCALE * (state[name] - base[name]) for name in state}
    return {name: made[id(tensor)] for name, tensor in state.items()}


@pytest.fixture(scope="module")
def guarded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust") / "run"
    asked = ("quarantine.action=exclude", "cluster.robust=median", "tune.agreement=true")
    pipeline.run(tiny(folder, *SWITCHED_OFF, *asked), lying)
    return folder


def test_scaled_upload_is_left_out_and_told(guarded_run: Path) -> None:
    facts = json.loads((guarded_run / "quarantine.json").read_text())
    assert facts["out"] == [LIAR]
    assert set(facts["scores"]) == {f"device-0{n}" for n in range(4)}
    members = json.loads((guarded_run / "clusters.json").read_text())["clusters"]
    assert LIAR not in [name for one in members for name in one["members"]]
    page = (guarded_run / "report.md").read_text()
    assert "## Quarantine" in page
    assert "past everywhere: left out" in page
    assert "no rule helps there" in page, "its clusters have one or two members"
    assert f"{LIAR}" not in scores(guarded_run)


def test_too_few_left_ends_the_run(guarded_run: Path, tmp_path: Path) -> None:
    """The same devices, of whom all four are wanted: gate and quarantine are run again."""
    folder = tmp_path / "run"
    shutil.copytree(guarded_run, folder)
    (folder / "config.json").unlink()
    asked = ("quarantine.action=exclude", "federation.min_devices=4")
    with pytest.raises(TooFewUploads, match=f"got 3; out: {LIAR}"):
        pipeline.run(tiny(folder, *SWITCHED_OFF, *asked), gather)


def test_a_cluster_needs_an_upload() -> None:
    config = ClusterConfig(num_clusters=8)
    assert clusters_for(config, 7) == 7
    assert clusters_for(config, 9) == 8
    assert clusters_for(replace(config, num_clusters=3), 9) == 3
