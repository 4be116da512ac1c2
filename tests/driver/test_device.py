"""A device: its training, its package; and all devices in turn."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepfusion import files, metrics
from deepfusion.checkpoints import load_state, save_state
from deepfusion.config import Config
from deepfusion.data import corpora
from deepfusion.data.batches import pack
from deepfusion.data.encoding import make_encoder
from deepfusion.data.made import held_by, make_world
from deepfusion.data.partition import partition, split_public
from deepfusion.device import gather as gathering
from deepfusion.device.gather import DeviceJob, gather
from deepfusion.device.train import common_start, train_device
from deepfusion.messages import Manifest
from deepfusion.metrics import Recorder
from deepfusion.models import build
from deepfusion.wire.package import read_state
from tests.driver.tiny import tiny

CONFIG = Config()
CONFIG = replace(
    CONFIG,
    data=replace(CONFIG.data, made_entities=16, context_length=32, vocab_size=400),
    devices=replace(
        CONFIG.devices, steps=6, init_steps=3, batch_size=4, lr=0.02, checkpoint_steps=2
    ),
)


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    metrics.silence(True)
    yield
    metrics.silence(False)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all devices share: the tokenizer and the start of a tiny architecture."""
    folder = tmp_path_factory.mktemp("shop")
    world = corpora.load(CONFIG.data, 7)
    public, _ = split_public(world, CONFIG.data, 7)
    tokenizer = corpora.train_tokenizer([one.text for one in public], CONFIG.data.vocab_size)
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    for kind in ("llama", "gpt2"):
        (folder / kind).mkdir()
        config = tiny(kind).config
        config.vocab_size = len(tokenizer)
        config.save_pretrained(str(folder / kind))
        packed = pack(public, tokenizer, CONFIG.data.context_length, 7)
        state = common_start(str(folder / kind), packed, tokenizer, CONFIG, Recorder(None))
        save_state(folder / f"{kind}.safetensors", state)
    return folder


def jobs(shop: Path, run: Path, config: Config = CONFIG) -> list[DeviceJob]:
    _, private = split_public(corpora.load(CONFIG.data, 7), CONFIG.data, 7)
    return [
        DeviceJob(
            f"device-{index}",
            str(shop / kind),
            shard,
            shop / f"{kind}.safetensors",
            shop / "tokenizer",
            config,
            run,
        )
        for index, (kind, shard) in enumerate(
            zip(("llama", "gpt2"), partition(private, 2, CONFIG.data, 7), strict=True)
        )
    ]


def content(folder: Path) -> dict[str, str]:
    return {path.name: files.sha256_of(path) for path in sorted(folder.iterdir())}


def test_common_start_is_repeatable_and_trained(shop: Path) -> None:
    start, _ = load_state(shop / "llama.safetensors")
    tokenizer = corpora.load_tokenizer(shop / "tokenizer")
    public, _ = split_public(corpora.load(CONFIG.data, 7), CONFIG.data, 7)
    packed = pack(public, tokenizer, CONFIG.data.context_length, 7)

    def again(config: Config) -> dict[str, Tensor]:
        return common_start(str(shop / "llama"), packed, tokenizer, config, Recorder(None))

    assert all(torch.equal(value, start[name]) for name, value in again(CONFIG).items())
    untrained = again(replace(CONFIG, devices=replace(CONFIG.devices, init_steps=0)))
    assert not torch.equal(untrained["lm_head.weight"], start["lm_head.weight"])


def test_gather_packs_what_training_gave(shop: Path, tmp_path: Path) -> None:
    job = jobs(shop, tmp_path)[0]
    (folder,) = gather([job])
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    start, _ = load_state(job.start)
    tokenizer = corpora.load_tokenizer(job.tokenizer)
    trained = train_device(
        job.architecture,
        start,
        job.documents,
        tokenizer,
        CONFIG,
        job.device,
        make_encoder(CONFIG.embedding),
        Recorder(None),
    )
    assert manifest.device == "device-0"
    assert manifest.tokens == trained.tokens
    assert manifest.tokenizer_fingerprint == corpora.fingerprint(tokenizer)
    for name, value in read_state(folder, manifest, start).items():
        update = (trained.state[name] - start[name]).abs().max()
        assert update > 0
        assert (value - trained.state[name]).abs().max() <= update / 100
    lines = Recorder(tmp_path / "metrics.jsonl").lines("device-0")
    assert [line["step"] for line in lines] == list(range(CONFIG.devices.steps))


