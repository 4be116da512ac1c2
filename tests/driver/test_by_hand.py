"""Packages that travel by other ways than a network: `device` on each, `distill` on the server."""

import json
import shutil
from pathlib import Path

import pytest

from deepfusion import cli, pipeline
from deepfusion.messages import TooFewUploads
from deepfusion.uploads import lying_there

from .test_pipeline import tiny

SMALL = (
    "federation.num_devices=2",
    "federation.min_devices=2",
    "controls.dense=false",
    "controls.centralised=false",
    "evaluate.max_tokens=128",
)
MODEL = "global_moe/model.safetensors"


@pytest.mark.slow
def test_packages_carried_by_hand_make_the_same_mixture(tmp_path: Path) -> None:
    pipeline.run(tiny(tmp_path / "whole", *SMALL))
    server = tiny(tmp_path / "server", *SMALL)
    for index in range(2):
        machine = tiny(tmp_path / f"machine-{index}", *SMALL)
        package = pipeline.one_device(machine, index)
        assert package.name == f"device-{index:02d}"
        shutil.copytree(package, tmp_path / "server" / "uploads" / package.name)
    pipeline.run(server, lying_there)
    assert (tmp_path / "server" / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()


def test_missing_packages_are_named(tmp_path: Path) -> None:
    with pytest.raises(TooFewUploads, match="got 0; missing: device-00, device-01"):
        pipeline.run(tiny(tmp_path / "server", *SMALL), lying_there)


def test_text_of_its_own_needs_the_servers_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f'[run]\noutput = "{tmp_path}/run"\n[data]\nprivate = "own"\n'
        "[controls]\ncentralised = false\n"
    )
    assert cli.main(["device", str(file), "--id", "0"]) == cli.FAILED
    assert "lacks starts/; copy them from the server's run folder" in capsys.readouterr().err
    assert cli.main(["run", str(file)]) == cli.USAGE
    assert "data.private must be 'shares' in one process" in capsys.readouterr().err
    assert cli.main(["device", str(file), "--id", "8"]) == cli.USAGE
    assert "0 to federation.num_devices - 1 = 7, got 8" in capsys.readouterr().err


def test_device_with_its_own_text_trains_on_it(tmp_path: Path) -> None:
    """The common start comes from the server's folder, the text from network.data."""
    own = tmp_path / "own"
    own.mkdir()
    lines = [{"text": f"a private note, number {i}", "source": f"note {i}"} for i in range(40)]
    (own / "medical.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    settings = (*SMALL, "data.private='own'", f"network.data='{own}'")
    with pytest.raises(TooFewUploads):
        pipeline.run(tiny(tmp_path / "server", *settings), lying_there)
    (tmp_path / "machine").mkdir()
    for name in ("starts", "tokenizer"):
        shutil.copytree(tmp_path / "server" / name, tmp_path / "machine" / name)
    package = pipeline.one_device(tiny(tmp_path / "machine", *settings), 1)
    manifest = json.loads((package / "manifest.json").read_text())
    assert manifest["device"] == "device-01"
    assert manifest["architecture"] == "qwen2"
    assert manifest["tokens"] > 0
