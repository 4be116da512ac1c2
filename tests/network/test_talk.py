"""The server's half of the protocol against scripted devices: no process, no network."""

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, RecordDict

from deepfusion.flower import records
from deepfusion.flower.collection import (
    SentFile,
    Standing,
    announced,
    parcels,
)
from deepfusion.flower.talk import RETURNS, Talk
from deepfusion.messages import UploadRefused
from deepfusion.wire.package import decode_embedding
from tests.driver.uploads import DIMENSIONS, SHARD_BYTES, packed, rewrite
from tests.network.scripted import Device, talk_to, wanted


@pytest.fixture
def package(tmp_path: Path) -> Path:
    packed(tmp_path / "package")
    return tmp_path / "package"


def same_bytes(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def test_an_upload_comes_in_whole(tmp_path: Path, package: Path) -> None:
    device, what = Device(package), wanted(tmp_path)
    standing = talk_to(device, what)
    upload = what.folder / "uploads" / "device-00"
    assert standing.status == "done"
    assert same_bytes(upload, package)
    # 6400 bytes in messages of 4096
    shards = [f"shard {index}" for index in range(len(list(package.glob("*.safetensors"))))]
    assert len(shards) > 1
    assert device.asked == ["hello", "base", "train", *shards, "close"]
    assert device.received == (tmp_path / "start").read_bytes()
    assert standing.bytes_up == sum(path.stat().st_size for path in upload.iterdir())
    assert standing.bytes_down == 6400
    assert decode_embedding((upload / "embedding.bin").read_bytes(), DIMENSIONS).shape == (
        DIMENSIONS,
    )


def test_an_upload_that_lies_there_whole_is_not_sent_again(tmp_path: Path, package: Path) -> None:
    what = wanted(tmp_path)
    talk_to(Device(package), what)
    again = Device(package)
    assert talk_to(again, what).status == "done"
    assert again.asked == ["hello", "base", "train", "close"]
    upload = what.folder / "uploads" / "device-00"
    (upload / "manifest.json").write_text("{}")
    third = Device(package)
    assert talk_to(third, what).status == "done"
    assert "shard 0" in third.asked, "another package is no excuse"
    assert same_bytes(upload, package)


GONE = Error(code=5, reason="node unavailable")


def test_a_device_that_vanishes_is_asked_for_the_rest_alone(tmp_path: Path, package: Path) -> None:
    device = Device(package)
    genuine, gone = device.shard, [True]

    def second_is_lost(facts: dict[str, Any]) -> RecordDict:
        if facts["index"] == 1 and gone:
            gone.pop()
            device.faults["shard"] = [GONE]
        return genuine(facts)

    device.shard = second_is_lost  # type: ignore[method-assign]
    standing = talk_to(device, wanted(tmp_path))
    assert standing.status == "done"
    assert standing.retries == 1
    assert device.asked.count("shard 0") == 1, "a received shard is never asked for again"
    assert device.asked.count("hello") == 2


def test_a_device_that_is_always_lost_is_not_asked_for_ever(tmp_path: Path, package: Path) -> None:
    lost = Device(package, base=[GONE] * 200)
    standing = Standing()
    talk = Talk(wanted(tmp_path).devices[0], wanted(tmp_path), standing)
    while talk.is_idle:
        ask = talk.begin()
        while ask is not None:
            ask = talk.take(lost.answer(ask))
    assert (standing.status, standing.reason) == ("failed", f"lost more than {RETURNS} times")
    assert lost.asked.count("base") == RETURNS + 1


def test_facts_have_a_length(tmp_path: Path, package: Path) -> None:
    long = records.pack({"x": "y" * records.FACTS_CHARACTERS})
    standing = talk_to(Device(package, hello=[long]), wanted(tmp_path))
    assert standing.status == "refused"
    assert "facts must be at most" in standing.reason


def test_another_package_after_a_restart_is_not_mixed_in(tmp_path: Path, package: Path) -> None:
    what = wanted(tmp_path)
    begun = what.folder / "inbox" / "device-00"
    begun.mkdir(parents=True)
    (begun / "manifest.json").write_text("{}")
    first = sorted(package.glob("*.safetensors"))[0].name
    (begun / first).write_bytes(b"of another package")
    assert talk_to(Device(package), what).status == "done"
    assert same_bytes(what.folder / "uploads" / "device-00", package)


def test_a_spoilt_shard_is_asked_again_and_counted(tmp_path: Path, package: Path) -> None:
    spoilt = records.pack({}, [b"x" * 7])
    device = Device(package, shard=[spoilt])
    standing = talk_to(device, wanted(tmp_path))
    assert standing.status == "done"
    assert standing.retries == 1
    assert standing.bytes_wasted > 0
    again = Device(package, shard=[records.pack({}, [b"x" * 7]) for _ in range(3)])
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "package").symlink_to(package)
    standing = talk_to(again, wanted(tmp_path / "again"))
    assert standing.status == "refused"
    assert again.verdict.startswith("refused: shard model-00001")