def test_same_seed_same_uploads_another_seed_others(shop: Path, tmp_path: Path) -> None:
    first, second = (gather(jobs(shop, tmp_path / name)) for name in ("a", "b"))
    assert list(map(content, first)) == list(map(content, second))
    other = replace(CONFIG, run=replace(CONFIG.run, seed=8))
    third = gather(jobs(shop, tmp_path / "c", other))
    assert content(third[0]) != content(first[0])


def test_what_is_done_is_not_trained_again(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = jobs(shop, tmp_path)
    gather(asked)
    trained: list[str] = []
    run_device = gathering.run_device
    monkeypatch.setattr(
        gathering, "run_device", lambda job: (trained.append(job.device), run_device(job))
    )
    gather(asked)
    assert trained == []
    # a shard that lost a document, and an upload that lost a byte, are done again
    gather([replace(asked[0], documents=asked[0].documents[1:]), asked[1]])
    assert trained == ["device-0"]
    shard = next(asked[1].upload.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    gather(asked[1:])
    assert trained == ["device-0", "device-1"]


def test_two_workers_give_the_same_uploads(shop: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    try:
        alone = gather(jobs(shop, tmp_path / "a"))
    finally:
        torch.set_num_threads(threads)
    together = gather(jobs(shop, tmp_path / "b"), workers=2)
    assert list(map(content, alone)) == list(map(content, together))
    lines = [Recorder(tmp_path / name / "metrics.jsonl").lines("device-1") for name in "ab"]
    assert lines[0] == lines[1] != []


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from deepfusion import training
from deepfusion.device.gather import gather
from tests.driver.test_device import jobs

torch.set_num_threads(1)
cross_entropy, steps = training.cross_entropy, []

def dies(*arguments):
    steps.append(1)
    if len(steps) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return cross_entropy(*arguments)

training.cross_entropy = dies
gather(jobs(Path(sys.argv[1]), Path(sys.argv[2]))[:1])
"""


def test_kill_9_and_run_again_is_the_uninterrupted_run(shop: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (whole,) = gather(jobs(shop, tmp_path / "whole")[:1])
        broken = tmp_path / "broken"
        ended = subprocess.run([sys.executable, "-c", KILLED, shop, broken], check=False)
        assert ended.returncode == -signal.SIGKILL
        assert not (broken / "uploads").exists()
        assert len(list((broken / "devices").glob("device-0-*.safetensors"))) == 1
        (resumed,) = gather(jobs(shop, broken)[:1])
    finally:
        torch.set_num_threads(threads)
    assert content(resumed) == content(whole)
    records = [
        Recorder(p / "metrics.jsonl").lines("device-0") for p in (tmp_path / "whole", broken)
    ]
    assert records[0] == records[1]
    assert not list((broken / "devices").glob("*.safetensors"))


BUSY = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from deepfusion.device.gather import _begin_worker
if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), _begin_worker, (1,)) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 120).result()
"""


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_worker_ends_with_the_run_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        worker = int(run.stdout.readline())
        assert _is_running(worker)
        run.kill()
    patience = time.monotonic() + 30
    while _is_running(worker) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not _is_running(worker)


def test_a_device_learns_its_own_facts_and_nobody_elses() -> None:
    """Of a small world a demo model knows its own facts after 80 steps, and others by chance."""
    config = replace(
        CONFIG,
        data=replace(CONFIG.data, made_entities=24, context_length=64, vocab_size=1024),
        devices=replace(CONFIG.devices, steps=80, init_steps=40, batch_size=8, lr=0.02),
    )
    world = make_world(7, config.data.made_entities)
    public, private = split_public(world.corpora, config.data, 7)
    shards = partition(private, 3, config.data, 7)
    tokenizer = corpora.train_tokenizer([one.text for one in public], config.data.vocab_size)
    packed = pack(public, tokenizer, config.data.context_length, 7)
    start = common_start("llama", packed, tokenizer, config, Recorder(None))
    shard = min(shards, key=len)
    encode = make_encoder(config.embedding)
    trained = train_device(
        "llama", start, shard, tokenizer, config, "device-0", encode, Recorder(None)
    )
    model = build.build("llama", len(tokenizer), torch.Generator(), 64)
    build.load_state(model, dict(trained.state))

    @torch.no_grad()
    def recall(own: bool) -> float:
        mine = held_by(world.facts, shard)
        asked = [f for f in held_by(world.facts, private) if (f in mine) == own]
        right = 0
        for fact in asked:
            prompt, answer = (tokenizer(text)["input_ids"] for text in (fact.prompt, fact.answer))
            logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
            right += logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
        return right / len(asked)

    assert recall(own=True) > 0.5
    assert recall(own=False) < 0.25
