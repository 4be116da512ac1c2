"""The device's half without a network: what it stores, what it decides, what it keeps to itself."""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from deepfusion import cli, config
from deepfusion.data.documents import CorpusError
from deepfusion.data.prepared import documents_of
from deepfusion.flower import joined, launch, records
from deepfusion.flower.client_app import DeviceFailed, _nothing_quoted
from deepfusion.flower.joined import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "out" / "network").mkdir(parents=True)
    return Place(device=1, output=str(tmp_path / "out"), run_device="cpu", threads=1, data="")


def part(content: bytes, offset: int, length: int) -> dict[str, Any]:
    sha256 = hashlib.sha256(content).hexdigest()
    return {"sha256": sha256, "bytes": len(content), "offset": offset, "length": length}


def test_bytes_survive_the_message(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000 + bytes(3 * records.PIECE_BYTES)
    (tmp_path / "file").write_bytes(content)
    packed = records.pack({"a": [1, "x"]}, records.read_pieces(tmp_path / "file"))
    assert records.facts_of(packed) == {"a": [1, "x"]}
    pieces = list(records.pieces_of(packed))
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) == records.PIECE_BYTES
    assert list(records.pieces_of(packed)) == [], "a piece is forgotten once it was read"
    assert list(records.pieces_of(records.pack({}))) == []


def test_messages_of_another_form_are_refused() -> None:
    for record in (RecordDict(), RecordDict({"facts": ConfigRecord({"json": "[1]"})})):
        with pytest.raises(ValueError, match="message: facts must be"):
            records.facts_of(record)
    array = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=b"1234")
    with pytest.raises(ValueError, match="bytes must be uint8, got 'float32'"):
        list(records.pieces_of(RecordDict({"bytes": ArrayRecord({"0": array})})))


def test_a_file_comes_in_parts_and_goes_on_after_a_kill(place: Place) -> None:
    content = bytes(range(200))
    joined.store(place, [part(content, 0, 120)], [content[:50], content[50:120]])
    asked = {"protocol": 1, "device": "device-01"}
    sha256 = hashlib.sha256(content).hexdigest()
    said = joined.hello(place, asked)
    assert (said["held"], said["begun"], said["refusal"]) == ([], {sha256: 120}, "")
    # killed while it wrote the next part: the part is sent again
    with (place.folder / "received" / f"{sha256}.partial").open("ab") as torn:
        torn.write(b"torn")
    joined.store(place, [part(content, 120, 80)], [content[120:]])
    assert (place.folder / "received" / sha256).read_bytes() == content
    assert joined.hello(place, asked)["held"] == [sha256]


def test_a_file_that_is_not_the_one_named_is_thrown_away(place: Place) -> None:
    content = b"0123456789"
    with pytest.raises(ValueError, match="must have sha256"):
        joined.store(place, [part(content, 0, 10)], [b"9876543210"])
    with pytest.raises(ValueError, match="ends at 0, got 5 on"):
        joined.store(place, [part(content, 5, 5)], [content[5:]])
    with pytest.raises(ValueError, match="must have 4 bytes more, got none"):
        joined.store(place, [part(content, 0, 10)], [content[:6]])
    assert not [one for one in (place.folder / "received").iterdir() if one.suffix == ""]


def test_hello_of_another_protocol_or_name_is_refused(place: Place) -> None:
    assert joined.hello(place, {"protocol": 2})["refusal"] == "protocol"
    assert joined.hello(place, {"protocol": 1, "device": "device-00"})["refusal"] == "device"
    assert joined.hello(place, {"protocol": 1})["refusal"] == "", "asked for its name"


@pytest.mark.parametrize("name", ["../x", "uploads/x", "starts/../x", "starts/a/b", "starts/"])
def test_files_of_the_server_lie_where_they_belong(place: Place, name: str) -> None:
    with pytest.raises(ValueError, match=r"must lie in starts/ or tokenizer/"):
        joined.train(place, {"files": {name: "0"}, "config": {}, "architecture": "gpt2"})


