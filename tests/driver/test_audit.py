"""The chain of audit lines: what was removed, altered or put in shows."""

import json
from pathlib import Path

import pytest

from deepfusion.cli import DONE, REFUSED, main
from deepfusion.wire.audit import NOTHING, Audit, examine, verify

from .uploads import packed


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    packed(tmp_path / "up")
    audit = Audit(tmp_path / "audit.jsonl")
    for index in range(4):
        verdict = "accepted" if index else "refused"
        reason = "" if index else "tokens"
        audit.append(
            tmp_path / "up", device=f"device-{index}", node="n", verdict=verdict, reason=reason
        )
    return audit


def lines_of(audit: Audit) -> list[str]:
    return audit.path.read_text().splitlines()


def test_whole_chain_is_accepted(audit: Audit) -> None:
    assert verify(audit.path) == verify(audit.path, audit.head) == audit.head != NOTHING
    assert [json.loads(line)["device"][-1] for line in lines_of(audit)] == list("0123")


def test_missing_file_is_an_empty_chain(tmp_path: Path) -> None:
    assert verify(tmp_path / "none.jsonl") == NOTHING


@pytest.mark.parametrize("number", [0, 1, 2])
def test_removed_line_shows(audit: Audit, number: int) -> None:
    lines = lines_of(audit)
    del lines[number]
    audit.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"line {number + 1} must follow line {number}"):
        verify(audit.path)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_altered_line_shows(audit: Audit, number: int) -> None:
    lines = lines_of(audit)
    lines[number] = lines[number].replace('"device-', '"Device-')
    audit.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"line {number + 2} must follow"):
        verify(audit.path)


def test_lines_cut_off_at_the_end_show_against_the_head(audit: Audit) -> None:
    audit.path.write_text("\n".join(lines_of(audit)[:3]) + "\n")
    verify(audit.path)
    with pytest.raises(ValueError, match="lines are missing"):
        verify(audit.path, audit.head)


def test_altered_last_line_shows_against_the_head(audit: Audit) -> None:
    text = audit.path.read_text()
    audit.path.write_text(text.replace('"device-3"', '"device-9"'))
    with pytest.raises(ValueError, match="must end at"):
        verify(audit.path, audit.head)


def test_line_that_is_no_json_shows(audit: Audit) -> None:
    with audit.path.open("a") as stream:
        stream.write("[]\n")
    with pytest.raises(ValueError, match="line 5 must follow line 4"):
        verify(audit.path)


def test_resumed_run_goes_on_with_the_chain(audit: Audit, tmp_path: Path) -> None:
    with audit.path.open("a") as stream:
        stream.write('{"torn by a kill')
    again = Audit(audit.path)
    assert again.head == audit.head
    again.append(tmp_path / "up", device="device-4", node="n", verdict="accepted", reason="")
    assert len(lines_of(again)) == 5
    assert verify(again.path, again.head) == again.head


def test_broken_chain_is_not_written_to(audit: Audit) -> None:
    audit.path.write_text("\n".join(lines_of(audit)[1:]) + "\n")
    with pytest.raises(ValueError, match="line 1 must follow"):
        Audit(audit.path)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Two audited uploads, and the head as a report prints it."""
    audit = Audit(tmp_path / "audit.jsonl")
    for device in ("device-00", "device-01"):
        packed(tmp_path / "uploads" / device, device=device)
        upload = tmp_path / "uploads" / device
        audit.append(upload, device=device, node="", verdict="accepted", reason="")
    said = f"Last line of the audit chain: SHA-256 {audit.head}."
    (tmp_path / "report.md").write_text(said)
    return tmp_path


def test_command_follows_the_chain(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(run_folder)]) == DONE
    assert "2 lines follow each other" in capsys.readouterr().out
    # lines after the report are no fault: a later round adds them
    audit = Audit(run_folder / "audit.jsonl")
    audit.append(run_folder, device="device-02", node="", verdict="refused", reason="late")
    assert examine(run_folder) == (3, audit.head)


@pytest.mark.parametrize("fault", ["cut", "altered", "changed upload"])
def test_command_refuses_a_broken_chain(
    run_folder: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder / "audit.jsonl"
    lines = path.read_text().splitlines()
    if fault == "cut":
        path.write_text(lines[0] + "\n")
        wanted = "which report.md names; lines are missing"
    elif fault == "altered":
        path.write_text("\n".join([lines[0].replace("accepted", "refused"), lines[1]]) + "\n")
        wanted = "line 2 must follow line 1"
    else:
        manifest = run_folder / "uploads" / "device-01" / "manifest.json"
        manifest.write_text(manifest.read_text().replace("1234", "4321"))
        wanted = "the upload was changed after it was judged"
    assert main(["validate", str(run_folder)]) == REFUSED
    assert wanted in capsys.readouterr().err
