"""Stage outputs are whole or absent, and a killed stage goes on to the same bits."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deepfusion import files
from deepfusion.checkpoints import (
    StageStore,
    find_ties,
    load_state,
    save_model,
    save_state,
)
from deepfusion.step_checkpoint import StepCheckpoint


def test_state_round_trip_keeps_ties_and_facts(tmp_path: Path) -> None:
    shared = torch.randn(3, 5)
    state = {
        "b": shared,
        "a": shared,
        "view": shared[1:],
        "n": torch.arange(3),
        "e": torch.empty(0),
    }
    save_state(tmp_path / "x.safetensors", state, {"step": 3, "why": ["a", None]})
    found, facts = load_state(tmp_path / "x.safetensors")
    assert facts == {"step": 3, "why": ["a", None]}
    assert set(found) == set(state)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert found["a"].data_ptr() == found["b"].data_ptr() != found["view"].data_ptr()


def test_ties_are_found_on_meta_tensors() -> None:
    embed, head = nn.Embedding(5, 3, device="meta"), nn.Linear(3, 5, bias=False, device="meta")
    module = nn.ModuleDict({"embed": embed, "head": head})
    assert find_ties(module.state_dict()) == {}
    head.weight = embed.weight
    assert find_ties(module.state_dict()) == {"head.weight": "embed.weight"}


def test_failing_write_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_state(path, {"a": torch.zeros(2)})

    def out_of_space(tensors: object, filename: Path, metadata: object) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_file", out_of_space)
    with pytest.raises(files.DiskFull, match=r"x.safetensors: no space left.*free some space"):
        save_state(path, {"a": torch.ones(2)})
    assert [one.name for one in tmp_path.iterdir()] == ["x.safetensors"]
    assert torch.equal(load_state(path)[0]["a"], torch.zeros(2))


def test_really_full_disk_is_one_sentence(tmp_path: Path) -> None:
    """A limit on the length of a file stands for a full disk: the system refuses the bytes."""
    body = """
import resource, signal, sys, torch
from pathlib import Path
from deepfusion.checkpoints import save_state
from deepfusion.files import DiskFull
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_state(Path(sys.argv[1]), {"a": torch.zeros(1 << 20)})
except DiskFull as error:
    print(error)
"""
    path = tmp_path / "x.safetensors"
    ran = subprocess.run(
        [sys.executable, "-c", body, path], capture_output=True, text=True, check=False
    )
    assert ran.stdout.startswith(f"{path}: no space left on the disk"), ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    body = """
import os, signal, sys
from pathlib import Path
from deepfusion import files
with files.whole(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "x.txt"
    path.write_text("old")
    ran = subprocess.run([sys.executable, "-c", body, path], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert [one.name for one in tmp_path.iterdir()] == ["x.txt"]


def test_process_killed_while_replacing_a_folder_leaves_none_or_a_whole_one(tmp_path: Path) -> None:
    """Removing the old folder takes many steps: a kill among them must not leave a thinned one."""
    body = """
import os, shutil, signal, sys
from pathlib import Path
from deepfusion import files
path = Path(sys.argv[1])
def write(text):
    with files.whole(path) as partial:
        partial.mkdir()
        for name in "abc":
            (partial / name).write_text(text)
write("old")
def killed_half_way(folder):
    (Path(folder) / "a").unlink()
    os.kill(os.getpid(), signal.SIGKILL)
shutil.rmtree = killed_half_way
write("new")
"""
    ran = subprocess.run([sys.executable, "-c", body, tmp_path / "up"], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert {path.name: path.read_text() for path in (tmp_path / "up").iterdir()} == dict.fromkeys(
        "abc", "new"
    )
    with files.whole(tmp_path / "up") as partial:
        partial.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["up"]


def test_model_folder_is_replaced_whole(tmp_path: Path) -> None:
    class Model:
        def __init__(self, name: str) -> None:
            self.name = name

        def save_pretrained(self, folder: str, /) -> None:
            (Path(folder) / self.name).write_text("x")
            if self.name == "broken":
                raise KeyboardInterrupt

    save_model(tmp_path / "base", Model("first"))
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "base", Model("broken"))
    assert [one.name for one in tmp_path.rglob("*")] == ["base", "first"]
    save_model(tmp_path / "base", Model("second"), Model("tokenizer"))
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["base", "second", "tokenizer"]


def test_stage_is_done_only_while_its_output_is_whole(tmp_path: Path) -> None:
    store = StageStore(tmp_path)
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge" / "a.bin").write_bytes(b"abc")
    assert not store.done("merge", "h1")
    store.mark_done("merge", "h1", [tmp_path / "merge"], {"loss": 1.5})
    assert store.done("merge", "h1")
    assert store.facts("merge") == {"loss": 1.5}
    assert not store.done("merge", "h2")
    first = store.outputs_hash("merge")
    (tmp_path / "merge" / "a.bin").write_bytes(b"abd")
    assert not store.done("merge", "h1")
    (tmp_path / "merge" / "a.bin").unlink()
    assert not store.done("merge", "h1")
    (tmp_path / "merge" / "a.bin").write_bytes(b"abc")
    assert store.done("merge", "h1")
    store.mark_done("merge", "h1", [tmp_path / "merge"], {"loss": 1.5})
    assert store.outputs_hash("merge") == first


def test_missing_output_cannot_be_marked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must have written it"):
        StageStore(tmp_path).mark_done("merge", "h", [tmp_path / "merge"])


def test_run_folder_refuses_another_configuration(tmp_path: Path) -> None:
    store = StageStore(tmp_path)
    store.claim("[run]\n", "a" * 64)
    store.claim("[run]\n", "a" * 64)
    with pytest.raises(ValueError, match=r"belongs to configuration aaaa.*run\.output"):
        store.claim("[run]\n", "b" * 64)


def train(steps: int, checkpoint: StepCheckpoint, stop_at: int | None = None) -> list[Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Dropout(0.5), nn.Linear(5, 3))
    matrices = [model[0].weight, model[2].weight]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02),
        torch.optim.AdamW([model[2].bias], lr=0.01, betas=(0.8, 0.9)),
    ]
    source = torch.Generator().manual_seed(5)
    first = checkpoint.restore({"model": model}, optimizers, {"source": source})
    for step in range(first, steps):
        if step == stop_at:
            return []
        model(torch.randn(4, 6, generator=source)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if checkpoint.due(step + 1):
            facts = {"best": step}
            checkpoint.save(step + 1, {"model": model}, optimizers, {"source": source}, facts)
    return [parameter.detach() for parameter in model.parameters()]


def test_resumed_training_is_bit_equal(tmp_path: Path) -> None:
    whole = train(9, StepCheckpoint(tmp_path / "never", 0))
    checkpoint = StepCheckpoint(tmp_path / "step.safetensors", 3)
    train(9, checkpoint, stop_at=5)
    assert checkpoint.facts() == {"best": 2}
    resumed = train(9, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


def test_forgotten_random_state_would_show(tmp_path: Path) -> None:
    """Negative control: without the generator's state the resumed run must differ."""
    whole = train(9, StepCheckpoint(tmp_path / "never", 0))
    checkpoint = StepCheckpoint(tmp_path / "step.safetensors", 3)
    train(9, checkpoint, stop_at=5)
    tensors, facts = load_state(checkpoint.path)
    tensors["rng.source"] = torch.Generator().manual_seed(6).get_state()
    save_state(checkpoint.path, tensors, facts)
    assert not torch.equal(whole[0], train(9, checkpoint)[0])
