"""The command line: one verb, one function; a file, `--set section.key=value`, `--quiet`, no more.

0 done   1 a stage failed   2 configuration or usage   3 too few good uploads
4 validation refused   5 transport failed   130 interrupted, state kept
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import files, metrics
from .config import Config, ConfigError, load
from .messages import TooFewUploads, TransportFailed, UploadRefused
from .wire.audit import examine
from .wire.expected import load_expected
from .wire.gate import inspect

DONE, FAILED, USAGE, TOO_FEW, REFUSED, TRANSPORT, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, USAGE),
    (UploadRefused, REFUSED),
    (TooFewUploads, TOO_FEW),
    (TransportFailed, TRANSPORT),
)
# These carry a sentence for the user; any other is a fault of ours and keeps its traceback.
FAULTS_WITH_A_SENTENCE = (
    ValueError,
    OSError,
    ImportError,
    NotImplementedError,
    TooFewUploads,
    TransportFailed,
)


def init(target: Path | None, overrides: Sequence[str]) -> int:
    """Write a commented TOML with every key and its default; without a file, to the screen."""
    if overrides:
        raise ConfigError("--set", ["init takes no --set; edit the file it writes"])
    text = Config().to_toml(template=True)
    if target is None:
        print(text, end="")
    elif target.exists():
        raise ConfigError(str(target), ["already exists; init never overwrites a file"])
    else:
        files.write_text(target, text)
        print(f"{target}: every key with its default; next: deepfusion run {target}")
    return DONE


def validate(target: Path | None, overrides: Sequence[str]) -> int:
    """The gate, by hand, for an upload inside a run folder; the audit chain, for a run folder."""
    assert target is not None, "the parser asks for a folder"
    if overrides:
        raise ConfigError("--set", ["validate takes no --set; the run folder holds what it checks"])
    if not target.is_dir():
        raise ConfigError(str(target), ["must be the folder of an upload or of a run, is none"])
    folder = target.resolve()
    if (folder / "audit.jsonl").is_file():
        return _validate_audit(folder)
    homes = [parent / "expected" for parent in folder.parents]
    home = next((one for one in homes if (one / "expected.json").exists()), None)
    if home is None:
        raise ConfigError(
            str(target),
            ["must lie inside a run folder with expected/, which says what is allowed"],
        )
    update = inspect(folder, load_expected(home), folder.name)
    shards = len(update.manifest.shards)
    print(
        f"{update.device}: accepted: {update.architecture}, {shards} shards, {update.tokens} tokens"
    )
    return DONE


def _validate_audit(folder: Path) -> int:
    try:
        count, head = examine(folder)
    except ValueError as fault:
        raise UploadRefused(str(fault)) from None
    print(f"{folder / 'audit.jsonl'}: {count} lines follow each other; the last one is {head}")
    return DONE


def run(target: Path | None, overrides: Sequence[str]) -> int:
    """Devices, clusters, distillation, merge, tuning, evaluation, report; resumes its folder."""
    from . import pipeline

    assert target is not None, "the parser asks for a file"
    config = load(target, overrides)
    if config.data.private == "own":
        raise ConfigError(
            str(target), ["data.private must be 'shares' in one process, got 'own'; see serve"]
        )
    page = pipeline.run(config)
    print(f"{page}: the report; {page.parent / 'global_moe'}: the model")
    return DONE


def report(target: Path | None, overrides: Sequence[str]) -> int:
    """Tables and plots of a finished run folder again."""
    from .report import write_report

    assert target is not None, "the parser asks for a folder"
    if overrides:
        raise ConfigError("--set", ["report takes no --set; the run folder holds what it prints"])
    print(write_report(target))
    return DONE


def _needs_flower(verb: str) -> None:
    if importlib.util.find_spec("flwr") is None:
        raise ImportError(
            f"deepfusion {verb} needs flwr >= 1.41, < 1.43: pip install 'deepfusion-moe[flower]'"
        )


def _device_of(config: Config, source: Path, index: int) -> int:
    if not 0 <= index < config.federation.num_devices:
        raise ConfigError(
            str(source),
            [
                "network.device must be the device's number, 0 to federation.num_devices - 1 = "
                f"{config.federation.num_devices - 1}, got {index}"
            ],
        )
    return index


def serve(target: Path | None, overrides: Sequence[str]) -> int:
    """The server: waits for devices on other machines, collects, then goes on as `run` does."""
    _needs_flower("serve")
    from . import pipeline
    from .flower.gather import gather
    from .flower.launch import only_one

    assert target is not None, "the parser asks for a file"
    config = load(target, overrides)
    with only_one(Path(config.run.output)):
        page = pipeline.run(config, gather)
    print(f"{page}: the report; {page.parent / 'global_moe'}: the model")
    return DONE


def join(target: Path | None, overrides: Sequence[str]) -> int:
    """One device: joins a server, trains when asked, sends its upload; Ctrl-C leaves."""
    _needs_flower("join")
    from .flower import launch

    assert target is not None, "the parser asks for a file"
    config = load(target, overrides)
    _device_of(config, target, config.network.device)
    launch.join(config)
    return DONE


def keys(
    target: Path | None, overrides: Sequence[str], hosts: Sequence[str] = (), devices: int = 8
) -> int:
    """A private authority, the server's certificate, one key a device; existing keys stay."""
    _needs_flower("keys")
    from .flower.keys import make_keys

    assert target is not None, "the parser asks for a folder"
    if overrides:
        raise ConfigError("--set", ["keys takes no --set"])
    made = make_keys(target, hosts, devices)
    print(f"{target}: {len(made)} new files; copy {target}/server to the server and each")
    print(f"{target}/device-NN to one device; ca.key stays here: it can admit other servers")
    return DONE


