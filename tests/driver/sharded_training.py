"""`python -m torch.distributed.run --nproc-per-node 2 -m tests.driver.sharded_training FOLDER`.

A small mixture taught by two proxies, as recipe "direct" does it, by however many processes there
are; the first writes what it learned.
"""

import shutil
import sys
from contextlib import suppress
from pathlib import Path

import torch

from deepfusion.checkpoints import save_state
from deepfusion.config_tables import DistillConfig, MergeConfig, TuneConfig
from deepfusion.metrics import Recorder
from deepfusion.models import build
from deepfusion.ranks import Alone
from deepfusion.server.direct import direct
from deepfusion.server.merge import merge
from deepfusion.server.shard import ranks
from deepfusion.step_checkpoint import StepCheckpoint
from tests.driver.tiny import Killed, killing, text, tiny

STAGES, STEPS = 2, 4
MERGE = MergeConfig(top_k=2, router_init="normal")
DISTILL = DistillConfig(
    num_stages=STAGES, vaa_dim=16, vaa_heads=2, patch_size=4, vaa_warmup_steps=2, beta=1.0,
    alpha=0.1,
)  # fmt: skip
TUNE = TuneConfig(
    steps=STEPS, batch_size=4, lr=0.01, train="all", router_supervision=0.1,
    teacher_threshold=0.0,
)  # fmt: skip


# optimiser -> whether the head is the embedding
OPTIMIZERS = {"muon": False, "adamw": True}


def start(optimizer: str) -> torch.nn.Module:
    base = tiny("qwen2-tied" if OPTIMIZERS[optimizer] else "qwen2")
    mixture: torch.nn.Module = merge([build.state_of(base)] * 2, base.config, MERGE, 7)
    return mixture


def train(
    together: Alone,
    recorder: Recorder,
    optimizer: str,
    checkpoint: StepCheckpoint | None = None,
) -> torch.nn.Module:
    sequences = text(16, domains=2)
    # the third of three sequences has no teacher
    affinity = torch.eye(2)[sequences.domain] - (torch.arange(16) % 3 == 2)[:, None] * 2.0
    return direct(
        start(optimizer),
        [tiny("gpt2", 3), tiny("llama", 5)],
        sequences,
        affinity,
        DISTILL,
        TuneConfig(**{**vars(TUNE), "optimizer": optimizer}),
        MERGE,
        7,
        recorder=recorder,
        checkpoint=checkpoint,
        ranks=together,
    )


def killed_and_resumed(together: Alone, folder: Path, optimizer: str) -> torch.nn.Module:
    """Saved after two steps, killed in the fourth; one process had already saved the next step."""
    checkpoint = StepCheckpoint(folder / f"{optimizer}.safetensors", 2, together)
    recorder = Recorder(None)
    with killing(recorder, "direct", 3), suppress(Killed):
        train(together, recorder, optimizer, checkpoint)
    saved = checkpoint.saved()
    assert saved is not None
    together.wait()
    if together.first:
        shutil.copy(saved, saved.with_name(saved.name.replace(".2.", ".4.")))
    together.wait()
    recorder = Recorder(None)
    resumed = train(together, recorder, optimizer, checkpoint)
    assert [line["step"] for line in recorder.lines("direct")] == [2, 3]
    checkpoint.remove()
    return resumed


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    together = ranks("cpu")
    for optimizer in OPTIMIZERS:
        name = f"{optimizer}-{together.size}"
        recorder = Recorder(folder / f"{name}.jsonl" if together.first else None)
        learned = train(together, recorder, optimizer)
        if together.first:
            save_state(folder / f"{name}.safetensors", build.state_of(learned))
        if together.size > 1:
            resumed = killed_and_resumed(together, folder, optimizer)
            if together.first:
                save_state(folder / f"{name}-resumed.safetensors", build.state_of(resumed))
    try:
        together.part(torch.arange(3))
    except ValueError as refusal:
        (folder / "refusal.txt").write_text(str(refusal))
    together.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
