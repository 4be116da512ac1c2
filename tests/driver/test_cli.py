"""The command line: verbs, exit codes, one sentence for each fault."""

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from deepfusion import cli, metrics
from deepfusion.config import Config, load
from deepfusion.files import DiskFull
from deepfusion.messages import TooFewUploads, TransportFailed, UploadRefused
from deepfusion.wire.expected import save_expected

from .uploads import expected, packed

Captured = pytest.CaptureFixture[str]


def test_init_writes_a_file_that_loads(tmp_path: Path, capsys: Captured) -> None:
    assert cli.main(["init", str(tmp_path / "new" / "run.toml")]) == 0
    assert load(tmp_path / "new" / "run.toml") == Config()
    assert "next: deepfusion run" in capsys.readouterr().out


def test_init_without_a_file_prints(capsys: Captured) -> None:
    assert cli.main(["init"]) == 0
    assert capsys.readouterr().out == Config().to_toml(template=True)


def test_init_never_overwrites(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "run.toml").write_text("mine")
    assert cli.main(["init", str(tmp_path / "run.toml")]) == 2
    assert (tmp_path / "run.toml").read_text() == "mine"
    assert "already exists" in capsys.readouterr().err


def test_validate_finds_the_run_folder(tmp_path: Path, capsys: Captured) -> None:
    save_expected(tmp_path / "expected", expected())
    upload = tmp_path / "uploads" / "device-00"
    packed(upload)
    assert cli.main(["validate", str(upload)]) == 0
    assert "device-00: accepted: toy, " in capsys.readouterr().out
    (upload / "embedding.bin").write_bytes(bytes(20))
    assert cli.main(["validate", str(upload)]) == 4
    error = capsys.readouterr().err
    assert error.startswith("deepfusion validate: device-00: embedding.bin must have sha256")
    assert error.count("\n") == 1


def test_validate_needs_a_run_folder(tmp_path: Path, capsys: Captured) -> None:
    packed(tmp_path / "device-00")
    assert cli.main(["validate", str(tmp_path / "device-00")]) == 2
    assert "must lie inside a run folder" in capsys.readouterr().err
    assert cli.main(["validate", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["validate"], ["init", "--loud"], ["init", "a", "b"]], ids=str
)
def test_usage_is_exit_2(arguments: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: deepfusion" in capsys.readouterr().err


def test_set_where_it_means_nothing_is_refused(tmp_path: Path, capsys: Captured) -> None:
    assert cli.main(["init", str(tmp_path / "x.toml"), "--set", "run.seed=1"]) == 2
    assert "init takes no --set" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fault, code",
    [
        (ValueError("distill: loss is not finite"), 1),
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT), "text.jsonl"), 1),
        (NotImplementedError("cuda: no such device"), 1),
        (DiskFull("runs/demo/base: no space left on the disk"), 1),
        (TooFewUploads("5 of 6 uploads"), 3),
        (UploadRefused("device-07: no"), 4),
        (TransportFailed("finished:failed"), 5),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: str(value),
)
def test_exit_codes(
    fault: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def verb(target: Path | None, overrides: Sequence[str]) -> int:
        raise fault

    monkeypatch.setitem(cli.VERBS, "init", (verb, "FILE", False))
    assert cli.main(["init"]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def verb(target: Path | None, overrides: Sequence[str]) -> int:
        raise AssertionError("plan counts more rows than slots")

    monkeypatch.setitem(cli.VERBS, "init", (verb, "FILE", False))
    with pytest.raises(AssertionError, match="plan counts"):
        cli.main(["init"])


def test_quiet_silences_progress(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_LINES", 0.0)

    def verb(target: Path | None, overrides: Sequence[str]) -> int:
        return len(list(metrics.progress(range(3), "x"))) - 3

    monkeypatch.setitem(cli.VERBS, "init", (verb, "FILE", False))
    assert cli.main(["init", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main(["init"]) == 0
    assert "x: 3/3" in capsys.readouterr().err


def test_module_is_a_command() -> None:
    command = [sys.executable, "-m", "deepfusion.cli", "init"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("[run]")


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_help_ends_with_an_example_that_parses(verb: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith(f"example: {cli.EXAMPLES[verb]}")
    program, *arguments = cli.EXAMPLES[verb].split()
    assert program == "deepfusion"
    assert cli.parser().parse_args(arguments).verb == verb


@pytest.mark.parametrize("verb", ["serve", "join", "keys"])
def test_without_flower_one_sentence_says_what_to_install(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main([verb, str(tmp_path)]) == cli.FAILED
    assert "pip install 'deepfusion-moe[flower]'" in capsys.readouterr().err
