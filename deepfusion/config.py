"""A run's configuration: TOML into frozen dataclasses, everything checked before any work begins.

defaults  <-  presets of the recipe  <-  the file  <-  --set section.key=value
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from .config_recipes import RECIPES
from .config_rules import contradictions
from .config_tables import (
    BaseConfig,
    ClusterConfig,
    ControlsConfig,
    DataConfig,
    DevicesConfig,
    DistillConfig,
    EmbeddingConfig,
    EvaluateConfig,
    FederationConfig,
    MergeConfig,
    NetworkConfig,
    QuarantineConfig,
    RunConfig,
    TuneConfig,
    UploadConfig,
)

TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text in quotes",
    tuple[str, ...]: "a list of texts",
}


class ConfigError(ValueError):
    """Every fault of a configuration at once; `faults` holds one sentence each."""

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        count = "1 error" if len(faults) == 1 else f"{len(faults)} errors"
        super().__init__("\n  ".join([f"configuration {source}: {count}", *faults]))


@dataclass(frozen=True)
class Config:
    """The resolved configuration of a run; attributes are the tables of the TOML."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    upload: UploadConfig = field(default_factory=UploadConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    controls: ControlsConfig = field(default_factory=ControlsConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)

    def to_toml(self, *, template: bool = False) -> str:
        """Every table and key with its value, meaning and options.

        In a template, keys that a recipe sets are commented out, so that the recipe can set them.
        """
        by_recipe = {
            name: {key for presets in RECIPES.values() for key in presets.get(name, {})}
            for name in (TABLES if template else ())
        }
        return "\n".join(
            _table_text(name, getattr(self, name), by_recipe.get(name, set())) for name in TABLES
        )

    def hash(self, *tables: str) -> str:
        """SHA-256 of some tables' values, by default of all; where results go does not count."""
        every = [name for name in TABLES if name not in APART_FROM_THE_RUN]
        values = {name: asdict(getattr(self, name)) for name in tables or every}
        values.get("run", {}).pop("output", None)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


TABLES: dict[str, type] = {
    "run": RunConfig,
    "data": DataConfig,
    "federation": FederationConfig,
    "devices": DevicesConfig,
    "upload": UploadConfig,
    "embedding": EmbeddingConfig,
    "quarantine": QuarantineConfig,
    "cluster": ClusterConfig,
    "base": BaseConfig,
    "distill": DistillConfig,
    "merge": MergeConfig,
    "tune": TuneConfig,
    "evaluate": EvaluateConfig,
    "controls": ControlsConfig,
    "network": NetworkConfig,
}
# a run is the same run wherever its results go and over whatever network it is gathered
APART_FROM_THE_RUN = ("network",)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and `section.key=value` overrides; ConfigError tells every fault."""
    path = Path(path)
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"must be TOML: {error}"]) from None
    return resolve(given, overrides, str(path))


def resolve(
    given: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "given"
) -> Config:
    """Check nested values and overrides and fill in the rest; raises ConfigError."""
    faults: list[str] = []
    asked: dict[str, dict[str, Any]] = {}
    for table, values in given.items():
        if not isinstance(values, Mapping):
            faults.append(f"key {table!r} must stand in a table such as [run]{_near(table)}")
        else:
            asked.setdefault(table, {}).update(values)
    for text in overrides:
        _override(asked, text, faults)
    recipe = asked.get("run", {}).get("recipe", RunConfig.recipe)
    presets = RECIPES.get(recipe, {}) if isinstance(recipe, str) else {}
    checked = {name: dict(presets.get(name, {})) for name in TABLES}
    for table, values in asked.items():
        if table not in TABLES:
            faults.append(f"unknown table [{table}]{_near_table(table)}")
            continue
        for name, value in values.items():
            checked[table] |= _checked(table, name, value, faults)
    if faults:
        raise ConfigError(source, faults)
    config = Config(**{name: kind(**checked[name]) for name, kind in TABLES.items()})
    if faults := list(contradictions(config)):
        raise ConfigError(source, faults)
    return config


def _override(asked: dict[str, dict[str, Any]], text: str, faults: list[str]) -> None:
    """Put one `section.key=value` over the file's values; the value is TOML, or bare text."""
    place, equals, value = text.partition("=")
    table, dot, name = place.strip().partition(".")
    if not equals or not dot:
        faults.append(f"--set must be section.key=value, got {text!r}")
        return
    try:
        asked.setdefault(table, {})[name] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        asked.setdefault(table, {})[name] = value.strip()