def test_words_of_an_exception_are_not_kept(tmp_path: Path, package: Path) -> None:
    private = Error(code=2, reason="<class 'ValueError'>:<'patient Jane Doe, 12 May'>")
    standing = talk_to(Device(package, train=[private]), wanted(tmp_path))
    assert (standing.status, standing.reason) == ("failed", "flower error 2")
    ours = Error(code=2, reason="<class 'x.DeviceFailed'>:<'DiskFull 28'>")
    standing = talk_to(Device(package, train=[ours]), wanted(tmp_path))
    assert (standing.status, standing.reason) == ("failed", "DiskFull 28")


def test_a_crash_is_forgiven_twice(tmp_path: Path, package: Path) -> None:
    crash = Error(code=8, reason="crashed")
    assert talk_to(Device(package, train=[crash, crash]), wanted(tmp_path)).status == "done"
    standing = talk_to(Device(package, train=[crash] * 3), wanted(tmp_path))
    assert (standing.status, standing.reason) == ("failed", "flower error 8")


@pytest.mark.parametrize(
    "said, reason",
    [
        ({"device": "device-01"}, "node must be device-00, says it is 'device-01'"),
        ({"protocol": 2}, "protocol must be 1, got 2"),
        ({"held": "all"}, "hello must say which files are held"),
        ({"begun": {"x": "y"}}, "hello must say which files are held"),
        ({"refusal": "protocol"}, "node must be device-00"),
    ],
)
def test_a_hello_that_does_not_agree_ends_it(
    tmp_path: Path, package: Path, said: dict[str, Any], reason: str
) -> None:
    right = {"protocol": 1, "device": "device-00", "held": [], "begun": {}, "versions": {}}
    device = Device(package, hello=[records.pack({**right, **said})])
    standing = talk_to(device, wanted(tmp_path))
    assert standing.status == "refused"
    assert reason in standing.reason
    assert device.asked == ["hello", "close"]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"device": "device-01"}, "device must be 'device-00', got 'device-01'"),
        ({"architecture": "other"}, "architecture must be 'toy', got 'other'"),
        ({"base_revision": "f" * 64}, "base revision must be"),
        ({"shards": []}, "shards, got 0"),
        ({"surplus": 1}, "unknown key 'surplus'"),
    ],
)
def test_what_is_announced_wrongly_is_not_fetched(
    tmp_path: Path, package: Path, changes: dict[str, Any], reason: str
) -> None:
    what = wanted(tmp_path)
    rewrite(package, **changes)
    device = Device(package)
    standing = talk_to(device, what)
    assert standing.status == "refused"
    assert reason in standing.reason
    assert not any(one.startswith("shard") for one in device.asked)


def test_announced_lengths_and_names_are_bounded(tmp_path: Path, package: Path) -> None:
    what = wanted(tmp_path)
    text = (package / "manifest.json").read_text()
    assert len(announced(text, what.devices[0], what).shards) > 1
    with pytest.raises(UploadRefused, match="at most 4096 bytes"):
        announced(text, what.devices[0], wanted(tmp_path, max_bytes=SHARD_BYTES))
    shards = json.loads(text)["shards"]
    for index, (key, value) in enumerate({"bytes": SHARD_BYTES + 1, "name": "../x"}.items()):
        wrong = [dict(one) for one in shards]
        wrong[index][key] = value
        rewrite(package, shards=wrong)
        with pytest.raises(UploadRefused, match="shard"):
            announced((package / "manifest.json").read_text(), what.devices[0], what)


def test_parcels_begin_where_the_device_stands() -> None:
    sent = [SentFile("a", "", 10, "A"), SentFile("b", "", 3, "B"), SentFile("c", "", 4, "C")]
    plan = parcels(sent, ["B"], {"A": 4}, 5)
    assert [[(p["sha256"], p["offset"], p["length"]) for p in one] for one in plan] == [
        [("A", 4, 5)],
        [("A", 9, 1), ("C", 0, 4)],
    ]
    assert parcels(sent, ["A", "B", "C"], {}, 5) == [[]]
    # whole but not renamed: one byte more, and with it the check
    assert parcels(sent[:1], [], {"A": 10}, 5)[0][0]["offset"] == 9