def test_the_device_decides_for_itself_where_it_computes(place: Place, tmp_path: Path) -> None:
    server = config.Config()
    tables = json.loads(json.dumps({k: v for k, v in asdict(server).items() if k != "network"}))
    tables["run"] |= {"output": "/srv/run", "device": "cuda:3", "threads": 64, "seed": 11}
    found = joined.resolved(place, tables, tmp_path)
    assert (found.run.output, found.run.device, found.run.threads) == (place.output, "cpu", 1)
    assert found.run.seed == 11
    assert found.hash("devices", "upload") == server.hash("devices", "upload")
    tables["data"] |= {"source": "files", "path": "/srv/text"}
    here = replace(place, data=str(tmp_path))
    assert joined.resolved(here, tables, tmp_path).data.path == str(tmp_path)
    with pytest.raises(config.ConfigError, match="unknown key"):
        joined.resolved(place, {**tables, "run": {**tables["run"], "suprise": 1}}, tmp_path)


def test_text_of_its_own_is_read_from_where_the_device_says(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    lines = [{"text": f"note {index}", "source": f"s{index}"} for index in range(3)]
    (own / "medical.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    given = {"data": {"private": "own"}, "controls": {"centralised": False}}
    found = documents_of(config.resolve(given), 0, str(own))
    assert [one.text for one in found] == ["note 0", "note 1", "note 2"]
    with pytest.raises(CorpusError, match=r"network\.data must be the folder"):
        documents_of(config.resolve(given), 0, "")
    (own / "medical.jsonl").rename(own / "poems.jsonl")
    with pytest.raises(CorpusError, match="at least one of"):
        documents_of(config.resolve(given), 0, str(own))


def test_an_exception_leaves_as_class_and_number(place: Place) -> None:
    secret = "patient Jane Doe"
    for error, wanted in (
        (ValueError(secret), "ValueError 0"),
        (OSError(28, "No space left", f"/home/{secret}"), "OSError 28"),
    ):
        with pytest.raises(DeviceFailed) as caught, _nothing_quoted(place):
            raise error
        assert str(caught.value) == wanted
        assert caught.value.__suppress_context__, "a chained traceback would tell it"
    assert secret in (place.folder / "network" / "device.log").read_text()


def test_nothing_calls_out(tmp_path: Path) -> None:
    found = launch.environment(tmp_path, {"A": "b"})
    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    assert found["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert found["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert (found["FLWR_HOME"], found["A"]) == (str(tmp_path), "b")
    # and Flower reads what we set: a misspelt name would be ignored quietly
    from flwr.supercore import constant, telemetry

    assert constant.FLWR_DISABLE_UPDATE_CHECK == "FLWR_DISABLE_UPDATE_CHECK"
    assert "FLWR_TELEMETRY_ENABLED" in Path(str(telemetry.__file__)).read_text()


def test_where_and_how_it_is_sent_does_not_make_another_run() -> None:
    one, other = config.resolve({}), config.resolve({"network": {"port": 9000, "device": 3}})
    assert one.hash() == other.hash()
    assert one.hash() != config.resolve({"run": {"seed": 8}}).hash()


def test_join_without_keys_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'[run]\noutput = "{tmp_path}/out"\n[network]\nkeys = "{tmp_path}"\n')
    assert cli.main(["join", str(file)]) == cli.USAGE
    assert "network.device must be the device's number" in capsys.readouterr().err
    assert cli.main(["join", str(file), "--set", "network.device=0"]) == cli.FAILED
    told = capsys.readouterr().err
    assert "network.keys must be a folder with ca.crt" in told
    assert "copy keys/device-NN" in told


def test_answering_does_not_cost_an_import_of_torch() -> None:
    code = "import sys, deepfusion.flower.client_app; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
