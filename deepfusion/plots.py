"""The report's plots as SVG text: losses by term, perplexity by domain, expert load, bytes sent."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from cycler import cycler

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# a colour-blind-safe qualitative scheme (Okabe and Ito, 2008)
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
SMOOTHED_POINTS = 60
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.prop_cycle": cycler(color=COLOURS),
    "svg.hashsalt": "deepfusion",
}


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    # no date inside: the same run gives the same report
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = stream.getvalue()
    # the metadata name a licence and a format by address: a report without addresses needs neither
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _smooth(values: Sequence[float]) -> list[float]:
    """Means of runs of equal length, so that a long curve stays readable."""
    width = max(1, len(values) // SMOOTHED_POINTS)
    return [
        sum(values[i : i + width]) / len(values[i : i + width])
        for i in range(0, len(values), width)
    ]


def _curve(axes: Axes, steps: Sequence[float], values: Sequence[float], label: str) -> None:
    axes.plot(_smooth(steps), _smooth(values), label=label, linewidth=1.3)


def loss_curves(records: Sequence[Mapping[str, Any]]) -> str:
    """One panel a loss term, one line a stage."""
    terms: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        stage = str(record["stage"])
        if stage.startswith("cost."):
            continue
        for term, value in record.items():
            if term not in ("stage", "step", "lr"):
                terms[term][stage].append((record["step"], value))
    if not terms:
        return ""
    with plt.rc_context(STYLE):
        columns = min(3, len(terms))
        rows = -(-len(terms) // columns)
        figure, panels = plt.subplots(
            rows, columns, figsize=(4.2 * columns, 3.0 * rows), squeeze=False
        )
        for panel in panels.flat[len(terms) :]:
            panel.set_visible(False)
        for panel, (term, stages) in zip(panels.flat, sorted(terms.items()), strict=False):
            for stage, points in stages.items():
                _curve(panel, [step for step, _ in points], [value for _, value in points], stage)
            panel.set_title(term.replace("_", " "))
            panel.set_xlabel("step")
            if len(stages) <= 8:
                panel.legend(fontsize=6, frameon=False)
            else:
                panel.legend(fontsize=5, frameon=False, ncol=2)
        figure.tight_layout()
        return _svg(figure)


def perplexity_bars(scores: Mapping[str, Mapping[str, float]]) -> str:
    """scores[model][domain] = perplexity; one group a domain, one bar a model."""
    domains = list(dict.fromkeys(domain for by_domain in scores.values() for domain in by_domain))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(2.2 + 2.4 * len(domains), 3.2))
        width = 0.82 / max(1, len(scores))
        for index, (model, by_domain) in enumerate(scores.items()):
            places = [place + index * width for place in range(len(domains))]
            heights = [by_domain.get(domain, float("nan")) for domain in domains]
            bars = axes.bar(places, heights, width * 0.92, label=model)
            axes.bar_label(bars, fmt="%.0f", fontsize=6, padding=1)
        axes.set_xticks([place + 0.41 - width / 2 for place in range(len(domains))], domains)
        axes.set_ylabel("perplexity, test text (lower is better)")
        axes.grid(axis="x", visible=False)
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _svg(figure)


def expert_load(load: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """load[domain][layer][expert] = share of the routed slots; one heat map a domain."""
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, panels = plt.subplots(1, len(load), figsize=(2.9 * len(load), 2.7), squeeze=False)
        largest = max(max(max(row) for row in layers) for layers in load.values())
        for panel, (domain, layers) in zip(panels.flat, load.items(), strict=True):
            image = panel.imshow(layers, vmin=0.0, vmax=largest, cmap="cividis", aspect="auto")
            panel.set_title(domain)
            panel.set_xlabel("expert")
            panel.set_xticks(range(len(layers[0])))
            panel.set_yticks(range(len(layers)))
            for row, values in enumerate(layers):
                for column, value in enumerate(values):
                    colour = "white" if value < 0.6 * largest else "black"
                    panel.text(
                        column,
                        row,
                        f"{value:.0%}",
                        ha="center",
                        va="center",
                        fontsize=6,
                        color=colour,
                    )
        panels[0][0].set_ylabel("layer")
        figure.colorbar(image, ax=panels.ravel().tolist(), shrink=0.8)
        return _svg(figure)


def bytes_bars(rows: Mapping[str, float]) -> str:
    """Megabytes of the run and of every named baseline, on a logarithmic axis."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 0.5 + 0.36 * len(rows)))
        names = list(rows)[::-1]
        values = [rows[name] / 1e6 for name in names]
        colours = [COLOURS[1] if name.startswith("this run") else COLOURS[0] for name in names]
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        axes.set_xscale("log")
        axes.set_xlabel("MB, both directions, all devices")
        axes.grid(axis="y", visible=False)
        return _svg(figure)
