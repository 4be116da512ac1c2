"""A device trains and packs a large model without a second copy of it in memory.

The model has 64 M parameters, 256 MiB; what is measured is the process's own peak.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BODY = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from deepfusion import metrics
from deepfusion.config import Config
from deepfusion.data.corpora import train_tokenizer
from deepfusion.data.documents import Document
from deepfusion.data.encoding import make_encoder
from deepfusion.device import train
from deepfusion.metrics import Recorder
from deepfusion.models import build
from deepfusion.wire.package import write_package

folder, width, layers, codec = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
file = folder / "config.json"
shape = {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": 8}
file.write_text(json.dumps(shape | {"vocab_size": 512, "n_positions": 32, "bos_token_id": 0}))
metrics.silence(True)
config = Config()
schedule = replace(config.devices, steps=2, batch_size=1, optimizer="adamw", checkpoint_steps=0)
config = replace(config, devices=schedule, data=replace(config.data, context_length=16))
tokenizer = train_tokenizer(["some text of one device"] * 50, 300)
start = build.state_of(build.build(str(file), 300, torch.Generator().manual_seed(0), 16, 0))
documents = [Document("some text of one device " * 9, "s", "d", "t")]
metrics._forget_peak()
trained = train.train_device(
    str(file), start, documents, tokenizer, config, "device-00",
    make_encoder(config.embedding, None), Recorder(None),
)
training = metrics.peak_resident_mib()
metrics._forget_peak()
before = metrics.peak_resident_mib()
write_package(trained, folder / "up", codec, 16 << 20)
packing = metrics.peak_resident_mib()
model = sum(one.numel() for one in trained.state.values()) * 4 / 2**20
print(json.dumps({"model": model, "training": training, "before": before, "packing": packing}))
"""


def measured(folder: Path, width: int, layers: int, codec: str) -> dict[str, float]:
    command = [sys.executable, "-c", BODY, str(folder), str(width), str(layers), codec]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks are reset through /proc"
)
def test_packing_needs_less_than_training(tmp_path: Path) -> None:
    found = measured(tmp_path, 1024, 5, "delta-int8")
    assert found["model"] > 240
    assert found["packing"] < 1.3 * found["training"]
    # a shard of 16 MiB, one tensor's code, stretches of it: no copy of the model
    assert found["packing"] - found["before"] < 0.4 * found["model"]
