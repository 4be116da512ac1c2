"""A run folder to `report.md` and a single-file `report.html`: figures from its files alone.

evaluation.json  scores of every model, fact recall, expert load
metrics.jsonl    losses by term, seconds and memory of every stage
ledger.json      bytes and named baselines
audit.jsonl      verdicts of the gate
collection.json  how far every device came, over a network
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files, plots
from .report_privacy import exposure_table, privacy_text
from .report_trust import quarantine_table, robust_sentence, standings_table
from .wire.audit import verify

Table = list[list[str]]
BARS = ("base", "mean model", "dense control", "centralised twin", "moe")
PAGE = "report.html"


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, a table (first row = header), a plot; only the heading must be."""

    title: str
    text: str = ""
    table: Table | None = None
    plot: str = ""


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else {}


def _change(new: float, old: float) -> str:
    return f"{new / old - 1:+.1%}"


def _beside(new: float, old: float) -> str:
    return f"{new:.2f} ({_change(new, old)})"


def verdict(evaluation: Mapping[str, Any]) -> str:
    """The run in one sentence: the MoE's perplexity against the base's, by domain."""
    models = evaluation["models"]
    base, moe = models["base"]["domains"], models["moe"]["domains"]
    parts = [
        f"{domain} {moe[domain]['perplexity']:.1f} against {base[domain]['perplexity']:.1f} "
        f"({_change(moe[domain]['perplexity'], base[domain]['perplexity'])})"
        for domain in moe
    ]
    text = f"Perplexity of the MoE against the base on {evaluation['split']} text: " + "; ".join(
        parts
    )
    recall = {name: one["fact_recall"] for name, one in models.items() if one.get("fact_recall")}
    if "moe" in recall and "base" in recall:
        text += f". Fact recall {recall['moe']['all']:.1%} against {recall['base']['all']:.1%}"
    return text + "."


def _scores(evaluation: Mapping[str, Any]) -> list[Section]:
    models = evaluation["models"]
    domains = list(models["base"]["domains"])
    base = models["base"]["domains"]
    rows = [["model", "kind", "parameters", *(f"{name} (vs base)" for name in domains), "accuracy"]]
    for name, one in models.items():
        by_domain = one["domains"]
        cells = [_beside(by_domain[d]["perplexity"], base[d]["perplexity"]) for d in domains]
        accuracy = " / ".join(f"{by_domain[d]['accuracy']:.1%}" for d in domains)
        rows.append([name, one["kind"], f"{one['parameters'] / 1e6:.2f} M", *cells, accuracy])
    bars = {
        name: {domain: score["perplexity"] for domain, score in one["domains"].items()}
        for name, one in models.items()
        if name in BARS
    }
    text = (
        f"Perplexity by domain on {evaluation['split']} text, {evaluation['tokens']:,} tokens; "
        "token accuracy in the order of the domains. Lower perplexity is better."
    )
    return [Section("Perplexity", text, rows, plots.perplexity_bars(bars))]


def _recall(evaluation: Mapping[str, Any]) -> list[Section]:
    models = {n: m for n, m in evaluation["models"].items() if m.get("fact_recall")}
    if not models:
        return []
    topics = [topic for topic in next(iter(models.values()))["fact_recall"] if topic != "all"]
    rows = [["model", "all topics", *topics]]
    rows += [
        [name, *(f"{one['fact_recall'][topic]:.1%}" for topic in ("all", *topics))]
        for name, one in models.items()
    ]
    devices = [one["fact_recall"]["all"] for one in models.values() if one["kind"] == "device"]
    text = "Share of the facts held by a single device that a model completes exactly, by argmax."
    if devices:
        text += f" Mean of the single devices over all topics: {sum(devices) / len(devices):.1%}."
    if "fact_chance" in evaluation:
        text += (
            f" A guess among the values a fact could have: {evaluation['fact_chance']:.1%}; public"
            " hearsay never states the true one, so that the base is below it."
        )
    return [Section("Fact recall", text, rows)]


def _routing(evaluation: Mapping[str, Any]) -> list[Section]:
    load = evaluation.get("expert_load")
    if not load:
        return []
    entropy = ", ".join(f"{d} {v:.2f}" for d, v in evaluation["router_entropy"].items())
    text = f"Share of routed slots by layer and expert. Router entropy in nats: {entropy}."
    return [Section("Expert load", text, None, plots.expert_load(load))]


def _communication(ledger: Mapping[str, Any]) -> list[Section]:
    if not ledger:
        return []
    totals, baselines = ledger["totals"], ledger["baselines"]
    sent = totals["bytes_wire"]
    rows = [["what", "bytes", "this run / it"], ["this run, measured", f"{sent:,}", "1"]]
    rows += [[name, f"{value:,.0f}", f"{sent / value:.3f}"] for name, value in baselines.items()]
    text = (
        "Bytes really serialised, both directions. The baselines are computed from the same "
        "configuration, not run; each says what it counts."
    )
    return [Section("Communication", text, rows, plots.bytes_bars({"this run": sent, **baselines}))]


