"""Uploads that are no whole models: low-rank updates, and what models say of public text."""

import json
import subprocess
from collections.abc import Callable

import pytest

from deepfusion.ledger import Ledger

from .federation import ROOT, Federation, command, serve
from .test_quick import bytes_of

pytestmark = pytest.mark.network
KINDS = {
    "adapter": ("devices.adapter_rank=2",),
    "logprobs": (
        "upload.kind='logprobs'",
        "upload.top_k=4",
        "upload.public_sequences=8",
        "distill.feature_loss='none'",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_they_make_the_mixture_that_one_process_makes(
    federation: Callable[..., Federation], kind: str
) -> None:
    fed = federation(*KINDS[kind])
    server = serve(fed, "serve.out")
    for device in range(2):
        fed.join(device)
    assert server.wait(400) == 0, (fed.folder / "serve.out").read_text()
    alone = federation(*KINDS[kind])
    ran = subprocess.run(
        command("run", alone.server, *alone.more), cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    for device in ("device-00", "device-01"):
        found = bytes_of(fed.server / "uploads" / device)
        assert found == bytes_of(alone.server / "uploads" / device)
        assert json.loads(found["manifest.json"])["content"]["kind"] == kind
    mixture = "global_moe/model.safetensors"
    assert (fed.server / mixture).read_bytes() == (alone.server / mixture).read_bytes()
    kinds = {row.kind for row in Ledger(fed.server / "ledger").transfers}
    assert kind in kinds
    assert "model" not in kinds
    assert "| device-01 | done | - |" in (fed.server / "report.md").read_text()
