"""What a run needs before any device trains: the dense base, and every architecture's start."""

from __future__ import annotations

from pathlib import Path

from .asked import content_of, expectation, save_public
from .checkpoints import load_state, save_model, save_state
from .data.encoding import Encoder, fit_idf, make_encoder
from .data.prepared import Text
from .device.train import common_start
from .library import Library
from .stages import Run
from .training import train_causal_lm
from .uploads import PUBLIC
from .wire.expected import Expected, save_expected


def train_base(here: Run, text: Text, library: Library) -> None:
    """The dense base, trained on public text, or taken as it is."""
    config = here.config

    def work() -> None:
        model = library.fresh(config.base.model, "base")
        train_causal_lm(
            model,
            text.sequences,
            config.base,
            stage="base",
            seed=config.run.seed,
            recorder=here.recorder,
            checkpoint_path=here.folder / "steps" / "base.safetensors",
            kernels=config.run.kernels,
        )
        save_model(here.folder / "base", model, text.tokenizer)

    here.stage("base", [], ["base"], work, reads=["data", "base"])


def common_starts(here: Run, text: Text, library: Library) -> tuple[Encoder, Expected]:
    """Every architecture's common start; what the gate and the embedding need."""
    config = here.config
    bases = {}
    for index, name in enumerate(dict.fromkeys(config.devices.architectures)):
        path = here.folder / "starts" / f"{index}.safetensors"

        def work(name: str = name, path: Path = path) -> None:
            checkpoint = here.folder / "steps" / f"start-{path.name}"
            state = common_start(
                name, text.sequences, text.tokenizer, config, here.recorder, checkpoint
            )
            save_state(path, state, {"architecture": name})

        here.stage(f"start-{index}", [], [f"starts/{path.name}"], work, reads=["data", "devices"])
        bases[name], _ = load_state(path)
    first = here.ranks.first
    if first:
        save_public(here.folder / "starts" / PUBLIC, config, text)
    expected = expectation(config, bases, library.fingerprint, content_of(config, text))
    if first and not (here.folder / "expected").is_dir():
        save_expected(here.folder / "expected", expected)
    idf = None
    if config.embedding.idf == "public":
        idf = fit_idf([one.text for one in text.public])
        if first and not (here.folder / "starts" / "idf.safetensors").exists():
            save_state(here.folder / "starts" / "idf.safetensors", {"idf": idf})
    return make_encoder(config.embedding, idf), expected