def device(target: Path | None, overrides: Sequence[str], id: int = -1) -> int:
    """Train and package one device, send nothing."""
    from . import pipeline

    assert target is not None, "the parser asks for a file"
    config = load(target, overrides)
    folder = pipeline.one_device(config, _device_of(config, target, id))
    print(f"{folder}: the package; copied into uploads/ of the server's run folder, it is what")
    print(f"`deepfusion distill {target}` reads")
    return DONE


def distill(target: Path | None, overrides: Sequence[str]) -> int:
    """The server's stages on packages that lie in uploads/ of the run folder already."""
    from . import pipeline
    from .uploads import lying_there

    assert target is not None, "the parser asks for a file"
    page = pipeline.run(load(target, overrides), lying_there)
    print(f"{page}: the report; {page.parent / 'global_moe'}: the model")
    return DONE


Verb = Callable[..., int]
# verb -> function, what its argument is called, whether it must be given
VERBS: dict[str, tuple[Verb, str, bool]] = {
    "init": (init, "FILE", False),
    "run": (run, "FILE", True),
    "report": (report, "RUN", True),
    "validate": (validate, "FOLDER", True),
    "keys": (keys, "DIR", True),
    "serve": (serve, "FILE", True),
    "join": (join, "FILE", True),
    "device": (device, "FILE", True),
    "distill": (distill, "FILE", True),
}
TARGETS = {
    "FILE": "a configuration, TOML; `deepfusion init FILE` writes one",
    "RUN": "a run folder: run.output of a configuration",
    "FOLDER": "an upload inside a run folder, or a run folder",
    "DIR": "folder of the keys, one folder a machine in it",
}
# what a verb takes beside its file: argument -> how argparse reads it
MORE: dict[str, dict[str, dict[str, Any]]] = {
    "keys": {
        "hosts": {
            "nargs": "*",
            "metavar": "HOST",
            "help": "names of the server, as devices see it",
        },
        "--devices": {"type": int, "default": 8, "help": "keys to make (default: 8)"},
    },
    "device": {
        "--id": {"type": int, "required": True, "metavar": "K", "help": "which one, from 0"}
    },
}
EXAMPLES = {
    "init": "deepfusion init run.toml",
    "run": "deepfusion run run.toml --set federation.num_devices=4",
    "report": "deepfusion report runs/demo",
    "validate": "deepfusion validate runs/demo/uploads/device-03",
    "keys": "deepfusion keys keys fusion.example.org 10.0.0.1 --devices 3",
    "serve": "deepfusion serve run.toml --set network.address=0.0.0.0",
    "join": "deepfusion join run.toml --set network.address=fusion.example.org "
    "--set network.device=0 --set network.keys=keys/device-00",
    "device": "deepfusion device run.toml --id 3",
    "distill": "deepfusion distill run.toml",
}
EPILOG = """a run in one process:    init, run
a run over a network:    keys, serve, and join on every device
packages by other ways:  device on each, distill on the server
exit codes:              0 done, 1 a stage failed, 2 configuration or usage, 3 too few good uploads,
                         4 validation refused, 5 transport failed, 130 interrupted, state kept"""


def parser() -> argparse.ArgumentParser:
    """One sub-command a verb; all take the same two options."""
    top = argparse.ArgumentParser(
        prog="deepfusion",
        description=(__doc__ or "").splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (function, argument, is_required) in VERBS.items():
        words = (function.__doc__ or "").partition("\n")[0]
        epilog = f"example:  {EXAMPLES[name]}"
        one = verbs.add_parser(name, help=words, description=words, epilog=epilog)
        count, what = None if is_required else "?", TARGETS[argument]
        one.add_argument("target", metavar=argument, type=Path, nargs=count, help=what)
        for more, how in MORE.get(name, {}).items():
            one.add_argument(more, **how)
        changes = "put one value over the file's; as often as you like"
        one.add_argument(
            "--set", action="append", default=[], metavar="section.key=value", help=changes
        )
        one.add_argument("--quiet", action="store_true", help="no progress")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; an expected fault is one sentence on stderr."""
    given = parser().parse_args(arguments)
    metrics.silence(given.quiet)
    more = {name.lstrip("-"): getattr(given, name.lstrip("-")) for name in MORE.get(given.verb, {})}
    try:
        return VERBS[given.verb][0](given.target, given.set, **more)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, run again to go on", file=sys.stderr)
        return INTERRUPTED
    except FAULTS_WITH_A_SENTENCE as fault:
        print(f"deepfusion {given.verb}: {fault}", file=sys.stderr)
        return next((code for kind, code in EXIT_CODES if isinstance(fault, kind)), FAILED)


if __name__ == "__main__":
    sys.exit(main())