def _devices(run_folder: Path, ledger: Mapping[str, Any]) -> list[Section]:
    facts = _json(run_folder / "devices.json")
    if not facts:
        return []
    verdicts = {
        line["device"]: (line["verdict"], line["reason"])
        for line in map(json.loads, files.whole_lines(run_folder / "audit.jsonl"))
    }
    rows = [["device", "architecture", "tokens", "bytes sent", "bytes / parameter", "verdict"]]
    for one in facts:
        name = one["device"]
        sent = one["bytes_wire"]
        status, reason = verdicts.get(name, ("missing", ""))
        said = status if not reason else f"{status}: {reason}"
        per_parameter = f"{sent / one['parameters']:.3f}"
        rows.append(
            [name, one["architecture"], f"{one['tokens']:,}", f"{sent:,}", per_parameter, said]
        )
    head = f"Last line of the audit chain: SHA-256 {verify(run_folder / 'audit.jsonl')}."
    return [Section("Devices", head, rows)]


def _clusters(run_folder: Path) -> list[Section]:
    facts = _json(run_folder / "clusters.json")
    if not facts:
        return []
    rows = [["cluster", "architecture", "members"]]
    rows += [
        [str(c["index"]), c["architecture"], ", ".join(c["members"])] for c in facts["clusters"]
    ]
    said = ", ".join(
        f"{name.replace('_', ' ')} {value:.3f}"
        for name, value in facts.items()
        if isinstance(value, float)
    )
    robust = robust_sentence(facts, str(facts.get("robust", "none")))
    return [Section("Clusters", f"{said}.{robust}" if said else robust.strip(), rows)]


def _told(title: str, facts: Any, told: Callable[[Any], tuple[str, Table]]) -> list[Section]:
    return [Section(title, *told(facts))] if facts else []


def _costs(records: Sequence[Mapping[str, Any]]) -> list[Section]:
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for record in records:
        stage = str(record["stage"])
        if stage.startswith("cost."):
            name = stage.removeprefix("cost.")
            seconds[name] = seconds.get(name, 0.0) + record["seconds"]
            peaks[name] = max(peaks.get(name, 0.0), record["peak_mib"])
    rows = [["stage", "seconds", "peak resident MiB"]]
    rows += [[name, f"{seconds[name]:.1f}", f"{peaks[name]:.0f}"] for name in seconds]
    rows.append(["all", f"{sum(seconds.values()):.1f}", f"{max(peaks.values(), default=0):.0f}"])
    text = "A stage that was interrupted and resumed counts the parts that ended."
    return [Section("Cost of every stage", text, rows)]


def sections(run_folder: Path) -> tuple[str, list[Section]]:
    """The verdict and every section a finished run has material for."""
    evaluation = _json(run_folder / "evaluation.json")
    if evaluation:
        # JSON files are written with sorted keys; the table reads from base to mixture
        models = evaluation["models"]
        evaluation["models"] = {name: models[name] for name in evaluation["order"]}
    else:
        raise FileNotFoundError(
            f"{run_folder}: holds no evaluation.json; finish the run first: deepfusion run FILE"
        )
    ledger = _json(run_folder / "ledger.json")
    records = [json.loads(line) for line in files.whole_lines(run_folder / "metrics.jsonl")]
    curves = Section("Losses", "By term; means of runs of steps.", None, plots.loss_curves(records))
    facts = _json(run_folder / "facts.json")
    checked = Section(
        "What was not checked",
        " ".join(evaluation["not_checked"]),
    )
    privacy = Section("Privacy", privacy_text(_json(run_folder / "devices.json") or []))
    setting = Section("Setting", "", [["key", "value"], *([k, str(v)] for k, v in facts.items())])
    body = [
        *_scores(evaluation),
        *_recall(evaluation),
        *_routing(evaluation),
        curves,
        *_communication(ledger),
        *_devices(run_folder, ledger),
        *_told("Collection", _json(run_folder / "collection.json"), standings_table),
        *_told("Quarantine", _json(run_folder / "quarantine.json"), quarantine_table),
        *_clusters(run_folder),
        *_costs(records),
        privacy,
        *_told("Planted secrets", _json(run_folder / "canaries.json"), exposure_table),
        checked,
        setting,
    ]
    return verdict(evaluation), body


def as_markdown(headline: str, body: Sequence[Section]) -> str:
    """The tables as Markdown; plots are in the HTML alone."""
    lines = ["# DeepFusion report", "", headline]
    for section in body:
        lines += ["", f"## {section.title}"]
        if section.text:
            lines += ["", section.text]
        if section.table:
            header, *rows = section.table
            lines += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
            lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
.verdict { background: #eef5fa; border-left: 4px solid #0072b2; padding: .7rem 1rem; }
table { border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #eee; }
th, td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead { background: #f6f6f6; }
svg { max-width: 100%; height: auto; }
"""


def as_html(headline: str, body: Sequence[Section]) -> str:
    """One file without outside references; everything a run wrote is escaped."""
    parts = [f"<h1>DeepFusion report</h1><p class=verdict>{html.escape(headline)}</p>"]
    for section in body:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.text:
            parts.append(f"<p>{html.escape(section.text)}</p>")
        parts.append(section.plot)
        if section.table:
            header, *rows = section.table
            head = "".join(f"<th>{html.escape(cell)}" for cell in header)
            lines = "".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows
            )
            parts.append(f"<table><thead><tr>{head}</thead><tbody>{lines}</tbody></table>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'><title>DeepFusion report</title>"
        f"<style>{STYLE}</style><body>" + "\n".join(parts) + "</body></html>\n"
    )


def write_report(run_folder: Path) -> Path:
    """Write report.md and report.html of a finished run; return the HTML's path.

    Raises FileNotFoundError where the run has no evaluation yet.
    """
    headline, body = sections(run_folder)
    files.write_text(run_folder / "report.md", as_markdown(headline, body))
    target = run_folder / PAGE
    files.write_text(target, as_html(headline, body))
    return target
