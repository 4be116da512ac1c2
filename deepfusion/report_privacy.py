"""The report's part on privacy: what the devices say they spent, and what planted secrets tell.

devices.json    epsilon and delta of every upload's manifest, as the device says
canaries.json   exposure of every planted secret in each model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Table = list[list[str]]

NOTHING_RAW = "No raw text left a device. "
CLEAR = (
    "there is no secure aggregation: what a device sends, and its embedding, travelled in clear, "
    "and memorised text can be extracted from fine-tuned weights"
)


def privacy_text(devices: Sequence[Mapping[str, Any]]) -> str:
    """Epsilon and delta of the whole run, or the words 'no differential privacy'."""
    told = {one["device"]: one["privacy"] for one in devices if one.get("privacy")}
    if not told:
        return f"{NOTHING_RAW}There is no differential privacy, and {CLEAR}."
    worst = max(told, key=lambda device: float(told[device]["epsilon"]))
    spent = told[worst]
    text = (
        f"{NOTHING_RAW}DP-SGD on {len(told)} of {len(devices)} devices: epsilon at most "
        f"{spent['epsilon']:.3g} at delta {spent['delta']:g} ({worst}: noise {spent['noise']:g}, "
        f"clip {spent['clip']:g}, rate {spent['rate']:.3g}, {spent['steps']:.0f} steps; RDP "
        "accountant), as the devices say. It hides one sequence of tokens each; a longer "
        "document is several. It covers what was trained, not the embedding, the count of tokens, "
        "or the recorded losses."
    )
    if len(told) < len(devices):
        text += " On the other devices there is no differential privacy."
    return f"{text} And {CLEAR}."


def exposure_table(facts: Mapping[str, Any]) -> tuple[str, Table]:
    """A sentence and a row a model: mean and largest exposure of the planted secrets, in bits."""
    table = [["model", "secrets", "mean exposure", "largest", "found first"]]
    for name, values in facts["exposure"].items():
        first = sum(value >= facts["most"] for value in values)
        mean = sum(values) / len(values)
        table.append(
            [name, str(len(values)), f"{mean:.2f}", f"{max(values):.2f}", f"{first}/{len(values)}"]
        )
    text = (
        f"{facts['planted']} made secrets were planted, {facts['copies']} times each, in one "
        "device's text. Exposure (Carlini et al., arXiv 1802.08232): log2 of the number of "
        "candidates over the secret's rank among them by likelihood; at most "
        f"{facts['most']:.2f} bits here, 1.4 on average for a model that never saw it (the base)."
    )
    return text, table
