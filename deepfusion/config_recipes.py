"""Presets of the recipes: keys that one sets where the file does not."""

from __future__ import annotations

from typing import Any

# Keys that a recipe sets where the file does not (method.md, 13); "recommended" is the defaults.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "distill": {
            "alpha": 1.0,
            "sampling": "uniform",
            "vaa_warmup_steps": 0,
            "target_norm": False,
            "student_norm": False,
        },
        "merge": {"router_init": "normal"},
        "tune": {"teacher_weight": 0.0, "balance_text": False},
    },
    "recommended": {},
    "direct": {
        "distill": {"nearness": "fit"},
        "tune": {
            "steps": 300,
            "lr": 0.02,
            "train": "all",
            "router_supervision": 0.1,
            "teacher_threshold": 0.0,
        },
    },
}
