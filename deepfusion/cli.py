"""The command line: one verb, one function; a file, `--set section.key=value`, `--quiet`, no more.

0 done   1 a stage failed   2 configuration or usage   3 too few good uploads
4 validation refused   5 transport failed   130 interrupted, state kept
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import files, metrics
from .config import Config, ConfigError, load
from .messages import TooFewUploads, TransportFailed, UploadRefused
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
    """The gate, by hand, for an upload that lies inside a run folder."""
    assert target is not None, "the parser asks for a folder"
    if overrides:
        raise ConfigError("--set", ["validate takes no --set; the run folder holds what it checks"])
    if not target.is_dir():
        raise ConfigError(str(target), ["must be the folder of an upload, is none"])
    folder = target.resolve()
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


def run(target: Path | None, overrides: Sequence[str]) -> int:
    """Devices, clusters, distillation, merge, tuning, evaluation, report; resumes its folder."""
    from . import pipeline

    assert target is not None, "the parser asks for a file"
    config = load(target, overrides)
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


Verb = Callable[[Path | None, Sequence[str]], int]
# verb -> function, what its argument is called, whether it must be given
VERBS: dict[str, tuple[Verb, str, bool]] = {
    "init": (init, "FILE", False),
    "run": (run, "FILE", True),
    "report": (report, "RUN", True),
    "validate": (validate, "FOLDER", True),
}


def parser() -> argparse.ArgumentParser:
    """One sub-command a verb; all take the same two options."""
    top = argparse.ArgumentParser(prog="deepfusion", description=__doc__.splitlines()[0])
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (function, argument, is_required) in VERBS.items():
        one = verbs.add_parser(name, help=(function.__doc__ or "").partition("\n")[0])
        one.add_argument("target", metavar=argument, type=Path, nargs=None if is_required else "?")
        one.add_argument("--set", action="append", default=[], metavar="section.key=value")
        one.add_argument("--quiet", action="store_true", help="no progress")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; an expected fault is one sentence on stderr."""
    given = parser().parse_args(arguments)
    metrics.silence(given.quiet)
    try:
        return VERBS[given.verb][0](given.target, given.set)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, run again to go on", file=sys.stderr)
        return INTERRUPTED
    except FAULTS_WITH_A_SENTENCE as fault:
        print(f"deepfusion {given.verb}: {fault}", file=sys.stderr)
        return next((code for kind, code in EXIT_CODES if isinstance(fault, kind)), FAILED)


if __name__ == "__main__":
    sys.exit(main())