def _checked(table: str, name: str, value: object, faults: list[str]) -> dict[str, Any]:
    """{name: value} if the key is known and the value lies within its limits, else a fault."""
    known = {one.name: one for one in fields(TABLES[table])}
    if name not in known:
        faults.append(f"unknown key {table}.{name}{_near(name, table)}")
        return {}
    kind = get_type_hints(TABLES[table])[name]
    if kind is float and type(value) is int:
        value = float(value)
    if kind == tuple[str, ...] and isinstance(value, list):
        value = tuple(value)
    if not _is_a(value, kind):
        faults.append(f"{table}.{name} must be {TYPE_NAMES[kind]}, got {_shown(value)}")
        return {}
    wanted = _limit_broken(value, known[name].metadata)
    if wanted:
        faults.append(f"{table}.{name} must be {wanted}, got {_shown(value)}")
        return {}
    return {name: value}


def _is_a(value: object, kind: Any) -> bool:
    if kind == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(one, str) for one in value)
    # type() and not isinstance(): true is no whole number
    return type(value) is kind


def _limit_broken(value: Any, limits: Mapping[str, Any]) -> str | None:
    """What the value must be, if it is not."""
    if isinstance(value, float) and not math.isfinite(value):
        return "finite"
    if "options" in limits and value not in limits["options"]:
        return "one of " + ", ".join(map(repr, limits["options"]))
    if limits.get("some") and (not value or (isinstance(value, tuple) and "" in value)):
        return "not empty"
    if "least" in limits and value < limits["least"]:
        return f">= {limits['least']}"
    if "most" in limits and value > limits["most"]:
        return f"<= {limits['most']}"
    if "above" in limits and value <= limits["above"]:
        return f"> {limits['above']}"
    if "below" in limits and value >= limits["below"]:
        return f"< {limits['below']}"
    return None


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _near(name: str, table: str | None = None) -> str:
    """'; did you mean ..?' with the nearest known key, first of the same table."""
    own = [one.name for one in fields(TABLES[table])] if table else []
    for close in difflib.get_close_matches(name, own, 1):
        return f"; did you mean {table}.{close}?"
    everywhere = {one.name: owner for owner, kind in TABLES.items() for one in fields(kind)}
    for close in difflib.get_close_matches(name, everywhere, 1):
        return f"; did you mean {everywhere[close]}.{close}?"
    return f"; [{table}] has {', '.join(own)}" if own else ""


def _near_table(table: str) -> str:
    for close in difflib.get_close_matches(table, TABLES, 1):
        return f"; did you mean [{close}]?"
    return f"; there are {', '.join(TABLES)}"


def _table_text(name: str, table: Any, commented: Collection[str] = ()) -> str:
    """`key = value  # meaning (options, bounds)` of every key; `commented` ones behind a #."""
    lines = [f"[{name}]  # {(type(table).__doc__ or '').rstrip('.')}"]
    for one in fields(table):
        assignment = f"{one.name} = {_toml(getattr(table, one.name))}"
        if one.name in commented:
            assignment = f"# {assignment}"
        lines.append(f"{assignment:<36}  # {one.metadata['meaning']}{_limits_text(one.metadata)}")
    return "\n".join(lines) + "\n"


def _limits_text(limits: Mapping[str, Any]) -> str:
    signs = {"least": ">=", "most": "<=", "above": ">", "below": "<"}
    bounds = ", ".join(f"{sign} {limits[kind]}" for kind, sign in signs.items() if kind in limits)
    options = " | ".join(map(_toml, limits.get("options", ())))
    return "".join(f" ({text})" for text in (options, bounds) if text)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # JSON's spelling of texts, numbers, true and false is TOML's as well
    return json.dumps(value, ensure_ascii=False)


def changed_keys(config: Config) -> Iterator[tuple[str, Any]]:
    """Dotted keys whose value is not the default, with the value: what a report prints first."""
    for name, kind in TABLES.items():
        default = kind()
        for one in fields(kind):
            if (value := getattr(getattr(config, name), one.name)) != getattr(default, one.name):
                yield f"{name}.{one.name}", value
