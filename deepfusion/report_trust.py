"""The report's part on trust: how every upload did on public text, and what clusters did about it.

collection.json   how far every device came that was asked over a network
quarantine.json   scores by upload and domain, medians, who is past the bound, who was left out
clusters.json     the average that every cluster really got
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

Table = list[list[str]]


def standings_table(facts: Mapping[str, Mapping[str, Any]]) -> tuple[str, Table]:
    """A sentence and a row a device that the last collection asked: also who was late or absent."""
    table = [["device", "standing", "why", "seconds", "tries again", "up", "down", "wasted"]]
    for device, one in sorted(facts.items()):
        counts = [f"{one[f'bytes_{way}']:,}" for way in ("up", "down", "wasted")]
        times = [f"{one['seconds']:.1f}", str(one["retries"])]
        table.append([device, one["status"], one["reason"] or "-", *times, *counts])
    number = Counter(str(one["status"]) for one in facts.values())
    said = ", ".join(f"{count} {status}" for status, count in sorted(number.items()))
    text = (
        f"How far every device came that the last collection asked: {said}. Whose upload had come "
        "in before was not asked again. Seconds to the last answer; bytes over the network."
    )
    return text, table


def quarantine_table(facts: Mapping[str, Any]) -> tuple[str, Table]:
    """A sentence and a row an upload: perplexity, entropy and agreement in each domain."""
    medians = facts["medians"]
    table = [["device", *(f"{d}: perplexity / entropy / agreement" for d in medians), "verdict"]]
    for device, own in sorted(facts["scores"].items()):
        cells = [
            f"{own[d]['perplexity']:.4g} / {own[d]['entropy']:.2f} / {own[d]['agreement']:.0%}"
            for d in medians
        ]
        table.append([device, *cells, _verdict(facts, device)])
    middle = ", ".join(f"{domain} {value:.2f}" for domain, value in medians.items())
    text = (
        "Every upload on public text, before any of them taught; entropy in nats, agreement: share "
        f"of the others with the same most likely token. Median nats per token: {middle}. Past the "
        f"bound: more than {facts['bound']:g} nats over the median of a domain; such an upload "
        + (
            "does not teach that domain, and is left out if that is so in every domain."
            if facts["action"] == "exclude"
            else "is told here and used all the same (quarantine.action = 'report')."
        )
    )
    if not facts["judged"]:
        text += " There were too few uploads for a median: nobody was judged."
    return text, table


def _verdict(facts: Mapping[str, Any], device: str) -> str:
    if device in facts["out"]:
        return "past everywhere: left out" if facts["action"] == "exclude" else "past everywhere"
    past = facts["past"].get(device, [])
    return f"past in {', '.join(past)}" if past else "within the bound"


def robust_sentence(facts: Mapping[str, Any], asked: str) -> str:
    """Where the average asked for could not be taken; empty if the plain mean was asked for."""
    if asked == "none":
        return ""
    small = [str(one["index"]) for one in facts["clusters"] if one["robust"] != asked]
    said = f" Average inside clusters: {asked}."
    if small:
        said += (
            f" Clusters {', '.join(small)} have one or two members: no rule helps there, theirs "
            "is the plain mean."
        )
    return said
